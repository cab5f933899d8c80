"""Photos in, triplets.json out: who is seen, which photos train, who is most similar.

    python -m tercet.train.make_triplets --data.path PHOTOS --model.path MODEL --out DIR

PHOTOS is a folder `<super_category>/<sub_category>/<photo>` or a JSON Lines file (core/data.py has
their form); training takes DIR as its data.path. Similarity comes from MODEL's own vision tower, or
from a SigLIP or CLIP folder: `--data.embedder FOLDER`. `--parquet FILE` also writes the rows in the
released Parquet columns, sized by MODEL's pixel limits.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache

import torch
from jsonargparse import auto_cli, set_parsing_settings
from rich.progress import track

from tercet.core.config import DataConfig, ModelConfig
from tercet.core.embedders import embedder
from tercet.core.manifest import Manifest
from tercet.core.model import PolicyParts, load_policy
from tercet.core.parquet import write_parquet
from tercet.core.triplets import prepare_manifest
from tercet.train.loop import command


def make_triplets(
    data: DataConfig, model: ModelConfig, out: str, parquet: str | None = None
) -> Manifest:
    """Choose triplets and write them to a folder.

    Args:
        data: photos, split, shots, embedder and seed.
        model: policy whose vision tower embeds, and whose pixel limits size the Parquet photos.
        out: folder that gets triplets.json.
        parquet: file that gets the released Parquet columns; None: none is written.
    """
    if os.path.abspath(out) == os.path.abspath(data.path):
        raise ValueError(f"out must differ from data.path, got {out!r} for both")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @cache
    def policy() -> PolicyParts:
        return load_policy(model, device)

    manifest = prepare_manifest(data, embedder(data.embedder, policy, device))
    print(f"wrote {manifest.write(out)}")
    print(summary(manifest))
    if parquet is not None:
        rows = track(manifest.anchors, description="writing Parquet rows")
        write_parquet(rows, parquet, policy().image_processor)
        print(f"wrote {parquet}: {len(manifest.anchors)} rows")
    return manifest


def summary(manifest: Manifest) -> str:
    """What a manifest holds, a line for each super-category, and what was left out."""
    anchors = Counter(anchor.super_category for anchor in manifest.anchors)
    sft = Counter(photo.super_category for photo in manifest.sft)
    lines = []
    for super_category, names in manifest.names.items():
        tests = [
            sum(photo.super_category == super_category for photo in manifest.test[world])
            for world in ("seen", "unseen")
        ]
        near = manifest.nearest.get(super_category, {})
        examples = [f"{name} ~ {others[0]}" for name, others in list(near.items())[:3]]
        lines.append(
            f"{super_category or 'all'}: {len(names)} sub-categories ({len(near)} seen), "
            f"{anchors[super_category]} anchors, {sft[super_category]} stage-1 photos, "
            f"{tests[0]} + {tests[1]} test photos (seen + unseen); {'; '.join(examples)}"
        )
    lines += [f"left out: {reason}" for reason in manifest.skipped]
    return "\n".join([*lines, f"{len(manifest.skipped)} left out"])


if __name__ == "__main__":
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    command(lambda: auto_cli(make_triplets, as_positional=False))
