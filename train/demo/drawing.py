"""Pictures of the drawn world's sub-categories, drawn with PIL.

Pose, proportions, colour, light, background and what covers the animal vary from picture to
picture. Pictures are drawn at twice their size and averaged down, because PIL does not antialias.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from tercet.train.demo.species import SPECIES, Species

# Hue, saturation and value of each colour word; every picture varies them a little.
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
    """[points, 2] from text like an SVG path's, in hundredths: "50,-12 7,0"."""
    return np.array([point.split(",") for point in path.split()], float) / 100


def _spline(path: str, steps: int = 5) -> np.ndarray:
    """Points [points of `path` * steps, 2] on the closed Catmull-Rom curve through its points."""
    p1 = _points(path)[:, None]  # [points, 1, 2]
    p0, p2, p3 = (np.roll(p1, shift, axis=0) for shift in (1, -1, -2))
    t = (np.arange(steps) / steps)[:, None]  # [steps, 1]
    cubic = t * (3 * (p1 - p2) + p3 - p0)
    curve = p1 + t / 2 * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + cubic))
    return curve.reshape(-1, 2)


# Unit coordinates: x to the right, y down; an animal fills about [-1, 1].
_CIRCLE = np.exp(2j * np.pi * np.arange(14) / 14).view(np.float64).reshape(-1, 2)
_LEAF = _spline("-100,0 -40,32 30,30 100,0 30,-30 -40,-32")
_FOREWINGS = {  # of the right side, like the hindwings
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
    """A map from unit coordinates to canvas pixels: stretch, turn, move."""
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
    """Draws polygons in an animal's unit coordinates, and holds its colours."""

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
            if marking == "banded":  # smaller and smaller copies of the wing
                for at, colour in zip(bands, (brush.mark, tint, brush.mark), strict=True):
                    brush.fill(wing * at * stretch, colour)
        if marking == "dotted":
            for x, y in dots:
                brush.fill(_disc(x, y, radius) * stretch, brush.mark)
        brush.pen.line(brush.place(_FEELER * (side, 1)), fill=brush.edge, width=brush.width)
    brush.fill(_CIRCLE * (0.06, 0.42) + (0, 0.04), brush.edge)
    brush.fill(_disc(0, -0.34, 0.085), brush.edge)


def _slab(left: float, right: float, height: float) -> np.ndarray:
    """A vertical slice of a fish's body, which reaches from x = -0.44 (tail) to 1 (nose)."""
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


def _scatter(
    image: Image.Image, super_category: str, count: int, reach: float, rng: Generator
) -> None:
    """Draw leaves (butterfly) or weeds and bubbles (fish) anywhere on the canvas."""
    pen = ImageDraw.Draw(image)
    low, high = _BACKGROUND_HUES[super_category]
    for _ in range(count):
        size = image.width * reach * rng.uniform(0.5, 1.0)
        place = _affine(rng.uniform(0, 2 * np.pi), (size, size), rng.uniform(0, image.width, 2))
        hue = rng.uniform(low - 0.08, high + 0.08)
        colour = _rgb(hue, rng.uniform(0.15, 0.6), rng.uniform(0.35, 0.9))
        if super_category == "fish" and rng.uniform() < 0.5:
            pen.polygon(place(0.5 * _CIRCLE), fill=colour)
            pen.polygon(place(_disc(0.15, -0.15, 0.12)), fill=_shade(colour, 1.5))
        else:
            pen.polygon(place(_LEAF), fill=colour)
            pen.line(place(_VEIN), fill=_shade(colour, 0.8), width=2)


def _background(super_category: str, canvas: int, rng: Generator) -> Image.Image:
    """Nine blurred patches around one colour."""
    hue = rng.uniform(*_BACKGROUND_HUES[super_category]) + rng.uniform(-0.05, 0.05, 9)
    saturation = rng.uniform(0.1, 0.5) * rng.uniform(0.6, 1.2, 9)
    value = rng.uniform(0.45, 0.9) * rng.uniform(0.7, 1.1, 9)
    patches = [_rgb(*hsv) for hsv in zip(hue, saturation, value, strict=True)]
    coarse = Image.fromarray(np.array(patches, np.uint8).reshape(3, 3, 3))
    return coarse.resize((canvas, canvas), Image.Resampling.BICUBIC)


def draw(species: Species, rng: Generator, size: int = 112) -> Image.Image:
    """Draw one picture of a sub-category; the same state of `rng` gives the same picture.

    Args:
        species: one of `SPECIES`.
        rng: source of everything that varies within the sub-category.
        size: pixels a side.

    Returns:
        An RGB image of `size` x `size` pixels.

    Raises:
        ValueError: `species` is not one of SPECIES, or `size` is under 28.
    """
    if species not in SPECIES or size < 28:
        raise ValueError(f"draw needs one of SPECIES and size >= 28, got {species} and {size}")
    canvas = 2 * size
    super_category = species.super_category
    colour, marking, shape = (value for _, value in species.attributes)
    image = _background(super_category, canvas, rng)
    _scatter(image, super_category, rng.integers(2, 7), 0.2, rng)
    hue, saturation, value = _HSV[colour]
    drift = np.clip(rng.normal(0, 0.02), -0.04, 0.04)
    body = _rgb(hue + drift, saturation * rng.uniform(0.8, 1.15), value * rng.uniform(0.8, 1.1))
    mark = _rgb(hue, 0.08, 1.0) if rng.uniform() < 0.15 else _rgb(hue, 0.5, 0.15)
    pen, edge, width = ImageDraw.Draw(image), _shade(body, 0.35), max(1, canvas // 75)
    brush = _Brush(pen, _pose(canvas, rng), body, mark, edge, width)
    animal = _draw_butterfly if super_category == "butterfly" else _draw_fish
    animal(brush, marking, shape, rng)
    _scatter(image, super_category, rng.integers(1, 4), 0.12, rng)
    pixels = np.asarray(image.reduce(2), np.float32) * rng.uniform(0.85, 1.15, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
