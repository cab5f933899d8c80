"""Every option of the training commands: one dataclass per concern, one docstring per field.

The command line and YAML use the same names: `--loss.kl_coef 0.02`, `loss: {kl_coef: 0.02}`.
`run.preset` names a set of options (see core.presets) that applies before both.

jsonargparse checks the types: numbers by its restricted types (PositiveInt, ...), words by their
Literal. LossConfig also checks itself, as people who call the kernels build one in Python.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tercet.core.log_config import GroupLogConfig, LogConfig
from tercet.core.model_config import ModelConfig
from tercet.core.option_types import (
    Decay,
    Device,
    Epsilon,
    PathOrEmpty,
    PathText,
    PerStep,
    Seed,
    Share,
    Threads,
    Word,
)
from tercet.core.parallel_config import ParallelConfig
from tercet.core.rollout_config import RolloutConfig
from tercet.core.tracker_config import TrackerConfig


@dataclass
class DataConfig:
    path: PathOrEmpty = ""
    """A triplets.json, a folder of photos, JSON Lines, or a Parquet file or folder of them."""
    names: PathText | None = None
    """JSON or YAML of names by folder of a folder of photos, {folder: name}; None: the folders'."""
    super_category: Word | None = None
    """What all photos show, for a folder that holds sub-categories alone: bird, for instance."""
    questions: PathText | None = None
    """YAML of question templates, {super_category: [template, ...]}; None: the built-in ones."""
    positive: Literal["redraw", "fixed"] = "redraw"
    """Positive and negative of an anchor: drawn anew every epoch, or the first of each list."""
    negatives: Literal["nearest", "nearest_image", "random", "genus"] = "nearest"
    """Photos of the most similar other sub-category (the paper), the most similar photos of others,
    photos of others drawn at random, or those of the most similar one of the same genus."""
    genus: PathText | None = None
    """CSV of sub_category and genus; how often the nearest is of the same genus is reported."""
    on_missing: Literal["error", "anchor"] = "error"
    """Without a positive or a negative: an error, or the anchor stands for it (GRPO, DAPO, 1-shot;
    without negatives, loss.kl_coef and loss.neg_entropy_coef must be 0)."""
    seen_fraction: Share = 0.6
    """Share of each super-category's sub-categories that training sees."""
    shots: PositiveInt = 4
    """Training photos per seen sub-category for TAPO."""
    sft_shots: NonNegativeInt = 1
    """Further photos per seen sub-category set aside for stage 1."""
    embedder: PathText = "policy"
    """What finds similar sub-categories: the policy's vision tower, its tokens' mean (`policy`) or
    their largest and smallest values (`policy_extremes`), or a SigLIP or CLIP folder."""
    embedder_layer: int | None = None
    """Block whose output embeds, from 0, or from -1 at the end; None: the embedder's own output."""
    similarity: Literal["cosine", "whitened"] = "cosine"
    """Of mean embeddings: as they are, or in units of what varies within a sub-category."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A missing or corrupt photo ends the run, or is left out and counted."""
    duplicates: Literal["report", "error"] = "report"
    """A photo under two labels, or both learnt and held out: left out of the tests, or an error."""
    seed: Seed = 0
    """Seed of the split, the shots and the triplets."""


