"""Names what photos show: the name, its candidates, the reasoning, and how far samples agree.

    python -m tercet.train.predict PHOTO.jpg --model.path CHECKPOINT
    python -m tercet.train.predict PHOTO.jpg --model.path CHECKPOINT --options wren gull --samples 8

With one sample decoding is greedy. With several, the name is the one that most samples give.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from tercet.core.config import RunConfig
from tercet.core.rollout_config import RolloutConfig
from tercet.core.tool_config import PredictConfig
from tercet.train.cli.command_line import command, read_options
from tercet.train.cli.interrupt import StopSignal


def main() -> None:
    options = read(sys.argv[1:])
    with StopSignal() as stop, stop.at_once():
        for found in predict(options):
            print(json.dumps(found, ensure_ascii=False) if options.json else described(found))


def read(argv: Sequence[str]) -> PredictConfig:
    """Options from a command line that begins with photos and may hold a bare --json."""
    first = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    words = [*(["--photos"] if first else []), *argv]
    for n, word in enumerate(words):
        if word == "--json" and words[n + 1 : n + 2] not in (["true"], ["false"]):
            words[n] = "--json=true"
    options = read_options(PredictConfig, words, __doc__.split("\n")[0])
    if not options.photos:
        raise ValueError("name at least one photo: python -m tercet.train.predict PHOTO.jpg ...")
    if len(set(options.options)) < len(options.options):
        raise ValueError(f"--options: a name stands there twice: {options.options}")
    return options


def predict(options: PredictConfig) -> Iterable[dict]:
    """For each photo {"photo", "name", "agree", "samples", "said", "candidates", "reasoning"}.

    Raises:
        ValueError: naming a photo that cannot be read, before the model is loaded.
    """
    # Here, so that --help does not wait for torch and transformers.
    from tercet.core.data.photos import check_images
    from tercet.core.models import load_policy
    from tercet.train.learner.device import set_up

    photos = [str(Path(photo).absolute()) for photo in options.photos]
    check_images(photos, "error")
    device = set_up(RunConfig(device=options.device))
    here = options.rollout.engine == "local"
    parts = load_policy(options.model, device if here else "cpu")
    outputs = asyncio.run(sample(options, parts, photos))
    return [
        summary(photo, outputs[key], options.options)
        for photo, key in zip(options.photos, photos, strict=True)
    ]


async def sample(options: PredictConfig, parts, photos: Sequence[str]) -> dict[str, list[str]]:
    """All outputs about each photo."""
    from tercet.core.data.vision import PromptEncoder
    from tercet.core.prompts import chat_ids, closed_world_text, open_world_text
    from tercet.core.types import Request
    from tercet.rollout.engine import Sampling
    from tercet.rollout.launch import open_engine

    text = open_world_text(options.question)
    if options.options:
        text = closed_world_text(options.question, options.options)
    turns = [{"role": "user", "content": "<image>" + text}]
    ids = tuple(chat_ids(parts.tokenizer, turns, 1, system_prompt=options.model.system_prompt))
    distinct = list(dict.fromkeys(photos))
    requests = [Request(p, p, ids, (p,), options.samples, options.seed, 0) for p in distinct]
    temperature = options.temperature if options.samples > 1 else 0.0
    outputs: dict[str, list[str]] = {photo: [] for photo in distinct}
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(
            parts,
            PromptEncoder(parts),
            RolloutConfig(**asdict(options.rollout)),
            Path(folder),
            lambda: iter(parts.model.named_parameters()),
        )
        with closing(engine):
            sampling = Sampling(temperature, max_tokens=options.max_tokens)
            async for done in engine.generate(requests, sampling):
                said = parts.tokenizer.decode(done.token_ids, skip_special_tokens=True)
                outputs[done.request_id].append((done.index, said))
    return {photo: [said for _, said in sorted(of)] for photo, of in outputs.items()}


def summary(photo: str, outputs: Sequence[str], options: Sequence[str]) -> dict:
    """What the outputs about a photo say together.

    The name is the one that most outputs give (of equally many, the one given first); candidates
    and reasoning are those of the first output that gives it. Names count as equal in their normal
    form. Without an option (where there are options) or an answer, an output names nothing.
    """
    from tercet.core.names import normal_form
    from tercet.train.evaluation.reasoning import candidates, reasoning_of

    names = [answered(output, options) for output in outputs]
    said = Counter(normal_form(name) for name in names if name)
    spelled = {normal_form(name): name for name in reversed(names) if name}
    best, agree = said.most_common(1)[0] if said else (None, 0)
    keys = [name and normal_form(name) for name in names]
    output = outputs[keys.index(best)]
    return {
        "photo": photo,
        "name": spelled.get(best),
        "agree": agree,
        "samples": len(outputs),
        "said": {spelled[key]: count for key, count in said.most_common()},
        "candidates": candidates(output, options),
        "reasoning": reasoning_of(output),
    }


def answered(output: str, options: Sequence[str]) -> str | None:
    """The name that an output gives: the only option in its answer, or the answer itself."""
    from tercet.core.names import names_in
    from tercet.core.prompts import extract_answer

    answer = extract_answer(output, "longest")
    if not options or not answer:
        return answer or None
    named = names_in(answer, options)
    return named[0] if len(named) == 1 else None


def described(found: dict) -> str:
    """The same in words."""
    share = f" ({found['agree']} of {found['samples']} samples)" if found["samples"] > 1 else ""
    lines = [f"{found['photo']}: {found['name'] or 'no answer'}{share}"]
    others = [f"{name} ({n})" for name, n in found["said"].items() if name != found["name"]]
    if others:
        lines.append(f"  also said: {', '.join(others)}")
    if found["candidates"]:
        lines.append(f"  candidates: {', '.join(found['candidates'])}")
    if found["reasoning"]:
        lines += [f"  {line}" for line in found["reasoning"].splitlines()]
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)
