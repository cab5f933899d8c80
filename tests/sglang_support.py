"""What the tests of SGLang servers build: servers on a CPU, engines, requests."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny

from tercet.core.data.vision import PromptEncoder
from tercet.core.types import Request
from tercet.rollout.endpoint import Endpoint
from tercet.rollout.engine import Sampling
from tercet.rollout.launch import SAME_PIXELS
from tercet.rollout.local import LocalEngine
from tercet.rollout.server import Server
from tercet.rollout.sglang import SglangEngine
from tercet.rollout.weights import open_sync

PYTHON = os.environ.get("TERCET_SGLANG_PYTHON", "")
NEEDS_SERVER = [
    pytest.mark.sglang,
    pytest.mark.skipif(not PYTHON, reason="no SGLang server: run make test-sglang"),
]
FLAGS = ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
FLAGS += ["--dtype", "float32", "--max-total-tokens", "8192", "--skip-server-warmup"]
FLAGS += ["--mem-fraction-static", "0.3", *SAME_PIXELS]
GREEDY = Sampling(temperature=0.0, max_tokens=12)
QUESTION = "<|vision_start|><|image_pad|><|vision_end|>What bird is this?"


def make_server(parts, folder: Path, **options) -> Server:
    if not (folder / "config.json").exists():
        parts.save(folder)
    options = {"arguments": FLAGS, "start_timeout_s": 180.0} | options
    return Server(folder, PYTHON, folder.parent / "server", **options)


def make_engine(parts, servers, folder: Path, *, way="disk", timeout_s=60.0, key=None, **options):
    """An engine on our servers, or on addresses of others. Buckets are small, so that there are
    several of them."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if not (folder / "policy").exists():
        parts.save(folder / "policy")
    sync = open_sync(
        way,
        parent=folder,
        config_from=folder / "policy",
        bucket_bytes=100 << 10,
        timeout_s=timeout_s,
    )
    endpoints = [
        Endpoint(s, None, headers, timeout_s)
        if isinstance(s, str)
        else Endpoint(s.url, s, headers, timeout_s)
        for s in servers
    ]
    weights = parts.model.named_parameters
    return SglangEngine(parts, PromptEncoder(parts), endpoints, sync, weights, **options)


def change_weights(parts) -> None:
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    avoid_image_tokens(parts)


@torch.no_grad()
def avoid_image_tokens(parts) -> None:
    """Give image tokens less than 1e-6 of probability: an engine draws responses with one again,
    and ends the run where that is not rare. The first feature of every text token, and so of the
    last hidden states, becomes large; the head's rows of image tokens are far below 0 there."""
    parts.model.get_input_embeddings().weight[:, 0] = 2.0
    parts.model.lm_head.weight[:, 0] = 2.0
    parts.model.lm_head.weight[list(parts.banned_ids), 0] = -10.0


def assert_same_as_local(parts, engine, requests, sampling=None) -> None:
    """Greedy tokens and log-probs of the servers are those of the in-process engine."""
    local = LocalEngine(parts, PromptEncoder(parts))
    local.update_weights(iter(()), engine.weight_version)
    found = collect(engine, requests, sampling or GREEDY)
    want = collect(local, requests, sampling or GREEDY)
    assert len(found) == sum(request.n for request in requests)
    for ours, theirs in zip(found, want, strict=True):
        assert (ours.request_id, ours.index) == (theirs.request_id, theirs.index)
        assert ours.token_ids == theirs.token_ids
        assert ours.finish_reason == theirs.finish_reason
        assert ours.weight_version == engine.weight_version
        got = torch.tensor(ours.rollout_logprobs)
        torch.testing.assert_close(got, torch.tensor(theirs.rollout_logprobs), atol=1e-5, rtol=0)


def make_requests(parts, photos, n=3) -> list[Request]:
    text = "<|im_start|>user\n" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n"
    ids = tuple(parts.tokenizer(text).input_ids)
    return [
        Request(f"g{i // 2}.{role}", f"g{i // 2}", ids, (photo,), n, seed=0, step=0)
        for i, (photo, role) in enumerate(
            zip(photos, ("anchor", "positive", "anchor"), strict=True)
        )
    ]


def collect(engine, requests, sampling=GREEDY):
    async def run():
        return [completion async for completion in engine.generate(requests, sampling)]

    done = asyncio.run(run())
    return sorted(done, key=lambda c: (c.request_id, c.index))


def training_options(folder: Path, steps: int) -> list[str]:
    """Options of train/tapo.py, two sub-categories of noise, all but those of the server."""
    parts = tiny("qwen2_5_vl")
    avoid_image_tokens(parts)
    parts.save(folder / "policy")
    for name in ("red_bird", "blue_bird"):
        (folder / "photos" / "bird" / name).mkdir(parents=True)
        for n in range(3):
            pixels = np.random.default_rng(n).integers(0, 255, (80 + n, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / "bird" / name / f"{n}.png")
    return f"""--data.path={folder / "photos"} --data.seen_fraction=1 --data.shots=3
        --data.sft_shots=0 --model.path={folder / "policy"} --run.out={folder / "run"}
        --run.steps={steps} --run.device=cpu --rollout.groups_per_step=4 --rollout.n_anchor=2
        --rollout.n_positive=2 --rollout.max_prompt_tokens=512 --rollout.max_response_tokens=12
        --rollout.max_rounds=2 --rollout.on_exhausted=keep_last_round --optim.lr=1e-3
        --rollout.engine=sglang""".split()


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes whose working directory is in a folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and Path(os.readlink(process / "cwd")) == folder:
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass  # it has ended, or is not ours
    return found
