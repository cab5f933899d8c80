"""TAPO: policy optimisation on triplets (Fine-R1, ICLR 2026), the whole step in one place.

How it differs from DAPO: a group's responses are sampled on the anchor photo and on another photo
of the same sub-category, but scored (by default) on the anchor alone; and the policy is pushed away
from what it would say to a photo of the most similar *other* sub-category, by maximising
KL(pi || pi_neg) and lowering the entropies of both. `--rollout.n_positive 0 --loss.kl_coef 0
--loss.entropy_coef 0 --loss.neg_entropy_coef 0` is DAPO.

    torchrun train/tapo.py                                    # the demo: draws its own data
    torchrun train/tapo.py --data.path photos --model.path MODEL --run.out runs/mine
    torchrun train/tapo.py ... --resume auto                  # go on from the newest checkpoint
    torchrun --nproc-per-node 4 --max-restarts 3 train/tapo.py ...   # 4 GPUs; goes on after a crash

--help lists every option. An interrupted run (Ctrl-C, SIGTERM) writes a checkpoint and exits with
128 + the signal's number.
"""

from __future__ import annotations

import asyncio
import copy
import os
import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tercet.core.config import TapoConfig
from tercet.train.learner.command_line import command, parse, show_help

if __name__ == "__main__":
    show_help(TapoConfig, __doc__)  # before torch and transformers are imported

import torch

from tercet.core.advantages import group_advantages
from tercet.core.data.embedders import embedder
from tercet.core.data.manifest import MANIFEST_NAME, Manifest
from tercet.core.data.triplets import prepare_manifest
from tercet.core.data.vision import PromptEncoder
from tercet.core.mismatch import mismatch_figures
from tercet.core.packing import Piece, mini_batches
from tercet.core.rewards import load_reward
from tercet.core.types import Group, PolicyParts
from tercet.rollout.engine import Engine, IdleEngine
from tercet.rollout.launch import open_engine
from tercet.rollout.sampler import GroupSampler, StepGroups, TripletStream
from tercet.train.learner.assemble import build_policy, open_parts
from tercet.train.learner.budget import TokenBudget
from tercet.train.learner.checkpoint import Checkpoints, load_state
from tercet.train.learner.device import set_up
from tercet.train.learner.figures import draw_curves, draw_samples, sample_rows
from tercet.train.learner.interrupt import StopSignal
from tercet.train.learner.loop import open_log, run, take_step
from tercet.train.learner.optim import build_optimizer, learning_rate
from tercet.train.learner.ranks import Ranks, restarts
from tercet.train.learner.update import Updater

SAMPLES_SHOWN = 4  # triplets in samples.png


