"""README and docs: their links, files, options and tables, and every command that they show.

A command that needs no GPU, server, download or make is run on a tiny policy and noise photos; of
the others the options are parsed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from eval_support import siglip
from PIL import Image
from report_support import make_run
from support import tiny
from test_clip_baseline import make_siglip
from torch.distributed.run import get_args_parser

from tercet.bench import whole_step
from tercet.core.config import SftConfig, TapoConfig
from tercet.core.data.eval_files import DATASETS
from tercet.core.tool_config import EvalConfig, SeedsConfig
from tercet.train import (
    analyse,
    doctor,
    eval_fgvr,
    export,
    make_cot,
    make_triplets,
    plan,
    predict,
    prepare,
    report,
)
from tercet.train.cli.arguments import options_of, overridden
from tercet.train.cli.command_line import parse, read_options
from tercet.train.demo import __main__ as demo

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
HEADINGS = [
    "Status",
    "Two commands",
    "Your own photos",
    "What a step prints",
    "Results",
    "Where each step of the paper is",
    "Code layout",
]
MOST_WORDS = 1500

PLACEHOLDERS = {
    "MODEL": "policy",
    "STAGE1": "policy",
    "CHECKPOINT": "policy",
    "ENCODER": "encoder",
    "CLIP": "clip",
    "ENV/bin/python": sys.executable,
}
"""Words of a command, and what stands for them; the other files that commands name lie in the
folder that they are run in."""
TINY = {
    "tapo": """--data.shots=3 --data.sft_shots=0 --run.steps=1 --run.device=cpu
        --rollout.groups_per_step=2 --rollout.n_anchor=2 --rollout.n_positive=2
        --rollout.max_response_tokens=8 --rollout.max_rounds=1
        --rollout.on_exhausted=keep_last_round""".split(),
    "sft": ["--run.steps=1", "--run.device=cpu", "--optim.samples_per_step=2"],
    "eval_fgvr": ["--max_tokens=8", "--per_class=1", "--device=cpu", "--text_encoder=null"],
    "predict": ["--max_tokens=8", "--device=cpu"],
    "analyse": ["--device=cpu"],
    "make_triplets": ["--data.shots=3", "--data.sft_shots=1"],
    "make_cot": [],
    "plan": [],
    "report": [],
}
"""Options that come before those of a command, to make it quick."""
PARSED_ONLY = {
    "--nproc-per-node 4": "needs four GPUs",
    "--rollout.engine sglang": "needs a server",
    "--chat.url": "needs an endpoint",
    "--judge.url": "needs an endpoint",
    "tercet.train.prepare": "needs the six data sets",
    "tercet.train.doctor": "looks at this machine",
    "tercet.train.export": "needs a checkpoint, or a file of records",
    "lmms_eval": "is another project's",
    "--teacher": "needs a teacher",
    "--serve": "goes on until Ctrl-C",
    "--reviewed": "needs a page that a person corrected",
    "pytest": "these tests themselves",
    "make": "makes an environment",
    "pip": "downloads",
    ".": "is the shell's own",
}
"""Commands, by an option or by their first word, that are not run, and why."""
FOREIGN = {"--dtype", "--enable-memory-saver", "--mem-fraction-static"}
FOREIGN |= {"--model", "--model_args", "--tasks", "--batch_size"}
FOREIGN |= {"--model-path", "--host", "--port", "--image-processor-backend"}
FOREIGN |= {"--enable-lora", "--lora-backend"}
"""Options of SGLang's servers and of lmms-eval."""
COMMANDS = ("make", "pip", "pytest", "python", "torchrun", ".")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def lines_of(text: str) -> list[str]:
    """Commands in a document's shell blocks; lines that end with a backslash are joined."""
    shell = "".join(content for language, content in blocks(text) if language == "sh")
    return [line for line in re.sub(r"\\\n\s*", "", shell).splitlines() if line.strip()]


def inline(text: str) -> list[str]:
    """Inline code of a document."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))


LINES = list(dict.fromkeys(line for text in TEXTS.values() for line in lines_of(text)))
MENTIONED = list(
    dict.fromkeys(
        code
        for text in TEXTS.values()
        for code in inline(text)
        if re.match(rf"(\w+=\S+ )?({'|'.join(COMMANDS[:-1])}) ", code) and code not in LINES
    )
)


def split(line: str) -> list[str]:
    """A command's words, without variables before it and with placeholders replaced."""
    words = shlex.split(line)
    while "=" in words[0]:
        words = words[1:]
    return [PLACEHOLDERS.get(word, word) for word in words]


