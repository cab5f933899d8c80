"""TRL's GRPOTrainer on the policy, photos, prompts and options of bench/whole_step_case.py.

TRL needs a processor for text and images. transformers' own wants torchvision, whose resizing
differs; the one here holds the PIL image processor that ours uses.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from torch import Tensor
from transformers import Qwen2_5_VLProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tercet.bench.whole_step_case import (
    BETAS,
    CLIPS,
    DECAY,
    EPS,
    FIXED_STEPS,
    MAX_NORM,
    Fixed,
    PeakMemory,
    Taken,
    Work,
    between,
    config_of,
    fixed_responses,
    gradients_of,
    now,
    question_of,
    rewards_of,
    triplets_of,
    updates_since,
    weights_of,
)
from tercet.core.config import ModelConfig
from tercet.core.data.manifest import Manifest
from tercet.core.models import load_policy
from tercet.core.types import PolicyParts, Triplet


class ImageProcessor(Qwen2_5_VLProcessor):
    """Tokenizer and image processor of a policy, without videos."""

    def __init__(self, parts: PolicyParts):
        self.tokenizer, self.image_processor = parts.tokenizer, parts.image_processor
        self.tokenizer.padding_side = "left"  # TRL asks for it
        self.chat_template = parts.tokenizer.chat_template
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = parts.banned_ids

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class Timed(GRPOTrainer):
    """The trainer with the seconds of its parts."""

    spent: dict[str, float]

    @contextmanager
    def clocked(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spent[name] += time.perf_counter() - started

    def _generate_single_turn(self, *given, **more):
        with self.clocked("sampling"):
            return super()._generate_single_turn(*given, **more)

    def _calculate_rewards(self, *given, **more):
        with self.clocked("reward"):
            return super()._calculate_rewards(*given, **more)

    def training_step(self, *given, **more):
        before = sum(self.spent.values())
        started = time.perf_counter()
        loss = super().training_step(*given, **more)
        within = sum(self.spent.values()) - before
        self.spent["training"] += time.perf_counter() - started - within
        return loss

    def _generate_and_score_completions(self, inputs):
        before, started = sum(self.spent.values()), time.perf_counter()
        found = super()._generate_and_score_completions(inputs)
        within = sum(self.spent.values()) - before
        self.spent["preparing"] += time.perf_counter() - started - within
        return found


class Watch(TrainerCallback):
    """Notes every step's seconds, the trainer's clocks, and memory above the first step's start."""

    def __init__(self):
        self.clocks: list[tuple[float, float]] = []
        self.parts: list[dict[str, float]] = []
        self.gradients: dict[str, Tensor] = {}
        self.trainer: Timed | None = None

    def on_train_begin(self, *_, **__):
        self.memory = PeakMemory()
        self.clocks.append(now())

    def on_pre_optimizer_step(self, *_, model=None, **__):
        self._updating = time.perf_counter()
        if self.trainer.rollout_func and not self.gradients:
            self.gradients = gradients_of(model)

    def on_optimizer_step(self, *_, **__):
        self.trainer.spent["training"] += time.perf_counter() - self._updating

    def on_step_end(self, *_, **__):
        self.clocks.append(now())
        self.parts.append(dict(self.trainer.spent))
        self.trainer.spent.clear()


