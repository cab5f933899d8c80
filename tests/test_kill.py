"""kill -9 at random points of a run: what goes on from its checkpoints ends bit for bit the same.

TERCET_KILLS says how often each run is killed (`make test-kill`: 20 times).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from ranks_support import ONE_THREAD, launch, make_workspace
from safetensors.torch import load_file

from tercet.train.run.checkpoint import find_checkpoint

pytestmark = [
    pytest.mark.kill,
    pytest.mark.filterwarnings("error:checkpoint"),  # none is ever damaged
]

KILLS = int(os.environ.get("TERCET_KILLS", "3"))
STEPS = 6
MARK = "TERCET_KILL_TEST"
"""An environment variable by which all processes of a run are found, also orphaned ones."""
TIMED = ("seconds_", "tokens_per_s", "peak_mem_gib")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("workspace")
    make_workspace(root)
    return root


class Run:
    """A training run under torchrun, as a context: its processes end with it at the latest.

    Args:
        workspace: where it runs; its output goes to <out>.log.
        out: its folder.
        ranks: processes.
        more: options.
    """

    def __init__(self, workspace: Path, out: str, ranks: int, *more: str):
        steps = (f"--run.steps={STEPS}", "--run.save_every=1")
        self._command = launch(out, ranks, *steps, *more)
        self._workspace, self._log = workspace, workspace / f"{out}.log"
        self._mark = uuid.uuid4().hex

    def __enter__(self) -> Run:
        with self._log.open("w") as log:
            self.agent = subprocess.Popen(
                self._command,
                cwd=self._workspace,
                env=ONE_THREAD | {MARK: self._mark},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def ended(self) -> bool:
        """Whether it has ended by itself. An error fails the test."""
        code = self.agent.poll()
        assert code in (None, 0), self._log.read_text()[-3000:]
        return code == 0

    def kill(self) -> None:
        """kill -9 its agent first, then its workers, until none is left."""
        self.agent.kill()
        self.agent.wait()
        deadline = time.monotonic() + 120
        while left := self.processes():
            assert time.monotonic() < deadline, f"processes {left} do not end"
            for process in left:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def processes(self) -> list[int]:
        """Ids of the processes that are there, children of children among them."""
        mark, found = f"{MARK}={self._mark}".encode(), []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # it has ended, or is another user's
                pass
        return found


@dataclass
class Whole:
    """A run that nothing disturbed: its folder, and when, in seconds, what happened."""

    out: Path
    begins: float
    ends: float


@pytest.fixture(scope="module")
def undisturbed(workspace) -> Callable[[int], Whole]:
    """The undisturbed run on a number of ranks, which runs once."""
    return cache(lambda ranks: run_whole(workspace, f"whole{ranks}", ranks))


def run_whole(workspace: Path, out: str, ranks: int) -> Whole:
    started, begins = time.monotonic(), None
    with Run(workspace, out, ranks) as run:
        while not run.ended():
            if begins is None and (workspace / out / "metrics.jsonl").exists():
                begins = time.monotonic() - started
            time.sleep(0.01)
        assert run.processes() == []
    return Whole(workspace / out, begins, time.monotonic() - started)


def wait_for_kill(
    run: Run, out: Path, whole: Whole, rng: random.Random, while_saving: bool
) -> bool:
    """Wait for a random point of the run, or of its next saving; False: it has ended before."""
    saved = find_checkpoint(out, "auto")
    done = int(saved.name.split("_")[1]) if saved else 0
    if while_saving:
        while not list(out.glob("checkpoints/.*.partial")):
            if run.ended():
                return False
            time.sleep(0.001)
        seconds = rng.uniform(0, 0.1)
    else:
        steps = (whole.ends - whole.begins) * (1 - done / STEPS)
        seconds = rng.uniform(0.8 * whole.begins, whole.begins + steps)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if run.ended():
            return False
        time.sleep(min(left, 0.01))
    return not run.ended()


def metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]


def contents(folder: Path) -> dict[str, object]:
    """A checkpoint's files by name: checksums, and of optimiser states, whose order in a file is
    free, each tensor's bytes."""
    found = {}
    for name, file in json.loads((folder / "complete.json").read_text())["files"].items():
        found[name] = file
        if name.startswith("sharded/"):
            states = load_file(folder / name)
            found[name] = {
                key: (v.dtype, v.shape, v.numpy().tobytes()) for key, v in states.items()
            }
    return found


def assert_same(out: Path, whole: Path) -> None:
    ours, theirs = find_checkpoint(out, "auto"), find_checkpoint(whole, "auto")
    assert ours.name == theirs.name == f"step_{STEPS:06d}"
    found, expected = contents(ours), contents(theirs)
    assert {"model.safetensors", "trainer_state.pt"} < found.keys() == expected.keys()
    assert sum(name.startswith("sharded/") for name in found) > 0
    assert [name for name in found if found[name] != expected[name]] == []
    assert metrics(out) == metrics(whole) and len(metrics(out)) == STEPS
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize(
    "ranks, more", [(1, ()), (2, ()), (1, ("--run.async_save=true",))], ids=["1", "2", "async"]
)
def test_killed_runs_go_on_bit_for_bit(workspace, undisturbed, ranks, more):
    """Every second kill comes while a checkpoint is written. A run that ends before it is killed
    is compared, and the next kill comes to a new one."""
    name = f"{ranks}{'async' if more else ''}"
    whole = undisturbed(ranks)
    rng, kills, run_number, ended = random.Random(name), 0, 0, True
    while kills < KILLS or not ended:
        run_number += ended
        out = workspace / f"killed{name}_{run_number}"
        with Run(workspace, out.name, ranks, *more, "--resume=auto") as run:
            if kills < KILLS:
                ended = not wait_for_kill(run, out, whole, rng, kills % 2 == 1)
                kills += not ended
            else:
                while not (ended := run.ended()):
                    time.sleep(0.05)
            if ended:
                assert run.processes() == []
                assert_same(out, whole.out)