def our_command(words: list[str]) -> tuple[str, list[str]] | None:
    """(name in train/, its options) of a command of ours."""
    if words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        assert options.training_script.startswith("train/")
        return Path(options.training_script).stem, options.training_script_args
    if words[:2] == ["python", "-m"] and words[2].startswith("tercet.train."):
        return words[2].removeprefix("tercet.train."), words[3:]
    return None


def why_not_run(line: str) -> str | None:
    """The reason in PARSED_ONLY; None for a command that is to be run."""
    for part, reason in PARSED_ONLY.items():
        words = split(line)
        if part in (words[0], *words[1:3]) or part.startswith("--") and part in line:
            return reason
    return None


def check_foreign(words: list[str]) -> None:
    """Fails for make targets, extras, markers, files and modules that are not there."""
    command, rest = words[0], words[1:]
    if command == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            pattern = rf"^{word.split('=')[0]} \?=" if "=" in word else rf"^[^\t#]*\b{word}\b.*:"
            assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {word}"
    elif command == "pip":
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        (extra,) = re.fullmatch(r"install -e \.(?:\[(\w+)\])?", " ".join(rest)).groups()
        assert extra is None or f'"{extra}": [' in setup
    elif command == "pytest":
        markers = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        if "-m" in rest:
            name = rest[rest.index("-m") + 1].split()[-1]
            assert f'"{name}: ' in markers, f"there is no marker {name}"
        pytest_ = Path(sys.executable).with_name("pytest")
        quick = ["--noconftest", "--markers", "-p", "no:cacheprovider"]
        subprocess.run([pytest_, *rest, *quick], cwd=ROOT, check=True, capture_output=True)
    elif command == "python" and rest[0] != "-m":
        assert (ROOT / rest[0]).is_file()
    elif command == "python":
        assert rest[1] == "lmms_eval" or find_spec(rest[1])
    else:
        assert words == [".", ".venv/bin/activate"]


