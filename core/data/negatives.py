"""Which photos each anchor is set apart from: by sub-category, by photo, by genus, or at random.

The paper takes the photos of the most similar other sub-category, by the mean of its photos.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tercet.core.config import DataConfig
from tercet.core.data.fields import as_words, csv_rows, text_of
from tercet.core.draws import seeded_int, seeded_order
from tercet.core.names import normal_form
from tercet.core.types import Photo

Embed = Callable[[list[str]], Tensor]
"""Image keys to [N, D] embeddings."""
SubCategory = tuple[str, str]
"""(super-category, sub-category)."""


@dataclass
class Similar:
    """What looks alike among the sub-categories that are trained on."""

    nearest: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """By super-category and sub-category: the others, most similar first."""
    cosines: dict[str, dict[str, float]] = field(default_factory=dict)
    """Alike: the cosine with the first of them."""
    look_alikes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """As `nearest`, of every sub-category among all."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """[D] float64 of unit length by image key."""


def rank_similar(embeddings: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Rank, for each sub-category, the others by the cosine of mean image embeddings.

    Args:
        embeddings: [photos, D] float of each sub-category, all of one super-category.

    Returns:
        For each name the other names, most similar first; ties are ordered by name.
    """
    return {name: [other for _, other in found] for name, found in _ranked(embeddings).items()}


def _ranked(embeddings: Mapping[str, Tensor]) -> dict[str, list[tuple[float, str]]]:
    names = sorted(embeddings)
    means = torch.stack([embeddings[name].double().mean(dim=0) for name in names])
    means = torch.nn.functional.normalize(means, dim=1)
    ranked = {}
    for name, cosines in zip(names, (means @ means.T).tolist(), strict=True):
        others = [(-cosine, other) for cosine, other in zip(cosines, names, strict=True)]
        ranked[name] = [(-cosine, other) for cosine, other in sorted(others) if other != name]
    return ranked


