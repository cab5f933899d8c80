"""Pictures of the drawn world's sub-categories, drawn with PIL.

Shape and marking of the wings, pose, light, background and what covers the animal vary from picture
to picture; only the colours of wings, tail and body tell the sub-category. Pictures are drawn at
twice their size and averaged down, because PIL does not antialias.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from tercet.train.demo.species import Species

# Hue, saturation and value of red, yellow, green, blue and purple; every picture varies them.
_HSV = (
    (0.975, 0.80, 0.88),
    (0.105, 0.86, 0.96),
    (0.385, 0.70, 0.78),
    (0.575, 0.75, 0.94),
    (0.760, 0.55, 0.88),
)
_BACKGROUND_HUES = (0.12, 0.42)
MARKINGS = ("plain", "banded", "dotted", "edged", "rayed")
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
    "longwing": _spline("0,-16 40,-46 104,-54 112,-34 84,-14 40,2"),
    "fanwing": _spline("0,-12 16,-50 46,-70 66,-52 58,-16 32,2"),
}
_HINDWINGS = {
    "roundwing": _spline("0,0 42,0 76,20 78,56 50,80 16,62"),
    "swallowtail": _spline("0,0 36,-2 52,16 50,44 58,76 74,106 54,106 38,72 22,42 8,30"),
    "longwing": _spline("0,0 40,-2 58,14 56,42 36,58 12,44"),
    "fanwing": _spline("0,-2 56,-14 96,10 98,54 62,88 18,72"),
}
SHAPES = tuple(_FOREWINGS)
_FEELER = _points("2,-30 8,-55 22,-75")
_VEIN = _points("-100,0 90,0")


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    return radius * _CIRCLE + (x, y)


def _affine(angle: float, stretch: tuple[float, float], centre: np.ndarray) -> Place:
    """A map from unit coordinates to canvas pixels: stretch, turn, move."""
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.diag(stretch) @ np.array([[cos, sin], [-sin, cos]])
    return lambda points: list(map(tuple, (points @ matrix + centre).tolist()))


def _pose(canvas: int, wild: float, rng: Generator) -> Place:
    scale = canvas * np.clip(rng.normal(0.43 - 0.07 * wild, 0.02 + 0.03 * wild), 0.25, 0.48)
    stretch = scale * rng.uniform(1 - 0.3 * wild, 1.0, 2)
    centre = canvas * np.clip(rng.normal(0.5, 0.02 + 0.04 * wild, 2), 0.4, 0.6)
    return _affine(np.clip(rng.normal(0, 0.1 + 0.3 * wild), -1.0, 1.0), stretch, centre)


@dataclass(frozen=True)
class _Brush:
    """Draws polygons in an animal's unit coordinates, and holds its colours."""

    pen: ImageDraw.ImageDraw
    place: Place
    wings: Colour
    tail: Colour
    body: Colour
    mark: Colour
    width: int
    edge: Colour = (35, 28, 30)

    def fill(self, points: np.ndarray, colour: Colour, *, edged: bool = False) -> None:
        placed = self.place(points)
        self.pen.polygon(placed, fill=colour)
        if edged:
            self.pen.line(placed + placed[:2], fill=self.edge, width=self.width)


def _within(wing: np.ndarray, share: float) -> np.ndarray:
    """A wing, shrunk to a share of its size around its own middle."""
    middle = wing.mean(0)
    return middle + share * (wing - middle)


