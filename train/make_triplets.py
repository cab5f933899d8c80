"""Photos to triplets.json: which sub-categories are seen, what each photo is for, what looks alike.

    python -m tercet.train.make_triplets --data.path PHOTOS --model.path MODEL --out DIR

PHOTOS is a folder `<super_category>/<sub_category>/<photo>` or a JSON Lines file (their form is in
core/data/photos.py); training takes DIR as its data.path. Similarity comes from MODEL's own vision
tower, or from a SigLIP or CLIP folder: `--data.embedder FOLDER`. DIR also gets triplets.png, a
contact sheet to judge the triplets by. `--parquet FILE` also writes the rows in the released
Parquet columns, photos resized to MODEL's pixel limits.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import track

from tercet.core.config import DataConfig, ModelConfig
from tercet.core.tool_config import TripletsConfig
from tercet.train.learner.command_line import check_output, command, read_options

if TYPE_CHECKING:
    from tercet.core.data.manifest import Manifest
    from tercet.core.types import PolicyParts


def make_triplets(
    data: DataConfig, model: ModelConfig, out: str, parquet: str | None = None, sheet: int = 0
) -> Manifest:
    """Choose triplets and write them to a folder.

    Args:
        data: photos, split, shots, embedder and seed.
        model: policy whose vision tower embeds, and whose pixel limits the Parquet photos get.
        out: folder for triplets.json.
        parquet: file for the released Parquet columns; None: it is not written.
        sheet: most anchors on triplets.png; 0: it is not drawn.
    """
    # Here, so that --help does not wait for torch and transformers.
    import torch

    from tercet.core.data.embedders import embedder
    from tercet.core.data.manifest import MANIFEST_NAME
    from tercet.core.data.parquet import write_parquet
    from tercet.core.data.sheet import SHEET_NAME, draw_sheet
    from tercet.core.data.triplets import prepare_manifest
    from tercet.core.models import family_of, load_policy

    if os.path.abspath(out) == os.path.abspath(data.path):
        raise ValueError(f"out must differ from data.path, got {out!r} for both")
    check_output(Path(out) / MANIFEST_NAME, "out")
    if parquet is not None:
        check_output(Path(parquet), "parquet")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @cache
    def policy() -> PolicyParts:
        return load_policy(model, device)

    manifest = prepare_manifest(data, embedder(data.embedder, policy, device))
    print(f"wrote {manifest.write(out)}")
    print(summary(manifest))
    if sheet:
        path = Path(out) / SHEET_NAME
        print(f"wrote {path}: {draw_sheet(manifest, path, sheet)} triplets to look at")
    if parquet is not None:
        rows = track(manifest.anchors, description="writing Parquet rows")
        resized = partial(family_of(policy().model.config).resized, policy().image_processor)
        write_parquet(rows, parquet, resized)
        print(f"wrote {parquet}: {len(manifest.anchors)} rows")
    return manifest


def summary(manifest: Manifest) -> str:
    """The numbers of a manifest, one line a super-category, and remarks on the data."""
    anchors = Counter(anchor.super_category for anchor in manifest.anchors)
    sft = Counter(photo.super_category for photo in manifest.sft)
    lines = []
    for super_category, names in manifest.names.items():
        tests = [
            sum(photo.super_category == super_category for photo in manifest.test[partition])
            for partition in ("seen", "unseen")
        ]
        near = manifest.nearest.get(super_category, {})
        examples = [f"{name} ~ {others[0]}" for name, others in list(near.items())[:3]]
        lines.append(
            f"{super_category or 'all'}: {len(names)} sub-categories ({len(near)} seen), "
            f"{anchors[super_category]} anchors, {sft[super_category]} stage-1 photos, "
            f"{tests[0]} + {tests[1]} test photos (seen + unseen); {'; '.join(examples)}"
        )
    return "\n".join([*lines, *manifest.remarks(), f"{len(manifest.skipped)} left out"])


def main() -> None:
    options = read_options(TripletsConfig, None, __doc__.split("\n")[0])
    make_triplets(options.data, options.model, options.out, options.parquet, options.sheet)


if __name__ == "__main__":
    command(main)
