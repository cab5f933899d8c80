"""Every option of the training commands: one dataclass a concern, one docstring a field.

On the command line and in YAML the same names are used: `--loss.kl_coef 0.02`, `loss: {kl_coef:
0.02}`. `run.preset` names a bundle of them (see PRESETS) that applies before both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PRESETS: dict[str, dict[str, object]] = {
    # The paper's form; also the default of every field below.
    "paper": {
        "loss.update_on": "anchor",
        "loss.kl_ratio": "neg_over_policy",
        "loss.neg_grad": "flow",
        "loss.neg_at": "now",
        "loss.mean_over": "batch",
        "rollout.max_rounds": 20,
        "rollout.on_exhausted": "error",
        "rollout.dispatch": "auto",
        "rollout.surplus": "carry",
        "data.positive": "redraw",
        "optim.minibatch_by": "group",
        "optim.skip_first_rollout_lr": False,
    },
    # What the published Fine-R1 code does where it differs from the paper.
    "released": {
        "loss.update_on": "own",
        "loss.kl_ratio": "neg_over_policy",
        "loss.neg_grad": "detach",
        "loss.neg_at": "step_start",
        "loss.mean_over": "micro_batch",
        "rollout.max_rounds": None,
        "rollout.on_exhausted": "keep_last_round",
        "rollout.dispatch": "batch",
        "rollout.surplus": "drop",
        "data.positive": "fixed",
        "optim.minibatch_by": "response",
        "optim.skip_first_rollout_lr": True,
    },
}


@dataclass
class DataConfig:
    path: str = ""
    """triplets.json, folder of photos, JSON Lines, or Parquet file or folder (see core.data)."""
    questions: str | None = None
    """YAML of question templates: {super_category: [template, ...]}; None: built-in ones."""
    positive: Literal["redraw", "fixed"] = "redraw"
    """Positive and negative photo of an anchor: drawn anew every epoch, or each list's first."""
    seen_fraction: float = 0.6
    """Share of each super-category's sub-categories that training sees."""
    shots: int = 4
    """Training photos per seen sub-category for TAPO."""
    sft_shots: int = 1
    """Further photos per seen sub-category set aside for stage 1."""
    embedder: str = "policy"
    """What tells similar sub-categories: the policy's vision tower, or a SigLIP/CLIP folder."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A missing or corrupt photo stops the reading, or is left out and counted."""
    seed: int = 0
    """Seed of split, shots and triplets."""


@dataclass
class ModelConfig:
    path: str = ""
    """Folder or hub id of the model."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Parameter dtype; auto: as stored."""
    min_pixels: int | None = None
    """Fewest pixels of a resized image; None: the image processor's own."""
    max_pixels: int | None = None
    """Most pixels of a resized image; None: the image processor's own."""
    system_prompt: str | None = None
    """System message of every prompt; None: the chat template's own default."""
    freeze_vision: bool = False
    """Leave the vision tower (without its merger) as it is."""
    freeze_merger: bool = False
    """Leave the merger between vision tower and language model as it is."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping their activations."""
    lora_rank: int = 0
    """Train low-rank additions of this rank (LoRA) and nothing else; 0: the weights themselves."""
    lora_alpha: int = 128
    """Additions are scaled by lora_alpha / lora_rank."""
    lora_targets: str = r".*language_model\.layers\..*_proj"
    """Linear layers with additions: regular expression that their whole name matches."""
    compile: bool = False
    """torch.compile of the parts of each decoder layer; attention itself is left out."""
    liger: bool = False
    """Liger's RMSNorm and SwiGLU (on a GPU; needs liger-kernel)."""


