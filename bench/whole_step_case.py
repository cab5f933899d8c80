"""What both trainers of bench/whole_step.py train: a policy, photos, prompts, and equal options.

Two policies: the one that the demo's stage 1 leaves, and SmolLM2-135M's body behind a random vision
tower. Both see pictures of the drawn world. Ours runs as in train/tapo.py, without checkpoints.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from tercet.bench.real_parts import download, real_language_model
from tercet.core.advantages import group_advantages
from tercet.core.config import TapoConfig
from tercet.core.data.manifest import Manifest
from tercet.core.data.stream import TripletStream
from tercet.core.prompts import stage2_text
from tercet.core.rewards import fine_r1_strict
from tercet.core.types import Group, Response, Triplet
from tercet.train import tapo
from tercet.train.cli.command_line import RECIPES, parse
from tercet.train.cli.interrupt import StopSignal
from tercet.train.demo import stages
from tercet.train.demo.drawn_world import write_world
from tercet.train.demo.stages import Seed
from tercet.train.logs.metrics import phase_seconds, read_metrics
from tercet.train.run.run_folder import open_folder

CLIPS = (0.2, 0.28)
BETAS, EPS, DECAY, MAX_NORM = (0.9, 0.98), 1e-8, 0.01, 1.0
ADVANTAGE_EPS = 1e-4
"""TRL's own, which it has no option for."""
SIDE = 224
"""Pixels of a photo for the larger policy."""
FIXED_STEPS = 3
"""Optimiser steps on fixed responses."""


@dataclass(frozen=True)
class Work:
    """A training run of one policy."""

    policy: str
    groups: int
    responses: int
    """Of each group."""
    tokens: int
    """Most of a response."""
    lr: float
    micro_batch_tokens: int

    @property
    def sampled(self) -> int:
        """Responses of a step."""
        return self.groups * self.responses


WORKS = {
    "demo": Work("demo", 16, 8, 40, 3e-4, 1024),
    "smollm2": Work("smollm2", 4, 8, 64, 1e-5, 1024),
}


def prepare(work: Work, folder: Path) -> None:
    """Write `start`, a policy, and `triplets` into the folder, where they are not there yet."""
    if (folder / "triplets").exists():
        return
    seed = Seed(folder, 0, "spelled")
    if work.policy == "demo":
        return stages.prepare(seed, [])
    folder.mkdir(parents=True, exist_ok=True)
    write_world(seed.data, 0, **stages.PICTURES, size=SIDE, names="spelled")
    parts, _ = real_language_model(download())
    parts.image_processor.size = {"shortest_edge": 56**2, "longest_edge": SIDE**2}
    parts.save(seed.start)
    stages.choose_triplets(seed, [])


def config_of(
    work: Work, folder: Path, out: Path, steps: int, seed: int, more: Sequence[str] = ()
) -> tuple[TapoConfig, str]:
    """Our options, and the same as YAML: DAPO on one photo, every sampled group trained on."""
    options = {
        "data.path": folder / "triplets",
        "model.path": folder / "start",
        "rollout.n_anchor": work.responses,
        "rollout.n_positive": 0,
        "rollout.groups_per_step": work.groups,
        "rollout.prompts_per_batch": work.groups,
        "rollout.dynamic_sampling": "false",
        "rollout.max_rows": work.sampled,
        "rollout.max_response_tokens": work.tokens,
        "rollout.max_prompt_tokens": 512,
        "rollout.top_p": 1,
        "loss.update_on": "anchor",
        "loss.clip_low": CLIPS[0],
        "loss.clip_high": CLIPS[1],
        "loss.clip_dual": "null",
        "optim.lr": work.lr,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "optim.beta1": BETAS[0],
        "optim.beta2": BETAS[1],
        "optim.eps": EPS,
        "optim.weight_decay": DECAY,
        "optim.decay_norms_and_biases": "false",
        "optim.max_grad_norm": MAX_NORM,
        "parallel.micro_batch_tokens": work.micro_batch_tokens,
        "run.out": out,
        "run.steps": steps,
        "run.seed": seed,
        "run.device": "cpu",
        "run.threads": torch.get_num_threads(),
    } | {f"loss.{name}": 0 for name in ("kl_coef", "entropy_coef", "neg_entropy_coef")}
    given = [f"--{name}={value}" for name, value in options.items()]
    argv = [f"--config={RECIPES / 'demo.yaml'}", *given, *more]
    config, _, resolved = parse(TapoConfig, argv, "")
    return config, resolved


