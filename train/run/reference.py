"""The reference policy of the KL that is minimised: what the run began from, kept as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from tercet.core.config import TapoConfig
from tercet.train.learner.lora import ADAPTER, added_layers
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks
from tercet.train.run.assemble import build_policy, open_parts

Reference = Callable[[], AbstractContextManager[Policy | None]]
"""Gives the policy whose log-probs are the reference's, for as long as a `with` lasts; or None."""


def open_reference(config: TapoConfig, policy: Policy, ranks: Ranks) -> Reference:
    """The reference of a run, None where its loss needs none; a collective.

    With LoRA it is the policy itself without its additions, which takes no memory. Else it is a
    frozen copy of model.path, sharded as the policy is; a run that goes on reads it there again.

    Raises:
        ValueError: as `open_parts`.
    """
    if not config.loss.needs_reference:
        return nullcontext
    if config.model.lora_rank:
        return lambda: without_additions(policy)
    temperature = config.rollout.temperature
    parts = open_parts(config.model, ranks, None)
    frozen = build_policy(parts, config, ranks, temperature=temperature).requires_grad_(False)
    return lambda: nullcontext(frozen)


@contextmanager
def without_additions(policy: Policy) -> Iterator[Policy]:
    """The policy with LoRA's additions multiplied by 0."""
    layers = [layer for _, layer in added_layers(policy.model)]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        _scale(layers, [0.0] * len(layers))
        yield policy
    finally:
        _scale(layers, scales)


def _scale(layers: list[nn.Module], scales: list[float]) -> None:
    for layer, scale in zip(layers, scales, strict=True):
        layer.scaling[ADAPTER] = scale
