"""The device of a process: what is there, and one GPU for each process."""

from __future__ import annotations

import pytest
import torch

from tercet.core.config import RunConfig
from tercet.train.learner.device import set_up

pytestmark = pytest.mark.core


@pytest.fixture
def gpus(monkeypatch):
    """Says how many GPUs there are, whatever this machine has; returns those that were set."""
    chosen = []

    def there_are(number: int) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return there_are


@pytest.mark.parametrize(("device", "missing"), [("cuda", 0), ("cuda:0", 0), ("cuda:7", 7)])
def test_a_gpu_that_is_not_there_is_named(device, missing, gpus):
    gpus(0)
    with pytest.raises(ValueError) as raised:
        set_up(RunConfig(device=device))
    said = f"run.device is {device!r}, which needs GPU {missing}; this process sees 0 GPUs"
    assert str(raised.value) == said


def test_each_process_has_a_gpu_of_its_own(gpus, monkeypatch):
    chosen = gpus(2)
    assert set_up(RunConfig(device="cpu")) == torch.device("cpu") and chosen == []
    assert set_up(RunConfig(device="cuda:1")) == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for device in ("auto", "cuda"):
        assert set_up(RunConfig(device=device)) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")] * 3
    with pytest.raises(ValueError, match="auto, cpu or cuda with several processes, got 'cuda:1'"):
        set_up(RunConfig(device="cuda:1"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="needs GPU 2; this process sees 2 GPUs"):
        set_up(RunConfig(device="auto"))
