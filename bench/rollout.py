"""Sampling on an SGLang server: overhead of the client, cache, weight sync, slow responses.

    make bench-rollout

The server is pinned to one core and the clients to another. Overhead is 1 - (our tokens/s) /
(tokens/s of SGLang's bench_serving) on the same ids, photos and lengths, with one sample per
request. The two clients alternate after a warm-up of each, and the prefix cache is emptied before
every run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tercet.bench.measure import append, commit, conditions
from tercet.core.config import ModelConfig
from tercet.core.data.stream import TripletStream
from tercet.core.data.vision import PromptEncoder, data_uri
from tercet.core.models import build_tiny, load_policy
from tercet.core.prompts import chat_ids
from tercet.core.rollout_config import RolloutConfig
from tercet.core.types import Anchor, PolicyParts, Request
from tercet.rollout.engine import Sampling
from tercet.rollout.launch import open_engine
from tercet.rollout.sampler import GroupSampler
from tercet.rollout.sglang import SglangEngine

RESULTS = Path(__file__).parent / "results" / "rollout.csv"
CLIENT = Path(__file__).parent / "sglang_client.py"
CPU_FLAGS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --dtype float32 "
    "--max-total-tokens 65536 --skip-server-warmup --mem-fraction-static 0.3"
)
QUESTION = "Which bird is shown in this photo? Think first, then answer with its name."
WAYS = ("disk", "distributed", "tensor")


@dataclass
class Row:
    """A row of the ledger: median and range of one quantity."""

    what: str
    unit: str
    median: float
    least: float
    most: float
    note: str


def row(what: str, unit: str, values: Sequence[float], note: str = "") -> Row:
    return Row(what, unit, float(np.median(values)), min(values), max(values), note)


@contextmanager
def pinned(*cores: int) -> Iterator[None]:
    """Pin this process, and those it starts meanwhile, to cores; to all if none of these exists."""
    before = os.sched_getaffinity(0)
    chosen = {sorted(before)[core] for core in cores if core < len(before)}
    os.sched_setaffinity(0, chosen or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def serving(
    parts: PolicyParts, options: argparse.Namespace, folder: Path, way: str = "disk"
) -> Iterator[SglangEngine]:
    """An engine on one server with the policy's weights."""
    config = RolloutConfig(
        engine="sglang",
        sglang_python=options.python,
        sglang_args=options.sglang_args,
        weight_sync=way,
        max_in_flight=options.concurrency,
    )
    weights = parts.model.named_parameters
    with pinned(0):
        engine = open_engine(parts, PromptEncoder(parts), config, folder, weights)
    try:
        engine.update_weights(weights(), 1)
        yield engine
    finally:
        engine.close()


def noise_photos(folder: Path, count: int, side: int) -> list[str]:
    paths = [folder / f"{n}.png" for n in range(count)]
    for n, path in enumerate(paths):
        pixels = np.random.default_rng(n).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return [str(path) for path in paths]


def make_requests(parts: PolicyParts, photos: Sequence[str], n: int, name: str) -> list[Request]:
    messages = [{"role": "user", "content": "<image>" + QUESTION}]
    ids = tuple(chat_ids(parts.tokenizer, messages, 1))
    return [Request(f"{name}{i}", f"{name}{i}", ids, (p,), n, 0, 0) for i, p in enumerate(photos)]


def sample(engine: SglangEngine, requests: Sequence[Request], length: int) -> tuple[int, float]:
    """Number of tokens decoded greedily, and the seconds it took."""

    async def run() -> int:
        sampling = Sampling(temperature=0.0, max_tokens=length)
        return sum([len(c.token_ids) async for c in engine.generate(requests, sampling)])

    started = time.perf_counter()
    return asyncio.run(run()), time.perf_counter() - started


