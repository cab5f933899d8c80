"""The metrics of a run: one table that says how each is shown, and one reader of metrics.jsonl.

A line of metrics.jsonl is a JSON object: the number of the step, its metrics by name, and the
seconds of each phase as `seconds_<phase>`. The step's line on the terminal, TensorBoard and
curves.png follow from the tables below. A metric that they do not list, such as one of your own
reward function, goes to metrics.jsonl and what run.log_to names only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

METRICS_FILE, ENVIRONMENT = "metrics.jsonl", "environment.json"  # in run.out
SECONDS = "seconds_"
"""What the name of a phase's seconds begins with."""


class Metric(NamedTuple):
    """A metric: its name in metrics.jsonl, what it is, and where it is shown."""

    name: str
    meaning: str
    line: int | None = None
    """Where the terminal shows it: 1 a column of the step's line, 2 below it with run.verbose,
    3 on a line of its own, as few steps have it; None: nowhere."""
    label: str = ""
    """What it is called there; neighbours on line 2 with the same label are joined."""
    form: str = ""
    """Its format there, with a fixed width."""
    panel: str | None = None
    """Title of its panel in curves.png; None: not drawn."""
    curve: str = ""
    """Its name in the panel's legend."""
    right: bool = False
    """Whether it is drawn on the panel's right axis."""


PANELS = {
    "Reward": "",
    "Loss": "",
    "Entropy and KL": "KL",
    "Share of tokens clipped": "",
    "Gradient norm and learning rate": "learning rate",
    "Response length and groups kept": "share kept",
}
"""The panels of curves.png in their order: the title, and the label of the right axis."""
MORE_PANELS = {
    "Sampler against trainer": "maximum",
    "Tokens a second": "",
    "Memory": "",
}
"""Further panels of the report page."""

# fmt: off
METRICS = (
    # Means over all responses sampled in the step, whether or not their group was kept.
    Metric("reward", "mean reward of a response",
           1, "reward", "6.3f", "Reward", "reward"),
    Metric("accuracy", "share of responses that the reward function counts as correct",
           1, "acc", "5.3f", "Reward", "accuracy"),
    Metric("several_names", "share of responses whose answer holds more than one known name",
           2, "several", "5.3f", "Reward", "several names"),
    Metric("format", "share of responses in the format that the prompt asks for",
           panel="Reward", curve="format"),
    Metric("acceptance", "share of the step's sampled groups that passed dynamic sampling",
           1, "kept", "5.3f", "Response length and groups kept", "share of groups kept", True),
    Metric("response_length", "mean length of a response, in tokens",
           1, "len", "6.1f", "Response length and groups kept", "tokens a response"),
    Metric("kept_length", "the same of the responses that are trained on",
           panel="Response length and groups kept", curve="tokens a kept response"),
    Metric("cut_off", "share of responses that were cut off at rollout.max_response_tokens",
           panel="Response length and groups kept", curve="share cut off", right=True),
    Metric("redrawn", "responses drawn again because of what was drawn, as a share of all"),
    Metric("groups", "groups that the step trains on"),
    Metric("filled_up", "groups trained on although they did not pass dynamic sampling"),
    # Of an evaluation during training.
    Metric("eval_seen", "share of held-out photos of seen sub-categories that are named right",
           3, "seen", "5.3f", "Reward", "held out, seen"),
    Metric("eval_unseen", "share of held-out photos of unseen sub-categories that are named right",
           3, "unseen", "5.3f", "Reward", "held out, unseen"),
    # Of the loss: sums over response tokens divided by num_loss_tokens, then means over updates.
    Metric("loss", "the loss that is minimised",
           2, "loss", "7.4f", "Loss", "total"),
    Metric("cross_entropy", "the loss of stage 1: minus the mean log-prob of the target tokens",
           1, "ce", "7.4f", "Loss", "cross entropy"),
    Metric("held_out_ce", "the same on records that are held out",
           3, "cross entropy", "6.4f", "Loss", "held out"),
    Metric("permuted_ce", "the same on held-out records, each with another one's photos",
           3, "with others' photos", "6.4f", "Loss", "held out, others' photos"),
    Metric("pg_loss", "the clipped policy-gradient term of the loss",
           2, "pg", "7.4f", "Loss", "policy gradient"),
    Metric("kl", "KL to the policy that sees the negative photo (k3 estimate), after its clamps",
           1, "kl", "6.4f", "Entropy and KL", "KL to negative", True),
    Metric("entropy", "minus the mean log-prob of the sampled tokens",
           1, "entropy", "6.3f", "Entropy and KL", "H"),
    Metric("neg_entropy", "minus the mean log-prob of the same tokens on the negative photo",
           2, "Hneg", "6.3f", "Entropy and KL", "H negative"),
    Metric("margin", "mean of log-prob on the anchor - on the negative, of sampled tokens",
           panel="Entropy and KL", curve="margin"),
    Metric("ref_kl", "KL to the reference policy (k3 estimate), after its clamps",
           panel="Entropy and KL", curve="KL to reference", right=True),
    Metric("exact_neg_entropy", "entropy of the next-token distribution on the negative photo"),
    Metric("exact_entropy", "entropy of the policy's whole next-token distribution",
           2, "Hexact", "5.3f", "Entropy and KL", "H exact"),
    Metric("clip_frac_high", "share of tokens held by the upper bound on the ratio",
           2, "clip", "5.3f", "Share of tokens clipped", "high"),
    Metric("clip_frac_low", "share of tokens held by the lower bound on the ratio",
           2, "clip", "5.3f", "Share of tokens clipped", "low"),
    Metric("clip_frac_dual", "share of tokens held by dual clipping",
           2, "clip", "5.3f", "Share of tokens clipped", "dual"),
    Metric("approx_kl", "KL to the policy at the start of the step (k3 estimate)",
           2, "kl_old", "7.1e", "Entropy and KL", "KL to old", True),
    # Of the optimiser: means over the step's updates.
    Metric("grad_norm", "norm of the gradient before it is clipped",
           1, "grad", "7.1e", "Gradient norm and learning rate", "gradient norm"),
    Metric("skipped_steps", "share of updates skipped because the gradient was not finite",
           2, "skip", "1.0f"),
    Metric("lr", "learning rate",
           2, "lr", "7.1e", "Gradient norm and learning rate", "learning rate", True),
    Metric("lora_merge_error", "what rounding takes from the merged weights of LoRA, relative",
           2, "merge", "7.1e"),
    # Of the sampler.
    Metric("tokens_per_s", "response tokens sampled in a second",
           2, "tok/s", "5.0f", "Tokens a second", "sampled"),
    # The sampler against the trainer, over the tokens of responses on the anchor photo.
    Metric("mismatch_mean", "mean of |log-prob of the trainer - log-prob of the sampler|",
           panel="Sampler against trainer", curve="mean difference"),
    Metric("mismatch_max", "maximum of |log-prob of the trainer - log-prob of the sampler|",
           panel="Sampler against trainer", curve="maximum", right=True),
    Metric("mismatch_kl", "KL(sampler || trainer) (k3 estimate)",
           panel="Sampler against trainer", curve="KL"),
    Metric("mismatch_over", "share of tokens whose log-probs differ by more than 0.1",
           panel="Sampler against trainer", curve="share above 0.1"),
    Metric("peak_mem_gib", "most GiB of memory so far, of rank 0: the GPU's, else the process's",
           panel="Memory", curve="peak, GiB"),
)
# fmt: on
"""Every metric that the training commands write, in the order of the terminal's columns."""

