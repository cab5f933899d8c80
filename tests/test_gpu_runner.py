"""bench/gpu.py: parts that fail, hang or write, one after another."""

from __future__ import annotations

import csv
import os
import time

import pytest

from tercet.bench import gpu
from tercet.bench.gpu import PARTS, Part, run_parts

WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1], 'rows.csv').write_text('1'); print('done')"
HANGS = (
    "import os, pathlib, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "pathlib.Path(sys.argv[1], 'pids').write_text(f'{os.getpid()} {child.pid}')\n"
    "time.sleep(600)"
)


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, capsys):
    parts = {
        "raises": Part(("-c", "raise RuntimeError('on purpose')"), 60),
        "hangs": Part(("-c", HANGS, "{out}"), 4),
        "writes": Part(("-c", WRITES, "{out}"), 60),
    }
    ends = {name: end for name, (end, _) in run_parts(parts, tmp_path, "cpu", 2).items()}
    assert ends == {"raises": "failed: exit code 1", "hangs": "stopped after 4 s", "writes": "ok"}
    assert (tmp_path / "rows.csv").read_text() == "1"
    log = (tmp_path / "gpu.log").read_text()
    assert "on purpose" in log and log.endswith("done\n")
    assert "on purpose" in capsys.readouterr().out
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether a process exists and is no zombie; waits up to 5 seconds for its end."""
    for _ in range(50):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return False
        except OSError:
            return False
        time.sleep(0.1)
    return True


def test_the_limit_of_the_whole_leaves_parts_out(tmp_path):
    parts = {"first": Part(("-c", "pass"), 60)}
    assert run_parts(parts, tmp_path, "cpu", 0.05)["first"] == ("no time left", 0.0)


def test_the_command_measures_a_card(tmp_path, capfd):
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--parts", "card"]) == 0
    with (tmp_path / "card.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["copy_gb_per_s"]) > 0.1 and float(row["matrix_tflops"]) > 1e-4
    assert row["device"].endswith("cores") and row["memory_gib"] == ""
    assert capfd.readouterr().out.splitlines()[-1].split()[-1] == "ok"


def test_every_part_has_a_limit_and_all_fit_into_what_comes_back():
    files = {
        word for part in PARTS.values() for word in part.arguments if word.startswith("{out}/")
    }
    assert len(files) + 2 <= 8  # with card.csv and gpu.log
    assert all(0 < part.limit_s <= 300 for part in PARTS.values())


@pytest.mark.parametrize("words", [["--parts", "all"], []])
def test_a_wrong_call_is_one_line(words, capsys):
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert os.linesep in capsys.readouterr().err