def whitened(embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings in units of what varies within sub-categories, around the mean of all.

    Half of the covariance within sub-categories is shrunk to its mean variance, as there are fewer
    photos than features.

    Args:
        embeddings: [photos, D] float of each sub-category, all of one super-category.
    """
    rows = torch.cat([of.double() for of in embeddings.values()])
    within = torch.cat([of.double() - of.double().mean(dim=0) for of in embeddings.values()])
    covariance = within.T @ within / max(1, len(rows) - len(embeddings))
    even = covariance.trace() / len(covariance) * torch.eye(len(covariance), dtype=torch.float64)
    variances, axes = torch.linalg.eigh((covariance + even) / 2)
    scale = axes / variances.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return {name: (of.double() - rows.mean(dim=0)) @ scale for name, of in embeddings.items()}


def find_similar(
    tapo: Mapping[SubCategory, list[Photo]],
    unseen: Mapping[SubCategory, list[Photo]],
    embed: Embed,
    similarity: str,
) -> Similar:
    """Embed all training photos and rank each super-category's sub-categories.

    Args:
        tapo: training photos by sub-category.
        unseen: some photos of the other sub-categories, which tell what looks alike, no more:
            nothing else depends on them.
        embed: gives the embeddings.
        similarity: "cosine" or "whitened" (see `whitened`).

    Raises:
        ValueError: the embedder gives something else than a row of finite numbers a photo.
    """
    shown = {**tapo, **unseen}
    keys = [photo.image for photos in shown.values() for photo in photos]
    rows = embed(keys)
    if rows.ndim != 2 or len(rows) != len(keys) or not rows.isfinite().all():
        raise ValueError(
            f"the embedder must give {len(keys)} rows of finite numbers, got {tuple(rows.shape)} "
            f"with {int((~rows.isfinite()).sum())} that are not finite"
        )
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    found = Similar(rows=dict(zip(keys, unit, strict=True)))
    of_class = rows.split([len(photos) for photos in shown.values()])
    embedded = dict(zip(shown, of_class, strict=True))
    scaled = whitened if similarity == "whitened" else dict
    for super_category, of in _by_super({labels: embedded[labels] for labels in tapo}).items():
        ranked = _ranked(scaled(of))
        found.nearest[super_category] = {n: [other for _, other in r] for n, r in ranked.items()}
        found.cosines[super_category] = {n: r[0][0] for n, r in ranked.items() if r}
    for super_category, of in _by_super(embedded).items():
        found.look_alikes[super_category] = rank_similar(scaled(of))
    return found


def _by_super(embedded: Mapping[SubCategory, Tensor]) -> dict[str, dict[str, Tensor]]:
    by_super: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (super_category, name), rows in embedded.items():
        by_super[super_category][name] = rows
    return by_super


def choose_negatives(
    tapo: dict[SubCategory, list[Photo]],
    similar: Similar,
    config: DataConfig,
    genera: Mapping[str, str],
) -> dict[str, list[str]]:
    """Keys of the photos that each anchor is set apart from, the fixed one first.

    Args:
        tapo: training photos by sub-category; each is an anchor.
        similar: of those photos; not needed where config.negatives is "random".
        config: which rule, how many, the seed.
        genera: of sub-categories, by their normal form; for "genus".

    Returns:
        By the anchor's key; empty where its super-category has no other sub-category.
    """
    by_super: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for (super_category, name), photos in tapo.items():
        by_super[super_category][name] = [photo.image for photo in photos]
    chosen: dict[str, list[str]] = {}
    for super_category, of_name in by_super.items():
        for name, anchors in of_name.items():
            others = sorted(key for n, keys in of_name.items() if n != name for key in keys)
            if not others:
                chosen |= {anchor: [] for anchor in anchors}
            elif config.negatives == "random":
                chosen |= {anchor: _drawn(anchor, others, config) for anchor in anchors}
            elif config.negatives == "nearest_image":
                chosen |= _nearest_images(anchors, others, similar.rows, config.shots)
            else:
                ranked = similar.nearest[super_category][name]
                kin = _of_genus(name, ranked, genera) if config.negatives == "genus" else []
                near = of_name[(kin or ranked)[0]]
                chosen |= {a: seeded_order(near, config.seed, "negative", a) for a in anchors}
    return chosen


def _drawn(anchor: str, others: list[str], config: DataConfig) -> list[str]:
    """config.shots of the others, or all where they are fewer."""
    left = dict(enumerate(others))  # what stands at each place, as places are emptied
    drawn = []
    for number in range(min(config.shots, len(others))):
        place = seeded_int(config.seed, "random", anchor, number) % len(left)
        drawn.append(left[place])
        left[place] = left[len(left) - 1]
        del left[len(left) - 1]
    return drawn


def _nearest_images(
    anchors: list[str], others: list[str], rows: Mapping[str, Tensor], most: int
) -> dict[str, list[str]]:
    cosines = torch.stack([rows[key] for key in anchors]) @ torch.stack([rows[k] for k in others]).T
    order = cosines.argsort(dim=1, descending=True, stable=True)[:, :most].tolist()
    return {
        anchor: [others[index] for index in found]
        for anchor, found in zip(anchors, order, strict=True)
    }


def _of_genus(name: str, others: list[str], genera: Mapping[str, str]) -> list[str]:
    genus = genera.get(normal_form(name))
    return [other for other in others if genus and genera.get(normal_form(other)) == genus]


def read_genera(path: str | Path) -> dict[str, str]:
    """Genus by sub-category's normal form, from a CSV with the columns sub_category and genus.

    Raises:
        ValueError: naming file and line at fault.
    """
    genera: dict[str, str] = {}
    for where, row in csv_rows(Path(path), ("sub_category", "genus")):
        name = as_words(text_of(row, "sub_category", where))
        genus = as_words(text_of(row, "genus", where))
        if genera.setdefault(normal_form(name), genus) != genus:
            raise ValueError(f"{where}: {name!r} has two genera")
    if not genera:
        raise ValueError(f"{path} holds no sub-category")
    return genera


def neighbours_note(similar: Similar, genera: Mapping[str, str], embedder: str) -> str:
    """How often the nearest sub-category is of the same genus, where one of it is trained on."""
    right = total = 0
    for ranked in similar.nearest.values():
        for name, others in ranked.items():
            kin = _of_genus(name, others, genera)
            total += bool(kin)
            right += bool(kin and kin[0] == others[0])
    share = f" ({right / total:.0%})" if total else ""
    return (
        f"the nearest sub-category is of the same genus for {right} of {total} sub-categories"
        f"{share} that have one (embedder {embedder})"
    )