def our_client(
    engine: SglangEngine, requests: Sequence[Request], length: int
) -> tuple[float, float]:
    """Tokens per second of our client, and the CPU seconds that it takes per 1,000 tokens."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    tokens, seconds = sample(engine, requests, length)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert tokens == length * len(requests), "the policy ended a response by itself"
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return tokens / seconds, 1000 * cpu / tokens


def bench_serving(url: str, options: argparse.Namespace, folder: Path, out: Path) -> float:
    """Tokens per second of SGLang's client, on the requests in rows.json.

    Raises:
        RuntimeError: when it fails.
    """
    command = f"""{options.python} {CLIENT} {folder / "rows.json"} --backend sglang
        --base-url {url} --model {folder / "policy"} --dataset-name random
        --num-prompts {options.prompts} --max-concurrency {options.concurrency} --disable-stream
        --return-logprob --flush-cache --output-file {out} --disable-tqdm --temperature 0"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command.split(), capture_output=True, text=True, timeout=600, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"bench_serving ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found = json.loads(out.read_text().splitlines()[-1])
    tokens = found["total_output_tokens"]
    assert tokens == options.tokens * options.prompts, tokens
    return found["output_throughput"]


def overhead(engine: SglangEngine, parts: PolicyParts, options, folder: Path) -> list[Row]:
    """Our client beside bench_serving on the same ids, photos and lengths."""
    photos = noise_photos(folder, options.prompts, options.side)
    requests = make_requests(parts, photos, 1, "single")
    endpoint, length = engine._endpoints[0], options.tokens
    rows = [
        {
            "input_ids": list(r.prompt_ids),
            "image_data": [data_uri(r.images[0])],
            "output_len": length,
        }
        for r in requests
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    found: dict[str, list[float]] = {"ours": [], "theirs": [], "cpu": []}
    for turn in range(options.rounds + 1):
        endpoint.post("/flush_cache", {})
        ours, cpu = our_client(engine, requests, length)
        theirs = bench_serving(endpoint.url, options, folder, folder / f"theirs_{turn}.jsonl")
        if turn:  # the first round is the warm-up
            found["ours"].append(ours)
            found["theirs"].append(theirs)
            found["cpu"].append(cpu)
    shares = [1 - a / b for a, b in zip(found["ours"], found["theirs"], strict=True)]
    note = f"{len(rows)} requests of {length} tokens, {options.concurrency} at once"
    return [
        row("client CPU", "s per 1000 tokens", found["cpu"], note),
        row("tokens, ours", "1/s", found["ours"], note),
        row("tokens, bench_serving", "1/s", found["theirs"], note),
        row("overhead", "share", shares, note),
    ]


def cache_hits(engine: SglangEngine, parts: PolicyParts, options, folder: Path) -> list[Row]:
    """Share of prompt tokens found in the prefix cache, with five samples per prompt."""
    requests = make_requests(parts, noise_photos(folder, options.prompts, options.side), 5, "many")
    engine._endpoints[0].post("/flush_cache", {})
    engine.cached_tokens = engine.prompt_tokens = 0
    sample(engine, requests, options.tokens)
    share = engine.cached_tokens / engine.prompt_tokens
    note = "5 samples a prompt: 0.8, and the text before the photo"
    return [row("cached prompt tokens", "share", [share], note)]


def sync_times(engine: SglangEngine, parts: PolicyParts, way: str, rounds: int) -> list[Row]:
    """Seconds of a weight sync by one of WAYS."""
    size = sum(p.nbytes for p in parts.model.parameters()) / 2**20
    seconds = []
    for version in range(2, rounds + 3):
        started = time.perf_counter()
        engine.update_weights(parts.model.named_parameters(), version)
        seconds.append(time.perf_counter() - started)
    return [row(f"weights by {way}", "s", seconds[1:], f"{size:.0f} MiB")]


def half_pass(rows: list[dict]) -> list[dict]:
    """A reward that half of the groups pass, chosen by the text of the first response."""
    kept = sum(map(ord, rows[0]["response"])) % 2
    return [{"overall": float(n * kept)} for n in range(len(rows))]


def make_sampler(
    engine: SglangEngine,
    parts: PolicyParts,
    anchors: Sequence[Anchor],
    dispatch: str,
    max_in_flight: int,
    seed: int,
) -> GroupSampler:
    """A sampler of 12 groups of 3 + 3 responses."""
    config = RolloutConfig(
        engine="sglang",
        dispatch=dispatch,
        groups_per_step=12,
        n_anchor=3,
        n_positive=3,
        max_response_tokens=512,
        max_in_flight=max_in_flight,
        surplus="drop",
    )
    return GroupSampler(
        engine,
        TripletStream(anchors, positive="fixed", seed=seed),
        parts.tokenizer,
        PromptEncoder(parts),
        config,
        reward=half_pass,
        names={},
        system_prompt=None,
        seed=seed,
    )


def stragglers(parts: PolicyParts, options: argparse.Namespace, folder: Path) -> list[Row]:
    """Seconds of a sampling step in which half of the groups pass, whatever their lengths, and mean
    lengths of what it keeps: in batches, as a stream, and as an ordered one.

    One token of 64 ends a response, so lengths are distributed as 1/64 exp(-length / 64). The
    server is one of its own, as an engine learns at its start what ends a response.
    """
    photos = noise_photos(folder, 12, options.side)
    anchors = [
        Anchor(str(i), p, (photos[i - 1],), (photos[i - 2],), QUESTION, "bird", "wren")
        for i, p in enumerate(photos)
    ]
    generation = parts.model.generation_config
    generation.eos_token_id = list(range(7, len(parts.tokenizer), 64))
    found: dict[str, list[float]] = {name: [] for name in ("batch", "stream", "ordered")}
    lengths: dict[str, list[float]] = {name: [] for name in found}
    with serving(parts, options, folder) as engine, pinned(1):
        for turn in range(options.rounds + 1):
            for dispatch, seconds in found.items():
                sampler = make_sampler(engine, parts, anchors, dispatch, options.concurrency, turn)
                started = time.perf_counter()
                groups = asyncio.run(sampler.collect(turn)).groups
                if turn:  # the first round is the warm-up
                    seconds.append(time.perf_counter() - started)
                    kept = [len(r.token_ids) for group in groups for r in group.responses]
                    lengths[dispatch].append(sum(kept) / len(kept))
    note = "12 groups of 6, half of them pass, mean length 64, at most 512"
    saved = {
        name: [1 - b / a for a, b in zip(found["batch"], found[name], strict=True)]
        for name in ("stream", "ordered")
    }
    return [
        *(row(f"step, {name}", "s", seconds, note) for name, seconds in found.items()),
        *(row(f"time saved, {name}", "share", shares, note) for name, shares in saved.items()),
        *(row(f"length kept, {name}", "tokens", means, note) for name, means in lengths.items()),
    ]


def make_parts(options, hidden_size: int, layers: int) -> PolicyParts:
    """The model asked for, or a random one that never emits stop or image tokens."""
    if options.model:
        return load_policy(ModelConfig(path=options.model), options.device)
    parts = build_tiny([QUESTION], hidden_size=hidden_size, layers=layers, image_size=options.side)
    never = [*parts.banned_ids, *parts.stop_ids]
    with torch.no_grad():
        # The first feature of every token, and so of the last hidden states, becomes large; the
        # head's rows of these tokens are far below 0 there.
        parts.model.get_input_embeddings().weight[:, 0] = 2.0
        parts.model.lm_head.weight[:, 0] = 2.0
        parts.model.lm_head.weight[never, 0] = -10.0
    return parts


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """All rows, in the order in which they are measured."""
    sizes = [(0, 0)] if options.model else [(128, 3), (768, 8)]
    for place, size in enumerate(sizes):
        parts = make_parts(options, *size)
        for way in WAYS:
            with (
                tempfile.TemporaryDirectory() as folder,
                serving(parts, options, Path(folder), way) as engine,
                pinned(1),
            ):
                yield from sync_times(engine, parts, way, options.rounds)
                if place or way != "disk":
                    continue
                for part in (overhead, cache_hits):
                    yield from part(engine, parts, options, Path(folder))
        if not place:
            with tempfile.TemporaryDirectory() as folder:
                yield from stragglers(parts, options, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="Python of the server's environment")
    parser.add_argument("--model", default="", help="folder; a small random model when not given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sglang-args", default=CPU_FLAGS)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--side", type=int, default=112, help="pixels of a photo")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    version = subprocess.run(
        [options.python, "-c", "import importlib.metadata as m; print(m.version('sglang'))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
    shared = conditions(options.device, commit()) | {"sglang": version}
    for found in measure(options):
        append(options.out, [found], shared)
        spread = f"({found.least:.4g} to {found.most:.4g})"
        print(f"{found.what:26} {found.median:9.4g} {spread:24} {found.unit:18} {found.note}")


if __name__ == "__main__":
    main()
