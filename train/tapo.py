"""TAPO: policy optimisation on triplets (Fine-R1, ICLR 2026), the whole step in one place.

How it differs from DAPO: a group's responses are sampled on the anchor photo and on another photo
of the same sub-category, but scored (by default) on the anchor alone; and the policy is pushed away
from what it would say to a photo of the most similar *other* sub-category, by maximising
KL(pi || pi_neg) and lowering the entropies of both. GRPO, Dr. GRPO, DAPO, GSPO and CISPO are
settings of the same loop (docs/algorithm.md; recipes/dapo_3b.yaml is DAPO).

    torchrun train/tapo.py                                    # the demo: draws its own data
    torchrun train/tapo.py --data.path photos --model.path MODEL --run.out runs/mine
    torchrun train/tapo.py ... --resume auto                  # go on from the newest checkpoint
    torchrun --nproc-per-node 4 --max-restarts 3 train/tapo.py ...   # 4 GPUs; goes on after a crash

--help: what matters first; --help all: every option. An interrupted run (Ctrl-C, SIGTERM) writes a
checkpoint first: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600, or torchrun kills it after 30 s.
"""

from __future__ import annotations

import asyncio
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from tercet.core.config import TapoConfig
from tercet.train.cli.command_line import command, parse, show_help

if __name__ == "__main__":
    show_help(TapoConfig, __doc__)  # before torch and transformers are imported

import torch
from torch import Tensor

from tercet.core.advantages import set_advantages
from tercet.core.data.stream import TripletStream
from tercet.core.data.vision import PromptEncoder
from tercet.core.mismatch import mismatch_figures
from tercet.core.packing import (
    Batches,
    Piece,
    are_weighed,
    by_response,
    micro_batch,
    mini_batches,
    scored_batch,
    weigh_rows,
)
from tercet.core.types import Group, MicroBatch, PolicyParts
from tercet.rollout.engine import Engine, IdleEngine
from tercet.rollout.launch import open_engine
from tercet.rollout.rewarding import load_reward
from tercet.rollout.sampler import GroupSampler
from tercet.train.cli.interrupt import StopSignal
from tercet.train.evaluation.held_out import HeldOut
from tercet.train.fit.estimate import run_time
from tercet.train.learner.micro_batches import TokenBudget, micro_batches
from tercet.train.learner.optim import Schedule, build_optimizer
from tercet.train.learner.policy import Policy
from tercet.train.logs.figures import draw_figures
from tercet.train.logs.group_log import GroupLog
from tercet.train.logs.metrics import is_reserved
from tercet.train.logs.terminal import say_end
from tercet.train.run.ahead import Ahead
from tercet.train.run.assemble import build_policy, open_manifest, open_parts, sampled_parts
from tercet.train.run.checkpoint import Checkpoints, load_state
from tercet.train.run.reference import open_reference
from tercet.train.run.run import (
    add_up,
    announce,
    clip_and_step,
    finish_step,
    mean_figures,
    open_log,
    report_end,
    sampling_progress,
    saved_on_error,
    settle,
)
from tercet.train.run.run_folder import RunFolder, open_folder
from tercet.train.run.sampler_check import check_sampler

SAMPLES_SHOWN = 4  # triplets in samples.png
STATE = ("steps_done", "groups", "minibatches_done", "figures", "minibatch_figures")
"""What is saved as it is; earlier versions did not save the last two."""


