"""A run's folder with what the report reads, made without training."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from tercet.core.config import TapoConfig
from tercet.train.cli.command_line import parse
from tercet.train.logs.group_files import packed, write_groups

NAMES = ["red wren", "blue wren", "green wren"]
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
"""What a policy might say, to the page's harm."""


def metrics_of(step: int) -> dict[str, float]:
    """A step's line of metrics.jsonl."""
    rng = random.Random(step)
    line = {"step": step, "reward": 0.3 + step / 1000 + rng.random() / 10, "accuracy": 0.25}
    line |= {"several_names": 0.0, "format": 0.9, "acceptance": 0.5, "response_length": 40.5}
    line |= {"kept_length": 41.0, "cut_off": 0.01, "loss": 0.01 - rng.random() / 50, "kl": 0.2}
    line |= {"pg_loss": 0.001, "entropy": 0.4, "neg_entropy": 0.6, "margin": 0.2, "lr": 1e-6}
    line |= {"clip_frac_high": 0.001, "clip_frac_low": 0.0, "grad_norm": rng.random()}
    line |= {"mismatch_mean": 0.003, "mismatch_max": 0.5, "tokens_per_s": 900 + step}
    line |= {"peak_mem_gib": 12.5, "my_score": 0.125, "seconds_generate": 3.5}
    line |= {"seconds_update": 2.25 + rng.random()}
    if step % 20 == 0:
        line |= {"eval_seen": 0.5, "eval_unseen": 0.25}
    return line


def response(role: str, said: str, truth: str, text: str = "") -> dict:
    """A logged response that names `said`; its log-probs tell the place of each token."""
    tokens = ["<think>", "a", " bird", "</think>", "<answer>", said, "</answer>"]
    tokens = [text, *tokens] if text else tokens
    right, count = said == truth, len(tokens)
    return {
        "role": role,
        "text": "".join(tokens),
        "tokens": tokens,
        "reward": 1.0 if right else 0.1,
        "metrics": {"accuracy": float(right), "format": 1.0},
        "advantage": 1.0 if right else -0.5,
        "finish_reason": "stop",
        "weight_version": 0,
        "logprobs": packed([-0.5] * count),
        "neg_logprobs": packed([-0.5 - place for place in range(count)]),
        "old_logprobs": packed([-0.5] * count),
        "rollout_logprobs": packed([-0.25] * count),
    }


def group(step: int, number: int, right: int, text: str = "") -> dict:
    """A logged group of four responses of which the first ones are right."""
    truth, other = NAMES[number % 3], NAMES[(number + 1) % 3]
    said = [truth] * right + [other] * (4 - right)
    roles = ["anchor", "anchor", "positive", "positive"]
    keys = {"anchor": number % 3, "positive": 3 + number % 3, "negative": (number + 1) % 3}
    return {
        "step": step,
        "id": f"{step - 1}.{number}.a{number}",
        "photos": {role: f"photos/{key}.png" for role, key in keys.items()},
        "names": {"anchor": truth, "positive": truth, "negative": other},
        "super_category": "bird",
        "question": "Which bird is this?",
        "kept": 0 < right < 4,
        "why": "passed" if 0 < right < 4 else "all right" if right else "all wrong",
        "responses": [
            response(role, name, truth, text) for role, name in zip(roles, said, strict=True)
        ],
    }


def make_run(folder: Path, steps: int = 3, *options: str, text: str = "") -> Path:
    """Write a run's folder: at each step five groups, of 2, 0, 4, 1 and 3 right answers of 4.

    Args:
        folder: of the run.
        steps: that it has finished.
        options: on its command line.
        text: stands before every response.
    """
    (folder / "photos").mkdir(parents=True)
    for number in range(6):
        colour = (40 * number, 255 - 40 * number, 90)
        Image.new("RGB", (60 + 10 * number, 80), colour).save(folder / f"photos/{number}.png")
    _, _, resolved = parse(TapoConfig, [f"--run.out={folder}", *options], "")
    (folder / "config.yaml").write_text(resolved, encoding="utf-8")
    lines = [metrics_of(step) for step in range(1, steps + 1)]
    text_of = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text_of, encoding="utf-8")
    environment = {"device": "cpu", "torch": "2.13.0", "steps of the run": steps}
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    triplets = {"root": ".", "names": {"bird": NAMES}}
    (folder / "triplets.json").write_text(json.dumps(triplets), encoding="utf-8")
    for step in range(1, steps + 1):
        groups = [group(step, n, right, text) for n, right in enumerate((2, 0, 4, 1, 3))]
        write_groups(folder / "groups", step, groups)
    return folder
