"""Options of sampling: engines and servers, prompts in flight, which groups are kept, rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tercet.core.option_types import (
    Choices,
    FewOrNone,
    Flags,
    Gpus,
    Host,
    PathOrEmpty,
    PathText,
    PerStep,
    Seconds,
    Share,
    Temperature,
    Url,
    Word,
)

LARGE_MODEL = 10**9
"""Parameters: the smallest published model of a family has twice as many."""
LONG_RESPONSE, SHORT_RESPONSE = 2048, 256
"""Most tokens of a response, for large models (as in the published runs) and for others."""
MOST_GROUPS = 384
"""Groups of a step in the published 3B run."""
LEAST_STEPS = 20
"""Optimiser steps below which a run changes little at the usual learning rates."""


@dataclass
class RolloutConfig:
    engine: Literal["local", "sglang"] = "local"
    """local: sample in this process, with the policy's own weights. sglang: on SGLang servers."""
    sglang_python: PathOrEmpty = ""
    """Python interpreter of the environment with sglang; servers are started with it."""
    server_gpus: list[Gpus] = field(default_factory=lambda: [""])
    """GPUs of each server to start, as `0` or `2,3`; an empty entry: the trainer's own GPUs."""
    colocated: bool = False
    """Servers and trainer share GPUs; servers free their memory while the policy is updated."""
    served_dtype: Literal["policy", "float32"] = "policy"
    """Dtype of the weights on the servers. float32: what LoRA adds to a bfloat16 policy reaches
    them unrounded, at twice the memory and traffic."""
    sglang_args: Flags = ""
    """Further flags of sglang.launch_server, as on a command line."""
    urls: list[Url] = field(default_factory=list)
    """Addresses of running SGLang servers; no servers are started then."""
    weight_sync: Literal["disk", "distributed", "tensor"] = "disk"
    """How weights reach the servers. disk: by files, kept in memory where there is room; servers of
    `urls` must see run.out. distributed: by a broadcast; the servers need GPUs of their own.
    tensor: as handles of the trainer's memory; servers on the same host."""
    weight_bucket_mib: PositiveInt = 512
    """Size in MiB of the weights that are sent at once."""
    sync_host: Host = "127.0.0.1"
    """Address at which servers reach this machine for `weight_sync: distributed`."""
    api_key_file: PathOrEmpty = ""
    """File with the key that is sent to the servers; servers that are started require it. Without
    a file the variable TERCET_API_KEY is read."""
    api_key: str | None = None
    """Refused: options are seen by others, on the command line and in config.yaml."""
    start_timeout_s: Seconds = 600.0
    """Longest that a server may take to load."""
    request_timeout_s: Seconds = 600.0
    """Longest that one response may take."""
    mismatch_limit: PositiveFloat | None = None
    """Most that servers' log-probs may differ from the trainer's, on average over the tokens that
    are sampled at the start; None: as much as the dtype explains."""
    max_in_flight: PerStep = 256
    """Most requests sent to the servers at once."""
    n_anchor: FewOrNone = 5
    """n1: responses sampled on the anchor image; 0 samples on the positive alone."""
    n_positive: FewOrNone = 5
    """n2: responses sampled on the positive image; 0 gives DAPO's group."""
    temperature: Temperature = 1.0
    """Logits are divided by it before sampling and for every log-prob."""
    top_p: Share = 0.99
    """Sample from the smallest set of tokens whose probability reaches this."""
    top_k: NonNegativeInt = 0
    """Sample from this many most likely tokens; 0: from all."""
    max_prompt_tokens: PositiveInt = 4096
    """A longer prompt is an error; prompts are never cut."""
    max_response_tokens: PositiveInt | Literal["auto"] = "auto"
    """A longer response is cut off. auto: 2,048, or 256 for a model of under a billion
    parameters."""
    groups_per_step: PerStep | Literal["auto"] = "auto"
    """Groups (prompts) that a rollout step keeps for training. auto: at most 384, and so few that
    all epochs together are at least 20 steps; chosen at the start of a run."""
    dispatch: Literal["auto", "batch", "stream", "ordered"] = "auto"
    """batch: each batch of prompts is finished before the next; every run gets the same groups.
    stream: enough prompts are always in flight, and the rest is aborted once the step is full;
    nothing waits for the slowest response, and short ones are favoured. ordered: the same, but
    groups count in the order in which they were asked for, so that none is. auto: ordered with
    SGLang, batch in this process."""
    prompts_per_batch: PerStep | None = None
    """Prompts of a batch; None: `groups_per_step`."""
    dynamic_sampling: bool = True
    """Keep only groups with both right and wrong answers; false: keep all of them."""
    max_rounds: PositiveInt | None = 20
    """Most rounds of a step; a round sends `groups_per_step` prompts. None: no limit."""
    on_exhausted: Literal["error", "train_kept", "keep_last_round"] = "error"
    """After the last round: stop with an error, train on the groups that were kept, or fill up with
    the last batch's groups (a batch of which no group passes is then also kept whole)."""
    surplus: Literal["carry", "drop"] = "carry"
    """Groups beyond `groups_per_step` go to the next step, or are dropped."""
    max_staleness: NonNegativeInt = 1
    """Most steps between the weights that sampled a carried group and those it trains."""
    overlap: Literal["off", "one_step"] = "off"
    """one_step: the next step is sampled while this one is trained on, by weights that are one step
    old then; for servers with GPUs of their own."""
    prompt: PathText = "stage2"
    """stage2, open, choice, both, attribute, no_thinking, or a template file with {question} and,
    by choice, {options}."""
    choices: Choices = 4
    """Options that choice, both, attribute and templates show: the true sub-category and the most
    similar others, shuffled; attribute shows none with 0."""
    reward: dict[str, float] | Word = "fine_r1"
    """fine_r1, fine_r1_strict, a function of your own as module:function, or weights of parts, as
    {format: 0.1, accuracy: 0.9}."""
    correct_part: Word | None = None
    """Part of a weighted reward that says whether an answer is correct; None: accuracy,
    accuracy_strict, classification or direct_answer, whichever is there first."""
    judge_url: Url | None = None
    """Address, ending in /v1, of the chat endpoint that judge_reasoning and best_of_rollouts ask.
    Its key is read from the variable TERCET_JUDGE_API_KEY."""
    judge_model: Word | None = None
    """Name of the model that it serves."""
    judge_cache: PathText | None = None
    """File that keeps the judge's answers for other runs; None: in memory."""
    reward_timeout_s: Seconds = 900.0
    """Longest that a reward function may take for a group; its process is killed then."""
    cut_off: Literal["keep", "mask", "penalise"] = "keep"
    """Responses that were cut off: trained on as any other, left out of the loss, or with
    `cut_off_penalty` taken from their reward."""
    cut_off_penalty: NonNegativeFloat = 0.5
    """What `cut_off: penalise` takes from a reward."""
    max_rows: PerStep = 256
    """Most responses that the in-process engine decodes at once."""

    def __post_init__(self) -> None:
        """Raises ValueError for no server at all, and for a key among the options, without
        repeating it."""
        if not self.server_gpus:
            raise ValueError("rollout.server_gpus needs an entry per server, got []")
        if self.api_key is not None:
            raise ValueError(
                "rollout.api_key is refused: options are seen by others; set the variable "
                "TERCET_API_KEY or rollout.api_key_file"
            )

    @property
    def longest_response(self) -> int:
        """Most tokens of a response, for any model."""
        tokens = self.max_response_tokens
        return LONG_RESPONSE if tokens == "auto" else tokens

    def settle(self, parameters: int, groups: int | None) -> None:
        """Put numbers in the place of every `auto`.

        Args:
            parameters: of the model.
            groups: that all epochs have together; None: not known.
        """
        if self.max_response_tokens == "auto":
            is_large = parameters >= LARGE_MODEL
            self.max_response_tokens = LONG_RESPONSE if is_large else SHORT_RESPONSE
        if self.groups_per_step == "auto":
            few = MOST_GROUPS if groups is None else groups // LEAST_STEPS
            self.groups_per_step = min(MOST_GROUPS, max(1, few))

    @property
    def ordered(self) -> bool:
        return self.dispatch == "ordered" or (self.dispatch == "auto" and self.engine == "sglang")

    @property
    def streaming(self) -> bool:
        return self.ordered or self.dispatch == "stream"