def _mark_wing(
    brush: _Brush, wing: np.ndarray, tint: Colour, marking: str, side: np.ndarray, rng: Generator
) -> None:
    """Draw a wing's marking: [points, 2] of the right wing; `side` mirrors and stretches it."""
    root = wing[0]
    if marking == "banded":  # smaller and smaller copies of the wing, from its root
        for share, colour in zip((0.8, 0.62, 0.4), (brush.mark, tint, tint), strict=True):
            brush.fill((root + share * (wing - root)) * side, colour)
    if marking == "edged":
        brush.fill(wing * side, brush.mark)
        brush.fill(_within(wing, rng.uniform(0.68, 0.76)) * side, tint)
    if marking == "dotted":
        radius = rng.uniform(0.06, 0.09)
        for x, y in _within(wing, 0.6)[:: len(wing) // 5]:
            dx, dy = rng.uniform(-0.03, 0.03, 2)
            brush.fill(_disc(x + dx, y + dy, radius) * side, brush.mark)
    if marking == "rayed":
        far = _within(wing, 0.86)
        for end in far[len(far) // 5 : -len(far) // 6 : len(far) // 8]:
            ray = np.stack([root + 0.12 * (end - root), end])
            brush.pen.line(brush.place(ray * side), fill=brush.mark, width=2 * brush.width)


def _draw_butterfly(brush: _Brush, marking: str, shape: str, rng: Generator) -> None:
    wings = (_HINDWINGS[shape], brush.tail), (_FOREWINGS[shape], brush.wings)
    for side in (-1, 1):
        stretch = np.array([side * rng.uniform(0.75, 1.0), 1.0])
        for wing, tint in wings:
            brush.fill(wing * stretch, tint, edged=True)
            _mark_wing(brush, wing, tint, marking, stretch, rng)
        brush.pen.line(brush.place(_FEELER * (side, 1)), fill=brush.edge, width=brush.width)
    brush.fill(_CIRCLE * (0.17, 0.46) + (0, 0.04), brush.body, edged=True)
    brush.fill(_disc(0, -0.38, 0.13), brush.body, edged=True)


def _scatter(image: Image.Image, count: int, reach: float, rng: Generator) -> None:
    """Draw leaves anywhere on the canvas, up to `reach` of its width long."""
    pen = ImageDraw.Draw(image)
    low, high = _BACKGROUND_HUES
    for _ in range(count):
        size = image.width * reach * rng.uniform(0.5, 1.0)
        place = _affine(rng.uniform(0, 2 * np.pi), (size, size), rng.uniform(0, image.width, 2))
        hue = rng.uniform(low - 0.08, high + 0.08)
        colour = _rgb(hue, rng.uniform(0.15, 0.6), rng.uniform(0.35, 0.9))
        pen.polygon(place(_LEAF), fill=colour)
        pen.line(place(_VEIN), fill=_shade(colour, 0.8), width=2)


def _background(canvas: int, rng: Generator) -> Image.Image:
    """Nine blurred patches around one colour."""
    hue = rng.uniform(*_BACKGROUND_HUES) + rng.uniform(-0.05, 0.05, 9)
    saturation = rng.uniform(0.1, 0.5) * rng.uniform(0.6, 1.2, 9)
    value = rng.uniform(0.45, 0.9) * rng.uniform(0.7, 1.1, 9)
    patches = [_rgb(*hsv) for hsv in zip(hue, saturation, value, strict=True)]
    coarse = Image.fromarray(np.array(patches, np.uint8).reshape(3, 3, 3))
    return coarse.resize((canvas, canvas), Image.Resampling.BICUBIC)


def _colours(species: Species, wild: float, rng: Generator) -> list[Colour]:
    """Colours of wings, tail and body in one picture."""
    drift = np.clip(rng.normal(0, 0.01 + 0.01 * wild), -0.04, 0.04)
    faded, dark = rng.uniform(0.95 - 0.3 * wild, 1.05), rng.uniform(0.95 - 0.25 * wild, 1.05)
    colours = []
    for place in species.values:
        hue, saturation, value = _HSV[place]
        hue += drift + rng.normal(0, 0.008 + 0.008 * wild)
        colours.append(_rgb(hue, saturation * faded, value * dark * rng.uniform(0.9, 1.0)))
    return colours


@dataclass(frozen=True)
class Setting:
    """Where a picture is taken."""

    wild: tuple[float, float]
    """Range of how much pose, colours and what lies in front vary: 0 least, 1 most."""
    light: tuple[float, float, float]
    """Mean of the light that red, green and blue are multiplied by."""


PLATE = Setting((0.0, 0.4), (1.0, 1.0, 1.0))
"""A plate in a book: what the base stage knows."""
FIELD = Setting((0.2, 0.8), (1.0, 0.8, 0.6))
"""The field, in evening light: what stage 1, TAPO and the tests show."""


def draw(species: Species, rng: Generator, setting: Setting = FIELD, size: int = 84) -> Image.Image:
    """Draw one picture of a sub-category; the same state of `rng` gives the same picture.

    Args:
        species: whose values decide the colours.
        rng: source of everything that varies within the sub-category.
        setting: where the picture is taken.
        size: pixels a side.

    Returns:
        An RGB image of `size` x `size` pixels.

    Raises:
        ValueError: `size` is under 28.
    """
    if size < 28:
        raise ValueError(f"a picture needs at least 28 pixels a side, got size {size}")
    canvas = 2 * size
    wild = rng.uniform(*setting.wild)
    image = _background(canvas, rng)
    _scatter(image, rng.integers(1, 3 + int(5 * wild)), 0.2, rng)
    mark = (245, 240, 230) if rng.uniform() < 0.3 else (40, 30, 30)
    pen, width = ImageDraw.Draw(image), max(1, canvas // 75)
    brush = _Brush(pen, _pose(canvas, wild, rng), *_colours(species, wild, rng), mark, width)
    _draw_butterfly(brush, str(rng.choice(MARKINGS)), str(rng.choice(SHAPES)), rng)
    _scatter(image, rng.integers(0, 2 + int(4 * wild)), 0.12, rng)
    light = np.array(setting.light) * rng.uniform(1 - 0.15 * wild, 1 + 0.1 * wild, 3)
    pixels = np.asarray(image.reduce(2), np.float32) * light * rng.uniform(1 - 0.25 * wild, 1.05)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
