"""A page to look through samples and correct them by hand, and its result read back.

The page is one file without scripts from elsewhere: open it in any browser, correct, save
review.json, and give that to `train/make_cot.py --reviewed`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import replace
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from tercet.core.data.fields import load_json
from tercet.core.data.files import shown
from tercet.core.data.vision import load_image
from tercet.train.cot.answers import TAGS, Parts, fault_of, read_parts
from tercet.train.cot.samples import CotSample

PAGE = "review.html"
PHOTO_PIXELS = 320
"""Longest side of a photo on the page."""
ROWS = {"analysis": 12, "options": 5, "comparison": 12, "prediction": 1}
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Chains of thought</title><style>
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em }
article { border-top: 1px solid #999; display: grid; gap: 1em; grid-template-columns: 20em 1fr;
  padding: 1em 0 }
textarea { box-sizing: border-box; font: inherit; width: 100% }
.reason { color: #b00 } label { display: block }
button { position: fixed; right: 1em; top: 1em }
</style></head><body><h1>Chains of thought</h1>
<p>Correct the texts, untick what is not to be kept, then save review.json.</p>
<button id="save">Save review.json</button>
"""
_TAIL = """<script>
document.getElementById("save").onclick = () => {
  const samples = {};
  for (const item of document.querySelectorAll("article")) {
    const entry = { keep: item.querySelector("input").checked };
    for (const text of item.querySelectorAll("textarea")) entry[text.name] = text.value;
    samples[item.dataset.id] = entry;
  }
  const link = document.createElement("a");
  const type = { type: "application/json" };
  link.href = URL.createObjectURL(new Blob([JSON.stringify({ samples }, null, 1)], type));
  link.download = "review.json";
  link.click();
};
</script></body></html>
"""


def review_page(out: Path, samples: Iterable[CotSample]) -> str:
    """The page: every sample whose four parts can be read.

    Args:
        out: folder that the samples' photos are relative to.
        samples: kept ones are ticked, rejected ones show their reason.
    """
    articles = [_article(out, s, parts) for s in samples if (parts := read_parts(s.said))]
    return _HEAD + "".join(articles) + _TAIL


def _article(out: Path, sample: CotSample, parts: Parts) -> str:
    texts = "".join(
        f'<label>{tag}<textarea name="{tag}" rows="{ROWS[tag]}">\n'
        f"{escape(getattr(parts, tag))}</textarea></label>"
        for tag in TAGS
    )
    reason = f'<p class="reason">{escape(sample.reason)}</p>' if sample.reason else ""
    checked = "" if sample.reason else " checked"
    concepts = "".join(f"<li>{escape(concept)}</li>" for concept in sample.concepts)
    return (
        f'<article data-id="{escape(sample.id)}"><div><img alt="" src="{_photo(out, sample)}">'
        f"<h2>{escape(sample.sub_category)}</h2><p>{escape(sample.question)}</p>{reason}"
        f'<label><input type="checkbox"{checked}> keep</label><ul>{concepts}</ul></div>'
        f"<div>{texts}</div></article>\n"
    )


def _photo(out: Path, sample: CotSample) -> str:
    photo = load_image(str(out / sample.image))
    photo.thumbnail((PHOTO_PIXELS, PHOTO_PIXELS), Image.Resampling.BICUBIC)
    stored = BytesIO()
    photo.save(stored, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stored.getvalue()).decode()


def read_review(path: Path, samples: Iterable[CotSample]) -> list[CotSample]:
    """The samples with what a person corrected; those that the page did not show are as before.

    Language is not checked again: the person decides.

    Args:
        path: review.json, as the page saves it.
        samples: all samples, kept and rejected.

    Raises:
        ValueError: naming the file, and the sample or field at fault.
    """
    review = load_json(path)
    entries = review.get("samples") if isinstance(review, dict) else None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold 'samples', as review.html saves them")
    known = {sample.id: sample for sample in samples}
    for name, entry in entries.items():
        if name not in known:
            raise ValueError(f"{path}: {shown(name)} is no sample of kept.jsonl or rejected.jsonl")
        known[name] = _corrected(known[name], entry, f"{path}: {name}")
    return list(known.values())


def _corrected(sample: CotSample, entry: object, where: str) -> CotSample:
    if not isinstance(entry, dict) or not isinstance(entry.get("keep"), bool):
        raise ValueError(f"{where}: 'keep' must be true or false")
    texts = [entry.get(tag) for tag in TAGS]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: needs the texts {', '.join(TAGS)}")
    said = "".join(f"<{t}>{text.strip()}</{t}>" for t, text in zip(TAGS, texts, strict=True))
    if not entry["keep"]:
        return replace(sample, said=said, reason=sample.reason or "review: not to be kept")
    reason = fault_of(read_parts(said), sample.sub_category, english=False)
    if reason is not None:
        raise ValueError(f"{where} is to be kept, but: {reason}")
    return replace(sample, said=said, reason=None)
