"""Questions for photos without one: templates by super-category, overridable by a YAML file."""

from __future__ import annotations

from pathlib import Path

import yaml

from tercet.core.data.files import check_text, read_yaml, shown
from tercet.core.names import normal_form

MAX_BYTES = 2**20

_COMMON = (
    "What kind of {super_category} is this?",
    "What type of {super_category} is shown in the image?",
    "What is the {super_category} featured in this picture?",
    "What is the {super_category} shown in the photo?",
    "What is the name of the {super_category} in the photo?",
    "Do you know what {super_category} this is?",
    "Can you identify the {super_category} in this image?",
    "Can you help me recognize the {super_category} in this photo?",
)
_MODEL = (
    *_COMMON,
    "What model is the {super_category} in this picture?",
    "Could you tell me the model of this {super_category}?",
)
_SPECIES = (
    *_COMMON,
    "What species is the {super_category} in this picture?",
    "Could you tell me the species of this {super_category}?",
)
QUESTIONS: dict[str, tuple[str, ...]] = {
    "default": _COMMON,
    "aircraft": _MODEL,
    "bird": _SPECIES,
    "car": _MODEL,
    "dog": _SPECIES,
    "flower": _SPECIES,
    "pet": _SPECIES,
}
"""Question templates by super-category (lower case, singular); "default" serves all others.

They are those of the released question files, each about a tenth of them."""


def read_questions(path: str | Path | None = None) -> dict[str, tuple[str, ...]]:
    """Question templates by super-category: QUESTIONS, overridden by a YAML file of lists.

    Args:
        path: YAML of {super_category: [template, ...]}; "default" serves every super-category
            without an entry, and `{super_category}` stands for its name. None: QUESTIONS.

    Raises:
        ValueError: naming file and entry at fault.
    """
    if path is None:
        return QUESTIONS
    own = read_yaml(Path(path), MAX_BYTES, yaml.SafeLoader)
    if not isinstance(own, dict) or not own:
        raise ValueError(f"{path} must map super-categories to lists of question templates")
    for name, templates in own.items():
        check_text(name, f"{path}: a super-category (in quotes, if it is a number)")
        where = f"{path}: {name!r} must be a list of questions"
        if not isinstance(templates, list) or not templates:
            raise ValueError(
                f"{path}: {name!r} must be a list of questions, got {shown(templates)}"
            )
        for index, template in enumerate(templates):
            check_text(template, f"{where}; question {index}")
    return QUESTIONS | {normal_form(name): tuple(own[name]) for name in own}


def questions_for(super_category: str, templates: dict[str, tuple[str, ...]]) -> list[str]:
    """The templates of a super-category, its name filled in; "birds" uses those of "bird"."""
    key = normal_form(super_category)
    if key not in templates and key.endswith("s") and key[:-1] in templates:
        key = super_category = key[:-1]
    chosen = templates.get(key, templates["default"])
    return [text.replace("{super_category}", super_category or "object") for text in chosen]
