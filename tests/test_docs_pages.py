"""The site, and what its pages claim of the code: messages, fields, options, two agents."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import which

import pytest
from ranks_support import ONE_THREAD, launch, make_workspace

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.tool_config import EvalConfig, ExportConfig
from tercet.train.cli.arguments import options_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ROOMS = ("core", "kernels", "rollout", "train")
GAP = "…"
"""Stands for what differs, in a message of the docs and in what an f-string says."""


def texts_of(tree: ast.AST) -> Iterator[str]:
    """Every string of a module, an f-string with GAP for each of its values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else GAP for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def said() -> str:
    """All that the code can say."""
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return "\n".join(re.sub(f"{GAP}+", GAP, text) for tree in trees for text in texts_of(tree))


def table_rows(text: str) -> list[list[str]]:
    """Cells of the tables' rows, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    heads = {n - 1 for n, row in enumerate(cells) if set(row[0]) <= set("-:")}
    return [row for n, row in enumerate(cells) if n not in heads and n - 1 not in heads]


def test_every_message_of_troubleshooting_is_in_the_code(said):
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [m[1] for row in table_rows(text) if (m := re.fullmatch(r"`([^`]+)`", row[0]))]
    assert len(messages) > 35
    missing = [message for message in messages if message not in said]
    assert not missing


def test_a_message_that_is_not_in_the_code_would_be_noticed(said):
    assert "run.out … is in use by …: two runs cannot write" in said
    assert "run.out … is used by …: two runs cannot write" not in said


def test_rewards_lists_every_field_that_a_reward_function_gets():
    tree = ast.parse((ROOT / "rollout" / "sampler.py").read_text(encoding="utf-8"))
    names = [
        [key.value for key in node.keys if isinstance(key, ast.Constant)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
    ]
    (given,) = [keys for keys in names if "ground_truth" in keys]
    text = (DOCS / "rewards.md").read_text(encoding="utf-8").partition("What a row holds:")[2]
    listed = [row[0].strip("`") for row in table_rows(text)]
    assert listed == given


@pytest.fixture(scope="module")
def pages():
    spec = spec_from_file_location("make_pages", DOCS / "make_pages.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_what_the_script_writes(pages):
    written = (DOCS / "options.md").read_text(encoding="utf-8")
    assert written == pages.options_page(), "run: python docs/make_pages.py"


def test_the_page_of_options_has_every_option_with_its_default():
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    listed = {row[0].strip("`").removeprefix("--"): row[1:] for row in table_rows(text)}
    for kind in (TapoConfig, SftConfig, ExportConfig):
        known = options_of(kind)
        sections = {name.partition(".")[0] for name in known if "." in name}
        assert set(known) - sections <= set(listed)
    assert set(options_of(EvalConfig)) - {"model", "rollout", "chat", "judge"} - set(listed) == {
        name for name in options_of(EvalConfig) if name.startswith("judge.")
    }
    assert listed["parallel.replicas"] == [
        "a whole number of at least 1",
        "`1`",
        "Sharded copies of the model (HSDP), each on an equal share of the ranks.",
    ]
    assert listed["source"][1] == "" and listed["run.keep_best"][1] == "`null`"


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(tmp_path):
    mkdocs = Path(sys.executable).with_name("mkdocs")
    if not mkdocs.exists():
        pytest.skip("mkdocs is not installed")
    command = [mkdocs, "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = sorted((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in made} >= {path.stem for path in DOCS.glob("*.md")}
    loaded = (
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(https?:)?//|<link[^>]*\shref=\"?https?://"
    )
    for page in made:
        html = page.read_text(encoding="utf-8")
        assert not re.search(loaded, html), page.name
    styles = "".join(p.read_text() for p in (tmp_path / "site").rglob("*.css"))
    assert not re.search(r"url\(\s*[\"']?https?://|@import", styles)
    assert (tmp_path / "site" / "figures" / "step.png").exists()
    formulas = (tmp_path / "site" / "algorithm.html").read_text(encoding="utf-8")
    assert formulas.count("<math") > 30 and "$" not in re.sub(
        r"<code.*?</code>", "", formulas, flags=re.S
    )
    assert not list((tmp_path / "site").glob("*.py"))


def test_the_dockerfile_has_every_room_and_the_tested_server():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert all(f"\nCOPY {room} {room}\n" in text for room in (*ROOMS, "bench"))
    pinned = (ROOT / "tests" / "sglang_cpu" / "requirements.txt").read_text(encoding="utf-8")
    assert f"sglang=={re.search(r'SGLANG_VERSION=(.*)', text)[1]}\n" in pinned
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all(f"!{name}\n" in ignored for name in copied.split())


@pytest.mark.skipif(not which("hadolint"), reason="hadolint is not installed")
def test_the_dockerfile_is_linted():
    subprocess.run(["hadolint", ROOT / "Dockerfile"], check=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


MEASURED = re.compile("seconds|_per_s|peak_mem")
"""Metrics that differ from run to run."""


@pytest.mark.slow
def test_two_agents_train_as_one_with_as_many_ranks(tmp_path):
    make_workspace(tmp_path)
    more = ["--run.steps=2"]
    one = subprocess.run(launch("one", 2, *more), cwd=tmp_path, env=ONE_THREAD, timeout=600)
    assert one.returncode == 0
    words = launch("two", 1, *more)
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "birds"]
    meeting += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    words[words.index("--standalone") : words.index("--standalone") + 1] = meeting
    agents = [subprocess.Popen(words, cwd=tmp_path, env=ONE_THREAD) for _ in range(2)]
    try:
        assert [agent.wait(600) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    steps = {}
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps[name] = [
            {k: v for k, v in json.loads(line).items() if not MEASURED.search(k)} for line in lines
        ]
    assert len(steps["one"]) == 2 and steps["one"] == steps["two"]


def test_the_slurm_script_is_read_by_bash_and_asks_for_what_it_uses():
    script = DOCS / "tapo.slurm"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    assert "--resume auto" in text and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in text
    assert (ROOT / re.search(r"--config (\S+)", text)[1]).exists()
