"""Photos to stage-1 records: chains of thought from a teacher, filtered, or the answers alone.

    python -m tercet.train.make_cot --data TRIPLETS --out DIR \
        --url http://HOST:30000/v1 --teacher MODEL

The teacher describes each photo, names visual concepts, and with the most telling ones reasons to
the name; an answer is kept if it names the right sub-category among its own candidates, in English
(train/cot/answers.py). DIR gets stage1.json for train/sft.py, kept.jsonl, and rejected.jsonl with
the reasons. All that the teacher said is in teacher.sqlite: the same command goes on after a stop.

`--review` writes review.html, to correct samples by hand; `--reviewed review.json` reads it back.
`--direct` needs no teacher: its records hold the answer alone (the paper's baseline SFT).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.core.tool_config import CotConfig
from tercet.rollout.server import API_KEY
from tercet.train.cli.command_line import check_output, command, read_options

if TYPE_CHECKING:
    from tercet.core.types import Photo
    from tercet.train.cot.samples import CotSample


def make_cot(config: CotConfig) -> int:
    """Make stage-1 records; returns how many.

    Raises:
        ValueError: naming the option, file or photo at fault, or when nothing was kept.
        ServerError: the teacher is down, or refuses the key or the model.
    """
    # Here, so that --help does not wait for torch.
    from tercet.train.cot.answers import direct_record
    from tercet.train.cot.photos import stage1_photos
    from tercet.train.cot.review import read_review
    from tercet.train.cot.samples import (
        KEPT,
        RECORDS,
        REJECTED,
        read_samples,
        write_records,
        write_samples,
    )

    out = Path(config.out)
    check_output(out / RECORDS, "out")
    if config.reviewed is not None:
        samples = [*read_samples(out / KEPT), *read_samples(out / REJECTED)]
        kept = write_samples(out, read_review(Path(config.reviewed), samples))
        return _said(out, len(kept))
    if not config.direct and (config.url is None or config.teacher is None):
        raise ValueError("--url and --teacher name the teacher; --direct needs none")
    photos, remarks = stage1_photos(
        Path(config.data), config.cots_per_class, config.on_bad_image, config.seed
    )
    print("\n".join([*remarks, f"{len(photos)} photos for stage 1"]))
    if config.direct:
        records = [
            direct_record(os.path.relpath(p.image, out), p.question, p.sub_category) for p in photos
        ]
        write_records(out, records)
        return _said(out, len(records))
    samples = _taught(config, photos, out)
    kept = write_samples(out, samples)
    if config.review:
        _write_page(out, samples)
    return _said(out, len(kept))


def _taught(config: CotConfig, photos: Sequence[Photo], out: Path) -> list[CotSample]:
    """The teacher's samples, with a bar while they are asked for."""
    import asyncio

    import torch
    from rich.progress import Progress

    from tercet.core.data.text_embedder import text_embedder
    from tercet.rollout.chat import ChatClient
    from tercet.train.cot.teacher import Teacher, endpoint_embedder

    out.mkdir(parents=True, exist_ok=True)
    client = ChatClient(
        config.url,
        config.teacher,
        what="teacher",
        api_key=os.environ.get(API_KEY),
        concurrency=config.concurrency,
        timeout_s=config.timeout_s,
        patience_s=config.patience_s,
        cache=out / "teacher.sqlite",
    )
    if config.embedder == "endpoint":
        embed = endpoint_embedder(client)
    else:
        encode = text_embedder(config.embedder, "cuda" if torch.cuda.is_available() else "cpu")

        async def embed(texts: Sequence[str]) -> torch.Tensor:
            return await asyncio.to_thread(encode, texts)

    classes = len({(photo.super_category, photo.sub_category) for photo in photos})
    try:
        with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
            task = bar.add_task("asking the teacher", total=len(photos) + classes)
            teacher = Teacher(client, embed, config, out, lambda: bar.advance(task))
            samples = asyncio.run(teacher.samples(photos))
    finally:
        client.close()
    print(teacher.tally)
    return samples


def _write_page(out: Path, samples: Sequence[CotSample]) -> None:
    """The page of kept samples, and of those whose language alone is at fault."""
    from tercet.train.cot.review import PAGE, review_page
    from tercet.train.cot.samples import write_whole

    shown = [s for s in samples if s.reason is None or s.reason.startswith("language")]
    print(f"wrote {write_whole(out / PAGE, review_page(out, shown))}: {len(shown)} samples")


def _said(out: Path, count: int) -> int:
    print(f"wrote {out / 'stage1.json'}: {count} records")
    return count


def read(words: Sequence[str]) -> CotConfig:
    """The options from a command line."""
    return read_options(CotConfig, words, __doc__.split("\n")[0])


def main() -> None:
    make_cot(read(sys.argv[1:]))


if __name__ == "__main__":
    command(main)
