"""Evaluation on held-out photos: greedy answers, closed-world and open-world accuracy.

    python -m tercet.train.eval_fgvr --model.path CHECKPOINT --data triplets.json --out eval.json

`--data` is a triplets.json, for its held-out photos, or JSON Lines of questions. Closed-world: the
prompt shows the options, and an answer is correct when it includes the true one. Open-world: an
answer is correct when the true name is the only known name in it (`exact`), or when the true name
occurs in it (`included`, the published text inclusion).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from tercet.core.config import RunConfig
from tercet.core.tool_config import EvalConfig
from tercet.train.learner.command_line import check_output, command, read_options


def main() -> None:
    evaluate(read_options(EvalConfig, None, __doc__.split("\n")[0]))


def evaluate(options: EvalConfig) -> None:
    """Ask the questions, score the answers, write them and print the table."""
    # Here, so that --help does not wait for torch and transformers.
    from tercet.core.data.photos import check_images
    from tercet.core.data.vision import PromptEncoder
    from tercet.core.models import load_policy
    from tercet.rollout.local import LocalEngine
    from tercet.train.evaluation.answers import ask, questions_of, table
    from tercet.train.learner.device import set_up

    check_output(Path(options.out), "out")
    questions, names = questions_of(options.data, options.per_class)
    bad = check_images((question.image for question in questions), "skip")
    if bad:
        raise ValueError(f"{next(iter(bad.values()))} ({len(bad)} bad photos in {options.data})")
    device = set_up(RunConfig(device=options.device))
    parts = load_policy(options.model, device)
    engine = LocalEngine(parts, PromptEncoder(parts), max_rows=options.max_rows)
    answers = ask(
        engine,
        parts,
        questions,
        prompt=options.prompt,
        names=names,
        system_prompt=options.model.system_prompt,
        max_tokens=options.max_tokens,
    )
    result = {"table": table(answers), "answers": [asdict(answer) for answer in answers]}
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    for partition, scores in result["table"].items():
        print(partition, "  ".join(f"{name} {value:.1f}" for name, value in scores.items()))
    print(f"written: {options.out}")


if __name__ == "__main__":
    command(main)
