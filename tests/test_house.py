"""Rules of the house that a slip would break silently."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "bench",
    "train/demo",
    "train",
    "train/cot",
    "train/publish",
    "train/page",
    "train/evaluation",
    "train/fit",
    "train/run",
    "train/logs",
    "train/learner",
    "train/cli",
    "rollout",
    "kernels",
    "core/data",
    "core/families",
    "core",
)
"""From the top down: a room imports from itself and from those below it."""
FILES = sorted(file for room in ROOMS for file in (ROOT / room).glob("*.py"))
COMMANDS = ("tapo", "sft", "plan", "make_triplets", "eval_fgvr", "predict", "analyse")
COMMANDS += ("prepare", "make_cot", "doctor", "export", "report")
TRAINER = {f"tercet.train.learner.{name}" for name in ("policy", "ranks", "optim")}
TRAINER |= {"tercet.train.run.checkpoint"}


def module(file: Path) -> str:
    return "tercet." + ".".join(file.relative_to(ROOT).with_suffix("").parts)


MODULES = {module(file): file for file in FILES}


def room_of(file: Path) -> str:
    """core/models.py is the door to the families: it stands with them."""
    if file == ROOT / "core" / "models.py":
        return "core/families"
    return file.parent.relative_to(ROOT).as_posix()


def imports(file: Path) -> set[str]:
    """Modules that a file imports anywhere; `from a import b` counts as a.b where that is one."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


def test_every_room_is_listed():
    folders = {
        file.parent
        for top in ("core", "kernels", "rollout", "train", "bench")
        for file in (ROOT / top).rglob("*.py")
    }
    assert {folder.relative_to(ROOT).as_posix() for folder in folders} == set(ROOMS)
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert all(f'    "{room}",\n' in setup for room in ROOMS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_down_only(file):
    for name in imports(file):
        assert name.partition(".")[0] not in {room.partition("/")[0] for room in ROOMS}, (
            f"{file} imports {name} without tercet."
        )
        if name.startswith("tercet."):
            there = MODULES[name]
            assert ROOMS.index(room_of(there)) >= ROOMS.index(room_of(file)), f"imports {name}"


def test_no_two_files_import_each_other():
    """Nor do three or more in a circle."""
    below = {name: imports(file) & MODULES.keys() for name, file in MODULES.items()}
    while leaves := {name for name, found in below.items() if not found}:
        below = {name: found - leaves for name, found in below.items() if name not in leaves}
    assert not below, f"imports in a circle: {sorted(below)}"


def test_kernels_know_types_and_options_alone_of_core():
    for file in (ROOT / "kernels").glob("*.py"):
        ours = {name for name in imports(file) if name.startswith("tercet.core")}
        assert ours <= {"tercet.core.types", "tercet.core.config"}, file


def test_core_needs_no_kernels_and_no_network():
    for file in FILES:
        if room_of(file).startswith("core"):
            tops = {name.partition(".")[0] for name in imports(file)}
            assert not tops & {"triton", "httpx", "requests", "socket", "urllib"}, file


def test_a_family_is_named_in_its_own_file_only():
    for file in FILES:
        if room_of(file) != "core/families" and not room_of(file).startswith("bench"):
            assert "qwen" not in file.read_text(encoding="utf-8").lower(), file
    assert "qwen" not in (ROOT / "core" / "models.py").read_text(encoding="utf-8").lower()


def test_commands_that_do_not_train_do_not_import_the_trainer():
    reached = defaultdict(set)

    def follow(name: str, start: str) -> None:
        if name in MODULES and name not in reached[start]:
            reached[start].add(name)
            for below in imports(MODULES[name]):
                follow(below, start)

    for command in COMMANDS[2:]:
        follow(f"tercet.train.{command}", command)
        assert not reached[command] & TRAINER, command


def cpu_seconds(code: str) -> tuple[str, float]:
    """What Python code prints in a process of its own, and the CPU seconds that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def seconds_of_torch() -> float:
    return cpu_seconds("import torch, transformers")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait_for_torch(command, seconds_of_torch):
    """Nor for as long as importing it takes on this machine."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('tercet.train.{command}', run_name='__main__')\n"
        "finally:\n"
        "    print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    printed, seconds = cpu_seconds(code)
    assert ("--model.path" in printed or "--out PATH" in printed) and printed.endswith("[]\n")
    assert seconds < seconds_of_torch


def test_no_folder_is_a_regular_package():
    assert not [room for room in ROOMS if (ROOT / room / "__init__.py").exists()]


def test_no_command_hides_another_module():
    """torchrun puts train/ first on sys.path."""
    code = (
        "import importlib.util, sys\n"
        "print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    )
    here = {path.stem for path in (ROOT / "train").iterdir() if path.suffix in ("", ".py")}
    here -= {"__pycache__"}
    assert not here & sys.stdlib_module_names
    found = subprocess.run(
        [sys.executable, "-c", code, *here], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]", "hides an installed module"


def test_bare_folders_are_never_imported():
    """SGLang and transformers import a package called kernels; ours must not stand in for it."""
    code = (
        "import sys, tercet.train.learner.policy, tercet.rollout.local\n"
        "print([m for m in ('core', 'kernels', 'rollout', 'train') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_files_and_functions_stay_small():
    limits = {"train/tapo.py": 350}
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        name = file.relative_to(ROOT).as_posix()
        assert len(text.splitlines()) <= limits.get(name, 400), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1
                lines -= doc.end_lineno - doc.lineno + 1 if doc else 0
                kernel = any("triton" in ast.unparse(d) for d in node.decorator_list)
                assert lines <= (80 if kernel else 40), f"{name}: {node.name} has {lines} lines"


def test_the_layout_names_every_file():
    layout = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    for file in FILES:
        assert f"  {file.name} " in layout, f"{file} is not in docs/layout.md"
