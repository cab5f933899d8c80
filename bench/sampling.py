"""The in-process engine beside transformers' own generate: log-probs first, then tokens a second.

    python -m tercet.bench.sampling                  # a small model on this machine
    python -m tercet.bench.sampling --device cuda    # Qwen2.5-VL-3B's sizes in bf16
    make bench                                       # a tiny one, by pytest-benchmark

Weights, photos and prompts are random, and no response ends before the last token. Both methods
sample several responses to each prompt. Before they are timed, their log-probs of greedy responses
are compared in float32 on a model of the same widths with two layers; where these are over the
gate, the engine gets a row without times. Then come rounds in which each method runs twice: for one
token, which is the prefill, and for all.

- decode_ms: time of all tokens but the first, a token.
- tokens_per_s: response tokens of all rows over the whole time, prefill included.
- floor_ms: bytes of the language model's matrices and head, which every token needs once, over the
  speed at which this device copies memory (bytes read and bytes written).
- floor_share: floor_ms over decode_ms.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tercet.bench import measure
from tercet.bench.step_case import (
    CPU_MODEL,
    RandomPhotos,
    Workload,
    build_policy,
    make_group,
    qwen_3b,
)
from tercet.core.types import Completion, PolicyParts, Request
from tercet.kernels.prefix_attention import ATTENTION_NAME
from tercet.rollout.engine import Sampling
from tercet.rollout.local import LocalEngine
from tercet.train.learner.policy import Policy

RESULTS = Path(__file__).parent / "results" / "sampling.csv"
GATE = 1e-3
"""Largest difference of two log-probs in float32 that counts as none."""
GATE_TOKENS = 8
GPU_WORKLOAD = Workload(groups=4, n_anchor=10, n_positive=0)
CPU_WORKLOAD = Workload(groups=2, n_anchor=3, n_positive=0, prompt=96, grid=(1, 16, 16))


class Endless(PolicyParts):
    """A policy without a tokenizer, whose responses never end by themselves."""

    stop_ids = ()


class Case:
    """Prompts to sample from, on one policy.

    Args:
        policy: its model samples.
        workload: groups, responses a group (n_anchor), tokens of a prompt and its photo.
    """

    def __init__(self, policy: Policy, workload: Workload):
        config, self.model, self.workload = policy.model.config, policy.model, workload
        area = config.vision_config.spatial_merge_size**2
        sizes = (config.text_config.vocab_size, config.image_token_id, area)
        encode = RandomPhotos(policy, workload.grid)
        parts = Endless(policy.model, None, None)
        self.banned = list(parts.banned_ids)
        self.engine = LocalEngine(parts, encode)
        groups = [make_group(workload, number, *sizes) for number in range(workload.groups)]
        self.requests = []
        for group in groups:
            ids = list(group.prompt_ids)  # transformers counts photos by the token before them
            ids[ids.index(config.image_token_id) - 1] = config.vision_start_token_id
            photo, count = (group.triplet.anchor,), workload.n_anchor
            self.requests.append(Request(group.id, group.id, tuple(ids), photo, count, 0, 0))
        prompts = [encode(request.prompt_ids, request.images) for request in self.requests]
        ids = torch.stack([prompt.input_ids for prompt in prompts]).to(policy.device)
        images = [image for prompt in prompts for image in prompt.images]
        self.inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
            "pixel_values": torch.cat([i.pixel_values for i in images]).to(policy.device),
            "image_grid_thw": torch.cat([i.grid_thw for i in images]).to(policy.device),
        }
        """What transformers takes: every prompt once; generate repeats them with their photos."""


def ours(case: Case, tokens: int, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and log-probs [rows, tokens] by the in-process engine."""

    async def collect() -> list[Completion]:
        sampling = Sampling(temperature=0.0 if greedy else 1.0, max_tokens=tokens)
        return [done async for done in case.engine.generate(case.requests, sampling)]

    found = sorted(asyncio.run(collect()), key=lambda done: (int(done.request_id), done.index))
    ids = torch.tensor([done.token_ids for done in found])
    return ids, torch.tensor([done.rollout_logprobs for done in found])


@torch.no_grad()
def theirs(case: Case, tokens: int, greedy: bool = False) -> tuple[Tensor, Tensor | None]:
    """The same by transformers' generate with its own attention; log-probs for greedy ones only."""
    case.model.eval()
    case.model.set_attn_implementation({"text_config": "sdpa"})
    drawn = {} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    try:
        output = case.model.generate(
            **case.inputs,
            **drawn,
            num_return_sequences=1 if greedy else case.workload.n_anchor,
            max_new_tokens=tokens,
            suppress_tokens=case.banned,
            return_dict_in_generate=True,
            output_logits=greedy,
        )
    finally:
        case.model.set_attn_implementation({"text_config": ATTENTION_NAME})
    ids = output.sequences[:, case.inputs["input_ids"].shape[1] :]
    if not greedy:
        return ids, None
    logprobs = torch.stack(output.logits, 1).float().log_softmax(-1)
    found = logprobs.gather(-1, ids[..., None])[..., 0]
    return tuple(x.repeat_interleave(case.workload.n_anchor, 0).cpu() for x in (ids, found))


METHODS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "ours": ours,
    "transformers": theirs,
}


