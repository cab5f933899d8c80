"""Stage 1: supervised fine-tuning on chains of thought, on the packing that TAPO uses.

The loss is the mean over the assistant's tokens of an optimiser step. Vision tower and merger stay
as they are unless `--model.freeze_vision false --model.freeze_merger false`.

    torchrun train/sft.py --data.path stage1.json --model.path MODEL --run.out runs/stage1
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tercet.core.config import SftConfig
from tercet.train.learner.command_line import command, parse, show_help

if __name__ == "__main__":
    show_help(SftConfig, __doc__)  # before torch and transformers are imported

import numpy as np
import torch

from tercet.core.data.photos import SftSample, read_sft
from tercet.core.data.vision import PromptEncoder
from tercet.core.packing import pack
from tercet.core.prompts import chat_ids
from tercet.core.types import PolicyParts
from tercet.train.learner.assemble import build_policy, open_parts
from tercet.train.learner.budget import TokenBudget
from tercet.train.learner.checkpoint import Checkpoints, load_state
from tercet.train.learner.device import set_up
from tercet.train.learner.figures import draw_curves
from tercet.train.learner.interrupt import StopSignal
from tercet.train.learner.loop import add_up, open_log, run, take_step
from tercet.train.learner.optim import build_optimizer, learning_rate
from tercet.train.learner.ranks import Ranks, restarts


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
        self.config, self.stop, self.out = config, stop, Path(config.run.out)
        self.ranks = Ranks(device, config.parallel)
        self.parts = open_parts(config.model, self.ranks, resume)
        self.encoder = PromptEncoder(self.parts)
        self.samples, skipped = read_sft(config.data.path, config.data.on_bad_image)
        self.examples = [tokenize(s, self.parts, config.model.system_prompt) for s in self.samples]
        self.policy = build_policy(self.parts, config, self.ranks)
        self.optimizer = build_optimizer(self.policy.model.named_parameters(), config.optim)
        self.saver = Checkpoints(self, config.run)
        per_epoch = len(self.samples) / config.optim.samples_per_step
        self.total_steps = config.run.steps or max(1, round(config.run.epochs * per_epoch))
        self.steps_done = self.skipped = 0
        if resume:
            state = load_state(resume)
            self.steps_done = state["steps_done"]
            self.saver.restore(resume, state)
        self.log = open_log(self, resolved)
        self._budget = TokenBudget(
            config, self.ranks, config.optim.max_tokens, self.log.say, bool(resume)
        )
        for reason in skipped:
            self.log.say(f"left out: {reason}")

    def step(self) -> dict[str, float]:
        """One optimiser step on the next samples of the epoch's order; returns its figures."""
        size = self.config.optim.samples_per_step
        chosen = [self._order(self.steps_done * size + i) for i in range(size)]
        with self.log.phase("update", total=size, unit="samples") as phase:
            sums = self._budget.fit(lambda: self._accumulate(chosen, phase), self.policy.zero_grad)
        lr = learning_rate(self.steps_done, self.total_steps, self.config.optim, False)
        figures = take_step(self, lr, self.ranks.add(sums))
        self.steps_done += 1
        return figures

    def _accumulate(self, chosen: Sequence[int], phase) -> dict[str, torch.Tensor]:
        """Add the samples' gradients up; returns sums over this rank's."""
        total = sum(len(self.examples[i].target_ids) for i in chosen)
        sums: dict[str, torch.Tensor] = {}
        self.policy.train()
        for chunk, is_filler in self._micro_batches(chosen):
            self.check_stop()
            packed = pack([(self._prompt(i), [self.examples[i].target_ids]) for i in chunk])
            labels = torch.tensor([t for i in chunk for t in self.examples[i].target_ids])
            loss, metrics = self.policy(
                packed,
                "cross_entropy",
                labels=labels,
                loss_mask=torch.full((len(labels),), float(not is_filler)),
                num_loss_tokens=total,
            )
            loss.backward()
            add_up(sums, metrics)
            phase.advance(len(chunk) * self.ranks.size)
        return sums

    def check_stop(self) -> None:
        """Raises Interrupted, on all ranks at once, when a signal has come to one of them."""
        self.ranks.check(self.stop)

    def close(self) -> None:
        """Leave the other ranks."""
        self.saver.close()
        self.ranks.close()

    def draw(self) -> None:
        """Write curves.png."""
        if not self.ranks.is_first:
            return
        draw_curves(self.out / "metrics.jsonl", self.out / "curves.png")

    def save(self) -> Path:
        """Write a checkpoint of the state between two steps."""
        return self.saver.save(self.steps_done, {"steps_done": self.steps_done})

    def _order(self, position: int) -> int:
        """Sample at a position of the endless stream: every epoch a fresh permutation."""
        epoch, place = divmod(position, len(self.examples))
        order = np.random.default_rng([self.config.run.seed, epoch])
        return int(order.permutation(len(self.examples))[place])

    def _prompt(self, i: int):
        example = self.examples[i]
        return self.encoder(example.prompt_ids, example.images)

    def _micro_batches(self, chosen: Sequence[int]) -> list[tuple[list[int], bool]]:
        """This rank's samples by micro-batch, and fillers (True) up to the most of any rank."""
        mine = self.ranks.dealt(chosen, self._length)
        return self.ranks.evened(list(self._split(mine)), [chosen[0]])

    def _length(self, i: int) -> int:
        return len(self._prompt(i)) + len(self.examples[i].target_ids)

    def _split(self, chosen: Sequence[int]) -> Iterator[list[int]]:
        budget, limit = self._budget.tokens, self.config.optim.max_tokens
        batch, used = [], 0
        for i in chosen:
            length = self._length(i)
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
    resume = "auto" if restarts() else resume
    saved = train(config, resolved, resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"checkpoint: {saved}")


if __name__ == "__main__":
    command(main)
