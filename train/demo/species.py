"""The drawn world's sub-categories, butterflies and fish, and the texts about them.

A sub-category is a combination of a colour (4 values), a marking (2) and a shape (2), and its name
is those three words: "amber banded swallowtail". So an unseen sub-category is an unseen combination
of values that training has seen, and the most similar sub-category differs in one attribute.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from tercet.core.prompts import stage2_text


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
    """One or two sentences that name the super-category, the attributes and the sub-category."""
    return _fill(_CAPTIONS[rng.integers(len(_CAPTIONS))], species)


def chain_of_thought(species: Species, rng: Generator) -> str:
    """The attributes one by one in `<think>`, then the name in `<answer>`, and only there."""
    return _fill(_THOUGHTS[rng.integers(len(_THOUGHTS))], species)


def question(super_category: str, rng: Generator) -> str:
    """A question for the sub-category's name, without stage 2's instruction on the format.

    Raises:
        ValueError: no animal of this super-category is drawn.
    """
    if super_category not in ATTRIBUTES:
        raise ValueError(f"super_category {super_category!r} is not one of {sorted(ATTRIBUTES)}")
    return QUESTIONS[rng.integers(len(QUESTIONS))].format(super_category=super_category)


def vocabulary() -> list[str]:
    """Every possible caption, chain of thought and stage-2 prompt, in a fixed order."""
    texts = [_fill(t, species) for species in SPECIES for t in (*_CAPTIONS, *_THOUGHTS)]
    asked = [t.format(super_category=name) for name in ATTRIBUTES for t in QUESTIONS]
    return texts + [stage2_text(text) for text in asked]


def _representative(some: list[Species], every: list[Species]) -> bool:
    """Whether `some` hold all pairs of values of `every`, and each has a near one among them.

    Two species are near when they differ in the value of one attribute.
    """
    pairs = [{p for s in g for p in itertools.combinations(s.attributes, 2)} for g in (some, every)]
    near = [any(len(set(a.attributes) - set(b.attributes)) == 1 for b in some) for a in some]
    return pairs[0] == pairs[1] and all(near)


def seen_species(seed: int) -> set[str]:
    """Names of the sub-categories that training sees: 10 of 16 in each super-category.

    Every pair of values of two attributes occurs among them. Each of them differs from another seen
    one in a single attribute, so that hard negatives exist.
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
