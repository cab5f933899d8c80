"""How far the sampler's log-probs are from the trainer's, and weights that correct for it.

Both compute the log-probs of the same tokens with the same weights, but with different kernels and
rounding. An unbiased gradient would weight each token by the ratio pi_trainer / pi_sampler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tercet.core.config import LossConfig
from tercet.core.types import Group, Response

BOUND = 0.1
"""mismatch_over is the share of log-probs that differ by more than this."""


def mismatch_figures(groups: Sequence[Group], weight_version: int) -> dict[str, float]:
    """Differences between old (trainer) and rollout (sampler) log-probs, over all tokens.

    Args:
        groups: their anchor responses with old_logprobs are used: under `update_on: own` and
            `anchor` alike both log-probs are those on the anchor.
        weight_version: that old log-probs were computed at; responses of other weights are left
            out.

    Returns:
        mismatch_mean and mismatch_max of |old - rollout|; mismatch_kl, the k3 estimate
        E[e^d - 1 - d] of KL(sampler || trainer) with d = old - rollout; mismatch_over, the share
        of tokens with |d| > BOUND. Empty without tokens.
    """
    compared = [
        r
        for group in groups
        for r in group.responses
        if r.role == "anchor" and r.weight_version == weight_version
        if r.old_logprobs is not None and r.token_ids
    ]
    if not compared:
        return {}
    difference = torch.cat([r.old_logprobs.double() - _rollout(r).double() for r in compared])
    return {
        "mismatch_mean": float(difference.abs().mean()),
        "mismatch_max": float(difference.abs().max()),
        "mismatch_kl": float((difference.expm1() - difference).mean()),
        "mismatch_over": float((difference.abs() > BOUND).double().mean()),
    }


def cap_of(response: Response, loss: LossConfig, version: int) -> float | None:
    """The bound of a response's importance weights; None: they are 1.

    They are 1 under `update_on: anchor` for responses sampled on the positive: their log-probs are
    those on another photo.

    Args:
        response: of a group that is trained on.
        loss: is_cap is for all responses, carried_cap for those that older weights sampled.
        version: of the weights at the start of the step.
    """
    if loss.update_on == "anchor" and response.role == "positive":
        return None
    is_carried = response.weight_version < version and loss.ratio_of == "token"
    return loss.is_cap or (loss.carried_cap if is_carried else None)


def importance_weights(response: Response, cap: float | None) -> Tensor | float:
    """[length] float32: truncated importance weights min(exp(old - rollout), cap); else 1."""
    if cap is None:
        return 1.0
    return (response.old_logprobs - _rollout(response)).exp().clamp(max=cap)


def _rollout(response: Response) -> Tensor:
    return torch.tensor(response.rollout_logprobs, dtype=torch.float32)
