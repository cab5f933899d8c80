"""Do the servers compute what the trainer computes? A look at the start of a run.

A server that runs in another dtype, at another temperature than it is asked for, or with other
weights gives log-probs that nothing else would contradict. So the first thing that is sampled, on
one photo, is scored by the trainer too.
"""

from __future__ import annotations

import asyncio
import math
import shlex

import torch

from tercet.core.mismatch import mismatch_figures
from tercet.core.packing import Piece, by_response, plain_batch, prompts_of
from tercet.core.rollout_config import RolloutConfig
from tercet.core.types import Completion, Group, Request, Response, Triplet
from tercet.rollout.engine import Sampling
from tercet.train.run.run import Run

SAMPLES, TOKENS = 4, 16
LIMITS = {"float32": 1e-4, "float16": 0.0125, "bfloat16": 0.1}
"""Most that log-probs may differ on average. For float16 and bfloat16 it is 25 times the dtype's
rounding (2^-11, 2^-8): it grows with a model's depth and its logits. For float32 it is 500 times
what was measured on a tiny policy (2e-7 to 6e-7), and a seventh of what the same policy differs by
when it is served in float16 (7e-4)."""


def check_sampler(run: Run) -> None:
    """Compare the servers' log-probs with the trainer's, on one photo; a collective.

    Raises:
        ValueError: they differ on average by more than the dtype explains.
    """
    config = run.config.rollout
    if not run.engine.full_vocabulary:
        run.log.say("the sampler's log-probs are renormalised after top_p and top_k")
    if config.engine != "sglang" or (config.top_k and not run.engine.full_vocabulary):
        return
    group = run.ranks.share(lambda: asyncio.run(_sampled(run)), run.policy.gather_weights)
    _score(run, group)
    found = mismatch_figures([group], run.steps_done)
    dtype = served_dtype(config, run.parts.model.dtype)
    limit = config.mismatch_limit or LIMITS[dtype]
    if not run.engine.full_vocabulary:
        limit -= math.log(config.top_p)
    said = (
        f"on average the servers' log-probs differ by {found['mismatch_mean']:.2g} from the "
        f"trainer's, at most by {found['mismatch_max']:.2g} (one photo, {dtype})"
    )
    # With LoRA the servers' weights are rounded once more, after every step.
    if found["mismatch_mean"] > limit and not (run.config.model.lora_rank and run.steps_done):
        raise ValueError(
            f"{said}; {dtype} explains {limit:.2g} (rollout.mismatch_limit): do they compute in "
            "another dtype, or change log-probs by an option or a variable of their own?"
        )
    run.log.say(said)


def served_dtype(config: RolloutConfig, trained: torch.dtype) -> str:
    """Name of the coarser one of the trainer's dtype and the one that sglang_args ask for."""
    words = shlex.split(config.sglang_args.replace("--dtype=", "--dtype "))
    asked = dict(zip(words, words[1:], strict=False)).get("--dtype", "")
    asked = {"half": "float16", "float": "float32"}.get(asked, asked)
    return max(str(trained).removeprefix("torch."), asked, key=lambda d: LIMITS.get(d, 0.0))


async def _sampled(run: Run) -> Group:
    """A group with responses to the first anchor's photo; looks for signals while it waits."""
    config, anchor = run.config.rollout, run.manifest.anchors[0]
    ids = run.sampler.prompts.ids(anchor, (anchor.image,))
    image, seed, step = anchor.image, run.config.run.seed, run.steps_done
    request = Request("check.anchor", "check", ids, (image,), SAMPLES, seed, step)
    tokens = min(TOKENS, config.max_response_tokens)
    sampling = Sampling(config.temperature, config.top_p, config.top_k, tokens)

    async def collect() -> list[Completion]:
        return [completion async for completion in run.engine.generate([request], sampling)]

    task = asyncio.create_task(collect())
    while not task.done():
        run.stop.check()
        await asyncio.wait({task}, timeout=1.0)
    responses = [
        Response("anchor", c.token_ids, c.rollout_logprobs, c.finish_reason, c.weight_version)
        for c in task.result()
    ]
    names = (anchor.question, anchor.super_category, anchor.sub_category)
    return Group("check", Triplet("check", image, image, image, *names), ids, responses)


@torch.no_grad()
def _score(run: Run, group: Group) -> None:
    """Set the group's old log-probs, as the trainer computes them."""

    def pack(pieces):
        return plain_batch(prompts_of(pieces, "anchor", run.encoder), 1.0)

    run.policy.eval()
    found = {}
    pieces = [Piece(group, tuple(range(len(group.responses))))]
    for some, micro in run.micro_batches(pieces, ["anchor"], pack):
        found |= by_response(some, run.policy(micro.update, "logprobs", labels=micro.labels))
    for part in run.ranks.exchange(found):
        for (_, index), logprobs in part.items():
            group.responses[index].old_logprobs = logprobs
