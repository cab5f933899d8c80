"""Tiny policies and noise photos shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sglang_support import make_engine, make_server
from support import tiny

from tercet.core.models import FAMILIES
from tercet.core.types import PolicyParts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def threads():
    torch.set_num_threads(1)  # two spin against each other on a busy machine


@pytest.fixture(scope="session", autouse=True)
def cache_of_embeddings(tmp_path_factory):
    """Nothing is found that another test run has embedded, nor left for the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERCET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=FAMILIES)
def parts(request) -> PolicyParts:
    return tiny(request.param)


@pytest.fixture
def photos(tmp_path) -> list[str]:
    """Three noise photos of different sizes."""
    keys = []
    for seed, (width, height) in enumerate([(112, 100), (60, 140), (150, 64)]):
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        keys.append(str(tmp_path / f"{seed}.png"))
        Image.fromarray(pixels).save(keys[-1])
    return keys


@pytest.fixture(scope="session")
def real_photos() -> Path:
    """Folder of real photographs; skips where there is none."""
    folder = Path(os.environ.get("TERCET_PHOTOS", ROOT.parent / "shared" / "fgvr"))
    if not (folder / "manifest.json").exists():
        pytest.skip("no folder of real photos: set TERCET_PHOTOS")
    return folder


@pytest.fixture(scope="session")
def released() -> Path:
    """Folder of the released question files and stage-1 records; skips where there is none."""
    folder = Path(os.environ.get("TERCET_RELEASED", ROOT.parent / "shared" / "released"))
    if not (folder / "eval").is_dir():
        pytest.skip("no released question files: set TERCET_RELEASED")
    return folder


@pytest.fixture(scope="session")
def policy() -> PolicyParts:
    return tiny("qwen2_5_vl")


@pytest.fixture(scope="session")
def server(policy, tmp_path_factory):
    """A real SGLang server on the CPU."""
    server = make_server(policy, tmp_path_factory.mktemp("sglang") / "model")
    server.start()
    yield server
    server.stop()
    assert not server.is_running()


@pytest.fixture
def engine(policy, server, tmp_path):
    return make_engine(policy, [server], tmp_path)
