"""How a command ends: its exit code and the one line that says why."""

from __future__ import annotations

import os
import signal

import pytest

from tercet.train.learner.command_line import command
from tercet.train.learner.interrupt import Interrupted

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
