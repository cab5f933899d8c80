"""Prompt styles: how a question is worded, and how answers to it are read.

The strings are data: those of the released script and of the papers stand here to the letter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Literal

from tercet.core.data.manifest import Manifest
from tercet.core.names import normal_form
from tercet.core.prompts import (
    BOTH,
    CHOICE,
    closed_world_text,
    extract_answer,
    open_world_text,
    stage2_text,
)
from tercet.core.types import EvalQuestion, Photo
from tercet.train.evaluation.answer_file import Mode
from tercet.train.evaluation.metrics import options_named

StyleName = Literal[
    "released", "stage2", "appendix", "choice", "both", "cot", "step_by_step", "in_context"
]
Text = Callable[[EvalQuestion], str]
Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Style:
    """A wording in each mode that it can be asked in."""

    texts: Mapping[Mode, Text]
    letters: bool = False
    """Whether the prompt shows a letter before each option."""
    tags: bool = True
    """Whether it asks for answer tags; else an output without them is an answer as a whole."""


def _appendix_open(q: EvalQuestion) -> str:
    return (
        f"Given the question: {q.question}. This is a fine-grained question, so you need to output "
        "fine-grained categories, such as specific animal species or car, airplane model. Output "
        "the thinking process in <think></think> and final answer in <answer></answer> tags. The "
        "response format should be as follows: <think>...</think><answer>your answer</answer>. "
        "Please follow this format exactly."
    )


def _appendix_closed(q: EvalQuestion) -> str:
    return (
        f"Given the question: {q.question}, based on the options provided in {list(q.options)}, "
        "output the thinking process in <think></think> and final choice in <answer></answer> "
        "tags. The response format should be as follows: <think>...</think><answer>choice</answer>."
        " Please follow this format exactly."
    )


def _lettered(instruction: str) -> Text:
    def text(q: EvalQuestion) -> str:
        if len(q.options) > len(ascii_uppercase):
            raise ValueError(
                f"line {q.line} of {q.file!r} has {len(q.options)} options, more than letters"
            )
        named = zip(ascii_uppercase, q.options, strict=False)
        return "\n".join([q.question, *(f"{a}. {name}" for a, name in named), instruction])

    return text


def _plain(q: EvalQuestion) -> str:
    return q.question


def _plain_closed(q: EvalQuestion) -> str:
    return f"{q.question} Choose one of the options in {list(q.options)}."


def _then(text: Text, end: str) -> Text:
    return lambda q: text(q) + end


# Ours: the prompt of ReFine-RFT's appendix that asks for these tags is not published.
_COT = (
    "\nOutput the thinking process in <think> </think>, the attributes that you see in <attribute> "
    "</attribute> and the final answer in <answer> </answer> tags. The response format should be: "
    "<think>...</think> <attribute>...</attribute> <answer>...</answer>."
)
_STEPS = " let's think step by step"
STYLES: dict[StyleName, Style] = {
    "released": Style(
        {
            "closed": lambda q: closed_world_text(q.question, q.options),
            "open": lambda q: open_world_text(q.question),
        }
    ),
    "stage2": Style({"open": lambda q: stage2_text(q.question)}),
    "appendix": Style({"closed": _appendix_closed, "open": _appendix_open}),
    "choice": Style(
        {"closed": _lettered(CHOICE)},
        letters=True,
        tags=False,
    ),
    "both": Style(
        {"closed": _lettered(BOTH)},
        letters=True,
        tags=False,
    ),
    "cot": Style({"closed": _then(_plain_closed, _COT), "open": _then(_plain, _COT)}),
    "step_by_step": Style(
        {"closed": _then(_plain_closed, _STEPS), "open": _then(_plain, _STEPS)}, tags=False
    ),
    "in_context": Style({"closed": _plain_closed, "open": _plain}, tags=False),
}


class Wording:
    """A style with the photos that its prompts show beside the question's own.

    Args:
        name: the style.
        demonstrations: triplets.json of a training run, for "in_context": each option that is a
            seen sub-category there is shown by a training photo, its question and its name.

    Raises:
        ValueError: "in_context" without demonstrations, or demonstrations without it.
    """

    def __init__(self, name: StyleName, demonstrations: str | Path | None = None):
        self.style = STYLES[name]
        if (name == "in_context") != (demonstrations is not None):
            raise ValueError(
                "--prompt in_context and --demonstrations triplets.json go together: got "
                f"{name!r} and {demonstrations!r}"
            )
        self._photos: dict[str, Photo] = {}
        if demonstrations is not None:
            manifest = Manifest.read(demonstrations)
            for a in manifest.anchors:
                photo = Photo(a.image, a.super_category, a.sub_category, a.question)
                self._photos.setdefault(normal_form(a.sub_category), photo)

    def turns(self, question: EvalQuestion, mode: Mode) -> tuple[Turns, tuple[str, ...]]:
        """The messages of a prompt, and the keys of its photos; the question's is the last one."""
        turns: Turns = []
        photos = self._demonstrated(question)
        for photo in photos:
            turns.append({"role": "user", "content": f"<image>{photo.question}"})
            turns.append({"role": "assistant", "content": photo.sub_category})
        turns.append({"role": "user", "content": "<image>" + self.style.texts[mode](question)})
        return turns, (*(photo.image for photo in photos), question.image)

    def _demonstrated(self, question: EvalQuestion) -> list[Photo]:
        known = (self._photos.get(normal_form(name)) for name in question.options)
        return [photo for photo in known if photo and photo.image != question.image]


def scored_text(output: str, shown: Sequence[str], style: Style) -> str:
    """An output as the rules of scoring read it.

    Where the style asks for no tags, all of an output without them stands between tags; where it
    shows letters, the names of the options that the answer names by letter or name do.

    Args:
        output: the whole raw output.
        shown: the options in the order of the prompt; none in open world.
        style: of the prompt.
    """
    if style.tags:
        return output
    answer, before = extract_answer(output, "longest"), output[: max(0, output.find("<answer>"))]
    if answer is None:
        answer, before = output, ""
    if style.letters and (named := options_named(answer, shown, letters=True)):
        answer = "; ".join(named)
    return f"{before}<answer>{answer}</answer>"