def logprob_error(case: Case, tokens: int = GATE_TOKENS) -> float:
    """Largest difference of the log-probs of greedy responses; infinite where tokens differ."""
    (ids, found), (wanted_ids, wanted) = (m(case, tokens, greedy=True) for m in (ours, theirs))
    return (found - wanted).abs().max().item() if torch.equal(ids, wanted_ids) else float("inf")


@dataclass
class Row:
    """A row of the ledger; times are medians in milliseconds."""

    method: str
    model: str
    dtype: str
    groups: int
    responses: int
    """Of each group."""
    prompt: int
    tokens: int
    """Of each response."""
    prefill_ms: float | None = None
    decode_ms: float | None = None
    tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    floor_ms: float | None = None
    floor_share: float | None = None
    ratio: float | None = None
    """tokens_per_s over those of transformers."""
    copy_gb_per_s: float | None = None
    extra_mib: float | None = None
    """Peak memory above the weights."""
    logprob_error: float | None = None
    note: str = ""


def check(row: Row, case: Case, tokens: int, error: float) -> bool:
    """Fill in memory and error, or a note on why there are none; returns whether to time it."""

    def call() -> list[Tensor]:
        METHODS[row.method](case, tokens)
        return []

    row.logprob_error = error
    if row.method == "ours" and not error <= GATE:
        row.note = f"over the gate of {GATE:.1g}: log-probs differ from transformers'"
        return False
    try:
        row.extra_mib = measure.extra_mib(call, case.inputs["input_ids"].is_cuda)[1]
    except Exception as failed:  # a peer's own failure is a result
        row.note = measure.failure(failed)
        torch.cuda.empty_cache()
    return not row.note


def run_case(case: Case, gate: Case, model: str, tokens: int, rounds: int) -> list[Row]:
    """Both methods: the gate, then rounds in which each runs for one token and for all.

    Args:
        case: what is timed.
        gate: float32 and few layers; where log-probs are compared.
        model: its name in the rows.
        tokens: of each response, at least 2.
        rounds: timed rounds.
    """
    workload, weights, device = case.workload, case.model.lm_head.weight, case.model.device
    on_gpu, count = device.type == "cuda", workload.groups * workload.n_anchor
    dtype = str(weights.dtype).removeprefix("torch.")
    sizes = (workload.groups, workload.n_anchor, workload.prompt, tokens)
    rows = {name: Row(name, model, dtype, *sizes) for name in METHODS}
    error = logprob_error(gate)
    timed = [name for name, row in rows.items() if check(row, case, tokens, error)]
    calls = {
        (name, n): (lambda name=name, n=n: METHODS[name](case, n))
        for name in timed
        for n in (1, tokens)
    }
    taken = {key: ms for key, (_, ms, _) in measure.interleaved(calls, rounds, 1, on_gpu).items()}
    layers = case.model.model.language_model.layers
    matrices = [p for p in (*layers.parameters(), weights) if p.dim() == 2]
    speed = measure.copy_bandwidth(device.type)
    for name in timed:
        row, whole = rows[name], taken[name, tokens]
        row.prefill_ms = taken[name, 1]
        row.decode_ms = (whole - row.prefill_ms) / (tokens - 1)
        row.tokens_per_s = 1e3 * count * tokens / whole
        row.decode_tokens_per_s = 1e3 * count / row.decode_ms
        row.floor_ms = 1e3 * sum(p.nbytes for p in matrices) / speed
        row.floor_share = row.floor_ms / row.decode_ms
        row.copy_gb_per_s = speed / 1e9
        base = taken.get(("transformers", tokens))
        row.ratio = base / whole if base else None
    return list(rows.values())


def show(row: Row) -> str:
    """A row as a line of text."""
    what = f"{row.model} {row.groups} x {row.responses} x {row.tokens} tokens {row.method:13}"
    if row.tokens_per_s is None:
        return f"{what} {row.note}"
    floor = f"floor {row.floor_ms:.2f} ms ({row.floor_share:.2f})"
    times = f"prefill {row.prefill_ms:8.1f} ms, then {row.decode_ms:7.2f} ms a token, {floor}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x of transformers"
    return f"{what} {row.tokens_per_s:7.0f} tokens/s {times} {row.extra_mib:7.0f} MiB {ratio}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="of a response; default: 96 on a GPU, else 12")
    parser.add_argument("--commit", default=measure.commit())
    options = parser.parse_args(argv)
    on_gpu, device = options.device == "cuda", options.device
    sizes, workload, name = CPU_MODEL, CPU_WORKLOAD, f"2 layers of {CPU_MODEL['hidden']}"
    if on_gpu:
        sizes, workload, name = {}, GPU_WORKLOAD, "qwen2.5-vl-3b"
    shallow = sizes | {"layers": 2, "vision_layers": 2}
    gate = Case(build_policy(qwen_3b(**shallow), torch.float32, device), workload)
    case = gate
    if on_gpu:
        case = Case(build_policy(qwen_3b(**sizes), torch.bfloat16, device), workload)
    rows = run_case(case, gate, name, options.tokens or (96 if on_gpu else 12), options.rounds)
    print(*map(show, rows), sep="\n", flush=True)
    measure.append(options.out, rows, measure.conditions(device, options.commit))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="sampling, 2 prompts of 96, 3 responses of 8 tokens")
def test_sampling(benchmark, method):
    case = Case(build_policy(qwen_3b(**CPU_MODEL), torch.float32, "cpu"), CPU_WORKLOAD)
    assert logprob_error(case) <= GATE
    benchmark.pedantic(lambda: METHODS[method](case, 8), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
