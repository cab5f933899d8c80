"""Rules of the house that a slip would break silently."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "core": set(),
    "kernels": {"core"},
    "rollout": {"core"},
    "bench": {"core", "kernels", "rollout", "train"},
    "train": {"core", "kernels", "rollout", "bench"},
}


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield node.module


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_down_only(folder):
    for file in (ROOT / folder).glob("*.py"):
        for name in imports(file):
            top, _, rest = name.partition(".")
            assert top not in ALLOWED, f"{file} imports {name} without tercet."
            if top == "tercet":
                other = rest.split(".")[0]
                assert other == folder or other in ALLOWED[folder], f"{file} imports {name}"


def test_kernels_know_the_types_alone_of_core():
    for file in (ROOT / "kernels").glob("*.py"):
        ours = [name for name in imports(file) if name.startswith("tercet.core")]
        assert set(ours) <= {"tercet.core.types"}, file


def test_no_folder_is_a_regular_package():
    assert not list(ROOT.glob("*/__init__.py"))


def test_no_command_hides_another_module():
    """torchrun puts train/ first on sys.path."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is not None)"
    for file in (ROOT / "train").glob("*.py"):
        assert file.stem not in sys.stdlib_module_names, file
        found = subprocess.run([sys.executable, "-c", code, file.stem], cwd=ROOT / "tests")
        assert found.returncode == 0, f"{file.name} hides an installed module"


def test_bare_folders_are_never_imported():
    """SGLang and transformers import a package called kernels; ours must not stand in for it."""
    code = (
        "import sys, tercet.train.policy, tercet.rollout.local\n"
        "print([m for m in ('core', 'kernels', 'rollout', 'train') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_files_and_functions_stay_small():
    for folder in ALLOWED:
        for file in (ROOT / folder).glob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert len(text.splitlines()) <= 400, file


def test_the_readme_names_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in ALLOWED:
        for file in (ROOT / folder).glob("*.py"):
            assert f"  {file.name} " in readme, f"{folder}/{file.name} is not in README's tree"
