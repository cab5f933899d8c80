"""The prompts of training and evaluation, and how an answer is read.

The prompt strings are data: a trained model expects them to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

IMAGE_MARKER = "<image>"
IMAGE_PAD = "<|image_pad|>"

STAGE2_INSTRUCTION = (
    "You first think through the reasoning process as an internal monologue, enclosed within "
    "<think> </think> tags. Then, provide your final answer enclosed within <answer> </answer> "
    "tags."
)

_ANSWER = {
    "first": re.compile("<answer>(.*?)</answer>", re.DOTALL),
    "longest": re.compile("<answer>(.*)</answer>", re.DOTALL),
}
_SPACE_AROUND_MARKS = re.compile(r"\s*([<>/])\s*")


def stage2_text(question: str) -> str:
    """User text of stage 2: the stripped question, a blank line and the instruction."""
    return f"{question.strip()}\n\n{STAGE2_INSTRUCTION}"


def open_world_text(question: str) -> str:
    """User text of the open-world evaluation, as released."""
    return (
        f"Given the question: {question}. This is a fine-grained question. Output reasoning in "
        "<think></think> and the final answer in <answer></answer>."
    )


def closed_world_text(question: str, options: Sequence[str]) -> str:
    """User text of the closed-world evaluation, as released: options as the repr of a list."""
    return (
        f"Given the question: {question}, based on the options provided in {list(options)}, output "
        "the thinking process in <think> </think> and final choice in <answer> </answer> tags. The "
        "response format should be: <think>...</think> <answer>choice</answer>."
    )


def squeeze(text: str) -> str:
    """`text` without the white space around `<`, `>` and `/`."""
    return _SPACE_AROUND_MARKS.sub(r"\1", text)


def extract_answer(text: str, which: Literal["first", "longest"] = "first") -> str | None:
    """Text between the answer tags.

    Args:
        text: the response.
        which: where the answer ends: `first` at the first closing tag (the reward's rule),
            `longest` at the last one (the evaluation's rule). It begins at the first opening tag.

    Returns:
        The text between the tags, stripped, possibly empty; None without a pair of tags.

    Raises:
        ValueError: `which` is something else.
    """
    if which not in _ANSWER:
        raise ValueError(f"which must be 'first' or 'longest', got {which!r}")
    match = _ANSWER[which].search(text)
    return match.group(1).strip() if match else None


def plain(text: str) -> str:
    """The form in which names are compared: lower case, `_` and white space as single spaces."""
    return squeeze(" ".join(text.lower().replace("_", " ").split()))


def names_in(text: str, names: Iterable[str]) -> list[str]:
    """The known names that occur in a text, ignoring case and reading `_` as a space.

    A name counts only between word boundaries. Longer names are searched first, and text that they
    match is not searched again: "crested auklet" does not count as "auklet".

    Args:
        text: the text to search.
        names: the known names; of two that are equal in this form, the first one is returned.

    Returns:
        The distinct names found, spelled as given, in the order of their first occurrence.

    Raises:
        ValueError: a name is empty.
    """
    hay = plain(text)
    taken = [False] * len(hay)
    found: dict[str, int] = {}
    for needle, name in _by_length(tuple(names)):
        start = hay.find(needle)
        while start >= 0:
            end = start + len(needle)
            if not any(taken[start:end]) and _is_bounded(hay, start, end):
                taken[start:end] = [True] * len(needle)
                found.setdefault(name, start)
            start = hay.find(needle, start + 1)
    return sorted(found, key=found.__getitem__)


def is_only_name(text: str, truth: str, names: Iterable[str]) -> bool:
    """Whether the true name is the only known name that occurs in a text (see `names_in`).

    Raises:
        ValueError: the true name is not a known one.
    """
    known, wanted = tuple(names), [plain(truth)]
    if [plain(name) for name in names_in(truth, known)] != wanted:
        raise ValueError(f"the true name {truth!r} is not a known name; known are {known}")
    return [plain(name) for name in names_in(text, known)] == wanted


@lru_cache(maxsize=64)
def _by_length(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name in its compared form, name as given), longest first."""
    needles: dict[str, str] = {}
    for name in names:
        if not plain(name):
            raise ValueError(f"a known name must not be empty, got {name!r}")
        needles.setdefault(plain(name), name)
    return sorted(needles.items(), key=lambda item: -len(item[0]))


def _is_bounded(text: str, start: int, end: int) -> bool:
    """Whether neither end of text[start:end] lies inside a word."""
    before, after = text[max(start - 1, 0) : start + 1], text[end - 1 : end + 1]
    return not any(len(pair) == 2 and pair.isalnum() for pair in (before, after))


def chat_ids(
    tokenizer,
    messages: Sequence[Mapping[str, str]],
    images: int,
    system_prompt: str | None = None,
) -> list[int]:
    """Prompt ids through the tokenizer's chat template, with ONE image pad per image.

    Each `<image>` in a user's content becomes an image item. A single image without a marker is put
    at the beginning of the first user turn. The ids end with the header of the assistant's turn.

    Args:
        tokenizer: of transformers, with a chat template that renders image items.
        messages: `{"role": ..., "content": ...}` turns, contents being strings.
        images: number of images in the prompt.
        system_prompt: system turn, if `messages` have none; None: the template's default.

    Returns:
        Token ids; every image is `<|vision_start|><|image_pad|><|vision_end|>` in them.

    Raises:
        ValueError: markers and `images` disagree, a content is not a string, the template fails,
            or the ids do not hold exactly one pad per image.
    """
    turns = _turns(messages, images)
    if system_prompt is not None and all(turn["role"] != "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": system_prompt})
    try:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    except Exception as error:
        raise ValueError(
            f"the tokenizer's chat template does not render {turns}: {error}"
        ) from error
    pad = tokenizer.get_vocab().get(IMAGE_PAD)
    pads = 0 if pad is None else ids.count(pad)
    if pads != images:
        known = "" if pad is not None else f"; the tokenizer has no token {IMAGE_PAD}"
        raise ValueError(
            f"the prompt must hold one {IMAGE_PAD} per image: {images} images, {pads} pads{known}; "
            f"messages: {turns}"
        )
    return ids


def _turns(messages: Sequence[Mapping[str, str]], images: int) -> list[dict]:
    """Messages with the image markers of user turns replaced by image items."""
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} must have a role and a text, got {message!r}")
    users = [n for n, message in enumerate(messages) if message["role"] == "user"]
    contents = [message["content"] for message in messages]
    if images == 1 and users and not any(IMAGE_MARKER in contents[n] for n in users):
        contents[users[0]] = IMAGE_MARKER + contents[users[0]]
    marked = sum(contents[n].count(IMAGE_MARKER) for n in users)
    if marked != images:
        raise ValueError(
            f"the messages mark {marked} images with {IMAGE_MARKER}, but {images} are given: "
            f"{list(messages)}"
        )
    return [
        {"role": message["role"], "content": _items(content) if n in users else content}
        for n, (message, content) in enumerate(zip(messages, contents, strict=True))
    ]


def _items(content: str) -> str | list[dict[str, str]]:
    """Text and image items in order; a content without images stays a string."""
    if IMAGE_MARKER not in content:
        return content
    items: list[dict[str, str]] = []
    for number, text in enumerate(content.split(IMAGE_MARKER)):
        items += [{"type": "image"}] if number else []
        items += [{"type": "text", "text": text}] if text else []
    return items
