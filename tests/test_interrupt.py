"""A rank whose torchrun is killed stops in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.core

RANK = """
import sys, time
from tercet.train.cli.interrupt import Interrupted, StopSignal
with StopSignal() as stop:
    print("up", flush=True)
    try:
        while True:
            stop.check()
            time.sleep(0.05)
    except Interrupted as error:
        open(sys.argv[1], "w").write(str(error.exit_code))
"""
TORCHRUN = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]])
"""


def test_an_orphaned_rank_stops_as_with_sigterm(tmp_path):
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, "-c", TORCHRUN, RANK, str(tmp_path / "code")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "up\n"
        parent.kill()
    deadline = time.monotonic() + 60
    while not (tmp_path / "code").exists() or not (tmp_path / "code").read_text():
        assert time.monotonic() < deadline, "the rank runs on"
        time.sleep(0.05)
    assert (tmp_path / "code").read_text() == str(128 + signal.SIGTERM)
