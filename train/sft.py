"""Stage 1: supervised fine-tuning on chains of thought, on the packing that TAPO uses.

The loss is the mean over the assistant's tokens of an optimiser step. Vision tower and merger stay
as they are unless `--model.freeze_vision false --model.freeze_merger false`. `--data.held_out 0.1`
also measures the loss on records that are not trained on: with their own photos, and with each
other's, which tells what the photos are worth to the policy.

    torchrun train/sft.py --data.path stage1.json --model.path MODEL --run.out runs/stage1
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from math import ceil
from pathlib import Path

from tercet.core.config import SftConfig
from tercet.train.cli.command_line import command, parse, show_help

if __name__ == "__main__":
    show_help(SftConfig, __doc__)  # before torch and transformers are imported

import torch

from tercet.core.data.records import read_sft
from tercet.core.data.vision import PromptEncoder
from tercet.core.draws import EndlessOrder
from tercet.core.packing import plain_batch, prompts_of
from tercet.core.types import MicroBatch
from tercet.train.cli.interrupt import StopSignal
from tercet.train.learner.examples import (
    Example,
    held_out,
    short_enough,
    tokenize,
    with_others_photos,
)
from tercet.train.learner.micro_batches import TokenBudget, micro_batches
from tercet.train.learner.optim import Schedule, build_optimizer
from tercet.train.logs.figures import draw_figures
from tercet.train.logs.terminal import say_end
from tercet.train.run.assemble import build_policy, open_parts, record_digests
from tercet.train.run.checkpoint import Checkpoints, load_state
from tercet.train.run.identity import digest
from tercet.train.run.run import (
    add_up,
    clip_and_step,
    finish_step,
    open_log,
    report_end,
    saved_on_error,
)
from tercet.train.run.run_folder import RunFolder, open_folder


class SftRun:
    """A stage-1 run's parts and its state; `step` is one optimiser step."""

    def __init__(self, config: SftConfig, resolved: str, stop: StopSignal, folder: RunFolder):
        self.config, self.stop, self.folder, self.ranks = config, stop, folder, folder.ranks
        self.out, resume = folder.path, folder.checkpoint
        self.parts = open_parts(config.model, self.ranks, resume)
        self.encoder = PromptEncoder(self.parts, config.parallel.pixel_cache_mib * 2**20)
        skipped = self._read_examples()
        self.order = EndlessOrder(len(self.examples), config.run.seed)
        self.policy = build_policy(self.parts, config, self.ranks)
        self.optimizer = build_optimizer(self.policy.model.named_parameters(), config.optim)
        self.checkpoints = Checkpoints(self, config.run, folder)
        self.per_epoch = ceil(len(self.examples) / config.optim.samples_per_step)
        self.total_steps = config.run.steps or config.run.epochs * self.per_epoch
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
        self.log.say(
            f"{len(self.examples)} records to train on, {len(self.held_out)} held out, "
            f"{len(skipped)} left out; {self.total_steps} steps, {self.per_epoch} an epoch"
        )

    def _read_examples(self) -> list[str]:
        """Set the examples that are trained on and held out; returns what was left out and why."""
        config = self.config
        samples, skipped = read_sft(config.data.path, config.data.on_bad_image)
        every = [tokenize(s, self.parts, config.model.system_prompt) for s in samples]
        kept, too_long = self.ranks.share(lambda: short_enough(every, self.encoder, config))
        self.examples, self.held_out = held_out(kept, config.data.held_out, config.run.seed)
        used = {"examples": digest([example.id for example in kept])}
        self.ranks.share(lambda: self.folder.note_data(record_digests(samples) | used))
        return skipped + too_long

    def step(self) -> dict[str, float]:
        """One optimiser step on the next samples of the epoch's order; returns its figures."""
        chosen = self._chosen()
        self.policy.train()
        with self.log.phase("update", total=len(chosen), unit="samples") as phase:
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
        every = self.config.run.eval_every or self.total_steps
        if self.held_out and (not self.steps_done % every or self.steps_done == self.total_steps):
            figures["held_out_ce"] = self._loss(self.held_out)
            figures["permuted_ce"] = self._loss(with_others_photos(self.held_out))
        return figures

    def _chosen(self) -> list[Example]:
        """The next step's examples; an epoch's last step takes what is left of it."""
        size, count = self.config.optim.samples_per_step, len(self.examples)
        epoch, step = divmod(self.steps_done, self.per_epoch)
        places = range(step * size, min((step + 1) * size, count))
        return [self.examples[self.order[epoch * count + place]] for place in places]

    @torch.no_grad()
    def _loss(self, examples: Sequence[Example]) -> float:
        """Mean cross-entropy over the target tokens of examples, of which nothing is learnt."""
        self.policy.eval()
        for attempt in self.budget.attempts(lambda: None):
            with attempt:
                sums: dict[str, torch.Tensor] = {}
                for _, micro in self._micro_batches(examples):
                    logprobs = self.policy(micro.update, "logprobs", labels=micro.labels)
                    weights = micro.loss_mask.to(logprobs) / micro.num_loss_tokens
                    add_up(sums, {"loss": -(logprobs * weights).sum()})
        return float(self.ranks.add(sums)["loss"])

    def _micro_batches(self, chosen: Sequence[Example]):
        """This rank's micro-batches of an optimiser step."""
        num_loss_tokens = sum(len(example.target_ids) for example in chosen)

        def pack(examples: Sequence[Example]) -> MicroBatch:
            return plain_batch(prompts_of(examples, "own", self.encoder), num_loss_tokens)

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
            while run.steps_done < run.total_steps and not run.checkpoints.best.stale:
                run.check_stop()
                saved = finish_step(run, run.step()) or saved
            run.checkpoints.wait()
            report_end(run, lambda: draw_figures(run.out))
    return saved


def main(argv: Sequence[str] | None = None) -> None:
    config, resume, resolved = parse(SftConfig, argv, __doc__)
    say_end(config.run.out, train(config, resolved, resume), "sft")


if __name__ == "__main__":
    command(main)
