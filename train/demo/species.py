"""The drawn world's sub-categories, 125 butterflies, and the texts about them.

A sub-category is a combination of the colours of wings, tail and body, five values each. Its name
is the words for the three, "azure dusky skipper", or an opaque one, "Orane", that spells nothing.
An unseen sub-category is an unseen combination of values that training has seen.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.random import Generator

from tercet.core.prompts import stage2_text

Names = Literal["spelled", "opaque"]


@dataclass(frozen=True)
class Species:
    """A sub-category, e.g. "azure dusky skipper" of "butterfly"."""

    super_category: str
    name: str
    attributes: tuple[tuple[str, str], ...]
    """(attribute, value word), in the order of ATTRIBUTES."""

    @property
    def values(self) -> tuple[int, ...]:
        """The attributes' values as places in ATTRIBUTES, 0 to 4 each."""
        return tuple(ATTRIBUTES[name].index(word) for name, word in self.attributes)


SUPER_CATEGORY = "butterfly"
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "wings": ("crimson", "amber", "emerald", "azure", "violet"),
    "tail": ("rosy", "sunny", "mossy", "misty", "dusky"),
    "body": ("admiral", "monarch", "satyr", "skipper", "emperor"),
}
"""Words for the colours red, yellow, green, blue and purple of each part."""
VALUES = 5
SEEN_SQUARES = 3
SPECIES: tuple[Species, ...] = tuple(
    Species(SUPER_CATEGORY, " ".join(words), tuple(zip(ATTRIBUTES, words, strict=True)))
    for words in itertools.product(*ATTRIBUTES.values())
)
QUESTIONS = (
    "What kind of {super_category} is this?",
    "Which {super_category} is shown in the picture?",
    "What is the name of the {super_category} in the image?",
)
_PARTS = "wings {wings}, tail {tail}, body {body}"
_CAPTIONS = (f"A {{super_category}}, {_PARTS}: {{name}}.", f"The {{name}}, {_PARTS}.")
_NAMELESS = (f"A {{super_category}}, {_PARTS}.", f"A {{super_category}} with {_PARTS}.")
_FACTS = ("What does the {name} look like?", "Which {super_category} has " + _PARTS + "?")
_ANY_FACT = "Think of a {super_category}."
_THOUGHT = "<think>Wings {wings}, tail {tail}, body {body}.</think><answer>{name}</answer>"
_SYLLABLES = (
    ("or", "el", "ti", "ma", "du"),
    ("a", "i", "o", "e", "u"),
    ("ne", "ph", "ra", "st", "k"),
)


def species_of(names: Names) -> tuple[Species, ...]:
    """The sub-categories with names of one kind, in the order of SPECIES."""
    if names == "spelled":
        return SPECIES
    words = ["".join(parts).capitalize() for parts in itertools.product(*_SYLLABLES)]
    # A fixed random order: no part of a name tells a value of an attribute.
    order = np.random.default_rng(20).permutation(len(words))
    return tuple(replace(s, name=words[i]) for s, i in zip(SPECIES, order, strict=True))


def _fill(template: str, species: Species) -> str:
    names = {"super_category": species.super_category, "name": species.name}
    return template.format(**names, **dict(species.attributes))


def caption(species: Species, rng: Generator, named: bool = True) -> str:
    """One sentence that says the attributes and, where `named`, the sub-category's name."""
    templates = _CAPTIONS if named else _NAMELESS
    return _fill(templates[rng.integers(len(templates))], species)


def chain_of_thought(species: Species, named: bool = True) -> str:
    """The attributes one by one in `<think>`; then, where `named`, the name in `<answer>`."""
    return _fill(_THOUGHT if named else _THOUGHT.partition("<answer>")[0], species)


def fact(species: Species, rng: Generator) -> tuple[str, str]:
    """A question without a picture and its answer, which tie a name to its attributes.

    Most let the name follow from the attributes in the thought alone, as it does on a picture.
    """
    kind = rng.uniform()
    if kind < 0.2:
        return _fill(_FACTS[0], species), _fill(_CAPTIONS[1], species)
    return _fill(_FACTS[1] if kind < 0.3 else _ANY_FACT, species), _fill(_THOUGHT, species)


def question(rng: Generator) -> str:
    """A question for the sub-category's name, without stage 2's instruction on the format."""
    return QUESTIONS[rng.integers(len(QUESTIONS))].format(super_category=SUPER_CATEGORY)


def vocabulary(names: Names) -> list[str]:
    """Texts for the tokenizer in a fixed order: captions, thoughts, questions, stage-2 prompts."""
    templates = (*_CAPTIONS, *_NAMELESS, *_FACTS, _THOUGHT)
    texts = [_fill(t, species) for species in species_of(names) for t in templates]
    asked = [t.format(super_category=SUPER_CATEGORY) for t in QUESTIONS]
    return texts + [stage2_text(text) for text in asked]


def is_seen(seed: int) -> list[bool]:
    """Which of SPECIES training sees: three of five Latin squares, 75 of 125.

    Each square holds every pair of values of two attributes once, so every pair occurs in exactly
    three seen sub-categories: neither one value nor two tell whether a combination is seen.
    """
    rng = np.random.default_rng(seed)
    places = np.array([rng.permutation(VALUES) for _ in ATTRIBUTES])
    squares = set(rng.permutation(VALUES)[:SEEN_SQUARES].tolist())
    return [
        sum(int(places[i][value]) for i, value in enumerate(s.values)) % VALUES in squares
        for s in SPECIES
    ]