def triplets_of(config: TapoConfig, count: int) -> list[Triplet]:
    """The triplets of a run's first groups, in the order in which it trains on them."""
    anchors = Manifest.read(config.data.path).anchors
    stream = TripletStream(anchors, positive=config.data.positive, seed=config.run.seed)
    return [next(stream) for _ in range(count)]


def rewards_of(responses: Sequence[str], triplets: Sequence[Triplet], names: dict) -> list[float]:
    """The reward of each response about its triplet."""
    rows = [
        {
            "response": said,
            "ground_truth": of.sub_category,
            "names": names.get(of.super_category, ()),
        }
        for said, of in zip(responses, triplets, strict=True)
    ]
    return [result["overall"] for result in fine_r1_strict(rows)]


def fixed_responses(triplet: Triplet, count: int) -> list[str]:
    """Texts of different lengths, every second of them right."""
    wrong = "no butterfly"
    return [
        f"<think>{'It has wings. ' * (1 + n % 3)}</think>"
        f"<answer>{wrong if n % 2 else triplet.sub_category}</answer>"
        for n in range(count)
    ]


def question_of(triplet: Triplet) -> str:
    """What the user asks."""
    return stage2_text(triplet.question)


class PeakMemory:
    """Resident memory of this process from now on: Linux only.

    Args:
        status: file that says how much is resident, and has been at most.
        reset: file that resets the latter.
    """

    def __init__(self, status: str = "/proc/self/status", reset: str = "/proc/self/clear_refs"):
        self._status = Path(status)
        gc.collect()
        Path(reset).write_text("5", encoding="ascii")
        self.start_mib = self._mib("VmRSS")

    def above_mib(self) -> float:
        """Peak above the start."""
        return self._mib("VmHWM") - self.start_mib

    def _mib(self, name: str) -> float:
        (line,) = [one for one in self._status.read_text().splitlines() if one.startswith(name)]
        return int(line.split()[1]) / 1024


@dataclass
class Taken:
    """What one run took; a list has an entry for each step."""

    seconds: list[float]
    cpu: list[float]
    """CPU seconds of this process, which vary less on a shared machine."""
    sampling: list[float]
    reward: list[float]
    update: list[float]
    tokens: list[float]
    rewards: list[float]
    start_mib: float
    peak_mib: float


def now() -> tuple[float, float]:
    """Seconds by the clock and of this process's CPU time."""
    return time.perf_counter(), time.process_time()