@dataclass(frozen=True)
class LossConfig:
    """Options of the TAPO loss (equation: kernels/reference.py); a bad value raises ValueError.

    Left alone, its coefficients are the paper's; train/tapo.py's default preset has others for the
    negative (core/presets.py).
    """

    update_on: Literal["anchor", "own"] = "anchor"
    """Image on which responses sampled on the positive are trained: the anchor, or their own."""
    ratio_of: Literal["token", "sequence"] = "token"
    """pi / pi_old of each token, or its geometric mean over the response (GSPO)."""
    policy_term: Literal["clip", "cispo"] = "clip"
    """clip: the clipped ratio times A. cispo: -A log pi, weighted by the ratio between both bounds
    whatever A's sign, as a constant."""
    clip_low: float = 0.2
    """Where A < 0, the ratio is at least 1 - clip_low."""
    clip_high: float = 0.28
    """Where A >= 0, the ratio is at most 1 + clip_high."""
    clip_dual: float | None = 3.0
    """Where A < 0, the ratio is at most this, at least 1; None: off."""
    log_ratio_clamp: float | None = 20.0
    """Bound on |log pi - log pi_old|; None: off."""
    kl_coef: float = 0.01
    """gamma: weight of KL(pi || pi_neg), which is maximised."""
    kl_ratio: Literal["neg_over_policy", "policy_over_neg"] = "neg_over_policy"
    """Log-ratio of that KL's k3; policy_over_neg is the paper's text, unbounded when maximised."""
    kl_log_clamp: float | None = 20.0
    """Bound on |log-ratio| inside every k3; None: off."""
    kl_clamp: float | None = 10.0
    """Upper bound on every k3; None: off."""
    entropy_form: Literal["sampled", "exact"] = "sampled"
    """Both entropies: minus the sampled token's log-prob, or that of the whole distribution."""
    entropy_coef: float = 0.03
    """eta_1: weight of the entropy on the anchor, which is minimised."""
    neg_entropy_coef: float = 0.03
    """eta_2: weight of the entropy on the negative, which is minimised."""
    ref_kl_coef: float = 0.0
    """beta: weight of KL(pi || reference policy), which is minimised. The reference is the model
    that the run began from: LoRA's without its additions, or a frozen copy."""
    neg_grad: Literal["flow", "detach"] = "flow"
    """Whether gradients flow through pi_neg."""
    neg_at: Literal["now", "step_start"] = "now"
    """Weights of pi_neg: the current ones, or those at the start of the rollout step."""
    is_cap: float | None = None
    """Weigh each token's policy term by min(pi_old / pi_sampler, is_cap); None: off."""
    carried_cap: float | None = 2.0
    """The same bound for carried groups alone, which older weights sampled, where is_cap is off;
    with ratio_of sequence there are no weights."""
    mean_over: Literal["batch", "group", "response", "virtual_batch", "constant", "micro_batch"] = (
        "batch"
    )
    """Mean over the tokens of a mini-batch; or mean over groups, responses or virtual batches of
    their token means (micro_batch: the old name of virtual_batch); or constant: a response's sum,
    divided by rollout.max_response_tokens, and the mean over responses."""
    advantage_std: bool = True
    """Divide a group's advantages by its rewards' standard deviation; Dr. GRPO does not."""
    mean_over_size: int = 4
    """Responses of a virtual batch with `mean_over: virtual_batch`."""

    def __post_init__(self) -> None:
        if self.mean_over == "micro_batch":
            object.__setattr__(self, "mean_over", "virtual_batch")
        for name, hint in get_type_hints(LossConfig).items():
            allowed, value = get_args(hint), getattr(self, name)
            if get_origin(hint) is Literal and value not in allowed:
                allowed = " or ".join(map(repr, allowed))
                raise ValueError(f"loss.{name} must be {allowed}, got {value!r}")
        for names, holds, allowed in (
            ("kl_coef entropy_coef neg_entropy_coef ref_kl_coef", math.isfinite, "finite"),
            ("clip_low clip_high", lambda x: x is not None and x >= 0, "at least 0"),
            ("clip_dual", lambda x: x is None or x >= 1, "at least 1, or None for off"),
            (
                "log_ratio_clamp kl_log_clamp kl_clamp is_cap carried_cap",
                lambda x: x is None or x > 0,
                "positive, or None for off",
            ),
            ("mean_over_size", lambda x: x >= 1, "at least 1"),
        ):
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"loss.{name} must be {allowed}, got {getattr(self, name)}")
        self._check_forms()
        if self.kl_ratio == "policy_over_neg":
            warnings.warn(
                "kl_ratio='policy_over_neg' is unbounded when maximised: at a log-ratio of 8 its "
                "gradient is 3,000 times that of 'neg_over_policy'",
                stacklevel=3,
            )

    def _check_forms(self) -> None:
        """Raises ValueError for forms that have no meaning together."""
        if self.entropy_form == "exact" and self.neg_at == "step_start" and self.neg_entropy_coef:
            raise ValueError(
                "loss.entropy_form 'exact' needs loss.neg_at 'now', or loss.neg_entropy_coef 0: "
                "only log-probs are kept of the start of the step"
            )
        if self.neg_at == "step_start" and self.neg_grad == "flow":
            raise ValueError(
                "loss.neg_at 'step_start' makes pi_neg a constant: it needs loss.neg_grad 'detach'"
            )
        tokenwise = self.policy_term == "cispo" or self.is_cap is not None
        if self.ratio_of == "sequence" and (tokenwise or self.mean_over != "response"):
            raise ValueError(
                "loss.ratio_of 'sequence' needs loss.mean_over 'response', loss.policy_term 'clip' "
                "and loss.is_cap None: a response has one ratio"
            )

    @property
    def works_against_kl(self) -> str:
        """A line for the user where the negative's entropy outweighs the KL; empty elsewhere."""
        outweighs = 0 < self.kl_coef <= self.neg_entropy_coef
        if not outweighs or (self.entropy_form, self.neg_grad) != ("sampled", "flow"):
            return ""
        return (
            f"loss.neg_entropy_coef {self.neg_entropy_coef:g} is at least loss.kl_coef "
            f"{self.kl_coef:g}: with its sampled form and neg_grad flow the negative photo is "
            "taught the anchor's answer (docs/algorithm.md); watch the metric margin"
        )

    @property
    def needs_reference(self) -> bool:
        return self.ref_kl_coef != 0

    @property
    def needs_negative(self) -> bool:
        return self.kl_coef != 0 or self.neg_entropy_coef != 0

    @property
    def negative_now(self) -> bool:
        """Whether log-probs on the negative are computed with the update, at the same weights."""
        return self.needs_negative and self.neg_at == "now"


