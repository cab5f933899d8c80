"""The reward function that the options name, and the judge that it asks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial

from tercet.core.config import TapoConfig
from tercet.core.data.negatives import read_genera
from tercet.core.prompts import JUDGE_REASONING, VERIFIER
from tercet.core.reward_process import RewardProcess
from tercet.core.rewards import PARTS, hierarchical
from tercet.core.rewards import load_reward as load_function
from tercet.core.rollout_config import RolloutConfig
from tercet.core.weighted_reward import WeightedReward
from tercet.rollout.judge import Judge, judged_part, verified_part
from tercet.rollout.server import ServerError

JUDGED = {
    "judge_reasoning": partial(judged_part, template=JUDGE_REASONING),
    "best_of_rollouts": partial(verified_part, template=VERIFIER),
}
"""Parts of weighted rewards that ask the judge: from the judge to the part."""
GENUS = "hierarchical"
PATIENCE_S = 60.0
"""How long a group's reward waits for a judge that is down, before its part is left out."""


def load_reward(config: TapoConfig) -> Callable | RewardProcess | WeightedReward:
    """The reward function of a run; asks its judge one question to see that it is there.

    Raises:
        ValueError: as `core.rewards.load_reward` and WeightedReward, or for a judge that is needed
            and not named, or named and not there, or genera that are needed and not named.
    """
    rollout, known, more = config.rollout, dict(PARTS), {}
    if isinstance(rollout.reward, str):
        return load_function(rollout.reward)
    if asked := JUDGED.keys() & rollout.reward.keys():
        judge = _judge(rollout, " and ".join(sorted(asked)))
        more = {name: JUDGED[name](judge) for name in asked}
    if GENUS in rollout.reward:
        if config.data.genus is None:
            raise ValueError(
                f"rollout.reward: {GENUS} needs data.genus, a CSV of sub_category,genus"
            )
        known[GENUS] = partial(hierarchical, genera=read_genera(config.data.genus))
    return WeightedReward(
        rollout.reward,
        correct=rollout.correct_part,
        timeout_s=rollout.reward_timeout_s,
        known=known,
        more=more,
    )


def _judge(config: RolloutConfig, parts: str) -> Judge:
    """The judge of the options, which has answered once."""
    if not (config.judge_url and config.judge_model):
        raise ValueError(f"rollout.reward: {parts} needs rollout.judge_url and rollout.judge_model")
    given = (config.judge_url, config.judge_model)
    key = os.environ.get("TERCET_JUDGE_API_KEY")
    first = Judge(*given, api_key=key, patience_s=0.0)
    try:
        asyncio.run(first.ask("Say 1."))
    except ServerError as error:
        raise ValueError(f"rollout.judge_url: {error}") from error
    finally:
        first.close()
    return Judge(*given, api_key=key, patience_s=PATIENCE_S, cache=config.judge_cache)
