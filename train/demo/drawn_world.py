"""A small fine-grained world drawn with PIL: butterflies and fish named by what they look like.

Every sub-category is one combination of a colour (4 values), a marking (2) and a shape (2), and its
name is those three words: "amber banded swallowtail". So unseen sub-categories are unseen
combinations of known values, and the most similar other one differs in a single attribute. Pose,
proportions, colour, light, background and what lies in front of the animal change from picture to
picture. The canvas is twice as large as the picture and averaged down, as PIL does not antialias.
"""

from __future__ import annotations

import colorsys
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.random import Generator
from PIL import Image, ImageDraw

from tercet.core.prompts import IMAGE_MARKER, stage2_text


@dataclass(frozen=True)
class Species:
    """A sub-category, e.g. "coral striped fantail" of "fish"."""

    super_category: str
    name: str
    attributes: tuple[tuple[str, str], ...]
    """(attribute, value word) in the order of the name."""


ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "butterfly": {
        "colour": ("crimson", "amber", "azure", "violet"),
        "marking": ("banded", "dotted"),
        "shape": ("swallowtail", "roundwing"),
    },
    "fish": {
        "colour": ("golden", "coral", "emerald", "indigo"),
        "marking": ("striped", "speckled"),
        "shape": ("forktail", "fantail"),
    },
}
SPECIES: tuple[Species, ...] = tuple(
    Species(super_category, " ".join(values), tuple(zip(attributes, values, strict=True)))
    for super_category, attributes in ATTRIBUTES.items()
    for values in itertools.product(*attributes.values())
)
SEEN_PER_SUPER_CATEGORY = 10
QUESTIONS = (
    "What kind of {super_category} is this?",
    "Which {super_category} is shown in the picture?",
    "What is the name of the {super_category} in the image?",
)
_CAPTIONS = (
    "A {super_category}: colour {colour}, marking {marking}, shape {shape}. It is the {name}.",
    "This {super_category} is the {name}. Colour {colour}, marking {marking}, shape {shape}.",
    "The {super_category} has colour {colour}, marking {marking} and shape {shape}: {name}.",
    "Here is the {name}, a {super_category}: colour {colour}, marking {marking}, shape {shape}.",
)
_THOUGHTS = (
    "<think>The colour is {colour}. The marking is {marking}. The shape is {shape}.</think>"
    "<answer>{name}</answer>",
    "<think>I see colour {colour}, marking {marking}, shape {shape}.</think>"
    "<answer>{name}</answer>",
)


def _fill(template: str, species: Species) -> str:
    names = {"super_category": species.super_category, "name": species.name}
    return template.format(**names, **dict(species.attributes))


def caption(species: Species, rng: Generator) -> str:
    """One or two sentences that name super-category, every attribute and the sub-category."""
    return _fill(_CAPTIONS[rng.integers(len(_CAPTIONS))], species)


def chain_of_thought(species: Species, rng: Generator) -> str:
    """The attributes one by one in `<think>`, then the name, for the first time, in `<answer>`."""
    return _fill(_THOUGHTS[rng.integers(len(_THOUGHTS))], species)


def question(super_category: str, rng: Generator) -> str:
    """A question for the name of a sub-category, without the instruction of stage 2.

    Raises:
        ValueError: `super_category` is not drawn here.
    """
    if super_category not in ATTRIBUTES:
        raise ValueError(f"super_category {super_category!r} is not one of {sorted(ATTRIBUTES)}")
    return QUESTIONS[rng.integers(len(QUESTIONS))].format(super_category=super_category)


def vocabulary() -> list[str]:
    """Every text that captions, chains of thought and stage 2's prompts can be, in fixed order."""
    texts = [_fill(t, species) for species in SPECIES for t in (*_CAPTIONS, *_THOUGHTS)]
    asked = [t.format(super_category=name) for name in ATTRIBUTES for t in QUESTIONS]
    return texts + [stage2_text(text) for text in asked]


def _representative(some: list[Species], every: list[Species]) -> bool:
    """Whether all pairs of values occur, and each has a neighbour that differs in one value."""
    pairs = [{p for s in g for p in itertools.combinations(s.attributes, 2)} for g in (some, every)]
    near = [any(len(set(a.attributes) - set(b.attributes)) == 1 for b in some) for a in some]
    return pairs[0] == pairs[1] and all(near)


def seen_species(seed: int) -> set[str]:
    """Names of the sub-categories that training sees: 10 of 16 in each super-category.

    Every pair of attribute values of a super-category occurs among them, and each differs from
    another seen one in a single attribute, so that hard negatives exist.
    """
    rng = np.random.default_rng(seed)
    names = set()
    for super_category in ATTRIBUTES:
        every = [s for s in SPECIES if s.super_category == super_category]
        chosen: list[Species] = []
        while not _representative(chosen, every):
            chosen = [every[i] for i in rng.permutation(len(every))[:SEEN_PER_SUPER_CATEGORY]]
        names |= {s.name for s in chosen}
    return names


