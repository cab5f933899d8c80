"""The SGLang engine against a real server on a CPU: tokens, log-probs, weights, faults.

Needs TERCET_SGLANG_PYTHON, the Python of the server's environment: `make test-sglang` sets it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny

from tercet.core.config import TapoConfig
from tercet.core.types import Request
from tercet.core.vision import PromptEncoder
from tercet.rollout.endpoint import Endpoint
from tercet.rollout.engine import Sampling
from tercet.rollout.launch import SAME_PIXELS
from tercet.rollout.local import LocalEngine
from tercet.rollout.server import Server, ServerError, free_ports
from tercet.rollout.sglang import SglangEngine
from tercet.rollout.weights import open_sync
from tercet.train import tapo
from tercet.train.command_line import parse

PYTHON = os.environ.get("TERCET_SGLANG_PYTHON", "")
pytestmark = [
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


@pytest.fixture(scope="module")
def policy():
    return tiny("qwen2_5_vl")


@pytest.fixture(scope="module")
def server(policy, tmp_path_factory):
    server = make_server(policy, tmp_path_factory.mktemp("sglang") / "model")
    server.start()
    yield server
    server.stop()
    assert not server.is_running()


def make_engine(parts, servers, folder: Path, *, way="disk", timeout_s=60.0, **options):
    """An engine on servers of ours (or on addresses of others); small buckets, so that there are
    several."""
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
        Endpoint(s, None, {}, timeout_s)
        if isinstance(s, str)
        else Endpoint(s.url, s, {}, timeout_s)
        for s in servers
    ]
    weights = parts.model.named_parameters
    return SglangEngine(parts, PromptEncoder(parts), endpoints, sync, weights, **options)


@pytest.fixture
def engine(policy, server, tmp_path):
    return make_engine(policy, [server], tmp_path)


def change_weights(parts) -> None:
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        # A random policy may prefer an image token, which the engine refuses.
        parts.model.lm_head.weight[list(parts.banned_ids)] = 0


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


@pytest.mark.parametrize("way", ["disk", "distributed", "tensor"])
def test_every_way_of_weights_gives_the_local_engines_answers(
    policy, server, photos, tmp_path, way
):
    """Tokens and log-probs, after each of two updates: nothing of the old weights is left."""
    engine = make_engine(policy, [server], tmp_path, way=way)
    requests = make_requests(policy, photos)
    for version in (1, 2):
        change_weights(policy)
        engine.update_weights(policy.model.named_parameters(), version)
        assert_same_as_local(policy, engine, requests)
    assert not list(tmp_path.glob("tercet-weights-*"))


def test_a_prompt_is_prefilled_once(policy, engine, photos):
    requests = make_requests(policy, photos, n=4)[:1]
    engine.update_weights(policy.model.named_parameters(), 3)
    assert len(collect(engine, requests)) == 4
    length = len(PromptEncoder(policy)(requests[0].prompt_ids, requests[0].images))
    assert engine.cached_tokens == 3 * (length - 1) and engine.prompt_tokens == 4 * length


def test_sampling_gives_full_vocabulary_logprobs(policy, engine, photos):
    """Before top_p and top_k: those that plain transformers computes for the same tokens."""
    requests = make_requests(policy, photos, n=2)
    engine.update_weights(policy.model.named_parameters(), 3)
    sampling = Sampling(temperature=0.7, top_p=0.3, max_tokens=8)
    for completion in collect(engine, requests, sampling):
        request = next(r for r in requests if r.id == completion.request_id)
        prompt = PromptEncoder(policy)(request.prompt_ids, request.images)
        ids = torch.cat([prompt.input_ids, torch.tensor(completion.token_ids)])[None]
        logits = policy.model(
            input_ids=ids,
            mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
            pixel_values=prompt.images[0].pixel_values,
            image_grid_thw=prompt.images[0].grid_thw,
        ).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / 0.7).log_softmax(-1)
        want = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        got = torch.tensor(completion.rollout_logprobs)
        torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture, tied", [("qwen2_vl", True), ("qwen2_5_vl", False)])
def test_other_architectures_and_heads(architecture, tied, photos, tmp_path):
    """Weight names and tied heads, on every way."""
    parts = tiny(architecture, tie_word_embeddings=tied)
    with make_server(parts, tmp_path / "model") as server:
        for version, way in enumerate(("disk", "distributed", "tensor"), start=1):
            change_weights(parts)
            engine = make_engine(parts, [server], tmp_path, way=way)
            engine.update_weights(parts.model.named_parameters(), version)
            assert_same_as_local(parts, engine, make_requests(parts, photos, n=1))


def test_a_server_killed_while_it_generates_is_restarted(policy, server, engine, photos):
    """Nothing is lost and nothing comes twice; the new server has the current weights."""
    requests = make_requests(policy, photos, n=2)
    engine.update_weights(policy.model.named_parameters(), 4)
    long = Sampling(temperature=0.0, max_tokens=64)
    want = collect(engine, requests, long)

    async def run():
        done = []
        async for completion in engine.generate(requests, long):
            if not done:
                os.killpg(server.process_group, signal.SIGKILL)
            done.append(completion)
        return done

    found = sorted(asyncio.run(run()), key=lambda c: (c.request_id, c.index))
    assert [(c.request_id, c.index) for c in found] == [(c.request_id, c.index) for c in want]
    assert [c.token_ids for c in found] == [c.token_ids for c in want]
    assert {c.weight_version for c in found} == {4} and server.is_healthy()


def test_a_hung_server_is_restarted(policy, server, photos, tmp_path):
    engine = make_engine(policy, [server], tmp_path, timeout_s=20.0)
    engine.update_weights(policy.model.named_parameters(), 5)
    os.killpg(server.process_group, signal.SIGSTOP)
    found = collect(engine, make_requests(policy, photos, n=1))
    assert len(found) == 3 and server.is_healthy()


def test_the_server_dies_with_a_killed_trainer(policy, tmp_path):
    policy.save(tmp_path / "model")
    port = free_ports(1)[0]
    script = f"""
