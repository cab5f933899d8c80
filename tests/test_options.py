"""Every option of every command, with values that no command can use, and YAML files alike.

Each value is either read as a plain and finite one, or refused in one line that names the option
and the value. The options come from the dataclasses, so that a new one is tried as well.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import is_dataclass, make_dataclass
from functools import cache
from operator import attrgetter

import pytest

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.tool_config import EvalConfig, PlanConfig, SeedsConfig, TripletsConfig
from tercet.train.learner import command_line
from tercet.train.learner.arguments import MOST, options_of, overridden, shown
from tercet.train.learner.command_line import parse, read_options

pytestmark = pytest.mark.core

COMMANDS = (TapoConfig, SftConfig, PlanConfig, EvalConfig, TripletsConfig, SeedsConfig)
NEEDED = {EvalConfig: ["--data=x"], TripletsConfig: ["--out=x"]}
FEW = ["nan", "-1", "0", "100000000000000000000", "", "null"]
"""Tried with every option of every command; these with every type of an option:"""
WORDS = [
    *("nan", "inf", "-inf", ".nan", ".inf", "1e400", "1e-400", "-1", "-0.0", "0", "2.5", "1e3"),
    *("100000000000000000000", "9" * 5000, "٣", "0x10", "1_000", "true", "null", "None", "", " "),
    *("x" * 200_000, "a\nb", "a\rb", "a\0b", "\udcff", "e\u0301", "[", "[1, 2]", "[" * 300),
    *("{a: 1}", "{", "- 1", ":", "'", '"', "&a [*a]", "*a", "!!python/name:os.system", "%", "(*"),
    *("(a{1,99}){1,99}", "~/x", "~nobody-here/x", "/dev/zero", "/", "..", "x/" * 4000, "cuda:99"),
    *("mps", "http://h:99999", "http://h:0", "http://[::1", "ftp://h", "http://u:p@h", "0,,1"),
]
VALUES = [
    *(None, True, 0, -1, 2.5, 10**20, -(10**20), math.inf, math.nan, "", "x", "a\0b", "é"),
    *([], [None], [[]], [1, 2], ["a"], ["http://h:0"], [math.inf], {}, {"a": 1}, [{"a": 1}]),
    *(["x" * 200_000], "x" * 200_000),
]
"""The same in YAML."""


@pytest.fixture(scope="module", autouse=True)
def _one_parser_a_command():
    """Building a parser takes ten times as long as reading a value."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "_parser", cache(command_line._parser))
        yield


def options() -> dict[str, tuple[type, object]]:
    """Every option by name: a command that has it, and its type."""
    return {
        name: (command, hint)
        for command in reversed(COMMANDS)
        for name, hint in options_of(command).items()
        if not is_dataclass(hint)
    }


def assert_plain(value: object) -> None:
    """What every part of the code and every file can hold."""
    if isinstance(value, list):
        for entry in value:
            assert_plain(entry)
    elif isinstance(value, str):
        assert type(value) is str and "\0" not in value and value.encode("utf-8") is not None
    elif value is not None:
        assert type(value) in (bool, int, float) and abs(value) <= MOST


def is_read(read, name: str, value: object) -> bool:
    """Whether a value is read; one that is not is named."""
    try:
        config = read()
    except ValueError as error:
        said = str(error)
        assert said.isprintable() and len(said) < 1000, said
        if name.startswith("loss."):  # LossConfig has numbers, not what was given
            assert re.search(f"{name} must be .*, got ", said), said
        elif "must hold one prompt and one response" in said or value is None:
            assert name in said
        else:
            assert said.startswith(f"{name} must be ") and f", got {shown(value)}" in said, said
        return False
    assert_plain(attrgetter(name)(config))
    return True


def test_every_option_reads_or_names_a_hostile_value():
    found = options()
    assert len(found) > 90 and {"rollout.urls", "optim.samples_per_step", "seeds"} <= found.keys()
    for name, (command, _hint) in found.items():
        for word in FEW:
            argv = overridden(NEEDED.get(command, []), [f"--{name}={word}"])
            is_read(lambda a=argv, c=command: read_options(c, a, ""), name, word)


TYPES = list({str(hint): hint for _, hint in options().values()}.values())


@pytest.mark.parametrize("hint", TYPES, ids=str)
def test_every_type_of_an_option_reads_or_names_a_hostile_value(hint, tmp_path):
    one = make_dataclass("One", [("option", hint)])
    taken = {
        w for w in WORDS if is_read(lambda w=w: parse(one, [f"--option={w}"], "")[0], "option", w)
    }
    assert not taken & {"a\0b", "\udcff", "x" * 200_000}
    file = tmp_path / "options.yaml"
    for value in VALUES:
        text = json.dumps(value, ensure_ascii=False)
        text = text.replace("Infinity", ".inf").replace("NaN", ".nan")
        file.write_text(f"option: {text}", encoding="utf-8")
        is_read(lambda: parse(one, [f"--config={file}"], "")[0], "option", value)