@dataclass
class RolloutConfig:
    engine: Literal["local", "sglang"] = "local"
    """local: in this process, on the policy's own weights. sglang: SGLang servers."""
    sglang_python: str = ""
    """Python of the environment that holds sglang: servers are started with it."""
    server_gpus: list[str] = field(default_factory=lambda: [""])
    """One server of ours an entry: the GPUs it sees, as `0` or `2,3`; empty: the trainer's own."""
    colocated: bool = False
    """Servers and trainer share GPUs: servers sleep while the policy is updated."""
    sglang_args: str = ""
    """Further flags of sglang.launch_server, as on a command line."""
    urls: list[str] = field(default_factory=list)
    """SGLang servers that run already, in place of ours."""
    weight_sync: Literal["disk", "distributed", "tensor"] = "disk"
    """How weights reach servers: files (in memory where there is room; servers of `urls` must see
    run.out), a broadcast (servers with GPUs of their own), or handed over on one host."""
    weight_bucket_mib: int = 512
    """Weights sent at once."""
    sync_host: str = "127.0.0.1"
    """Address of this machine that servers join for `weight_sync: distributed`."""
    api_key: str | None = None
    """Sent to the servers, and asked for by ours."""
    start_timeout_s: float = 600.0
    """How long a server may take to load."""
    request_timeout_s: float = 600.0
    """How long one response may take."""
    max_in_flight: int = 256
    """Most requests sent to the servers at once."""
    n_anchor: int = 5
    """n1: responses sampled on the anchor image."""
    n_positive: int = 5
    """n2: responses sampled on the positive image; 0 gives DAPO's group."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 0.99
    """Nucleus: smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Keep this many most likely tokens; 0: all."""
    max_prompt_tokens: int = 4096
    """A longer prompt is an error; it is never cut."""
    max_response_tokens: int = 2048
    """Longer responses are cut off."""
    groups_per_step: int = 384
    """Kept groups (prompts) of a rollout step."""
    dispatch: Literal["auto", "batch", "stream"] = "auto"
    """batch: prompts in batches, each finished before the next, the same groups in every run.
    stream: always enough prompts in flight, the rest aborted once the step is full; nothing waits
    for the slowest response. auto: stream to SGLang servers, batch in this process."""
    prompts_per_batch: int | None = None
    """Prompts of a batch; None: as many as the step has groups."""
    max_rounds: int | None = 20
    """A round is one step's worth of prompts sent; None: no limit."""
    on_exhausted: Literal["error", "train_kept", "keep_last_round"] = "error"
    """When the rounds are spent: stop, train on what was kept, or fill up from the last batch of
    prompts (which is then also kept whole whenever none of its groups passes)."""
    surplus: Literal["carry", "drop"] = "carry"
    """Groups beyond a step's number go to the next step, or are dropped."""
    max_staleness: int = 1
    """Oldest weights, in steps, that a carried group may come from."""
    reward: str = "fine_r1"
    """fine_r1, fine_r1_strict, or a function of your own as module:function."""
    cut_off: Literal["keep", "mask", "penalise"] = "keep"
    """Responses that hit the limit: as any other, left out of the loss, or `cut_off_penalty` off
    their reward."""
    cut_off_penalty: float = 0.5
    """Taken from the reward of a cut-off response with `cut_off: penalise`."""
    max_rows: int = 256
    """Most responses the in-process engine decodes at once."""

    @property
    def streaming(self) -> bool:
        return self.dispatch == "stream" or (self.dispatch == "auto" and self.engine == "sglang")


@dataclass
class LossConfig:
    update_on: Literal["anchor", "own"] = "anchor"
    """Image under which responses sampled on the positive are scored: the anchor, or their own."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    clip_dual: float | None = 3.0
    """For negative advantages the loss is at most this times |A|; None: off."""
    log_ratio_clamp: float | None = 20.0
    """Bound on |log pi - log pi_old|; None: off."""
    kl_coef: float = 0.01
    """gamma: weight of KL(pi || pi_neg), which is maximised."""
    kl_ratio: Literal["neg_over_policy", "policy_over_neg"] = "neg_over_policy"
    """Form of the k3 estimator; policy_over_neg is the paper's text, unbounded when maximised."""
    kl_log_clamp: float | None = 20.0
    """Bound on the log-ratio inside k3; None: off."""
    kl_clamp: float | None = 10.0
    """Bound on k3; None: off."""
    entropy_coef: float = 0.03
    """eta_1: weight of the sampled entropy on the anchor, which is minimised."""
    neg_entropy_coef: float = 0.03
    """eta_2: weight of the sampled entropy on the negative, which is minimised."""
    neg_grad: Literal["flow", "detach"] = "flow"
    """Whether gradients pass through pi_neg."""
    neg_at: Literal["now", "step_start"] = "now"
    """pi_neg of the current weights, or computed once a rollout step."""
    is_cap: float | None = None
    """Weigh the policy term by min(pi_old / pi_sampler, this), token by token; None: off."""
    mean_over: Literal["batch", "group", "response", "micro_batch"] = "batch"
    """Token mean over the mini-batch, or mean over groups, responses or virtual micro-batches of
    their token means."""
    mean_over_size: int = 4
    """Responses of a virtual micro-batch with `mean_over: micro_batch`."""

    @property
    def needs_negative(self) -> bool:
        return self.kl_coef != 0 or self.neg_entropy_coef != 0

    @property
    def negative_now(self) -> bool:
        """Whether the negative is scored beside the update, at the same weights."""
        return self.needs_negative and self.neg_at == "now"


@dataclass
class OptimConfig:
    lr: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up, down to 0 at the last optimiser step."""
    warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; a step with a non-finite norm is skipped."""
    states: Literal["bfloat16", "float32"] = "bfloat16"
    """Optimiser states of bfloat16 parameters: 10 or 16 bytes a parameter with its gradient. Those
    of float32 parameters are float32."""
    max_skipped: int = 5
    """Steps skipped one after the other that end the run, with a checkpoint."""


@dataclass
class TapoOptimConfig(OptimConfig):
    skip_first_rollout_lr: bool = False
    """Learning rate 0 for the first rollout's mini-batches (the released code's warm-up)."""
    groups_per_minibatch: int | None = None
    """Groups of one optimiser step; None: the whole rollout step."""
    minibatch_by: Literal["group", "response"] = "group"
    """Mini-batches of whole groups, or of responses balanced by length, cutting through groups."""