import time
from tercet.rollout.server import Server
server = Server({str(tmp_path / "model")!r}, {PYTHON!r}, {str(tmp_path)!r},
                arguments={FLAGS!r}, port={port})
server.start()
print("up", server.process_group, flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as trainer:
        group = int(trainer.stdout.readline().split()[1])
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        trainer.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        pytest.fail("the server outlives its trainer")


def test_bad_configuration_is_named_in_seconds(policy, server, tmp_path):
    started = time.monotonic()
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ServerError, match="does not answer"):
        make_engine(policy, [nowhere], tmp_path)
    with pytest.raises(ValueError, match="twice"):
        make_engine(policy, [nowhere, nowhere], tmp_path)
    with pytest.raises(ValueError, match="holds no config.json"):
        Server(tmp_path / "none", PYTHON, tmp_path)
    with pytest.raises(ValueError, match="there is no"):
        Server(server.model_path, tmp_path / "python", tmp_path)
    with pytest.raises(ServerError, match="is taken"):
        make_server(policy, tmp_path / "model", port=server.port).start()
    with pytest.raises(ServerError, match="ended with code"):
        make_server(policy, tmp_path / "model", arguments=["--no-such-flag"]).start()
    assert time.monotonic() - started < 60


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and Path(os.readlink(process / "cwd")) == folder:
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass  # it has ended, or is not ours
    return found


def test_training_samples_on_a_server_and_leaves_none(tmp_path, monkeypatch):
    """Three steps of train/tapo.py: weights go to the server before and after each."""
    parts = tiny("qwen2_5_vl")
    with torch.no_grad():
        parts.model.lm_head.weight[list(parts.banned_ids)] = 0
    parts.save(tmp_path / "policy")
    for name in ("red_bird", "blue_bird"):
        (tmp_path / "photos" / "bird" / name).mkdir(parents=True)
        for n in range(3):
            pixels = np.random.default_rng(n).integers(0, 255, (80 + n, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / "bird" / name / f"{n}.png")
    lengths = lambda rows: [{"overall": row["response_length"] / 10} for row in rows]  # noqa: E731
    monkeypatch.setattr(tapo, "load_reward", lambda spec: lengths)
    out = tmp_path / "run"
    argv = f"""--data.path={tmp_path / "photos"} --data.seen_fraction=1 --data.shots=3
        --data.sft_shots=0 --model.path={tmp_path / "policy"} --run.out={out} --run.steps=3
        --run.device=cpu --rollout.groups_per_step=4 --rollout.n_anchor=2 --rollout.n_positive=2
        --rollout.max_prompt_tokens=512 --rollout.max_response_tokens=12 --rollout.max_rounds=1
        --rollout.on_exhausted=keep_last_round --optim.lr=1e-3 --rollout.engine=sglang
        --rollout.sglang_python={PYTHON}""".split()
    config, _, resolved = parse(TapoConfig, [*argv, f"--rollout.sglang_args={' '.join(FLAGS)}"], "")
    tapo.train(config, resolved)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 and row["groups"] == 4 for row in rows)
    log = (out / "sglang" / "server_0" / "sglang.log").read_text()
    assert log.count('"POST /update_weights_from_disk HTTP/1.1" 200') == 4
    assert processes_in(out / "sglang" / "server_0") == []
