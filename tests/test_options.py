"""Every option of every command, with values that no command can use, and YAML files alike.

Each value is either read as a plain and finite one, or refused in one line that names the option
and the value. The options come from the dataclasses, so that a new one is tried as well.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import is_dataclass, make_dataclass
from functools import cache
from operator import attrgetter

import pytest

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.tool_config import (
    CotConfig,
    EvalConfig,
    PlanConfig,
    PrepareConfig,
    SeedsConfig,
    TripletsConfig,
)
from tercet.train.cli import command_line
from tercet.train.cli.arguments import MOST, options_of, overridden, shown
from tercet.train.cli.command_line import parse, read_options

pytestmark = pytest.mark.core

COMMANDS = (TapoConfig, SftConfig, PlanConfig, EvalConfig, TripletsConfig, SeedsConfig)
COMMANDS += (PrepareConfig, CotConfig)
NEEDED = {EvalConfig: ["--questions=x"], TripletsConfig: ["--out=x"], PrepareConfig: ["--root=x"]}
NEEDED |= {CotConfig: ["--data=x", "--out=x"]}
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
    if isinstance(value, list | dict):
        for entry in [*value, *value.values()] if isinstance(value, dict) else value:
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
        elif name == "rollout.api_key":  # refused whole, and never repeated
            assert said.startswith(f"{name} is refused") or name in said
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: null", "optim must hold options, NAME: VALUE, got null"),
        ("loss: 3", "loss must hold options, NAME: VALUE, got 3"),
        ("run: []", "run must hold options, NAME: VALUE, got \\[\\]"),
        ("- 1", "must hold sections of options, got \\[1\\]"),
        ("", "must hold sections of options, got null"),
        ("data: {pth: x}", "there is no option 'data.pth'"),
        ("dta: {path: x}", "there is no option 'dta'"),
        ("1: 2", "there is no option 1"),
        ("config: other.yaml", "there is no option 'config'"),
        ("data: {path: a, path: b}", "line 1: 'path' is there twice"),
        ("data: {path: a}\nrun: {steps: 1}\ndata: {path: b}", "line 3: 'data' is there twice"),
        ("data: &d {path: *d}", "line 1: aliases are not allowed"),
        ("data: {path: [&a [x, x], *a]}", "line 1: aliases are not allowed"),
        ("data: {path: " + "[" * 1000, "nested more than 16 deep|exceeded maximum nesting depth"),
        ("run: {steps: " + "9" * 5000 + "}", "limit \\(4300 digits\\)"),
        ("data: {path: 'a", "found unexpected end of stream"),
        ("data: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"data: {path: \xff}", "byte 13 is not UTF-8"),
        (b"\xff\xfed\x00a\x00", "byte 0 is not UTF-8"),
        ("#" * (1 << 20) + "\n", "has at most 1,048,576 bytes"),
    ],
)
def test_a_file_of_options_that_cannot_be_read_is_named(text, said, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said) as raised:
        parse(TapoConfig, [f"--config={file}"], "")
    assert str(file) in str(raised.value) and str(raised.value).isprintable()


def test_only_a_regular_file_holds_options(tmp_path):
    """A FIFO would be waited for, /dev/zero read for ever."""
    os.mkfifo(tmp_path / "fifo")
    for file in (tmp_path / "fifo", tmp_path, tmp_path / "nothing", "/dev/zero", "", "run: {}"):
        with pytest.raises(ValueError, match="config must be a YAML file that exists, got "):
            parse(TapoConfig, ["--config", str(file)], "")


def test_no_option_is_given_twice():
    with pytest.raises(ValueError, match="data.path is given twice: 'a' and 'b'"):
        parse(TapoConfig, ["--data.path", "a", "--run.steps=3", "--data.path=b"], "")
    with pytest.raises(ValueError, match="seeds is given twice: 0 and 1"):
        read_options(SeedsConfig, ["--seeds", "0", "--seeds", "1"], "")
    argv = ["--rollout.urls+=http://a:1", "--rollout.urls+=http://b:2"]
    assert parse(TapoConfig, argv, "")[0].rollout.urls == ["http://a:1", "http://b:2"]
    assert overridden(argv, ["--rollout.urls+=x"]) == ["--rollout.urls+=x"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--data.pat x", "there is no option 'data.pat'"),
        ("x", "there is no option 'x'"),
        ("-x", "there is no option '-x'"),
        ("--", "there is no option '--'"),
        ("--data.path", "data.path needs one value, got none"),
        ("--data.path a b", "data.path needs one value, got 'a' 'b'"),
        ("--optim {lr:3}", "optim has options of its own; give them as --optim.NAME"),
        ("--resume=", "resume must be a path .*, or null, got ''"),
        ("--run.steps+=3", "steps"),
    ],
)
def test_words_that_are_no_options_are_named(argv, said):
    with pytest.raises(ValueError, match=said):
        parse(TapoConfig, argv.split(), "")


@pytest.mark.parametrize("flags", ["--tp 2 --mem-fraction-static 0.5", "--dtype=half --tp 2"])
def test_flags_for_another_program_are_one_value(flags):
    """As the documentation shows them, beside the form with an equals sign."""
    for words in (["--rollout.sglang_args", flags], [f"--rollout.sglang_args={flags}"]):
        config = parse(TapoConfig, [*words, "--run.out", "my runs", "--data.path=my photos"], "")[0]
        assert config.rollout.sglang_args == flags
        assert (config.run.out, config.data.path) == ("my runs", "my photos")
    with pytest.raises(ValueError, match="run.out needs one value, got none"):
        parse(TapoConfig, ["--run.out", "--data.path=my photos"], "")


def test_several_values_make_a_list():
    argv = ["--rollout.urls", "http://a:1", "http://[::1]:2/v1", "--rollout.server_gpus", "2,3"]
    rollout = parse(TapoConfig, argv, "")[0].rollout
    assert rollout.urls == ["http://a:1", "http://[::1]:2/v1"] and rollout.server_gpus == ["2,3"]
    argv = ["--rollout.urls=[http://a:1]", '--rollout.server_gpus=["0,1", ""]']
    rollout = parse(TapoConfig, argv, "")[0].rollout
    assert rollout.urls == ["http://a:1"] and rollout.server_gpus == ["0,1", ""]


def test_files_apply_before_the_command_line_wherever_they_stand(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("run: {steps: 1, save_every: 1, keep_last: 1}")
    second.write_text("run: {steps: 2, save_every: 2}")
    argv = ["--run.steps=3", f"--config={first}", f"--config={second}"]
    run = parse(TapoConfig, argv, "")[0].run
    assert (run.steps, run.save_every, run.keep_last) == (3, 2, 1)


def test_home_folders_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "mine.yaml"
    file.write_text("data: {path: ~/photos, questions: ~/q.yaml}\nrollout: {sglang_python: ~/py}")
    argv = ["--config=~/mine.yaml", "--model.path", "~/model", "--run.out=~/run", "--resume=~/old"]
    config, resume, resolved = parse(TapoConfig, argv, "")
    paths = [config.data.path, config.data.questions, config.rollout.sglang_python]
    paths += [config.model.path, config.run.out, resume]
    names = ["photos", "q.yaml", "py", "model", "run", "old"]
    assert paths == [f"{tmp_path}/{name}" for name in names]
    assert "~" not in resolved and f"out: {tmp_path}/run" in resolved
    tools = read_options(TripletsConfig, ["--out=~/t", "--parquet=~/p", "--data.embedder=~/e"], "")
    assert [tools.out, tools.parquet, tools.data.embedder] == [f"{tmp_path}/{n}" for n in "tpe"]
    argv = ["--questions", "~/q", "~/r", "--out=~/o", "--images=~/i", "--text_encoder=~/t"]
    tools = read_options(EvalConfig, argv, "")
    paths = [*tools.questions, tools.out, *tools.images, tools.text_encoder]
    assert paths == [f"{tmp_path}/{n}" for n in "qroit"]
    assert read_options(SeedsConfig, ["--seeds=3", "--out=~/s"], "").out == f"{tmp_path}/s"


def test_a_command_ends_with_one_line_and_code_1():
    command = [sys.executable, "-m", "tercet.train.eval_fgvr", "--questions=x", "--trials=nan"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = "eval_fgvr.py: trials must be a whole number from 1 to 10,000, got 'nan'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