@dataclass
class ParallelConfig:
    micro_batch_tokens: int = 16384
    """Most packed tokens of one branch of one forward pass."""
    branches: Literal["joint", "one_at_a_time"] = "joint"
    """Forward and backward of update and negative together, or one after the other: the same
    gradient with half the activations and one more forward pass."""
    head_chunk_rows: int | None = None
    """Response rows that reach the head at once; None: what suits the device."""
    replicas: int = 1
    """Groups of ranks that hold a whole sharded copy each (HSDP): one a machine, as a rule."""
    mixed_precision: bool = False
    """float32 parameters (`model.dtype`) that are computed with in bfloat16; their gradients are
    summed over ranks in float32."""
    offload: bool = False
    """Parameters, gradients and optimiser states stay in CPU memory; each layer's parameters are
    on the GPU while it is computed, and the CPU takes the optimiser step."""
    timeout_s: float = 7200.0
    """Longest that a rank waits for the others; sampling counts."""


@dataclass
class RunConfig:
    out: str = "runs/tapo"
    """Folder of checkpoints, logs and figures."""
    epochs: int = 10
    steps: int | None = None
    """Steps; None: what the epochs give."""
    save_every: int = 20
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: str | None = None
    """Figure of metrics.jsonl, for instance `accuracy`: the checkpoint with the highest mean since
    the one before it is kept as well."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy in CPU memory."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    threads: int | None = None
    """CPU threads of PyTorch; None: its own choice."""
    wandb: str | None = None
    """Weights & Biases project; None: not used."""
    seed: int = 0


@dataclass
class TapoRunConfig(RunConfig):
    preset: Literal["paper", "released"] = "paper"
    """Bundle of options that applies before YAML and command line."""


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
        rollout, loss = self.rollout, self.loss
        if min(rollout.n_anchor, rollout.n_positive) < 0 or not rollout.n_anchor:
            raise ValueError(
                "rollout.n_anchor must be at least 1 and rollout.n_positive at least 0, got "
                f"{rollout.n_anchor} and {rollout.n_positive}"
            )
        if rollout.n_anchor + rollout.n_positive < 2:
            raise ValueError("rollout.n_anchor + rollout.n_positive must be at least 2, got 1")
        if loss.neg_at == "step_start" and loss.neg_grad == "flow":
            raise ValueError(
                "loss.neg_at 'step_start' makes pi_neg a constant: it needs loss.neg_grad 'detach'"
            )
        longest = rollout.max_prompt_tokens + rollout.max_response_tokens
        if self.parallel.micro_batch_tokens < longest:
            raise ValueError(
                f"parallel.micro_batch_tokens is {self.parallel.micro_batch_tokens}; it must hold "
                f"one prompt and one response: rollout.max_prompt_tokens + "
                f"rollout.max_response_tokens = {longest}"
            )
        positive = {
            "rollout.groups_per_step": rollout.groups_per_step,
            "rollout.prompts_per_batch": rollout.prompts_per_batch,
            "rollout.max_rounds": rollout.max_rounds,
            "rollout.max_response_tokens": rollout.max_response_tokens,
            "rollout.max_rows": rollout.max_rows,
            "rollout.max_in_flight": rollout.max_in_flight,
            "rollout.weight_bucket_mib": rollout.weight_bucket_mib,
            "optim.groups_per_minibatch": self.optim.groups_per_minibatch,
            "optim.max_skipped": self.optim.max_skipped,
            "loss.mean_over_size": loss.mean_over_size,
            "parallel.head_chunk_rows": self.parallel.head_chunk_rows,
            "parallel.replicas": self.parallel.replicas,
            "run.save_every": self.run.save_every,
            "run.keep_last": self.run.keep_last,
            "data.shots": self.data.shots,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if loss.is_cap is not None and loss.is_cap <= 0:
            raise ValueError(f"loss.is_cap must be positive, got {loss.is_cap}")
        if not 0 < rollout.top_p <= 1:
            raise ValueError(f"rollout.top_p must lie in (0, 1], got {rollout.top_p}")
        if rollout.temperature <= 0:
            raise ValueError(
                f"rollout.temperature must be positive in training, got {rollout.temperature}"
            )


@dataclass
class SftDataConfig:
    path: str = ""
    """Stage-1 JSON: a list of {"messages": [...], "images": [...]}."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A missing or corrupt photo stops the reading, or is left out and counted."""


@dataclass
class SftOptimConfig(OptimConfig):
    lr: float = 5e-6
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up, down to 0 at the last optimiser step."""
    warmup_steps: int = 6
    """Optimiser steps over which the learning rate rises."""
    weight_decay: float = 0.1
    samples_per_step: int = 64
    """Samples of one optimiser step, over all ranks."""
    max_tokens: int = 4096
    """A longer sample is an error; it is never cut."""


@dataclass
class SftRunConfig(RunConfig):
    out: str = "runs/sft"
    """Folder of checkpoints, logs and figures."""


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
