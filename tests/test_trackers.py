"""Trackers: what they get, what they never get, and what a run does when one fails.

Those of packages that are installed are the real ones, offline; CI installs wandb.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

from tercet.core.config import TapoConfig
from tercet.train.cli.arguments import options_of as types_of
from tercet.train.logs import trackers
from tercet.train.logs.run_log import RunLog
from tercet.train.logs.trackers import Trackers
from tercet.train.run.identity import options_of, shared_options

SECRETS = ("10.0.0.7", "s3cret", "/home/somebody", "/opt/env")


def options() -> dict:
    """Those of a run that names addresses, keys and folders of its machine."""
    config = TapoConfig()
    config.data.path = config.model.path = "/home/somebody/data"
    config.run.out = "/home/somebody/runs/mine"
    config.rollout.urls = ["http://10.0.0.7:30000"]
    config.rollout.judge_url = "http://10.0.0.7:30001/v1"
    config.rollout.sync_host = "10.0.0.7"
    config.rollout.api_key_file = "/home/somebody/s3cret"
    config.rollout.sglang_args = "--api-key s3cret"
    config.rollout.sglang_python = "/opt/env/bin/python"
    config.optim.lr = 2e-6
    return shared_options(options_of(config), types_of(TapoConfig))


@pytest.fixture
def png(tmp_path) -> Path:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "samples.png")
    return tmp_path / "samples.png"


def test_options_that_are_shown_hold_no_address_key_or_folder():
    shown = options()
    assert shown["optim.lr"] == 2e-6 and shown["model.path"] == "data"
    assert shown["rollout.reward"] == "fine_r1" and shown["loss.kl_coef"] == 0.01
    assert not [s for s in SECRETS if s in json.dumps(shown)]
    left_out = set(types_of(TapoConfig)) - set(shown)
    assert {"rollout.urls", "rollout.api_key_file", "rollout.sglang_args"} <= left_out
    assert len(shown) > 80


class Fake:
    """A tracker that remembers, and fails where it is told to."""

    def __init__(self, fails: str = ""):
        self.calls, self.fails = [], fails

    def __getattr__(self, name: str):
        if name not in ("start", "store_init_configuration", "log", "log_images", "finish"):
            raise AttributeError(name)

        def call(*arguments, **options):
            if name == self.fails:
                raise RuntimeError("the network\nis down")
            self.calls.append((name, *arguments, *options.values()))

        return call


def test_every_step_reaches_every_tracker_until_it_fails(tmp_path, png, monkeypatch):
    fakes = {"wandb": Fake(), "mlflow": Fake(fails="log")}
    for name in fakes:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setattr(trackers, "_made", lambda name, *_: fakes[name])
    opened = Trackers(["mlflow", "tensorboard", "wandb"], "birds", tmp_path, {"optim.lr": 1.0})
    console = Console(file=open(tmp_path / "text", "w"), width=200)
    with RunLog(tmp_path / "run", 2, "", ("tensorboard",), opened, console=console) as log:
        log.step(1, {"reward": 0.5})
        log.step(2, {"reward": 0.75})
        log.picture("samples", png)
    console.file.close()
    wandb = [call if call[0] != "log_images" else call[0] for call in fakes["wandb"].calls]
    assert wandb == [
        ("start",),
        ("store_init_configuration", {"optim.lr": 1.0}),
        ("log", {"reward": 0.5}, 1),
        ("log", {"reward": 0.75}, 2),
        "log_images",
        ("finish",),
    ]
    assert [call[0] for call in fakes["mlflow"].calls] == ["start", "store_init_configuration"]
    said = (tmp_path / "text").read_text()
    assert said.count("mlflow gets nothing from here on: the network is down") == 1


def test_a_package_that_is_missing_or_does_not_start_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(ValueError, match="the package swanlab is not installed: `pip install swan"):
        Trackers(["swanlab"], "birds", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    monkeypatch.setattr(trackers, "_made", lambda *_: Fake(fails="start"))
    with pytest.raises(ValueError, match="wandb cannot be started: the network is down .wandb log"):
        Trackers(["wandb"], "birds", tmp_path, {})


def holds(folder: Path, *texts: str | bytes) -> list[bool]:
    """Whether any file below a folder has each text."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    content = b"".join(_records(p) if p.suffix == ".wandb" else p.read_bytes() for p in files)
    return [(t.encode() if isinstance(t, str) else t) in content for t in texts]


def _records(file: Path) -> bytes:
    """What a .wandb file holds: blocks of 32 KiB, which cut records, each part behind 7 bytes."""
    data, place, parts = file.read_bytes(), 7, []
    while place < len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        end = place + 7 + int.from_bytes(data[place + 4 : place + 6], "little")
        parts.append(data[place + 7 : end])
        place = end
    return b"".join(parts)


def record(name: str, out: Path, png: Path) -> None:
    opened = Trackers([name], "birds", out, options())
    assert opened.log(1, {"reward": 0.53125}) == []
    assert opened.picture("samples", png, 1) == []
    assert opened.close() == []


def test_wandb_offline(tmp_path, png, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run_a"
    out.mkdir()
    record("wandb", out, png)
    (run,) = (out / "wandb").glob("offline-run-*")
    assert (run / "files" / "media" / "images").is_dir()
    deadline = time.monotonic() + 30  # its own process writes, at times after the run's end
    while not all(holds(run, "reward", "0.53125", "optim.lr", "birds", "run_a")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not any(holds(run, "10.0.0.7", "s3cret", "/home/somebody/data", "/opt/env"))


def test_mlflow_in_a_folder(tmp_path, png, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    out = tmp_path / "run_a"
    out.mkdir()
    record("mlflow", out, png)
    (metric,) = out.rglob("metrics/reward")
    assert metric.read_text().split()[1:] == ["0.53125", "1"]
    assert next(out.rglob("params/optim.lr")).read_text() == "2e-06"
    assert next(out.rglob("artifacts/samples.png")).read_bytes() == png.read_bytes()
    assert not any(holds(out / "mlruns", "10.0.0.7", "s3cret", "/home/somebody/data"))


def test_swanlab_offline(tmp_path, png, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    out = tmp_path / "run_a"
    out.mkdir()
    record("swanlab", out, png)
    assert all(holds(out / "swanlab", "reward", struct.pack("<d", 0.53125), "optim.lr"))
    assert not any(holds(out / "swanlab", "10.0.0.7", "s3cret", "/home/somebody/data"))