class TapoRun:
    """A run's parts and its state; `step` is one rollout step.

    Args:
        config: every option.
        resolved: the same as YAML, kept beside the run.
        stop: checked wherever the state is whole.
        folder: the run's, opened by all ranks; it says where the run goes on.
    """

    def __init__(self, config: TapoConfig, resolved: str, stop: StopSignal, folder: RunFolder):
        self.config, self.stop, self.folder, self.ranks = config, stop, folder, folder.ranks
        self.out, resume = folder.path, folder.checkpoint
        self.parts = open_parts(config.model, self.ranks, resume)
        self.encoder = PromptEncoder(self.parts, config.parallel.pixel_cache_mib * 2**20)
        self.manifest = open_manifest(config.data, self.parts, self.ranks, folder, config.loss)
        state = load_state(resume) if resume else {}
        self.total_steps = settle(config, self.parts, len(self.manifest.anchors), state)
        sampled = sampled_parts(self.parts, config, self.ranks)
        self.engine = self.ranks.on_first(lambda: self._open_engine(sampled)) or IdleEngine()
        temperature = config.rollout.temperature
        self.policy = build_policy(self.parts, config, self.ranks, config.loss, temperature)
        self.reference = open_reference(config, self.policy, self.ranks)
        self.optimizer = build_optimizer(self.policy.model.named_parameters(), config.optim)
        self.checkpoints = Checkpoints(self, config.run, folder)
        self.sampler = self._open_sampler()
        self.ahead = Ahead(self)
        self.ranks.share(lambda: self.sampler.check_prompts(self.manifest.anchors))
        self.schedule = Schedule(config.optim, self.total_steps)
        self.held_out = HeldOut(self)
        self.steps_done = self.minibatches_done = self.skipped = 0
        self.groups: list[Group] = []  # of a step that has begun; empty between steps
        self.figures: dict[str, float] = {}  # of its sampling
        self.minibatch_figures: list[dict[str, float]] = []
        self.working_on: Sequence[Piece] = ()
        self.shown: list[Group] = []
        if resume:
            self._restore(resume, state)
        self._sync(self.steps_done)
        self.log, self.group_log = open_log(self, resolved), GroupLog(self)
        longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        self.budget = TokenBudget(config, self.ranks, longest, self.log.say, bool(resume))
        given = {"encode": self.encoder, "shape": self.policy.shape, "ranks": self.ranks}
        self.micro_batches = partial(micro_batches, **given, budget=self.budget)
        cards, model = (self.ranks.device, self.ranks.size), self.parts.model.config
        announce(self, sampled, run_time(config, model, self.total_steps, *cards))
        check_sampler(self)

    def step(self) -> dict[str, float]:
        """One rollout step; returns its figures.

        An exception leaves a state that can be saved: the step goes on where it was.
        """
        config, loss, policy = self.config, self.config.loss, self.policy
        if not self.groups:
            self._sample()  # rollout, rewards, advantages
        self._leave_engine()  # to sleep, or to the next step
        size = config.optim.groups_per_minibatch or config.rollout.groups_per_step
        batches = mini_batches(self.groups, size, config.optim.minibatch_by)
        before = any(are_weighed(batch, loss, self.steps_done) for batch in batches[:1])
        self._score("old_logprobs", loss.update_on, batches[not before :])  # else its own update
        if loss.needs_negative and not loss.negative_now:
            self._score("neg_logprobs", "negative", batches)
        with self.reference() as frozen:
            self._score("ref_logprobs", loss.update_on, batches if frozen else [], frozen)
        with self.log.phase("update", total=len(self.groups), unit="groups") as phase:
            for batch in batches[self.minibatches_done :]:
                self.working_on = batch
                for attempt in self.budget.attempts(policy.zero_grad):
                    with attempt:
                        sums, found = {}, {}
                        for pieces, micro in self._micro_batches(batch):
                            self.check_stop()
                            value, metrics = policy.accumulate(micro, config.parallel.branches)
                            found |= self.group_log.take(pieces, metrics)
                            add_up(sums, {"loss": value} | metrics)
                            phase.advance(len(pieces) * self.ranks.size / len(batches))
                if sums:  # else no row of the mini-batch counts
                    lr = self.schedule.rate(self.steps_done, self.minibatches_done, len(batches))
                    self.minibatch_figures.append(clip_and_step(self, lr, sums))
                self.minibatches_done, self.working_on = self.minibatches_done + 1, ()
                if self.minibatches_done == 1 and not before:
                    self._set("old_logprobs", found)
        self.ahead.wait()
        with self.log.phase("sync", total=1, unit="update"):
            self._sync(self.steps_done + 1, wake=config.rollout.colocated)
        figures = self.figures | mismatch_figures(self.groups, self.steps_done)
        figures |= mean_figures(self.minibatch_figures) | self.held_out.figures()
        self.group_log.write(self.groups)
        self.shown, self.groups, self.figures = self.groups[:SAMPLES_SHOWN], [], {}
        self.steps_done, self.minibatches_done, self.minibatch_figures = self.steps_done + 1, 0, []
        return figures

    def _sample(self) -> None:
        """Fill self.groups, on all ranks, with rewarded responses and their advantages."""
        config = self.config.rollout
        if config.colocated:
            self.ranks.release_memory()
        responses = config.groups_per_step * (config.n_anchor + config.n_positive)

        def sample() -> tuple[list[Group], dict[str, float]]:
            with self.log.phase("generate", total=responses, unit="responses") as phase:
                progress = sampling_progress(self, phase)
                sampled = asyncio.run(self.sampler.collect(self.steps_done, progress))
                self.log.add_time("reward", sampled.reward_seconds)
            set_advantages(sampled.groups, self.config.loss.advantage_std)
            self.group_log.sampled = sampled
            return sampled.groups, sampled.figures()

        self.groups, self.figures = self.ranks.share(sample, self.policy.gather_weights)

    def _leave_engine(self) -> None:
        if self.config.rollout.colocated:
            self.ranks.share(self.engine.sleep)
        self.ahead.begin()

    def _score(self, field: str, photo: str, batches: Batches, by: Policy | None = None) -> None:
        """Set a field of log-probs of all responses that lack it, by these weights or `by`."""
        pieces = [piece for batch in batches for piece in batch]
        pieces = [p for p in pieces if any(getattr(r, field) is None for r in p.chosen())]
        if not pieces:
            return

        pack = partial(scored_batch, photo=photo, encode=self.encoder)
        policy, self.working_on = (by or self.policy).eval(), pieces
        phase_name = {"old": "old", "neg": "negative", "ref": "reference"}[field[:3]]
        with self.log.phase(phase_name, total=len(pieces), unit="groups") as phase:
            for attempt in self.budget.attempts(self.policy.zero_grad):
                with attempt:
                    found = {}
                    for some, micro in self.micro_batches(pieces, [photo], pack):
                        self.check_stop()
                        with torch.no_grad():
                            logprobs = policy(micro.update, "logprobs", labels=micro.labels)
                        found |= by_response(some, logprobs)
                        phase.advance(len(some) * self.ranks.size)
        self._set(field, found)
        self.working_on = ()

    def _micro_batches(self, batch: Sequence[Piece]) -> Iterator[tuple[list[Piece], MicroBatch]]:
        """This rank's micro-batches of an update; none where no row of the mini-batch counts."""
        loss, rollout = self.config.loss, self.config.rollout
        num_loss_tokens = weigh_rows(batch, loss, rollout.cut_off, rollout.max_response_tokens)
        if not num_loss_tokens:
            return

        def pack(pieces: Sequence[Piece]) -> MicroBatch:
            return micro_batch(pieces, self.encoder, loss, num_loss_tokens, self.steps_done)

        photos = [loss.update_on, "negative"] if loss.negative_now else [loss.update_on]
        self.policy.train()
        yield from self.micro_batches(batch, photos, pack)

    def _set(self, field: str, found: dict[tuple[str, int], Tensor]) -> None:
        """Set a field of responses, found on one rank or another, on all ranks."""
        groups = {group.id: group for group in self.groups}
        for part in self.ranks.exchange(found):
            for (group_id, index), logprobs in part.items():
                setattr(groups[group_id].responses[index], field, logprobs)

    def _sync(self, version: int, wake: bool = False) -> None:
        """Send the weights to what samples, after waking it where it sleeps."""
        if wake:
            self.ranks.release_memory()
            self.ranks.share(self.engine.wake)
        if not self.ranks.is_first:
            self.policy.gather_weights()
        self.ranks.share(
            lambda: self.engine.update_weights(self.policy.sampled_weights(), version),
            self.policy.gather_weights,
        )

    def check_stop(self) -> None:
        """Raises Interrupted, on all ranks at once, when a signal has come to one of them."""
        self.ranks.check(self.stop)

    def _open_engine(self, parts: PolicyParts) -> Engine:
        def weights() -> Iterator[tuple[str, Tensor]]:
            # A server was restarted while rank 0 samples: the other ranks, which wait in `share`
            # for what it sampled, must put sharded weights together with it.
            self.ahead.check_weights()
            self.ranks.ask_for_help()
            return self.policy.sampled_weights()

        rollout, work_dir = self.config.rollout, self.out / "sglang"
        dtype = torch.bfloat16 if self.config.parallel.mixed_precision else parts.model.dtype
        more = {"dtype": dtype, "check_stop": self.stop.check}
        return open_engine(parts, self.encoder, rollout, work_dir, weights, **more)

    def _open_sampler(self) -> GroupSampler:
        config, anchors, seed = self.config, self.manifest.anchors, self.config.run.seed
        self.stream = TripletStream(anchors, positive=config.data.positive, seed=seed)
        with self.stop.at_once():
            reward = self.ranks.on_first(lambda: load_reward(config))
        parts = (self.engine, self.stream, self.parts.tokenizer, self.encoder)
        more = {"names": self.manifest.names, "nearest": self.manifest.nearest, "seed": seed}
        more |= {"system_prompt": config.model.system_prompt, "is_reserved": is_reserved}
        return GroupSampler(*parts, config.rollout, reward=reward, **more)

    def close(self) -> None:
        """Stop the servers that sample and what computes rewards, and leave the other ranks."""
        self.ahead.close()
        self.sampler.close()
        self.engine.close()
        self.checkpoints.close()
        self.ranks.close()

    def save(self, keep: int = 0) -> Path:
        """Write a checkpoint of the state as it is: between steps, or between mini-batches."""
        self.ahead.stop()
        state = {name: getattr(self, name) for name in STATE} | self.schedule.state()
        state |= {"stream": self.stream.state(), **self.sampler.state()}
        return self.checkpoints.save(self.steps_done, state, keep)

    def _restore(self, folder: Path, state: dict) -> None:
        if state["groups"]:
            self.folder.check_step()
        for name in STATE:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.schedule.restore(state)
        self.sampler.restore(state)
        self.stream.restore(state["stream"])
        self.checkpoints.restore(folder, state)


def train(config: TapoConfig, resolved: str, resume: str | None = None) -> Path:
    """Run TAPO to its last step.

    Args:
        config: every option.
        resolved: the same as YAML, kept beside the run.
        resume: checkpoint folder, `auto`, or None for a new run (see `open_folder`).

    Returns:
        The folder of the last checkpoint.
    """
    with StopSignal() as stop, open_folder(config, resume) as folder:
        run, saved = TapoRun(config, resolved, stop, folder), folder.checkpoint
        with closing(run), run.log, saved_on_error(run):
            while run.steps_done < run.total_steps and not run.checkpoints.best.stale:
                run.check_stop()
                saved = finish_step(run, run.step()) or saved
            run.checkpoints.wait()
            report_end(run, lambda: draw_figures(run.out, run.shown))
    return saved


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    config, resume, resolved = parse(TapoConfig, argv, __doc__)
    if not config.data.path and not config.model.path:
        # Not imported: the demo imports this file.
        runpy.run_module("tercet.train.demo", run_name="__main__", alter_sys=True)
        return
    say_end(config.run.out, train(config, resolved, resume), "tapo")


if __name__ == "__main__":
    command(main)
