"""Stage-1 records as a data set for others: the records, a card, and by choice the photos."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import yaml

from tercet.core.commit import code_version
from tercet.core.data.records import SftSample, read_sft
from tercet.core.prompts import extract_answer

RECORDS, PHOTOS = "stage1.json", "photos"
MOST_NAMES = 400
"""Names that the card lists."""
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**9, "n>100K"))
"""The hub's words for the number of records below a bound."""


def write_records(file: Path, out: Path, *, name: str, licence: str | None, photos: bool) -> int:
    """Write a folder with stage1.json, README.md and by choice photos/.

    Paths of photos are relative to their common folder, so that none of this machine's is told.

    Args:
        file: stage-1 records, each with its photos.
        out: an empty folder.
        name: of the data set.
        licence: as the hub names licences.
        photos: copy the photos too.

    Returns:
        The number of records.

    Raises:
        ValueError: naming file, record or photo at fault.
    """
    samples, _ = read_sft(file)
    keys = list(dict.fromkeys(key for sample in samples for key in sample.images))
    root = os.path.commonpath([os.path.dirname(key) for key in keys]) if keys else os.sep
    places = {key: os.path.relpath(key, root) for key in keys}
    if photos:
        for key, place in places.items():
            target = out / PHOTOS / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(key, target)
        places = {key: f"{PHOTOS}/{place}" for key, place in places.items()}
    records = [
        {
            "messages": [{"role": role, "content": content} for role, content in sample.messages],
            "images": [places[key] for key in sample.images],
        }
        for sample in samples
    ]
    text = json.dumps(records, indent=1, ensure_ascii=False)
    (out / RECORDS).write_text(text, encoding="utf-8")
    card = records_card(samples, name=name, licence=licence, photos=len(keys) if photos else 0)
    (out / "README.md").write_text(card, encoding="utf-8")
    return len(records)


def records_card(samples: list[SftSample], *, name: str, licence: str | None, photos: int) -> str:
    """The text of README.md; `photos` are those in the folder."""
    fields: dict[str, object] = {"task_categories": ["image-text-to-text"], "language": ["en"]}
    if licence:
        fields["license"] = licence
    fields["size_categories"] = [next(word for bound, word in SIZES if len(samples) < bound)]
    fields["tags"] = ["tercet", "fine-grained-recognition", "chain-of-thought"]
    answers = [sample.messages[-1][1] for sample in samples]
    names = Counter(extract_answer(answer, "longest") or "(no answer)" for answer in answers)
    words = sorted(len(answer.split()) for answer in answers)
    listed = ", ".join(f"{n} ({k})" for n, k in sorted(names.items())[:MOST_NAMES])
    more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    where = "The photos are not part of this repository: paths are relative to their common folder."
    if photos:
        where = f"{photos:,} photos are in `{PHOTOS}/`."
    return f"""---
{yaml.safe_dump(fields, sort_keys=False)}---

# {name.rpartition("/")[2]}

{len(samples):,} conversations about photos for supervised fine-tuning before TAPO: a question, and
an answer that reasons before it names what the photo shows. Written by Tercet, version
{code_version()}.

`{RECORDS}` is a JSON list of `{{"messages": [{{"role", "content"}}], "images": [path]}}`;
`<image>` in the user's turn stands for the photo. {where}

## Answers

- {len(names):,} names; {words[len(words) // 2]} words an answer in the middle, {words[-1]} at most.
- Names (records): {listed}{more}
"""