def between(clocks: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Seconds and CPU seconds from each of these moments to the next."""
    pairs = list(pairwise(clocks))
    return [b[0] - a[0] for a, b in pairs], [b[1] - a[1] for a, b in pairs]


def equal_advantages(groups: Sequence[Group], divide_by_std: bool = True) -> None:
    """As `set_advantages`, with TRL's eps."""
    for group in groups:
        rewards = torch.tensor([response.reward for response in group.responses])
        found = group_advantages(
            rewards, [0] * len(rewards), ADVANTAGE_EPS, divide_by_std=divide_by_std
        )
        for response, advantage in zip(group.responses, found.tolist(), strict=True):
            response.advantage = advantage


def with_run(config: TapoConfig, resolved: str, use: Callable[[tapo.TapoRun], object]) -> object:
    """What `use` makes of a run, with TRL's eps of advantages."""
    kept, tapo.set_advantages = tapo.set_advantages, equal_advantages
    try:
        with StopSignal() as stop, open_folder(config, None) as folder:
            run = tapo.TapoRun(config, resolved, stop, folder)
            with closing(run), run.log:
                return use(run)
    finally:
        tapo.set_advantages = kept


def train_ours(
    work: Work, folder: Path, out: Path, steps: int, seed: int, more: Sequence[str] = ()
) -> Taken:
    """Run our steps, the last of them too without a checkpoint."""
    config, resolved = config_of(work, folder, out, steps, seed, more)
    clocks: list[tuple[float, float]] = []

    def use(run: tapo.TapoRun) -> tuple[float, float]:
        memory = PeakMemory()
        clocks.append(now())
        for _ in range(steps):
            figures = run.step()
            run.log.step(run.steps_done, figures)
            clocks.append(now())
        return memory.start_mib, memory.above_mib()

    start_mib, peak_mib = with_run(config, resolved, use)
    lines = read_metrics(out / "metrics.jsonl")
    phases = [phase_seconds(line) for line in lines]
    return Taken(
        *between(clocks),
        *([phase.get(name, 0.0) for phase in phases] for name in ("generate", "reward", "update")),
        [line["response_length"] * work.sampled for line in lines],
        [line["reward"] for line in lines],
        start_mib,
        peak_mib,
    )


@dataclass
class Fixed:
    """What a trainer makes of fixed responses in FIXED_STEPS optimiser steps, without clipping."""

    prompt_ids: list[list[int]]
    """Of each group of the first step, image pads expanded."""
    pixels: list[Tensor]
    """Of its photo."""
    gradients: dict[str, Tensor]
    """Of the first step."""
    updates: dict[str, Tensor]
    """What all steps changed in the weights."""


def fixed_ours(work: Work, folder: Path, out: Path) -> Fixed:
    """Steps of ours on `fixed_responses`."""
    config, resolved = config_of(work, folder, out, FIXED_STEPS, 0)
    config.optim.max_grad_norm = 1e9
    chosen = triplets_of(config, FIXED_STEPS * work.groups)
    gradients: dict[str, Tensor] = {}
    kept = tapo.clip_and_step

    def note(run: tapo.TapoRun, *given: object) -> dict[str, float]:
        if not gradients:
            gradients.update(gradients_of(run.policy.model))
        return kept(run, *given)

    def use(run: tapo.TapoRun) -> Fixed:
        prompts, before = [], weights_of(run.policy.model)
        for start in range(0, len(chosen), work.groups):
            run.groups.extend(_fixed_group(run, work, one) for one in chosen[start:][: work.groups])
            equal_advantages(run.groups)
            keys = [(group.prompt_ids, (group.triplet.anchor,)) for group in run.groups]
            prompts += [run.encoder(*key) for key in keys]
            run.step()
        first = prompts[: work.groups]
        pixels = [prompt.images[0].pixel_values for prompt in first]
        updates = updates_since(before, run.policy.model)
        return Fixed([prompt.input_ids.tolist() for prompt in first], pixels, gradients, updates)

    tapo.clip_and_step = note
    try:
        return with_run(config, resolved, use)
    finally:
        tapo.clip_and_step = kept


def _fixed_group(run: tapo.TapoRun, work: Work, triplet: Triplet) -> Group:
    """A group that was sampled just now, of fixed responses."""
    said = fixed_responses(triplet, work.responses)
    scores = rewards_of(said, [triplet] * len(said), run.manifest.names)
    responses = []
    for text, score in zip(said, scores, strict=True):
        ids = run.parts.tokenizer.encode(text, add_special_tokens=False) + [run.parts.turn_end]
        logprobs = (0.0,) * len(ids)  # not used: they are of the weights that are trained
        responses.append(
            Response("anchor", tuple(ids), logprobs, "stop", run.steps_done, text, score)
        )
    prompt = run.sampler.prompts.ids(triplet, (triplet.anchor,))
    return Group(triplet.id, triplet, prompt, responses)


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all gradients."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def updates_since(before: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """What has changed since the weights were `before`."""
    return {name: weight - before[name] for name, weight in weights_of(model).items()}
