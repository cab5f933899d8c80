"""How a command begins and ends: its help, its options, its exit code, the line that says why."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import is_dataclass

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.log_config import ReportConfig
from tercet.train.cli.arguments import options_of
from tercet.train.cli.command_line import command, parse, read_options
from tercet.train.cli.help_page import FIRST
from tercet.train.cli.interrupt import Interrupted

pytestmark = pytest.mark.core


class Ended(BaseException):
    """Stands for the end of the process."""


def end_of(monkeypatch, error: BaseException | None, **environment: str) -> int:
    """The exit code of a command whose main raises an exception."""

    def main():
        if error is not None:
            raise error

    def ends(code: int):
        raise Ended(code)

    for name in ("TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train/tapo.py"])
    monkeypatch.setattr(os, "_exit", ends)
    with pytest.raises((SystemExit, Ended)) as ended:
        command(main)
    return ended.value.args[0]


def stopped(signum: int) -> Interrupted:
    error = Interrupted(signum)
    error.saved = "checkpoint after 3 steps: runs/a; --resume auto goes on from it"
    return error


@pytest.mark.parametrize("signum, name", [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_stop_is_one_line_and_no_failure_to_torchrun(monkeypatch, capsys, signum, name):
    assert end_of(monkeypatch, stopped(signum)) == 128 + signum
    line = f"tapo.py: stopped by {name}: checkpoint after 3 steps: runs/a; --resume auto goes on"
    assert capsys.readouterr().err == f"{line} from it\n"
    assert end_of(monkeypatch, stopped(signum), TORCHELASTIC_RUN_ID="none", RANK="0") == 0
    assert capsys.readouterr().err == f"{line} from it\n"
    assert end_of(monkeypatch, stopped(signum), TORCHELASTIC_RUN_ID="none", RANK="1") == 0
    assert capsys.readouterr().err == ""


def test_ctrl_c_before_a_run_begins_is_a_stop_too(monkeypatch, capsys):
    assert end_of(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "tapo.py: stopped by SIGINT\n"
    assert end_of(monkeypatch, KeyboardInterrupt(), TORCHELASTIC_RUN_ID="none") == 0


def test_errors_fail_under_torchrun_too(monkeypatch, capsys):
    for environment in ({}, {"TORCHELASTIC_RUN_ID": "none", "RANK": "1"}):
        assert end_of(monkeypatch, ValueError("no such option"), **environment) == 1
        assert capsys.readouterr().err == "tapo.py: no such option\n"
        assert end_of(monkeypatch, None, **environment) == 0


def test_torchrun_says_last_what_failed(monkeypatch, tmp_path):
    """Read back as torchrun does it; its report ends with the message of the first failure."""
    file = tmp_path / "attempt_0" / "error.json"
    error = ValueError("there is no option 'run.step'")
    assert end_of(monkeypatch, error, TORCHELASTIC_ERROR_FILE=str(file)) == 1
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    report = ChildFailedError("train/tapo.py", {0: failure}).format_msg()
    *_, last, rule = report.strip().splitlines()
    assert last.strip() == "traceback : tapo.py: there is no option 'run.step'"
    assert set(rule) == {"="}

    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr("sys.argv", ["train/tapo.py"])
    with pytest.raises(RuntimeError):
        command(broken)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    report = ChildFailedError("train/tapo.py", {0: failure}).format_msg()
    assert "traceback : tapo.py: RuntimeError: a bug\n" in report


def helped(config_class: type, argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(config_class, argv, "What it does.")
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config_class, most", [(TapoConfig, 22), (SftConfig, 18)])
def test_help_shows_the_options_that_matter_first_and_all_on_demand(config_class, most, capsys):
    brief = helped(config_class, ["--help"], capsys)
    whole = helped(config_class, ["--help", "all"], capsys)
    assert helped(config_class, ["--help=all"], capsys) == whole
    named = [re.findall(r"^  --([\w.]+)", text, re.MULTILINE) for text in (brief, whole)]
    expected = {name for name, hint in options_of(config_class).items() if not is_dataclass(hint)}
    assert set(named[1]) == expected | {"config", "resume"} and len(named[1]) == len(set(named[1]))
    assert set(named[0]) < set(named[1]) and len(named[0]) <= most
    assert {"data.path", "model.path", "run.out", "optim.lr", "resume"} <= set(named[0])
    for text in (brief, whole):
        assert max(map(len, text.splitlines())) <= 100 and "Config(" not in text
    assert f"The options that matter first, {len(named[0])} of {len(named[1])}" in brief


def test_every_option_that_matters_first_exists():
    known = options_of(TapoConfig).keys() | options_of(SftConfig).keys()
    assert set(FIRST) <= known
    assert len([name for name in FIRST if name in options_of(TapoConfig)]) == 20


def test_help_tells_value_default_and_meaning(capsys):
    brief = helped(TapoConfig, ["--help"], capsys)
    assert "  --run.steps N (default: null)\n      Steps of the run; None: as many" in brief
    assert "  --rollout.engine local|sglang (default: local)\n" in brief
    with pytest.raises(SystemExit):
        read_options(ReportConfig, ["-h"], "A page.")
    text = capsys.readouterr().out
    assert (
        "  --runs PATH ... (needed)\n" in text and "  --serve true|false (default: false)" in text
    )


@pytest.mark.parametrize(
    "given, near",
    [
        ("--run.step=3", "run.steps"),
        ("--loss.kl_coeff=0.1", "loss.kl_coef"),
        ("--rollout.group_per_step=8", "rollout.groups_per_step"),
    ],
)
def test_an_option_that_does_not_exist_names_the_nearest(given, near):
    name = given.removeprefix("--").partition("=")[0]
    with pytest.raises(ValueError, match=f"there is no option '{name}'; did you mean {near}\\?$"):
        parse(TapoConfig, [given], "")


def test_an_abbreviation_is_no_option_and_nothing_far_is_named():
    with pytest.raises(ValueError, match="there is no option 'data.pa'"):
        parse(TapoConfig, ["--data.pa=photos"], "")
    with pytest.raises(ValueError, match="there is no option 'zzzz'$"):
        parse(TapoConfig, ["--zzzz=1"], "")


def test_an_option_of_true_or_false_can_stand_alone():
    config, _, _ = parse(TapoConfig, ["--run.verbose", "--run.steps=3"], "")
    assert config.run.verbose is True and config.run.steps == 3
    with pytest.raises(ValueError, match="run.steps needs one value"):
        parse(TapoConfig, ["--run.steps"], "")