class TapoRun:
    """A run's parts and its state; `step` is one rollout step.

    Args:
        config: every option.
        resolved: the same as YAML, kept beside the run.
        stop: checked wherever the state is whole.
        resume: checkpoint folder to go on from.
    """

    def __init__(self, config: TapoConfig, resolved: str, stop: StopSignal, resume: Path | None):
        self.config, self.stop, self.out = config, stop, Path(config.run.out)
        device = set_up(config.run)
        self.ranks = Ranks(device, config.parallel)
        self.parts = open_parts(config.model, self.ranks, resume)
        self.encoder = PromptEncoder(self.parts)
        self.manifest = self.ranks.share(lambda: self._manifest(resume))
        sampled, own = self.parts, self.ranks.mesh is None and not config.model.lora_rank
        if not own and self.ranks.is_first and config.rollout.engine == "local":
            sampled = replace(self.parts, model=copy.deepcopy(self.parts.model).to(device))
        self.engine: Engine | IdleEngine = IdleEngine()
        self.ranks.share(lambda: self._open_engine(sampled))
        self.policy = build_policy(
            self.parts, config, self.ranks, config.loss, config.rollout.temperature
        )
        self.optimizer = build_optimizer(self.policy.model.named_parameters(), config.optim)
        self.saver = Checkpoints(self, config.run)
        self.stream = TripletStream(
            self.manifest.anchors, positive=config.data.positive, seed=config.run.seed
        )
        self.sampler = GroupSampler(
            self.engine,
            self.stream,
            self.parts.tokenizer,
            self.encoder,
            config.rollout,
            reward=load_reward(config.rollout.reward),
            names=self.manifest.names,
            system_prompt=config.model.system_prompt,
            seed=config.run.seed,
        )
        per_epoch = len(self.manifest.anchors) / config.rollout.groups_per_step
        self.total_steps = config.run.steps or max(1, int(config.run.epochs * per_epoch))
        self.steps_done = self.skipped = 0
        self.groups: list[Group] = []
        """Groups of a step that has begun; empty between steps."""
        self.minibatches_done = 0
        self.optimizer_steps = 0
        if resume:
            self._restore(resume)
        self._sync(self.steps_done)
        self.log = open_log(self, resolved)
        longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        budget = TokenBudget(config, self.ranks, longest, self.log.say, bool(resume))
        self.updater = Updater(
            config, self.policy, self.encoder, self.ranks, budget, self.check_stop
        )
        if sampled is not self.parts:
            self.log.say("rank 0 samples on a whole copy of the policy")
        if not self.engine.full_vocabulary:
            self.log.say("the sampler's log-probs are renormalised after top_p and top_k")
        self.shown: list[Group] = []

    def _open_engine(self, parts: PolicyParts) -> None:
        self.engine = open_engine(
            parts, self.encoder, self.config.rollout, self.out / "sglang", self._weights_again
        )

    def _weights_again(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as they are, once more, while the other ranks wait for what rank 0 shares."""
        self.ranks.ask_for_help()
        return self.policy.named_weights()

    def _sync(self, version: int) -> None:
        """Send the weights to what samples."""
        if not self.ranks.is_first:
            self.policy.gather_weights()
        self.ranks.share(
            lambda: self.engine.update_weights(self.policy.named_weights(), version),
            self.policy.gather_weights,
        )

    def check_stop(self) -> None:
        """Raises Interrupted, on all ranks at once, when a signal has come to one of them."""
        self.ranks.check(self.stop)

    def _manifest(self, resume: Path | None) -> Manifest:
        """The run's own manifest when it goes on, else a new one, written beside the run."""
        if resume and (self.out / MANIFEST_NAME).exists():
            return Manifest.read(self.out)
        visual = self.parts.model.model.visual
        home = visual.device
        embed = embedder(self.config.data.embedder, lambda: self.parts, self.ranks.device)
        visual.to(self.ranks.device)
        manifest = prepare_manifest(self.config.data, embed)
        visual.to(home)
        manifest.write(self.out)
        return manifest

    def step(self) -> dict[str, float]:
        """Sample, reward, score, update and sync once; returns the step's figures."""
        config = self.config
        figures = {}
        if not self.groups:
            figures = self._sample()
        if config.rollout.colocated:
            self.ranks.share(self.engine.sleep)
        size = config.optim.groups_per_minibatch or config.rollout.groups_per_step
        batches = mini_batches(self.groups, size, config.optim.minibatch_by)
        # The first mini-batch is updated at the very weights that old log-probs are those of: only
        # importance weights need them before the update.
        unscored = batches if config.loss.is_cap is not None else batches[1:]
        self._score("old", "old_logprobs", unscored)
        if config.loss.needs_negative and config.loss.neg_at == "step_start":
            self._score("negative", "neg_logprobs", batches)
        updates = []
        with self.log.phase("update", total=len(self.groups), unit="groups") as phase:
            for batch in batches[self.minibatches_done :]:
                updates.append(self._update(batch, len(batches), phase))
                self.minibatches_done += 1
        figures |= self._mismatch()
        with self.log.phase("sync", total=1, unit="update"):
            if config.rollout.colocated:
                self.ranks.release_memory()
                self.ranks.share(self.engine.wake)
            self._sync(self.steps_done + 1)
        self.steps_done += 1
        self.shown, self.groups, self.minibatches_done = self.groups[:SAMPLES_SHOWN], [], 0
        return figures | _mean(updates)

    def _sample(self) -> dict[str, float]:
        """Fill self.groups, on all ranks, with rewarded responses and their advantages."""
        config = self.config.rollout
        if config.colocated:
            self.ranks.release_memory()
        responses = config.groups_per_step * (config.n_anchor + config.n_positive)

        def sample() -> tuple[list[Group], dict[str, float]]:
            with self.log.phase("generate", total=responses, unit="responses") as phase:

                def progress(count: int) -> None:
                    phase.advance(count)
                    self.stop.check()

                started = time.perf_counter()
                sampled = asyncio.run(self.sampler.collect(self.steps_done, progress))
                seconds = time.perf_counter() - started
                self.log.add_time("reward", sampled.reward_seconds)
            _set_advantages(sampled.groups)
            return sampled.groups, _sampling_figures(sampled, seconds)

        self.groups, figures = self.ranks.share(sample, self.policy.gather_weights)
        return figures

    def _score(self, phase_name: str, field: str, batches: Sequence[Sequence[Piece]]) -> None:
        """Set a field of all responses that lack it, at these weights."""
        pieces = [piece for batch in batches for piece in batch]
        pieces = [p for p in pieces if any(getattr(r, field) is None for r in p.chosen())]
        if pieces:
            with self.log.phase(phase_name, total=len(pieces), unit="groups") as phase:
                self.updater.score(field, pieces, phase.advance)

    def _update(self, pieces: Sequence[Piece], minibatches: int, phase) -> dict[str, float]:
        """One optimiser step on a mini-batch; returns its figures."""
        done = self.updater.accumulate(pieces, lambda n: phase.advance(n / minibatches))
        if done is None:
            return {}
        sums, keep_logprobs = done
        steps, config = self.total_steps * minibatches, self.config
        lr = learning_rate(self.optimizer_steps, steps, config.optim, self.steps_done == 0)
        figures = take_step(self, lr, sums)
        self.optimizer_steps += 1
        if self.minibatches_done == 0 and config.loss.is_cap is None:
            keep_logprobs()  # they are those of the step's first weights
        return figures

    def _mismatch(self) -> dict[str, float]:
        """Sampler against trainer on anchor responses of this step's weights."""
        return mismatch_figures(
            [
                response
                for group in self.groups
                for response in group.responses
                if response.role == "anchor" and response.weight_version == self.steps_done
            ]
        )

    def close(self) -> None:
        """Stop the servers that sample, and leave the other ranks."""
        self.engine.close()
        self.saver.close()
        self.ranks.close()

    def draw(self) -> None:
        """Write curves.png and samples.png."""
        if not self.ranks.is_first:
            return
        draw_curves(self.out / "metrics.jsonl", self.out / "curves.png")
        if self.shown:
            draw_samples(sample_rows(self.shown), self.out / "samples.png")

    def save(self) -> Path:
        """Write a checkpoint of the state as it is: between steps, or between mini-batches."""
        state = {
            "steps_done": self.steps_done,
            "optimizer_steps": self.optimizer_steps,
            "groups": self.groups,
            "minibatches_done": self.minibatches_done,
            "carried": self.sampler.carried,
            "stream": self.stream.state(),
        }
        return self.saver.save(self.steps_done, state)

    def _restore(self, folder: Path) -> None:
        state = load_state(folder)
        self.steps_done = state["steps_done"]
        self.optimizer_steps = state["optimizer_steps"]
        self.groups = state["groups"]
        self.minibatches_done = state["minibatches_done"]
        self.sampler.carried = state["carried"]
        self.stream.restore(state["stream"])
        self.saver.restore(folder, state)


def _set_advantages(groups: Sequence[Group]) -> None:
    """A = (R - mean) / (std + 1e-6), pooled over a group's anchor and positive responses."""
    pooled = [(n, r) for n, group in enumerate(groups) for r in group.responses]
    rewards = torch.tensor([r.reward for _, r in pooled], dtype=torch.float64)
    advantages = group_advantages(rewards, [n for n, _ in pooled])
    for (_, response), advantage in zip(pooled, advantages.tolist(), strict=True):
        response.advantage = advantage


def _sampling_figures(sampled: StepGroups, seconds: float) -> dict[str, float]:
    """Figures over every response that was sampled in the step, kept or not."""
    seen = sampled.seen
    if not seen:
        return {}
    figures = {
        "reward": sum(r.reward for r in seen) / len(seen),
        "response_length": sum(len(r.token_ids) for r in seen) / len(seen),
        "cut_off": sum(r.finish_reason == "length" for r in seen) / len(seen),
        "acceptance": sampled.acceptance,
        "groups": float(len(sampled.groups)),
        "filled_up": float(sampled.filled_up),
        "tokens_per_s": sampled.tokens / seconds,
    }
    for name in sorted({name for r in seen for name in r.metrics}):
        figures[name] = sum(r.metrics.get(name, 0.0) for r in seen) / len(seen)
    return figures


def _mean(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean over the mini-batches that have a figure."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [u[name] for u in updates if name in u] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def train(config: TapoConfig, resolved: str, resume: str | None = None) -> Path:
    """Run TAPO to its last step.

    Args:
        config: every option.
        resolved: the same as YAML, kept beside the run.
        resume: checkpoint folder, `auto`, or None for a new run.

    Returns:
        The folder of the last checkpoint.
    """
    return run(TapoRun, config, resolved, resume)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    config, resume, resolved = parse(TapoConfig, argv, __doc__)
    resume = "auto" if restarts() else resume
    if not config.data.path and not config.model.path:
        # Not imported: the demo imports this file.
        runpy.run_module("tercet.train.demo", run_name="__main__", alter_sys=True)
        return
    saved = train(config, resolved, resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"checkpoint: {saved}\nlog and figures: {config.run.out}")


if __name__ == "__main__":
    command(main)
