"""Group advantages from rewards, and the row weights that express what the loss is a mean over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from tercet.core.types import Group


def group_advantages(
    rewards: Tensor,
    group_ids: Sequence[Hashable] | Tensor,
    eps: float = 1e-6,
    *,
    divide_by_std: bool = True,
) -> Tensor:
    """Advantages A_i = (R_i - mean) / (std + eps), pooled over all responses of a group.

    Args:
        rewards: [N] any float dtype.
        group_ids: N ids, or an [N] tensor of them; the order of responses does not matter.
        eps: added to the unbiased standard deviation.
        divide_by_std: without it A_i = R_i - mean (Dr. GRPO, arXiv 2503.20783).

    Returns:
        [N] in the dtype and on the device of `rewards`; 0 in a group of one response or of equal
        rewards.

    Raises:
        ValueError: rewards that are not [N] floats, another number of ids, or a reward that is not
            finite.
    """
    rewards = torch.as_tensor(rewards)
    ids = group_ids.tolist() if isinstance(group_ids, Tensor) else list(group_ids)
    if rewards.dim() != 1 or not rewards.is_floating_point() or len(ids) != len(rewards):
        raise ValueError(
            f"rewards must be [N] floats with N group_ids, got {rewards.dtype} of shape "
            f"{tuple(rewards.shape)} and {len(ids)} ids"
        )
    values = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, group in enumerate(ids):
        members[group].append(index)
    advantages = torch.zeros_like(values)
    for group, indices in members.items():
        pool = values[indices]
        if not pool.isfinite().all():
            raise ValueError(f"rewards of group {group!r} must be finite, got {pool.tolist()}")
        if (pool != pool[0]).any():
            scale = pool.std() + eps if divide_by_std else 1.0
            advantages[indices] = (pool - pool.mean()) / scale
    return advantages.to(rewards.dtype)


def row_weights(
    lengths: Sequence[int],
    group_ids: Sequence[Hashable],
    masked: Sequence[bool],
    mean_over: Literal["batch", "group", "response", "virtual_batch", "constant"] = "batch",
    mean_over_size: int = 4,
    longest: int = 1,
) -> list[float]:
    """Weight of each response's tokens, so that one weighted mean gives every `mean_over`.

    The loss is sum(weight * token loss) / sum(weight * length). Weights and denominators are, with
    n the number of tokens that count:

    - `batch`: every weight is 1, the denominator is n.
    - `group`: 1 / tokens of the response's group; the denominator is the number of groups.
    - `response`: 1 / its own tokens; the denominator is the number of responses.
    - `virtual_batch`: 1 / tokens of its virtual batch: `mean_over_size` responses in order,
      fewer in the last; the denominator is the number of virtual batches.
    - `constant`: 1 / `longest`, but the denominator is the number of responses that count.

    All but `batch` and `constant` thus take a mean of token means. Both sums may be added up over
    several calls, for example over ranks, as long as no group or virtual batch is split between
    two calls.

    Args:
        lengths: tokens of each response.
        group_ids: group of each response.
        masked: which responses stay out of the loss. They and empty responses have weight 0 and
            count in no denominator and no virtual batch.
        mean_over: what the loss is a mean over.
        mean_over_size: responses of a virtual batch.
        longest: most tokens that a response may have.

    Returns:
        One weight per response; all 0 when no token counts.

    Raises:
        ValueError: arguments of different lengths, a negative length, an unknown `mean_over`, or
            `mean_over_size` below 1.
    """
    if not len(lengths) == len(group_ids) == len(masked):
        raise ValueError(
            f"one length, group id and mask per response are needed, got {len(lengths)}, "
            f"{len(group_ids)} and {len(masked)}"
        )
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths must not be negative, got {list(lengths)}")
    if mean_over_size < 1:
        raise ValueError(f"mean_over_size must be at least 1, got {mean_over_size}")
    counted = [n for n, length in enumerate(lengths) if length and not masked[n]]
    # The unit of each counted response: what its token mean is taken over.
    units: dict[str, list[Hashable]] = {
        "batch": [],
        "group": [group_ids[n] for n in counted],
        "response": list(counted),
        "virtual_batch": [place // mean_over_size for place in range(len(counted))],
        "constant": [],
    }
    if mean_over not in units:
        raise ValueError(f"mean_over must be one of {', '.join(units)}, got {mean_over!r}")
    weights = [0.0] * len(lengths)
    if mean_over in ("batch", "constant"):
        for n in counted:
            weights[n] = 1.0 if mean_over == "batch" else 1.0 / longest
        return weights
    tokens: dict[Hashable, int] = defaultdict(int)
    for n, unit in zip(counted, units[mean_over], strict=True):
        tokens[unit] += lengths[n]
    for n, unit in zip(counted, units[mean_over], strict=True):
        weights[n] = 1.0 / tokens[unit]
    return weights


def set_advantages(groups: Sequence[Group], divide_by_std: bool = True) -> None:
    """Set every response's advantage from its group's rewards, anchor and positive pooled."""
    pooled = [(n, r) for n, group in enumerate(groups) for r in group.responses]
    rewards = torch.tensor([r.reward for _, r in pooled], dtype=torch.float64)
    advantages = group_advantages(rewards, [n for n, _ in pooled], divide_by_std=divide_by_std)
    for (_, response), advantage in zip(pooled, advantages.tolist(), strict=True):
        response.advantage = advantage


def sequence_old_logprobs(logprobs: Tensor, old_logprobs: Tensor, response_index: Tensor) -> Tensor:
    """Old log-probs with which every token has the ratio of its whole response (GSPO, 2507.18071).

    With L tokens in a response, s = exp(1/L sum_t (a_t - o_t)). Put in the place of o_t, the
    constant a_t - log s gives each token the ratio s and, with row weights 1/L, the gradient
    s A / L: that of the response's term min(s A, clip(s) A).

    Args:
        logprobs: [R] float: the policy's a at the weights that are about to be updated.
        old_logprobs: [R] the same dtype: o.
        response_index: [R] int64: which response a row belongs to, from 0.

    Returns:
        [R] in the dtype of `logprobs`, detached.
    """
    log_ratio = (logprobs - old_logprobs).detach()
    count = int(response_index.max()) + 1 if len(response_index) else 0
    sums = log_ratio.new_zeros(count).index_add_(0, response_index, log_ratio)
    lengths = torch.bincount(response_index, minlength=count).to(log_ratio.dtype)
    return logprobs.detach() - (sums / lengths.clamp(min=1))[response_index]