def dataset_of(triplets: Sequence[Triplet]) -> datasets.Dataset:
    """Conversational prompts with a column of photos, which are decoded when they are read."""
    rows = {
        "prompt": [[{"role": "user", "content": question_of(one)}] for one in triplets],
        "image": [one.anchor for one in triplets],
        "number": list(range(len(triplets))),
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


EQUAL = dict(
    loss_type="dapo",
    beta=0.0,
    epsilon=CLIPS[0],
    epsilon_high=CLIPS[1],
    delta=None,
    num_iterations=1,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    shuffle_dataset=False,
    lr_scheduler_type="constant",
    optim="adamw_torch_fused",
    adam_beta1=BETAS[0],
    adam_beta2=BETAS[1],
    adam_epsilon=EPS,
    weight_decay=DECAY,
    max_grad_norm=MAX_NORM,
    bf16=False,
    gradient_checkpointing=False,
    use_cpu=True,
)
"""Options that are the same for every policy, by TRL's names of them."""
QUIET = dict(
    remove_unused_columns=False,
    save_strategy="no",
    logging_steps=1,
    report_to=[],
    disable_tqdm=True,
)


def options_of(work: Work, out: Path, steps: int, seed: int, micro_batch: int) -> dict:
    """TRL's options: those of EQUAL and QUIET, and the work's."""
    passes = work.sampled // micro_batch
    return (
        EQUAL
        | QUIET
        | {
            "output_dir": str(out),
            "max_steps": steps,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": passes,
            "steps_per_generation": passes,
            "num_generations": work.responses,
            "max_completion_length": work.tokens,
            "learning_rate": work.lr,
            "seed": seed,
        }
    )


def make_trainer(
    work: Work,
    folder: Path,
    out: Path,
    steps: int,
    seed: int,
    micro_batch: int,
    rollout: Callable | None = None,
) -> tuple[Timed, Watch]:
    """The trainer with the options that are equal to ours.

    Args:
        work: what is trained.
        folder: with start and triplets.
        out: TRL's own folder; nothing is saved.
        steps: of the run.
        seed: of the sampling.
        micro_batch: sequences of one forward pass.
        rollout: what gives responses, in place of sampling; gradients are not clipped then.
    """
    config, _ = config_of(work, folder, out, steps, seed)
    parts = load_policy(ModelConfig(path=str(folder / "start"), dtype="float32"))
    names = Manifest.read(config.data.path).names
    triplets = triplets_of(config, work.groups * steps)

    def reward(completions, number, **_) -> list[float]:
        said = [completion[0]["content"] for completion in completions]
        return rewards_of(said, [triplets[n] for n in number], names)

    options = options_of(work, out, steps, seed, micro_batch)
    options["generation_kwargs"] = {"suppress_tokens": list(parts.banned_ids)}
    if rollout:
        options["max_grad_norm"] = 0.0
    watch = Watch()
    trainer = Timed(
        model=parts.model,
        reward_funcs=reward,
        args=GRPOConfig(**options),
        train_dataset=dataset_of(triplets),
        processing_class=ImageProcessor(parts),
        callbacks=[watch],
        rollout_func=rollout,
    )
    trainer.spent, watch.trainer = defaultdict(float), trainer
    return trainer, watch


def train_trl(
    work: Work, folder: Path, out: Path, steps: int, seed: int, micro_batch: int
) -> Taken:
    """Run TRL's steps."""
    trainer, watch = make_trainer(work, folder, out, steps, seed, micro_batch)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "reward" in line]
    return Taken(
        *between(watch.clocks),
        *([parts.get(name, 0.0) for parts in watch.parts] for name in ("sampling", "reward")),
        [parts.get("training", 0.0) for parts in watch.parts],
        [line["completions/mean_length"] * work.sampled for line in lines],
        [line["reward"] for line in lines],
        watch.memory.start_mib,
        watch.memory.above_mib(),
    )


def fixed_trl(work: Work, folder: Path, out: Path, micro_batch: int) -> Fixed:
    """Steps of TRL's on `fixed_responses`, through its rollout_func."""
    config, _ = config_of(work, folder, out, FIXED_STEPS, 0)
    chosen = triplets_of(config, FIXED_STEPS * work.groups)
    said = [text for one in chosen for text in fixed_responses(one, work.responses)]
    seen: dict[str, list] = {}

    def rollout(prompts: list, trainer: Timed) -> dict:
        prompt_ids, _, fields = trainer._tokenize_prompts(prompts)
        tokenizer, end = trainer.processing_class.tokenizer, trainer.eos_token_ids[0]
        texts = said[trainer.state.global_step * work.sampled :][: work.sampled]
        ids = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in texts]
        if not seen:
            sizes = [int(grid.prod()) for grid in torch.as_tensor(fields["image_grid_thw"])]
            seen["pixels"] = list(torch.as_tensor(fields["pixel_values"]).split(sizes))
            seen["prompt_ids"] = [list(ids) for ids in prompt_ids]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None}

    trainer, watch = make_trainer(work, folder, out, FIXED_STEPS, 0, micro_batch, rollout)
    before = weights_of(trainer.model)
    trainer.train()
    first = slice(None, None, work.responses)
    updates = updates_since(before, trainer.model)
    return Fixed(seen["prompt_ids"][first], seen["pixels"][first], watch.gradients, updates)