FROM_REWARDS = ("accuracy", "several_names", "format")
"""Metrics of the table that reward functions give."""
RESERVED = {"step"}.union(*({m.name, m.label} for m in METRICS if m.name not in FROM_REWARDS))


def is_reserved(name: str) -> bool:
    """Whether the trainer itself writes a metric of that name, or calls one so on a step's line."""
    return name.startswith((SECONDS, "seconds/")) or name.removeprefix("train/") in RESERVED


PHASES = {
    "generate": "gen",
    "reward": "rew",
    "old": "old",
    "negative": "neg",
    "update": "upd",
    "sync": "sync",
    "eval": "eval",
    "log": "log",
}
"""The phases of a step in their order, with their labels on the terminal."""


def tensorboard_tag(name: str) -> str:
    """The name in TensorBoard, which groups by what stands before the slash."""
    if "/" in name:
        return name
    if name.startswith(SECONDS):
        return f"seconds/{name.removeprefix(SECONDS)}"
    return f"train/{name}"


def phase_seconds(line: dict[str, float]) -> dict[str, float]:
    """The seconds of each phase in a line of metrics.jsonl, by the phase's name."""
    return {
        name.removeprefix(SECONDS): value
        for name, value in line.items()
        if name.startswith(SECONDS)
    }


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """The steps that a metrics.jsonl records, in its order, each as a dict with `step`.

    What a kill or a power cut left at the end is left out (see `whole_lines`).

    Raises:
        ValueError: as `whole_lines`.
    """
    return whole_lines(path)[0]


def whole_lines(path: Path | str) -> tuple[list[dict[str, float]], int]:
    """The steps that a metrics.jsonl records, and how many bytes at its end are damaged.

    The damaged end begins with the first line that is no JSON object with a step: one cut short,
    or the zeros that some file systems leave after a power cut.

    Raises:
        ValueError: a good line follows a damaged one; the message gives the damaged one's number.
    """
    steps, damaged, first = [], 0, None
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), 1):
        step = _step_of(line)
        if step is None:
            damaged, first = damaged + len(line), first or number
        elif first:
            raise ValueError(f"{path}, line {first}: not a JSON object with a step")
        else:
            steps.append(step)
    return steps, damaged


def _step_of(line: bytes) -> dict[str, float] | None:
    """A line's object; None where it is none with the number of a step."""
    try:
        step = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return step if isinstance(step, dict) and type(step.get("step")) is int else None
