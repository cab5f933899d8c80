"""The reward function that the options name, and the judge that it asks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from tercet.core.prompts import JUDGE_REASONING
from tercet.core.reward_process import RewardProcess
from tercet.core.rewards import load_reward as load_function
from tercet.core.rollout_config import RolloutConfig
from tercet.core.weighted_reward import WeightedReward
from tercet.rollout.judge import Judge, judged_part
from tercet.rollout.server import ServerError

JUDGED = "judge_reasoning"
PATIENCE_S = 60.0
"""How long a group's reward waits for a judge that is down, before its part is left out."""


def load_reward(config: RolloutConfig) -> Callable | RewardProcess | WeightedReward:
    """The reward function of a run; asks its judge one question to see that it is there.

    Raises:
        ValueError: as `core.rewards.load_reward` and WeightedReward, or for a judge that is needed
            and not named, or named and not there.
    """
    if isinstance(config.reward, str):
        return load_function(config.reward)
    more = {JUDGED: _judge(config)} if JUDGED in config.reward else {}
    return WeightedReward(
        config.reward,
        correct=config.correct_part,
        timeout_s=config.reward_timeout_s,
        more=more,
    )


def _judge(config: RolloutConfig) -> Callable:
    """R_cot of ReFine-RFT: how sound a judge finds a response's reasoning."""
    if not (config.judge_url and config.judge_model):
        raise ValueError(
            f"rollout.reward: {JUDGED} needs rollout.judge_url and rollout.judge_model"
        )
    given = (config.judge_url, config.judge_model)
    key = os.environ.get("TERCET_JUDGE_API_KEY")
    first = Judge(*given, api_key=key, patience_s=0.0)
    try:
        asyncio.run(first.ask("Say 1."))
    except ServerError as error:
        raise ValueError(f"rollout.judge_url: {error}") from error
    finally:
        first.close()
    judge = Judge(*given, api_key=key, patience_s=PATIENCE_S, cache=config.judge_cache)
    return judged_part(judge, JUDGE_REASONING)