def check_options(name: str, argv: list[str]) -> None:
    """Fails for an option or a value that the command would refuse."""
    if name in ("tapo", "sft"):
        parse({"tapo": TapoConfig, "sft": SftConfig}[name], argv, "")
    elif name == "eval_fgvr":
        read_options(EvalConfig, argv, "")
    elif name == "predict":
        predict.read(argv)
    elif name == "demo":
        read_options(SeedsConfig, argv, "")
    else:
        readers = (doctor, export, make_cot, plan, prepare, report)
        next(r for r in readers if r.__name__.endswith(f".{name}")).read(argv)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """What the commands name: photos, a policy, stage-1 records, triplets, rewards, train/."""
    root = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    for name in ("red_bird", "blue_bird", "grey_bird", "pink_bird"):
        (root / "photos" / "bird" / name).mkdir(parents=True)
        for n in range(5):
            pixels = rng.integers(0, 255, (*rng.integers(60, 90, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / "bird" / name / f"{n}.jpg")
    parts = tiny(hidden_size=64, layers=1, vision_layers=1)
    parts.save(root / "policy")
    messages = [
        {"role": "user", "content": "<image>What bird is this?"},
        {"role": "assistant", "content": "<think>It is red.</think><answer>red bird</answer>"},
    ]
    record = {"messages": messages, "images": ["photos/bird/red_bird/0.jpg"]}
    (root / "stage1.json").write_text(json.dumps([record] * 2))
    write_questions(root)
    siglip(root / "encoder")
    make_siglip(root / "clip")
    python = [code for text in TEXTS.values() for name, code in blocks(text) if name == "python"]
    (root / "my_rewards.py").write_text("\n".join(python))
    (root / "train").symlink_to(ROOT / "train")
    for name in ("first", "second"):
        make_run(root / "runs" / name)
    argv = [*TINY["make_triplets"], "--data.path=photos", "--model.path=policy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for out in ("runs/mine", "triplets"):
            patch.setattr(sys, "argv", ["make_triplets", *argv, f"--out={out}"])
            make_triplets.main()
        patch.setattr(sys, "argv", ["make_cot", "--data=triplets", "--out=direct", "--direct"])
        make_cot.main()
    return root


def write_questions(root: Path) -> None:
    """Question files, and answers to them."""
    answers = []
    for stem in (f"{name}_{end}" for name in DATASETS for end in ("seen", "unseen")):
        asked = {"question": "Which bird?", "options": ["red bird", "blue bird"]}
        # Photo 0 is trained on; blue birds are unseen.
        photo = "red_bird/0.jpg" if stem.endswith("_seen") else "blue_bird/1.jpg"
        asked |= {"image_path": f"far/bird/{photo}", "ground_truth": "red bird"}
        (root / f"{stem}.jsonl").write_text(json.dumps(asked))
        for mode in ("closed", "open") if stem.startswith("bird") else ():
            about = {"file": stem, "line": 1, "mode": mode, "trial": 0, "output": "a bird"}
            answers.append(json.dumps(about) + "\n")
    (root / "answers.jsonl").write_text("".join(answers))
    scored = {"file": "bird_seen", "line": 1, "partition": "seen", "dataset": "bird"}
    scored |= {"image": "0.jpg", "truth": "red bird", "closed": 1.0}
    for name in ("base", "tuned"):
        (root / "eval" / name).mkdir(parents=True)
        (root / "eval" / name / "lines.jsonl").write_text(json.dumps(scored))


def assert_explained(metrics_file: Path) -> None:
    """Every metric of a run is in the table of docs/training.md."""
    for line in metrics_file.read_text().splitlines():
        for name in json.loads(line).keys() - {"step"}:
            assert f"`{name}`" in TEXTS["docs/training.md"], f"{name} is not explained"


@pytest.mark.parametrize("line", LINES)
def test_commands_run_or_parse(line, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    ours = our_command(split(line))
    if ours is None:
        assert why_not_run(line), f"say in PARSED_ONLY why this is not run: {line}"
        return check_foreign(split(line))
    name, argv = ours
    if why_not_run(line):
        return check_options(name, argv)
    first = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    words = [*argv[:first], *overridden(TINY[name], argv[first:])]
    monkeypatch.setattr(sys, "argv", [name, *words])
    importlib.import_module(f"tercet.train.{name}").main()
    assert capsys.readouterr().out.strip()
    if name in ("tapo", "sft"):
        assert_explained(workspace / argv[argv.index("--run.out") + 1] / "metrics.jsonl")


@pytest.mark.parametrize("line", MENTIONED)
def test_commands_in_the_text_parse(line, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    ours = our_command(split(line))
    check_options(*ours) if ours else check_foreign(split(line))


def test_the_first_command_runs_as_it_stands(workspace):
    """As a process of its own; what it prints is explained in README and docs/training.md."""
    line = next(line for line in lines_of(TEXTS["README.md"]) if " torchrun " in line)
    words = split(line)
    place = words.index("train/tapo.py") + 1
    own = overridden(words[place:], ["--run.out=runs/process"])
    words = [*words[:place], *overridden(TINY["tapo"], own)]
    words[0] = str(Path(sys.executable).with_name("torchrun"))
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=workspace, env=one_thread, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert_explained(workspace / "runs" / "process" / "metrics.jsonl")
    (header,) = re.findall(r"^ +(step reward .*)$", done.stdout, re.MULTILINE)
    assert header in TEXTS["README.md"]
    for label in header.split():
        assert all(f"`{label}`" in TEXTS[name] for name in ("README.md", "docs/training.md")), label


def test_the_plan_in_the_docs_is_what_the_command_prints(capsys):
    text = TEXTS["docs/memory.md"]
    (line,) = [line for line in lines_of(text) if "tercet.train.plan" in line]
    shown = next(content for language, content in blocks(text) if language == "text")
    plan.main(split(line)[3:])
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in printed if line] == [line for line in shown.splitlines() if line]


def test_rewards_in_the_docs_are_rewards(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    found: dict = {}
    exec((workspace / "my_rewards.py").read_text(), found)
    assert found["short"]([{"response_length": 4}]) == [{"overall": 0.25}]
    assert callable(found["reasoning"])


def test_commands_stand_in_shell_blocks():
    for name, text in TEXTS.items():
        for language, content in blocks(text):
            assert language in ("sh", "text", "python", "py", "math", ""), f"{name}: {language}"
            found = re.findall(rf"^(?:{'|'.join(COMMANDS[:-1])}) .*", content, re.MULTILINE)
            assert language == "sh" or not found, f"{name}: {found}"
        assert text.count("```") == 2 * len(blocks(text)), f"{name}: a block is not closed"


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """Options of our commands, of torchrun, and of SGLang's servers that the docs name."""

    def helped(show) -> str:
        with redirect_stdout(StringIO()) as text, pytest.raises(SystemExit):
            show()
        return text.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", "--help", "all"])
        commands = (analyse, doctor, eval_fgvr, export, make_cot)
        commands += (make_triplets, plan, predict, prepare, report)
        mains = [command.main for command in commands]
        texts = [helped(show) for show in (*mains, lambda: demo.main(["--help", "all"]))]
        texts.append(helped(lambda: whole_step.main(["--help"])))
    texts += [helped(lambda c=c: parse(c, ["--help=all"], "")) for c in (TapoConfig, SftConfig)]
    torchrun = {name for action in get_args_parser()._actions for name in action.option_strings}
    return {*re.findall(r"--[\w.]+", "\n".join(texts)), *torchrun, *FOREIGN}


def test_torchrun_is_always_given_time_to_stop():
    """Its ranks write a checkpoint after a signal, which may take longer than its 30 s."""
    texts = TEXTS | {"Makefile": (ROOT / "Makefile").read_text(encoding="utf-8")}
    for name, text in texts.items():
        for line in re.findall(r".*\btorchrun --.*", text):
            assert re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 \S*torchrun ", line), name


def test_options_exist(known_options):
    assert {"--loss.kl_coef", "--optim.samples_per_step", "--per_class"} <= known_options
    for name, text in TEXTS.items():
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text):
            assert option in known_options, f"{name}: {option}"


def test_values_of_options_are_allowed():
    """Inline code such as `--optim.states float32`, as train/tapo.py or train/sft.py reads it."""
    found = {code for text in TEXTS.values() for code in inline(text) if code.startswith("--")}
    checked = 0
    for code in sorted(found):
        words = shlex.split(code)
        names = [word for word in words if word.startswith("--")]
        if len(words) > len(names) and all("." in name for name in names):
            known = options_of(TapoConfig)
            of_tapo = all(name.removeprefix("--").partition("=")[0] in known for name in names)
            parse(TapoConfig if of_tapo else SftConfig, words, "")
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_files_exist(name):
    text = TEXTS[name]
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert link.startswith("https://") or ((ROOT / name).parent / link).exists(), link
    rooms = "core|kernels|rollout|train|bench|tests|docs"
    for path in re.findall(rf"(?<![\w./])((?:{rooms})/[\w/.-]*[\w/])", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:constraints|\.ci/|setup|pyproject)[\w.-]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", TEXTS)
def test_tables_have_as_many_cells_in_every_row(name):
    for table in re.findall(r"(?:^\|.*\n)+", TEXTS[name], re.MULTILINE):
        rows = table.splitlines()
        assert all(row.endswith(" |") for row in rows)
        assert re.fullmatch(r"\|( -+:? \|)+", rows[1]), table
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, table


def test_readme_has_its_parts_in_order_and_is_short():
    text = TEXTS["README.md"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    assert text.startswith("# Tercet\n") and "](docs/samples.png)" in text.partition("\n## ")[0]
    assert len(text.split()) <= MOST_WORDS


def test_docs_are_all_reached_from_readme():
    """By its links, and theirs."""
    reached, found = set(), {"README.md"}
    while found:
        reached |= found
        links = {
            os.path.normpath(Path(name).parent / link)
            for name in found
            for link in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", TEXTS[name])
        }
        found = (links & TEXTS.keys()) - reached
    assert not TEXTS.keys() - reached


def test_docs_are_all_in_the_site():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = {f"docs/{name}" for name in re.findall(r": ([\w-]+\.md)$", nav, re.MULTILINE)}
    assert listed == TEXTS.keys() - {"README.md", "CONTRIBUTING.md"} | {"docs/CONTRIBUTING.md"}


def test_every_make_target_says_what_it_does():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*(?:\\\n.*)*)", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in phony.replace("\\", "").split():
        assert re.search(rf"^(\S+ )?{target} .*\w", shown, re.MULTILINE), target
