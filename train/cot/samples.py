"""Samples of a teacher: kept ones and rejected ones with the reason, on disk as JSON Lines."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tercet.core.data.fields import json_lines, text_of
from tercet.core.types import Photo
from tercet.train.cot.answers import read_parts, record

KEPT, REJECTED, RECORDS = "kept.jsonl", "rejected.jsonl", "stage1.json"
FIELDS = ("id", "image", "super_category", "sub_category", "question")


@dataclass(frozen=True)
class CotSample:
    """What a teacher said about a photo."""

    id: str
    """`<photo>#<number>`, below the folder of outputs."""
    image: str
    """Relative to that folder."""
    super_category: str
    sub_category: str
    question: str
    concepts: tuple[str, ...]
    said: str
    """The whole answer; empty where there was none."""
    reason: str | None
    """Why it was rejected; None: it is kept."""

    @classmethod
    def of(
        cls, photo: Photo, out: Path, number: int, concepts: Iterable[str], said: str, reason
    ) -> CotSample:
        """Sample `number` of a photo."""
        image = os.path.relpath(photo.image, out)
        labels = (photo.super_category, photo.sub_category, photo.question)
        return cls(f"{image}#{number}", image, *labels, tuple(concepts), said, reason)


@dataclass
class Tally:
    """What a run asked for and got."""

    calls: int = 0
    """Requests answered in this run; what an earlier one asked is not asked again."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasons: Counter = field(default_factory=Counter)
    """Of samples: "kept", or the first word of the reason."""

    def add(self, sample: CotSample) -> None:
        """Count a sample."""
        self.reasons["kept" if sample.reason is None else sample.reason.partition(":")[0]] += 1

    def __str__(self) -> str:
        total = sum(self.reasons.values())
        kept = self.reasons["kept"]
        others = ", ".join(
            f"{n} {name}" for name, n in self.reasons.most_common() if name != "kept"
        )
        share = f" ({kept / total:.1%})" if total else ""
        return (
            f"{kept} of {total} samples kept{share}{'; rejected: ' + others if others else ''}; "
            f"{self.calls} requests, {self.prompt_tokens:,} + {self.completion_tokens:,} tokens "
            "(prompts + answers)"
        )


def write_samples(out: Path, samples: Iterable[CotSample]) -> list[CotSample]:
    """Write kept.jsonl, rejected.jsonl and stage1.json; returns the kept ones."""
    samples = sorted(samples, key=lambda sample: (sample.super_category, sample.sub_category))
    kept = [sample for sample in samples if sample.reason is None]
    for name, chosen in ((KEPT, kept), (REJECTED, [s for s in samples if s.reason is not None])):
        lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in chosen]
        write_whole(out / name, "".join(lines))
    records = [record(s.image, s.question, read_parts(s.said), s.sub_category) for s in kept]
    write_records(out, records)
    return kept


def write_records(out: Path, records: list[dict]) -> Path:
    """Write stage1.json; it is not written without records."""
    if not records:
        raise ValueError(f"no record for {out / RECORDS}: nothing was kept")
    return write_whole(out / RECORDS, json.dumps(records, indent=1, ensure_ascii=False))


def write_whole(path: Path, text: str) -> Path:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(unfinished, path)
    return path


def read_samples(path: Path) -> list[CotSample]:
    """Read kept.jsonl or rejected.jsonl back.

    Raises:
        ValueError: naming file, line and field at fault.
    """
    samples = []
    for where, line in json_lines(path):
        texts = {name: text_of(line, name, where) for name in FIELDS}
        said, reason, concepts = line.get("said"), line.get("reason"), line.get("concepts")
        if not isinstance(said, str) or not isinstance(reason, str | None):
            raise ValueError(f"{where}: 'said' and 'reason' must be texts")
        if not isinstance(concepts, list) or not all(isinstance(c, str) for c in concepts):
            raise ValueError(f"{where}: 'concepts' must be a list of texts")
        samples.append(CotSample(**texts, concepts=tuple(concepts), said=said, reason=reason))
    return samples
