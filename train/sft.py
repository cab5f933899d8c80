"""Stage 1: supervised fine-tuning on chains of thought, on the packing that TAPO uses.

The loss is the mean over the assistant's tokens of an optimiser step. Vision tower and merger stay
as they are unless `--model.freeze_vision false --model.freeze_merger false`.

    torchrun train/sft.py --data.path stage1.json --model.path MODEL --run.out runs/stage1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tercet.core.config import SftConfig
from tercet.core.data import SftSample, read_sft
from tercet.core.model import PolicyParts, load_policy
from tercet.core.packing import pack
from tercet.core.prompts import chat_ids
from tercet.core.vision import PromptEncoder
from tercet.train.checkpoint import (
    load_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from tercet.train.command_line import parse, set_up
from tercet.train.figures import draw_curves
from tercet.train.interrupt import StopSignal
from tercet.train.loop import add_up, command, run, take_step
from tercet.train.optim import build_optimizer, learning_rate
from tercet.train.parallel import World
from tercet.train.policy import Policy
from tercet.train.run_log import RunLog


@dataclass(frozen=True)
class Example:
    """A tokenised sample."""

    prompt_ids: tuple[int, ...]
    images: tuple[str, ...]
    target_ids: tuple[int, ...]


def tokenize(sample: SftSample, parts: PolicyParts, system_prompt: str | None) -> Example:
    """Prompt and target ids of a conversation; the target ends with the end-of-turn token."""
    messages = [{"role": role, "content": content} for role, content in sample.messages]
    prompt = chat_ids(
        parts.tokenizer, messages[:-1], len(sample.images), system_prompt=system_prompt
    )
    target = parts.tokenizer.encode(messages[-1]["content"], add_special_tokens=False)
    return Example(tuple(prompt), sample.images, (*target, parts.stop_ids[0]))


class SftRun:
    """A stage-1 run's parts and its state; `step` is one optimiser step."""

    def __init__(self, config: SftConfig, resolved: str, stop: StopSignal, resume: Path | None):
        device = set_up(config.run)
        self.config, self.check_stop, self.out = config, stop.check, Path(config.run.out)
        self.world = World(device, config.parallel)
        if self.world.size > 1:
            raise ValueError("train/sft.py runs in one process for now: use --nproc-per-node 1")
        model = replace(config.model, path=str(resume)) if resume else config.model
        self.parts = load_policy(model, device)
        self.encoder = PromptEncoder(self.parts)
        self.samples, skipped = read_sft(config.data.path, config.data.on_bad_image)
        self.examples = [tokenize(s, self.parts, config.model.system_prompt) for s in self.samples]
        self.policy = Policy(self.parts, chunk_rows=config.parallel.head_chunk_rows)
        if config.model.gradient_checkpointing:
            self.parts.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = build_optimizer(self.policy.model.named_parameters(), config.optim)
        per_epoch = len(self.samples) / config.optim.samples_per_step
        self.total_steps = config.run.steps or max(1, round(config.run.epochs * per_epoch))
        self.steps_done = self.skipped = 0
        if resume:
            state = load_state(resume)
            self.steps_done = state["steps_done"]
            self.optimizer.load_state_dict(state["optimizer"])
            set_rng_state(state["rng"])
        self.log = RunLog(self.out, self.total_steps, resolved, config.run.wandb)
        self.log.resume_at(self.steps_done + 1)
        self.log.say(f"attention: {self.policy.attention}")
        for reason in skipped:
            self.log.say(f"left out: {reason}")

    def step(self) -> dict[str, float]:
        """One optimiser step on the next samples of the epoch's order; returns its figures."""
        config, size = self.config, self.config.optim.samples_per_step
        chosen = [self._order(self.steps_done * size + i) for i in range(size)]
        total = sum(len(self.examples[i].target_ids) for i in chosen)
        sums: dict[str, torch.Tensor] = {}
        with self.log.phase("update", total=size, unit="samples") as phase:
            self.policy.train()
            for chunk in self._micro_batches(chosen):
                self.check_stop()
                packed = pack([(self._prompt(i), [self.examples[i].target_ids]) for i in chunk])
                labels = torch.tensor([t for i in chunk for t in self.examples[i].target_ids])
                loss, metrics = self.policy(
                    packed,
                    "cross_entropy",
                    labels=labels,
                    loss_mask=torch.ones(len(labels)),
                    num_loss_tokens=total,
                )
                loss.backward()
                add_up(sums, metrics)
                phase.advance(len(chunk))
        lr = learning_rate(self.steps_done, self.total_steps, config.optim, False)
        figures = take_step(self, lr, sums)
        self.steps_done += 1
        return figures

    def close(self) -> None:
        """Nothing runs beside it."""

    def draw(self) -> None:
        """Write curves.png."""
        draw_curves(self.out / "metrics.jsonl", self.out / "curves.png")

    def save(self) -> Path:
        """Write a checkpoint of the state between two steps."""
        self.optimizer.zero_grad(set_to_none=True)
        state = {
            "steps_done": self.steps_done,
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(),
        }
        keep = self.config.run.keep_last
        return save_checkpoint(self.out, self.steps_done, self.parts.save, state, keep)

    def _order(self, position: int) -> int:
        """Sample at a position of the endless stream: every epoch a fresh permutation."""
        epoch, place = divmod(position, len(self.examples))
        order = np.random.default_rng([self.config.run.seed, epoch])
        return int(order.permutation(len(self.examples))[place])

    def _prompt(self, i: int):
        example = self.examples[i]
        return self.encoder(example.prompt_ids, example.images)

    def _micro_batches(self, chosen: Sequence[int]) -> Iterator[list[int]]:
        budget, limit = self.config.parallel.micro_batch_tokens, self.config.optim.max_tokens
        batch, used = [], 0
        for i in chosen:
            length = len(self._prompt(i)) + len(self.examples[i].target_ids)
            if length > min(budget, limit):
                raise ValueError(
                    f"sample {self.samples[i].id!r} has {length} tokens; optim.max_tokens is "
                    f"{limit} and parallel.micro_batch_tokens {budget} (samples are never cut)"
                )
            if batch and used + length > budget:
                yield batch
                batch, used = [], 0
            batch.append(i)
            used += length
        if batch:
            yield batch


def train(config: SftConfig, resolved: str, resume: str | None = None) -> Path:
    """Run stage 1 to its last step; returns the folder of the last checkpoint.

    Args:
        config: every option.
        resolved: the same as YAML, kept beside the run.
        resume: checkpoint folder, `auto`, or None for a new run.
    """
    return run(SftRun, config, resolved, resume)


def main(argv: Sequence[str] | None = None) -> None:
    config, resume, resolved = parse(SftConfig, argv, __doc__)
    print(f"checkpoint: {train(config, resolved, resume)}")


if __name__ == "__main__":
    command(main)