# Hue, saturation and value of the colour words; every picture varies them.
_HSV = {
    "crimson": (0.970, 0.80, 0.88), "amber": (0.085, 0.88, 0.96),
    "azure": (0.575, 0.75, 0.94), "violet": (0.735, 0.52, 0.90),
    "golden": (0.140, 0.78, 0.95), "coral": (0.020, 0.66, 0.98),
    "emerald": (0.410, 0.66, 0.80), "indigo": (0.645, 0.54, 0.86),
}  # fmt: skip
_BACKGROUND_HUES = {"butterfly": (0.12, 0.42), "fish": (0.46, 0.66)}
Colour = tuple[int, int, int]
Place = Callable[[np.ndarray], list[tuple[float, float]]]


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    rgb = colorsys.hsv_to_rgb(hue % 1.0, min(saturation, 1.0), min(value, 1.0))
    return tuple(round(255 * c) for c in rgb)


def _shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, round(factor * c)) for c in colour)


def _points(path: str) -> np.ndarray:
    """Points written like those of an SVG path, in hundredths: "50,-12 7,0"."""
    return np.array([point.split(",") for point in path.split()], float) / 100


def _spline(path: str, steps: int = 5) -> np.ndarray:
    """Points [points of `path` * steps, 2] on the closed Catmull-Rom curve through its points."""
    p1 = _points(path)[:, None]  # [points, 1, 2]
    p0, p2, p3 = (np.roll(p1, shift, axis=0) for shift in (1, -1, -2))
    t = (np.arange(steps) / steps)[:, None]  # [steps, 1]
    cubic = t * (3 * (p1 - p2) + p3 - p0)
    curve = p1 + t / 2 * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + cubic))
    return curve.reshape(-1, 2)


# Unit coordinates: x to the right, y down, an animal within about [-1, 1].
_CIRCLE = np.exp(2j * np.pi * np.arange(14) / 14).view(np.float64).reshape(-1, 2)
_LEAF = _spline("-100,0 -40,32 30,30 100,0 30,-30 -40,-32")
_FOREWINGS = {  # the right ones, as the hindwings
    "roundwing": _spline("0,-12 25,-60 62,-78 90,-58 88,-20 50,4"),
    "swallowtail": _spline("0,-12 40,-66 98,-98 86,-56 62,-16 40,4"),
}
_HINDWINGS = {
    "roundwing": _spline("0,0 42,0 76,20 78,56 50,80 16,62"),
    "swallowtail": _spline("0,0 36,-2 52,16 50,44 58,76 74,106 54,106 38,72 22,42 8,30"),
}
_DOTS = _points("66,-60 40,-42 62,-30 32,-12 34,18 42,46")
_TAILS = {
    "forktail": _spline("-36,-10 -60,-34 -104,-82 -88,-36 -62,0 -88,36 -104,82 -60,34 -36,10"),
    "fantail": _spline("-36,-12 -52,-44 -78,-66 -100,-42 -106,0 -100,42 -78,66 -52,44 -36,12"),
}
_FINS = {  # on the back; mirrored below
    "forktail": _spline("36,-20 12,-40 -24,-68 -14,-40 -28,-10"),
    "fantail": _spline("56,-20 48,-62 10,-80 -24,-64 -34,-10"),
}
_FEELER = _points("2,-30 8,-55 22,-75")
_VEIN = _points("-100,0 90,0")


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    return radius * _CIRCLE + (x, y)


def _affine(angle: float, stretch: tuple[float, float], centre: np.ndarray) -> Place:
    """Map from unit coordinates to canvas pixels: stretch, turn, move."""
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.diag(stretch) @ np.array([[cos, sin], [-sin, cos]])
    return lambda points: list(map(tuple, (points @ matrix + centre).tolist()))


def _pose(canvas: int, rng: Generator) -> Place:
    scale = canvas * np.clip(rng.normal(0.41, 0.035), 0.32, 0.48)
    flip = -1 if rng.uniform() < 0.25 else 1
    stretch = scale * rng.uniform(0.85, 1.0, 2) * (flip, 1)
    centre = canvas * np.clip(rng.normal(0.5, 0.035, 2), 0.42, 0.58)
    return _affine(np.clip(rng.normal(0, 0.2), -0.6, 0.6), stretch, centre)


@dataclass(frozen=True)
class _Brush:
    """Where to draw an animal, and in which colours."""

    pen: ImageDraw.ImageDraw
    place: Place
    body: Colour
    mark: Colour
    edge: Colour
    width: int

    def fill(self, points: np.ndarray, colour: Colour, *, edged: bool = False) -> None:
        placed = self.place(points)
        self.pen.polygon(placed, fill=colour)
        if edged:
            self.pen.line(placed + placed[:2], fill=self.edge, width=self.width)