@dataclass
class OptimConfig:
    lr: NonNegativeFloat = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine fall to 0 (see `rates`)."""
    rates: Literal["full", "transformers"] = "full"
    """full: the warm-up ends at its last step and the decay at the run's. transformers: as its
    schedulers: 0 at the first step, and the decay would end one step after the run."""
    warmup_steps: NonNegativeInt = 0
    """Optimiser steps over which the learning rate rises."""
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Epsilon = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    decay_norms_and_biases: bool = True
    """Whether norms and biases decay too, as in the released code of TAPO; transformers' trainer,
    and so the released stage 1, leaves them out."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm; a step with a non-finite norm is skipped."""
    states: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the optimiser states of bfloat16 parameters; with the gradient, a parameter takes 10
    or 16 bytes. States of float32 parameters are float32."""
    max_skipped: PositiveInt = 5
    """So many skipped steps in a row end the run, with a checkpoint."""


@dataclass
class TapoOptimConfig(OptimConfig):
    skip_first_rollout_lr: bool = False
    """Learning rate 0 for the first rollout's mini-batches, as the released code's warm-up has."""
    groups_per_minibatch: PerStep | None = None
    """Groups of one optimiser step; None: the whole rollout step."""
    minibatch_by: Literal["group", "response"] = "group"
    """Deal whole groups to mini-batches, or single responses, balanced by length."""


@dataclass
class RunConfig(LogConfig, TrackerConfig):
    out: PathText = "runs/tapo"
    """Folder of checkpoints, logs and figures."""
    overwrite: bool = False
    """Begin a new run in a folder that holds one: that one is moved aside, to `out`.1 (.2, ...)."""
    epochs: PositiveInt = 10
    steps: PositiveInt | None = None
    """Steps of the run; None: as many as `epochs` gives."""
    save_every: PositiveInt = 20
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    keep_best: Word | None = None
    """Column of metrics.jsonl, for instance `accuracy`. Its mean over the steps since the last
    checkpoint rates a checkpoint; the one with the highest mean is kept as well."""
    stop_after: PositiveInt | None = None
    """End after so many values of `keep_best` in a row without a new best; steps that do not have
    it do not count. None: never."""
    save_lora: Literal["both", "adapter", "merged"] = "both"
    """What a checkpoint has of a policy with LoRA: a folder that transformers loads, which has the
    adapter merged, the adapter by itself in PEFT's form (adapter/), or both."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy in CPU memory."""
    device: Device = "auto"
    """auto: cuda where there is a GPU, else cpu."""
    threads: Threads | None = None
    """CPU threads of PyTorch; None: its own choice."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Raises ValueError for stop_after without the figure that it looks at."""
        if self.stop_after and not self.keep_best:
            raise ValueError("run.stop_after needs run.keep_best, the figure that it looks at")


