"""Group advantages from rewards, and the row weights that express what the loss is a mean over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from tercet.core.types import Group


def group_advantages(
    rewards: Tensor, group_ids: Sequence[Hashable] | Tensor, eps: float = 1e-6
) -> Tensor:
    """Advantages A_i = (R_i - mean) / (std + eps), pooled over all responses of a group.

    Args:
        rewards: [N] any float dtype.
        group_ids: N ids, or an [N] tensor of them; the order of responses does not matter.
        eps: added to the unbiased standard deviation.

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
            advantages[indices] = (pool - pool.mean()) / (pool.std() + eps)
    return advantages.to(rewards.dtype)


def row_weights(
    lengths: Sequence[int],
    group_ids: Sequence[Hashable],
    masked: Sequence[bool],
    mean_over: Literal["batch", "group", "response", "virtual_batch"] = "batch",
    mean_over_size: int = 4,
) -> list[float]:
    """Weight of each response's tokens, so that one weighted mean gives every `mean_over`.

    The loss is sum(weight * token loss) / sum(weight * length). Weights and denominators are, with
    n the number of tokens that count:

    - `batch`: every weight is 1, the denominator is n.
    - `group`: 1 / tokens of the response's group; the denominator is the number of groups.
    - `response`: 1 / its own tokens; the denominator is the number of responses.
    - `virtual_batch`: 1 / tokens of its virtual batch: `mean_over_size` responses in order,
      fewer in the last; the denominator is the number of virtual batches.

    All but `batch` thus take a mean of token means. Both sums may be added up over several calls,
    for example over ranks, as long as no group or virtual batch is split between two calls.

    Args:
        lengths: tokens of each response.
        group_ids: group of each response.
        masked: which responses stay out of the loss. They and empty responses have weight 0 and
            count in no denominator and no virtual batch.
        mean_over: what the loss is a mean over.
        mean_over_size: responses of a virtual batch.

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
    }
    if mean_over not in units:
        raise ValueError(f"mean_over must be one of {', '.join(units)}, got {mean_over!r}")
    weights = [0.0] * len(lengths)
    if mean_over == "batch":
        for n in counted:
            weights[n] = 1.0
        return weights
    tokens: dict[Hashable, int] = defaultdict(int)
    for n, unit in zip(counted, units[mean_over], strict=True):
        tokens[unit] += lengths[n]
    for n, unit in zip(counted, units[mean_over], strict=True):
        weights[n] = 1.0 / tokens[unit]
    return weights


def set_advantages(groups: Sequence[Group]) -> None:
    """Set every response's advantage from its group's rewards, anchor and positive pooled."""
    pooled = [(n, r) for n, group in enumerate(groups) for r in group.responses]
    rewards = torch.tensor([r.reward for _, r in pooled], dtype=torch.float64)
    advantages = group_advantages(rewards, [n for n, _ in pooled])
    for (_, response), advantage in zip(pooled, advantages.tolist(), strict=True):
        response.advantage = advantage