def _draw_butterfly(brush: _Brush, marking: str, shape: str, rng: Generator) -> None:
    dots = _DOTS + rng.uniform(-0.03, 0.03, _DOTS.shape)
    radius = rng.uniform(0.075, 0.1)
    bands = rng.uniform(0.8, 0.86), rng.uniform(0.56, 0.62), rng.uniform(0.34, 0.42)
    wings = (_HINDWINGS[shape], _shade(brush.body, 0.85)), (_FOREWINGS[shape], brush.body)
    for side in (-1, 1):
        stretch = side * rng.uniform(0.75, 1.0), 1.0
        for wing, tint in wings:
            brush.fill(wing * stretch, tint, edged=True)
            if marking == "banded":  # the wing again and again, smaller, from its root
                for at, colour in zip(bands, (brush.mark, tint, brush.mark), strict=True):
                    brush.fill(wing * at * stretch, colour)
        if marking == "dotted":
            for x, y in dots:
                brush.fill(_disc(x, y, radius) * stretch, brush.mark)
        brush.pen.line(brush.place(_FEELER * (side, 1)), fill=brush.edge, width=brush.width)
    brush.fill(_CIRCLE * (0.06, 0.42) + (0, 0.04), brush.edge)
    brush.fill(_disc(0, -0.34, 0.085), brush.edge)


def _slab(left: float, right: float, height: float) -> np.ndarray:
    """The part between two x of a fish's body, which reaches from -0.44 (tail) to 1 (nose)."""
    x = np.linspace(left, right, 5 + int(12 * (right - left)))
    t = (x + 0.44) / 1.44
    half = height * (0.2 * (1 - t) + np.sin(np.pi * t) ** 0.8 * (0.75 + 0.25 * t))
    return np.stack([np.r_[x, x[::-1]], np.r_[-half, half[::-1]]], axis=1)


def _draw_fish(brush: _Brush, marking: str, shape: str, rng: Generator) -> None:
    height = rng.uniform(0.34, 0.44) if shape == "forktail" else rng.uniform(0.44, 0.56)
    fin = _shade(brush.body, 0.82)
    brush.fill(_TAILS[shape] * (1, rng.uniform(0.9, 1.1)), fin, edged=True)
    for side in (-0.9, 1):
        brush.fill(_FINS[shape] * (1, side), fin, edged=True)
    brush.fill(_slab(-0.44, 1.0, height), brush.body, edged=True)
    if marking == "striped":
        for left in np.arange(-0.32, 0.4, step := rng.uniform(0.25, 0.3)):
            brush.fill(_slab(left, left + 0.62 * step, 0.95 * height), brush.mark)
    else:
        radius = rng.uniform(0.06, 0.08)
        for column, x in enumerate(np.arange(-0.22, 0.55, 0.22)):
            for y in (-0.55, 0, 0.55) if column % 2 else (-0.25, 0.25):
                dx, dy = rng.uniform(-0.03, 0.03, 2)
                brush.fill(_disc(x + dx, y * height + dy, radius), brush.mark)
    brush.fill(_disc(0.72, -0.22 * height, 0.1), (250, 250, 245))
    brush.fill(_disc(0.74, -0.22 * height, 0.05), (20, 20, 25))


def _litter(image: Image.Image, kind: str, count: int, reach: float, rng: Generator) -> None:
    """Leaves (butterfly) or weed and bubbles (fish), anywhere on the canvas."""
    pen = ImageDraw.Draw(image)
    low, high = _BACKGROUND_HUES[kind]
    for _ in range(count):
        size = image.width * reach * rng.uniform(0.5, 1.0)
        place = _affine(rng.uniform(0, 2 * np.pi), (size, size), rng.uniform(0, image.width, 2))
        hue = rng.uniform(low - 0.08, high + 0.08)
        colour = _rgb(hue, rng.uniform(0.15, 0.6), rng.uniform(0.35, 0.9))
        if kind == "fish" and rng.uniform() < 0.5:
            pen.polygon(place(0.5 * _CIRCLE), fill=colour)
            pen.polygon(place(_disc(0.15, -0.15, 0.12)), fill=_shade(colour, 1.5))
        else:
            pen.polygon(place(_LEAF), fill=colour)
            pen.line(place(_VEIN), fill=_shade(colour, 0.8), width=2)


