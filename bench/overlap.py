"""What sampling ahead gains: steps of a run on a server of its own core, with and without overlap.

    make bench-overlap

The server is pinned to one core and the trainer to the other, as they would have GPUs of their own;
without overlap the server may use both cores too, since the trainer waits meanwhile. The runs
alternate, and each one's first step, which nothing is sampled ahead for, is left out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from tercet.bench.measure import append, commit, conditions
from tercet.bench.rollout import CPU_FLAGS, make_parts, noise_photos, pinned
from tercet.core.config import TapoConfig
from tercet.core.types import PolicyParts
from tercet.rollout.launch import SAME_PIXELS
from tercet.rollout.server import Server
from tercet.train import tapo
from tercet.train.cli.command_line import parse

RESULTS = Path(__file__).parent / "results" / "overlap.csv"
STEPS = 5
SHAPE = {"groups_per_step": 8, "n_anchor": 3, "n_positive": 3, "max_response_tokens": 48}


@dataclass
class Row:
    """Seconds of a step: medians over steps and rounds, and what of them the trainer waits."""

    overlap: str
    server_cores: int
    step_s: float
    generate_s: float
    update_s: float
    steps: int


def length(rows: list[dict]) -> list[dict]:
    """A reward that every group passes."""
    return [{"overall": n / len(rows)} for n in range(len(rows))]


def steps_of(folder: Path, url: str, overlap: str, run: str) -> list[dict]:
    """The metrics of a run's steps but the first."""
    options = [f"--rollout.{name}={value}" for name, value in SHAPE.items()]
    options += ["--rollout.engine=sglang", f"--rollout.urls=['{url}']"]
    options += [f"--rollout.overlap={overlap}", "--rollout.reward=tercet.bench.overlap:length"]
    options += [f"--data.path={folder / 'photos'}", "--data.seen_fraction=1", "--data.sft_shots=0"]
    options += [f"--model.path={folder / 'policy'}", f"--run.out={folder / run}"]
    options += ["--run.device=cpu", f"--run.steps={STEPS}", f"--run.save_every={STEPS}"]
    config, _, resolved = parse(TapoConfig, options, "")
    tapo.train(config, resolved)
    lines = (folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][1:]


def measure(parts: PolicyParts, options: argparse.Namespace) -> Iterator[Row]:
    for cores, ways in (((0,), ("off", "one_step")), ((0, 1), ("off",))):
        found: dict[str, list[dict]] = {way: [] for way in ways}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            parts.save(folder / "policy")
            for species in ("wren", "auk"):
                place = folder / "photos" / "bird" / species
                place.mkdir(parents=True)
                noise_photos(place, 4, options.side)
            flags = [*SAME_PIXELS, *shlex.split(CPU_FLAGS)]
            server = Server(folder / "policy", options.python, folder / "server", arguments=flags)
            with pinned(*cores):
                server.start()
            with server, pinned(1):  # it runs already: entering it starts nothing
                for turn in range(options.rounds):
                    for way in ways:
                        found[way] += steps_of(folder, server.url, way, f"{way}_{turn}")
        for way, steps in found.items():
            yield row(way, len(cores), steps)


def row(overlap: str, server_cores: int, steps: Sequence[dict]) -> Row:
    whole = [sum(v for name, v in step.items() if name.startswith("seconds_")) for step in steps]
    parts = ([step[f"seconds_{name}"] for step in steps] for name in ("generate", "update"))
    seconds = (round(median(values), 3) for values in (whole, *parts))
    return Row(overlap, server_cores, *seconds, len(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="Python of the server's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=112, help="pixels of a photo")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.model = ""
    torch.set_num_threads(1)
    parts = make_parts(options, 256, 4)
    for found in measure(parts, options):
        append(options.out, [found], conditions("cpu", commit()))
        print(found)


if __name__ == "__main__":
    main()
