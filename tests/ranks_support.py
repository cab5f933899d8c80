"""A small training run on one or several processes, started by torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from support import LENGTH, tiny

from tercet.train.cli.arguments import overridden

PATHS = os.pathsep.join(["hooks", *filter(None, [os.environ.get("PYTHONPATH")])])
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
HOOK = """
import importlib.util, os, sys
for word in sys.orig_argv if "RANK" in os.environ else ():
    if word.startswith("--rollout.reward="):
        name = word.partition("=")[2].partition(":")[0]
        spec = importlib.util.spec_from_file_location(name, name + ".py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
"""A sitecustomize.py that runs the reward's module at the start of every rank: tests put faults of
ranks into it. The reward function itself runs in a process of its own."""
ROOT = Path(__file__).resolve().parents[1]
# With eps this large a step is proportional to the gradient, noise in tiny ones does not show.
OPTIONS = """--data.path=photos --model.path=policy --data.shots=3 --data.sft_shots=0
    --run.device=cpu --rollout.groups_per_step=5 --rollout.n_anchor=2 --rollout.n_positive=2
    --rollout.max_prompt_tokens=512 --rollout.max_response_tokens=12 --rollout.max_rounds=1
    --rollout.on_exhausted=keep_last_round --rollout.reward=lengths:length
    --optim.groups_per_minibatch=3 --optim.lr=0.1 --optim.eps=1.0
    --parallel.micro_batch_tokens=560""".split()


def make_workspace(root: Path) -> None:
    """Write noise photos, tiny policies of two families and a reward into a folder."""
    rng = np.random.default_rng(0)
    for name in ("red_bird", "blue_bird", "grey_bird"):
        (root / "photos" / "bird" / name).mkdir(parents=True)
        for n in range(4):
            pixels = rng.integers(0, 255, (*rng.integers(60, 140, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / "bird" / name / f"{n}.png")
    tiny(hidden_size=64, layers=2, vision_layers=1).save(root / "policy")
    tiny("qwen3_vl", hidden_size=64, layers=2, vision_layers=1).save(root / "qwen3_vl")
    (root / "lengths.py").write_text(LENGTH)
    (root / "hooks").mkdir()
    (root / "hooks" / "sitecustomize.py").write_text(HOOK)


def launch(
    out: str, ranks: int, *more: str, restarts=0, script="tapo.py", options=OPTIONS
) -> list[str]:
    """The command line of a run on several ranks, started in the folder of `make_workspace`."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    how = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    words = overridden(options, [f"--run.out={out}", *more])
    return [torchrun, *how, str(ROOT / "train" / script), *words]