def _background(kind: str, canvas: int, rng: Generator) -> Image.Image:
    """Nine blurred patches around one colour."""
    hue = rng.uniform(*_BACKGROUND_HUES[kind]) + rng.uniform(-0.05, 0.05, 9)
    saturation = rng.uniform(0.1, 0.5) * rng.uniform(0.6, 1.2, 9)
    value = rng.uniform(0.45, 0.9) * rng.uniform(0.7, 1.1, 9)
    patches = [_rgb(*hsv) for hsv in zip(hue, saturation, value, strict=True)]
    coarse = Image.fromarray(np.array(patches, np.uint8).reshape(3, 3, 3))
    return coarse.resize((canvas, canvas), Image.Resampling.BICUBIC)


def draw(species: Species, rng: Generator, size: int = 112) -> Image.Image:
    """Draw one picture of a sub-category, the same for the same state of `rng`.

    Args:
        species: one of `SPECIES`.
        rng: decides everything that varies within the sub-category.
        size: pixels a side.

    Returns:
        An RGB image of `size` x `size` pixels.

    Raises:
        ValueError: another species, or fewer than 28 pixels a side.
    """
    if species not in SPECIES or size < 28:
        raise ValueError(f"draw needs one of SPECIES and size >= 28, got {species} and {size}")
    canvas = 2 * size
    kind = species.super_category
    colour, marking, shape = (value for _, value in species.attributes)
    image = _background(kind, canvas, rng)
    _litter(image, kind, rng.integers(2, 7), 0.2, rng)
    hue, saturation, value = _HSV[colour]
    drift = np.clip(rng.normal(0, 0.02), -0.04, 0.04)
    body = _rgb(hue + drift, saturation * rng.uniform(0.8, 1.15), value * rng.uniform(0.8, 1.1))
    mark = _rgb(hue, 0.08, 1.0) if rng.uniform() < 0.15 else _rgb(hue, 0.5, 0.15)
    pen, edge, width = ImageDraw.Draw(image), _shade(body, 0.35), max(1, canvas // 75)
    brush = _Brush(pen, _pose(canvas, rng), body, mark, edge, width)
    (_draw_butterfly if kind == "butterfly" else _draw_fish)(brush, marking, shape, rng)
    _litter(image, kind, rng.integers(1, 4), 0.12, rng)
    pixels = np.asarray(image.reduce(2), np.float32) * rng.uniform(0.85, 1.15, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_world(
    folder: str | Path, seed: int, *, train: int, sft: int, test: int, size: int = 112
) -> None:
    """Write drawings, manifest.json, stage1.json and questions.yaml, complete or not at all.

    A seen sub-category gets `train` and `sft` drawings, every one gets `test`. What is drawn for a
    split does not depend on the size of the others. The same arguments give the same bytes.

    Args:
        folder: must not exist or be empty.
        seed: of the drawings, the texts and the choice of the seen sub-categories.
        train: drawings a seen sub-category for stage 2.
        sft: drawings a seen sub-category for stage 1.
        test: held-out drawings of every sub-category.
        size: pixels a side.

    Raises:
        ValueError: `folder` is in use, or a number is negative.
    """
    folder = Path(folder).resolve()
    counts = {"train": train, "sft": sft, "test": test}
    if min(counts.values()) < 0:
        raise ValueError(f"train, sft and test must be at least 0, got {counts}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is in use: remove it or write to another folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write_files(partial, seed, counts, size)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(folder: Path, seed: int, counts: dict[str, int], size: int) -> None:
    seen = seen_species(seed)
    classes, images, stage1 = [], [], []
    for index, species in enumerate(SPECIES):
        partition = "seen" if species.name in seen else "unseen"
        own = {s: n if partition == "seen" or s == "test" else 0 for s, n in counts.items()}
        label = {"super_category": species.super_category, "sub_category": species.name}
        classes.append(label | {"partition": partition} | own)
        place = f"{species.super_category}/{species.name.replace(' ', '_')}"
        (folder / place).mkdir(parents=True)
        keys = [(split, (index, s, i)) for s, split in enumerate(own) for i in range(own[split])]
        for number, (split, key) in enumerate(keys):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
            path = f"{place}/{number:03d}.png"
            draw(species, rng, size).save(folder / path)
            entry = {"path": path} | label | {"partition": partition, "split": split}
            if split == "sft":
                entry |= {"split": "train", "in_stage1": True}
                asked = IMAGE_MARKER + stage2_text(question(species.super_category, rng))
                turns = {"user": asked, "assistant": chain_of_thought(species, rng)}
                messages = [{"role": role, "content": text} for role, text in turns.items()]
                stage1.append({"messages": messages, "images": [path]})
            images.append(entry)
    manifest = {"seed": seed, "classes": classes, "images": images}
    templates = {w: [t.format(super_category=w) for t in QUESTIONS] for w in ATTRIBUTES}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (folder / "stage1.json").write_text(json.dumps(stage1, indent=1))
    (folder / "questions.yaml").write_text(yaml.safe_dump(templates, sort_keys=False))
