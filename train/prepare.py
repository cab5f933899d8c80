"""Six downloaded data sets to one photo set, manifest.json, that every command reads.

    python -m tercet.train.prepare ROOT --questions EVAL --stage1 Fine-R1-Stage1-data.json

ROOT holds the data sets as their publishers ship them, in folders of any names; what is missing is
said, with where its publisher has it. Nothing is downloaded. EVAL, the folder of the released
question files, says which sub-categories are seen and what is asked about test photos; without it
seen ones are drawn. The released stage-1 records get the publishers' paths: ROOT/stage1.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.core.tool_config import PrepareConfig
from tercet.train.cli.command_line import check_output, command, read_options

if TYPE_CHECKING:
    from tercet.core.data.released import Asked, Stage1
    from tercet.core.data.six_sets import FoundSet


def prepare(config: PrepareConfig) -> Path:
    """Find the data sets, check them, and write the photo set.

    Returns:
        The path of manifest.json.

    Raises:
        ValueError: naming the data set, file or photo at fault.
    """
    # Here, so that --help does not wait for torch, which the drawing of seen sub-categories needs.
    from tercet.core.data.released import read_asked, read_stage1
    from tercet.core.data.six_sets import find_sets

    root, out = Path(config.root), Path(config.out or config.root)
    for name in ("manifest.json", "stage1.json"):
        check_output(out / name, "out")
    sets, lines = find_sets(root, config.on_missing)
    if not sets:
        raise ValueError(f"{root} holds none of the six data sets: {' | '.join(lines)}")
    asked = {}
    if config.questions is not None:
        asked = {f.edition.super_category: read_asked(Path(config.questions), f) for f in sets}
    stage1 = None if config.stage1 is None else read_stage1(Path(config.stage1), sets)
    lines += _about(asked, stage1)
    listing = {"root": os.path.relpath(root, out)}
    listing |= {"classes": list(_classes(sets, asked, config))}
    listing |= {"images": list(_images(root, sets, asked, stage1))}
    print("\n".join([*map(str, sets), *lines]))
    path = _write(out / "manifest.json", listing)
    if stage1 is not None and stage1.records:
        _write(out / "stage1.json", list(_records(out, sets, stage1)))
    return path


def _about(asked: dict[str, Asked], stage1: Stage1 | None) -> list[str]:
    lines = [
        f"{name}: {len(found.questions):,} released questions about test photos"
        + (f", {found.elsewhere:,} about photos that are not here" if found.elsewhere else "")
        for name, found in asked.items()
    ]
    if stage1 is not None:
        lines += [f"stage 1: {len(stage1.records)} released records with their photos"]
        lines += stage1.missing
    return lines


def _classes(
    sets: list[FoundSet], asked: dict[str, Asked], config: PrepareConfig
) -> Iterator[dict[str, str]]:
    from tercet.core.data.triplets import draw_partitions

    names = {f.edition.super_category: {p.sub_category for p in f.listed} for f in sets}
    pairs = [(name, sub) for name, subs in sorted(names.items()) for sub in sorted(subs)]
    drawn = draw_partitions(pairs, config.seen_fraction, config.seed)
    for name, sub in pairs:
        partition = asked[name].partitions[sub] if name in asked else drawn[name, sub]
        yield {"super_category": name, "sub_category": sub, "partition": partition}


def _images(
    root: Path, sets: list[FoundSet], asked: dict[str, Asked], stage1: Stage1 | None
) -> Iterator[dict[str, object]]:
    for found in sets:
        name, folder = found.edition.super_category, os.path.relpath(found.folder, root)
        used = stage1.photos.get(name, set()) if stage1 else set()
        questions = asked[name].questions if name in asked else {}
        for photo in found.listed:
            image = {"path": os.path.normpath(f"{folder}/{photo.path}"), "super_category": name}
            image |= {"sub_category": photo.sub_category, "split": photo.split}
            if photo.path in questions:
                image["question"] = questions[photo.path]
            if photo.path in used:
                image["in_stage1"] = True
            yield image


def _records(out: Path, sets: list[FoundSet], stage1: Stage1) -> Iterator[dict]:
    """The records, their photos' paths relative to `out`."""
    folders = {found.edition.super_category: os.path.relpath(found.folder, out) for found in sets}
    for record in stage1.records:
        folder = folders[record["super_category"]]
        kept = {name: value for name, value in record.items() if name != "super_category"}
        yield kept | {"images": [os.path.normpath(f"{folder}/{path}") for path in record["images"]]}


def _write(path: Path, content: object) -> Path:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(unfinished, path)
    print(f"wrote {path}: {len(content['images'] if isinstance(content, dict) else content):,}")
    return path


def read(argv: Sequence[str]) -> PrepareConfig:
    """The options; a first word without dashes is the root."""
    if argv and not argv[0].startswith("-"):
        argv = [f"--root={argv[0]}", *argv[1:]]
    return read_options(PrepareConfig, argv, __doc__.split("\n")[0])


def main() -> None:
    prepare(read(sys.argv[1:]))


if __name__ == "__main__":
    command(main)
