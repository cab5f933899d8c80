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
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import track

from tercet.core.config import DataConfig, ModelConfig
from tercet.core.tool_config import TripletsConfig
from tercet.train.cli.command_line import check_output, command, read_options

if TYPE_CHECKING:
    from tercet.core.data.embedders import Encoder
    from tercet.core.data.manifest import Manifest
    from tercet.core.types import PolicyParts


def make_triplets(
    data: DataConfig,
    model: ModelConfig,
    out: str,
    parquet: str | None = None,
    sheet: int = 0,
    by_layer: bool = False,
) -> Manifest:
    """Choose triplets and write them to a folder.

    Args:
        data: photos, split, shots, embedder and seed.
        model: policy whose vision tower embeds, and whose pixel limits the Parquet photos get.
        out: folder for triplets.json.
        parquet: file for the released Parquet columns; None: it is not written.
        sheet: most anchors on triplets.png; 0: it is not drawn.
        by_layer: say what each layer of the embedder finds; needs data.genus.
    """
    # Here, so that --help does not wait for torch and transformers.
    import torch

    from tercet.core.data.embedders import embedder, load_encoder
    from tercet.core.data.manifest import MANIFEST_NAME
    from tercet.core.data.parquet import write_parquet
    from tercet.core.data.sheet import SHEET_NAME, draw_sheet
    from tercet.core.data.triplets import prepare_manifest
    from tercet.core.models import family_of, load_policy

    _check(data, Path(out) / MANIFEST_NAME, parquet, by_layer)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @cache
    def policy() -> PolicyParts:
        return load_policy(model, device)

    embed = embedder(data.embedder, policy, device, data.embedder_layer)
    manifest = prepare_manifest(data, embed)
    print(f"wrote {manifest.write(out)}")
    print(summary(manifest))
    if by_layer:
        print(layer_notes(manifest, data, load_encoder(data.embedder, policy, device)))
    if sheet:
        path = Path(out) / SHEET_NAME
        print(f"wrote {path}: {draw_sheet(manifest, path, sheet)} triplets to look at")
    if parquet is not None:
        rows = track(manifest.anchors, description="writing Parquet rows")
        resized = partial(family_of(policy().model.config).resized, policy().image_processor)
        write_parquet(rows, parquet, resized)
        print(f"wrote {parquet}: {len(manifest.anchors)} rows")
    return manifest


def _check(data: DataConfig, manifest: Path, parquet: str | None, by_layer: bool) -> None:
    """Raises ValueError for what could not be written or said at the end."""
    if os.path.abspath(manifest.parent) == os.path.abspath(data.path):
        raise ValueError(f"out must differ from data.path, got {data.path!r} for both")
    check_output(manifest, "out")
    if parquet is not None:
        check_output(Path(parquet), "parquet")
    if by_layer and data.genus is None:
        raise ValueError("by_layer needs data.genus, a CSV of sub_category,genus")


def layer_notes(manifest: Manifest, data: DataConfig, encoder: Encoder) -> str:
    """How often the nearest sub-category is of the same genus, a line for each layer."""
    from tercet.core.data.negatives import find_similar, neighbours_note, read_genera

    photos = defaultdict(list)
    for anchor in manifest.anchors:
        photos[anchor.super_category, anchor.sub_category].append(anchor)
    keys = [anchor.image for of_class in photos.values() for anchor in of_class]
    layers, genera = [*range(encoder.layers), None], read_genera(data.genus)
    lines = []
    for layer, rows in zip(layers, encoder.of_layers(keys, layers), strict=True):
        similar = find_similar(photos, {}, lambda _, rows=rows: rows, data.similarity)
        name = data.embedder if layer is None else f"{data.embedder}, layer {layer}"
        lines.append(neighbours_note(similar, genera, name))
    return "\n".join(lines)


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
    wanted = {name: getattr(options, name) for name in ("parquet", "sheet", "by_layer")}
    make_triplets(options.data, options.model, options.out, **wanted)


if __name__ == "__main__":
    command(main)