@dataclass
class TapoRunConfig(RunConfig, GroupLogConfig):
    preset: Literal["tercet", "equation_4", "released", "paper"] = "tercet"
    """Options that apply before YAML and command line (paper: the old name of tercet)."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on held-out photos, greedy with stage 2's prompt; the last step has
    one too. 0: none."""
    eval_photos: PositiveInt = 64
    """Held-out photos of seen and as many of unseen sub-categories for them, drawn once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset == "paper":
            warnings.warn("run.preset 'paper' is called 'tercet' now", FutureWarning, stacklevel=3)
            self.preset = "tercet"


@dataclass
class TapoConfig:
    """Options of train/tapo.py."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: TapoOptimConfig = field(default_factory=TapoOptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: TapoRunConfig = field(default_factory=TapoRunConfig)

    def __post_init__(self) -> None:
        """Raises ValueError for combinations that have no meaning, naming the fields."""
        rollout, run = self.rollout, self.run
        if not run.eval_every and (run.keep_best or "").startswith("eval_"):
            raise ValueError(f"run.keep_best {run.keep_best} needs run.eval_every")
        if rollout.n_anchor + rollout.n_positive < 2:
            raise ValueError("rollout.n_anchor + rollout.n_positive must be at least 2, got 1")
        if not 0 < rollout.top_p <= 1:
            raise ValueError(f"rollout.top_p must lie in (0, 1], got {rollout.top_p}")
        if rollout.overlap != "off":
            self._check_overlap()
        longest = rollout.max_prompt_tokens + rollout.longest_response
        if self.parallel.micro_batch_tokens < longest:
            raise ValueError(
                f"parallel.micro_batch_tokens is {self.parallel.micro_batch_tokens}; it must hold "
                f"one prompt and one response: rollout.max_prompt_tokens + "
                f"rollout.max_response_tokens = {longest}"
            )

    def _check_overlap(self) -> None:
        rollout, loss = self.rollout, self.loss
        if rollout.engine == "local" or rollout.colocated:
            said = "rollout.engine sglang, and rollout.colocated false"
            raise ValueError(
                f"rollout.overlap one_step needs servers with GPUs of their own: {said}"
            )
        if not rollout.max_staleness:
            raise ValueError("rollout.overlap one_step needs rollout.max_staleness of at least 1")
        if loss.ratio_of == "sequence" or not (loss.is_cap or loss.carried_cap):
            said = "loss.ratio_of token, and loss.carried_cap or loss.is_cap"
            raise ValueError(f"rollout.overlap one_step needs importance weights: {said}")


@dataclass
class SftDataConfig:
    path: PathOrEmpty = ""
    """Stage-1 JSON: a list of {"messages": [...], "images": [...]}."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A missing or corrupt photo ends the run, or is left out and counted."""
    on_long: Literal["skip", "error"] = "skip"
    """A record longer than `optim.max_tokens` is left out and counted, or ends the run; none is
    ever cut."""
    held_out: Decay = 0.0
    """Share of the records that is not trained on, drawn by the seed; their loss is measured, once
    with their own photos and once with each other's."""


@dataclass
class SftOptimConfig(OptimConfig):
    lr: NonNegativeFloat = 5e-6
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up; linear and cosine fall to 0 (see `rates`)."""
    warmup_steps: NonNegativeInt = 6
    """Optimiser steps over which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.1
    samples_per_step: PerStep = 64
    """Samples of one optimiser step, over all ranks; an epoch's last step takes what is left."""
    max_tokens: PositiveInt = 4096
    """Most tokens of a record, prompt and target; see `data.on_long`."""


@dataclass
class SftRunConfig(RunConfig):
    out: PathText = "runs/sft"
    """Folder of checkpoints, logs and figures."""
    eval_every: PositiveInt | None = None
    """Steps between measurements of the loss on held-out records; None: after the last step."""


@dataclass
class SftConfig:
    """Options of train/sft.py."""

    data: SftDataConfig = field(default_factory=SftDataConfig)
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(freeze_vision=True, freeze_merger=True)
    )
    optim: SftOptimConfig = field(default_factory=SftOptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: SftRunConfig = field(default_factory=SftRunConfig)
