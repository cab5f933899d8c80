"""Stage 1: supervised fine-tuning on chains of thought, on the packing that TAPO uses.

The loss is the mean over the assistant's tokens of an optimiser step. Vision tower and merger stay
as they are unless `--model.freeze_vision false --model.freeze_merger false`.

    torchrun train/sft.py --data.path stage1.json --model.path MODEL --run.out runs/stage1
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tercet.core.config import SftConfig
from tercet.train.learner.command_line import command, parse, show_help

if __name__ == "__main__":
    show_help(SftConfig, __doc__)  # before torch and transformers are imported

import torch

from tercet.core.data.records import SftSample, read_sft
from tercet.core.data.vision import PromptEncoder
from tercet.core.draws import EndlessOrder
from tercet.core.packing import Encode, Prompts, plain_batch, prompts_of
from tercet.core.prompts import chat_ids
from tercet.core.types import MicroBatch, PolicyParts
from tercet.train.learner.assemble import build_policy, open_parts, record_digests
from tercet.train.learner.checkpoint import Checkpoints, load_state
from tercet.train.learner.figures import draw_figures
from tercet.train.learner.interrupt import StopSignal
from tercet.train.learner.micro_batches import TokenBudget, micro_batches
from tercet.train.learner.optim import Schedule, build_optimizer
from tercet.train.learner.run import (
    add_up,
    clip_and_step,
    finish_step,
    open_log,
    report_end,
    saved_on_error,
)
from tercet.train.learner.run_folder import RunFolder, open_folder


@dataclass(frozen=True)
class Example:
    """A tokenised sample."""

    id: str
    prompt_ids: tuple[int, ...]
    images: tuple[str, ...]
    target_ids: tuple[int, ...]

    def prompts(self, photo: str, encode: Encode) -> Prompts:
        """The prompt with its one target; the photos are always its own."""
        return [(encode(self.prompt_ids, self.images), [self.target_ids])]

    def halves(self) -> tuple:
        """Samples are never cut."""
        return ()

    def __str__(self) -> str:
        return f"sample {self.id!r}: prompt and target"


def tokenize(sample: SftSample, parts: PolicyParts, system_prompt: str | None) -> Example:
    """Prompt and target ids of a conversation; the target ends with the end-of-turn token, once.

    Raises:
        ValueError: another token that ends an answer, or one of an image, in the target.
    """
    messages = [{"role": role, "content": content} for role, content in sample.messages]
    prompt = chat_ids(
        parts.tokenizer, messages[:-1], len(sample.images), system_prompt=system_prompt
    )
    end = parts.tokenizer.convert_ids_to_tokens(parts.turn_end)
    answer = _without(end, messages[-1]["content"])
    target = parts.tokenizer.encode(answer, add_special_tokens=False)
    refused = {*parts.stop_ids, *parts.banned_ids}.intersection(target)
    if refused:
        names = ", ".join(parts.tokenizer.convert_ids_to_tokens(sorted(refused)))
        raise ValueError(f"sample {sample.id!r}: its answer must not hold {names}")
    return Example(sample.id, tuple(prompt), sample.images, (*target, parts.turn_end))


def _without(end: str, answer: str) -> str:
    """An answer without the end-of-turn tokens that may stand at its end already."""
    while (cut := answer.rstrip()).endswith(end):
        answer = cut.removesuffix(end)
    return answer


class SftRun:
    """A stage-1 run's parts and its state; `step` is one optimiser step."""

    def __init__(self, config: SftConfig, resolved: str, stop: StopSignal, folder: RunFolder):
        self.config, self.stop, self.folder, self.ranks = config, stop, folder, folder.ranks
        self.out, resume = folder.path, folder.checkpoint
        self.parts = open_parts(config.model, self.ranks, resume)
        self.encoder = PromptEncoder(self.parts, config.parallel.pixel_cache_mib * 2**20)
        samples, skipped = read_sft(config.data.path, config.data.on_bad_image)
        self.ranks.share(lambda: folder.note_data(record_digests(samples)))
        self.examples = [tokenize(s, self.parts, config.model.system_prompt) for s in samples]
        self.ranks.share(self._check_lengths)
        self.order = EndlessOrder(len(samples), config.run.seed)
        self.policy = build_policy(self.parts, config, self.ranks)
        self.optimizer = build_optimizer(self.policy.model.named_parameters(), config.optim)
        self.checkpoints = Checkpoints(self, config.run, folder)
        per_epoch = len(samples) / config.optim.samples_per_step
        self.total_steps = config.run.steps or max(1, round(config.run.epochs * per_epoch))
        self.schedule = Schedule(config.optim, self.total_steps)
        self.steps_done = self.skipped = 0
        self.working_on = ()  # a step that failed is taken again: its samples are the user's own
        if resume:
            state = load_state(resume)
            self.steps_done = state["steps_done"]
            self.schedule.restore(state)
            self.checkpoints.restore(resume, state)
        self.log = open_log(self, resolved)
        longest = config.optim.max_tokens
        self.budget = TokenBudget(config, self.ranks, longest, self.log.say, bool(resume))
        for reason in skipped:
            self.log.say(f"left out: {reason}")

    def _check_lengths(self) -> None:
        limit = self.config.optim.max_tokens
        for example in self.examples:
            prompt = self.encoder.length(example.prompt_ids, example.images)
            tokens = prompt + len(example.target_ids)
            if tokens > limit:
                raise ValueError(
                    f"sample {example.id!r} has {tokens} tokens; optim.max_tokens is {limit} "
                    "(samples are never cut: lower model.max_pixels or raise the limit)"
                )

    def step(self) -> dict[str, float]:
        """One optimiser step on the next samples of the epoch's order; returns its figures."""
        size = self.config.optim.samples_per_step
        chosen = [self.examples[self.order[self.steps_done * size + i]] for i in range(size)]
        with self.log.phase("update", total=size, unit="samples") as phase:
            for attempt in self.budget.attempts(self.policy.zero_grad):
                with attempt:
                    sums: dict[str, torch.Tensor] = {}
                    for examples, micro in self._micro_batches(chosen):
                        self.check_stop()
                        loss, metrics = self.policy(micro, "cross_entropy")
                        loss.backward()
                        add_up(sums, metrics)
                        phase.advance(len(examples) * self.ranks.size)
        figures = clip_and_step(self, self.schedule.rate(self.steps_done), sums)
        self.steps_done += 1
        return figures

    def _micro_batches(self, chosen: Sequence[Example]):
        """This rank's micro-batches of an optimiser step."""
        num_loss_tokens = sum(len(example.target_ids) for example in chosen)

        def pack(examples: Sequence[Example]) -> MicroBatch:
            return plain_batch(prompts_of(examples, "own", self.encoder), num_loss_tokens)

        self.policy.train()
        return micro_batches(
            chosen,
            ["own"],
            pack,
            encode=self.encoder,
            shape=self.policy.shape,
            ranks=self.ranks,
            budget=self.budget,
        )

    def check_stop(self) -> None:
        """Raises Interrupted, on all ranks at once, when a signal has come to one of them."""
        self.ranks.check(self.stop)

    def save(self, keep: int = 0) -> Path:
        """Write a checkpoint of the state between two steps."""
        state = {"steps_done": self.steps_done} | self.schedule.state()
        return self.checkpoints.save(self.steps_done, state, keep)

    def close(self) -> None:
        """Leave the other ranks."""
        self.checkpoints.close()
        self.ranks.close()


def train(config: SftConfig, resolved: str, resume: str | None = None) -> Path:
    """Run stage 1 to its last step; returns the folder of the last checkpoint.

    Args:
        config: every option.
        resolved: the same as YAML, kept beside the run.
        resume: checkpoint folder, `auto`, or None for a new run (see `open_folder`).
    """
    with StopSignal() as stop, open_folder(config, resume) as folder:
        run, saved = SftRun(config, resolved, stop, folder), folder.checkpoint
        with closing(run), run.log, saved_on_error(run):
            while run.steps_done < run.total_steps:
                run.check_stop()
                saved = finish_step(run, run.step()) or saved
            run.checkpoints.wait()
        report_end(run, lambda: draw_figures(run.out))
    return saved


def main(argv: Sequence[str] | None = None) -> None:
    config, resume, resolved = parse(SftConfig, argv, __doc__)
    saved = train(config, resolved, resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"checkpoint: {saved}")


if __name__ == "__main__":
    command(main)
