"""The model card: what was trained, on what, how, and how good it is, from the run's own files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from tercet.core.commit import code_version
from tercet.train.logs.metrics import METRICS
from tercet.train.publish.trained import Trained

STAGES = {"tapo": "TAPO (Triplet Augmented Policy Optimization)", "sft": "supervised fine-tuning"}
SHOWN = ("reward", "accuracy", "eval_seen", "eval_unseen", "response_length", "kl", "margin")
SHOWN += ("cross_entropy", "held_out_ce", "permuted_ce")
"""Metrics in the table of figures, where the run has them."""
CURVES = "curves.png"
"""The run's figure, which stands beside the card."""
WINDOW = 10
"""Most steps whose mean stands in that table."""
MOST_TABLE = 1 << 20
"""Bytes of a table of an evaluation."""
LOADS_WHOLE = """from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({name!r}, dtype="auto")
processor = AutoProcessor.from_pretrained({name!r})  # needs torchvision
"""
LOADS_ADAPTER = """from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({base!r}, dtype="auto")
model = PeftModel.from_pretrained(model, {name!r})
processor = AutoProcessor.from_pretrained({base!r})  # needs torchvision
"""
ASKS = """question = {question!r}
photo = {{"type": "image", "image": Image.open("photo.jpg")}}
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": [photo, {{"type": "text", "text": question}}]}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
ids = model.generate(**inputs, max_new_tokens=1024, do_sample=False)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
"""


def model_card(
    trained: Trained,
    *,
    name: str,
    base: str | None,
    licence: str | None,
    is_adapter: bool,
    question: str,
    evaluation: Path | None = None,
) -> str:
    """The text of README.md.

    Args:
        trained: the checkpoint.
        name: of the model: where it will be found, or its folder's name.
        base: hub id of the model that training began with; None: not known.
        licence: of the weights, as the hub names licences; None: the card says whose it follows.
        is_adapter: whether the folder holds a LoRA adapter alone.
        question: an example of a prompt, as in training.
        evaluation: folder of an evaluation, whose tables.md is taken over.

    Raises:
        ValueError: the folder of the evaluation holds no tables, or too large ones.
    """
    command = trained.identity.command if trained.identity else "tapo"
    parts = [_front(base, licence, is_adapter, command), f"# {name.rpartition('/')[2]}"]
    parts.append(_opening(trained, base, command))
    loads = (LOADS_ADAPTER if is_adapter else LOADS_WHOLE).format(name=name, base=base)
    parts.append(f"## Use\n\n```python\n{loads}{ASKS.format(question=question)}```")
    parts.append("\n".join(["## Training data", "", *_data(trained)]))
    parts.append("\n".join(["## Figures", "", *_figures(trained)]))
    if evaluation is not None:
        parts.append(_tables(evaluation))
    parts.append("\n".join(["## Recipe", "", *_recipe(trained)]))
    parts.append("\n".join(["## Licence", "", _licence(base, licence)]))
    return "\n\n".join(parts) + "\n"


def _front(base: str | None, licence: str | None, is_adapter: bool, command: str) -> str:
    """The fields that the hub reads."""
    fields: dict[str, object] = {"library_name": "peft" if is_adapter else "transformers"}
    fields["pipeline_tag"] = "image-text-to-text"
    if licence:
        fields["license"] = licence
    if base:
        fields["base_model"] = base
        fields["base_model_relation"] = "adapter" if is_adapter else "finetune"
    fields["tags"] = ["tercet", command, "fine-grained-recognition"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _opening(trained: Trained, base: str | None, command: str) -> str:
    of = f"[{base}](https://huggingface.co/{base})" if base else "a model that is not on the hub"
    return (
        f"A model that names what a photo shows, trained from {of} by {STAGES[command]} with "
        f"Tercet, version {trained.version or 'not recorded'}. It is the state after "
        f"{trained.step:,} steps; version {code_version()} wrote this folder."
    )


def _data(trained: Trained) -> Iterator[str]:
    manifest = trained.manifest
    if manifest is None:
        yield "The run's folder was not there when this card was written."
        return
    seen = Counter(
        anchor.super_category
        for anchor in {(a.super_category, a.sub_category): a for a in manifest.anchors}.values()
    )
    anchors = Counter(a.super_category for a in manifest.anchors)
    yield "| super-category | sub-categories | of these trained on | photos trained on |"
    yield "| --- | ---: | ---: | ---: |"
    for group, names in sorted(manifest.names.items()):
        yield f"| {_cell(group)} | {len(names)} | {seen[group]} | {anchors[group]} |"
    held_out = sum(map(len, manifest.test.values()))
    yield f"\n{held_out:,} photos are held out. Photos are not part of this repository."


def _figures(trained: Trained) -> Iterator[str]:
    steps = trained.metrics
    rows = [m for m in METRICS if m.name in SHOWN and any(m.name in step for step in steps)]
    if not rows:
        yield "The run's metrics were not there when this card was written."
        return
    yield f"Means of the first and the last steps that have a figure, at most {WINDOW} of each:\n"
    yield "| figure | meaning | first | last |"
    yield "| --- | --- | ---: | ---: |"
    for metric in rows:
        values = [step[metric.name] for step in steps if metric.name in step]
        window = min(WINDOW, max(1, len(values) // 2))
        first, last = values[:window], values[-window:]
        ends = " | ".join(f"{sum(of) / len(of):.4g}" for of in (first, last))
        yield f"| {metric.name} | {_cell(metric.meaning)} | {ends} |"
    if (trained.run_folder / CURVES).is_file():
        yield f"\n![metrics over the steps of the run]({CURVES})"


def _tables(folder: Path) -> str:
    file = folder / "tables.md"
    if not file.is_file() or file.stat().st_size > MOST_TABLE:
        raise ValueError(
            f"--evaluation: {folder} is no folder of train/eval_fgvr.py: it needs a tables.md of "
            f"at most {MOST_TABLE:,} bytes"
        )
    text = file.read_text(encoding="utf-8").strip()
    return f"## Evaluation\n\n{text.replace('## ', '### ')}"


def _recipe(trained: Trained) -> Iterator[str]:
    recipe = trained.recipe()
    if trained.identity is None:
        yield "The checkpoint is of an earlier version and does not tell its options."
        return
    yield f"Options of train/{trained.identity.command}.py that differ from their defaults:\n"
    yield f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"


def _licence(base: str | None, licence: str | None) -> str:
    if licence:
        return f"The weights: {licence}. Tercet, the code that trained them: MIT."
    of = base or "the model that training began with"
    return f"The weights follow the licence of {of}. Tercet, the code that trained them: MIT."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
