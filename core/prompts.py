"""The prompts of training and evaluation, and how an answer is read.

The prompt strings are data: a trained model expects them to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Literal

IMAGE_MARKER = "<image>"
IMAGE_PAD = "<|image_pad|>"

STAGE2_INSTRUCTION = (
    "You first think through the reasoning process as an internal monologue, enclosed within "
    "<think> </think> tags. Then, provide your final answer enclosed within <answer> </answer> "
    "tags."
)

THINK = "<think>"
OPENING_TOKENS = 16  # hold it even where its characters are tokens of their own
JUDGE_REASONING = (
    "Look at the photo. Question: {question}\nTrue answer: {ground_truth}\nResponse: {response}\n\n"
    "How factual, relevant and helpful is the reasoning of this response? Say a number from 0 to "
    "100 only."
)
"""Of R_cot (ReFine-RFT), to a judge. The paper's wording is not published: this is ours."""
VERIFIER = (
    "The true name of what a photo shows is: {ground_truth}\nA model answered: {answer}\n\n"
    "How does the answer compare to the true name? Say one of these and nothing else:\n"
    "specific: the same thing, also by a synonym or a scientific name\n"
    "more specific: a kind of it\n"
    "less specific: the close group that it belongs to, such as its genus or product line\n"
    "generic: a much broader group that it belongs to\n"
    "abstain: it names nothing\n"
    "wrong: anything else, also where it names several things"
)
"""Of best_of_rollouts, to a verifier. The categories are SpeciaRL's, the wording is ours."""
_NO_THINKING = "Please directly output the answer."
_ATTRIBUTE = (
    "First think about what you see, enclosed within <think> </think> tags. Then list the "
    "attributes that tell the category, enclosed within <attribute> </attribute> tags. Then give "
    "the final answer, enclosed within <answer> </answer> tags."
)
"""ReFine-RFT's wording is not published: this is ours."""
CHOICE = "Answer with the letter from the given choices directly"
BOTH = "Answer the correct choice and its category name"
"""Of ReFine-RFT, to the letter."""
_TAGGED = "Put the answer within <answer> </answer> tags."
PROMPTS = ("stage2", "open", "choice", "both", "attribute", "no_thinking")
"""The training prompts that have a name."""
WITH_LETTERS = ("choice", "both", "attribute")
"""Those that show options by letter, where there are any."""
_OPENING, _CLOSING = "<answer>", "</answer>"
# White space after a mark, or before one: each run of it is looked at once.
_SPACE_AT_MARKS = re.compile(r"(?<=[<>/])\s+|(?<!\s)\s++(?=[<>/])")


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


def training_text(prompt: str, question: str, options: Sequence[str] = ()) -> str:
    """User text of a training prompt.

    Args:
        prompt: one of PROMPTS, or a template with {question} and, by choice, {options}.
        question: the question, stripped here.
        options: sub-categories to choose from, in the order in which they are shown; `stage2`,
            `open` and `no_thinking` show none.

    Returns:
        The text; options are shown as `A. name`, a line each.
    """
    question = question.strip()
    listed = option_lines(options)
    if prompt == "stage2":
        return stage2_text(question)
    if prompt == "open":
        return open_world_text(question)
    if prompt == "no_thinking":
        return f"{question} {_NO_THINKING}"
    if prompt in WITH_LETTERS:
        asked = f"{question}\n{listed}" if options else question
        instruction = {"choice": f"{CHOICE}. {_TAGGED}", "both": f"{BOTH}. {_TAGGED}"}
        return f"{asked}\n\n{instruction.get(prompt, _ATTRIBUTE)}"
    return prompt.replace("{options}", listed).replace("{question}", question)


def option_lines(options: Sequence[str]) -> str:
    """Options by letter, a line each: `A. name`."""
    lines = (f"{letter}. {name}" for letter, name in zip(LETTERS, options, strict=False))
    return "\n".join(lines)


def read_prompt(option: str) -> str:
    """What `rollout.prompt` names: one of PROMPTS as it is, or the content of a template file.

    Raises:
        ValueError: neither a known prompt nor a file, or a template without {question}.
    """
    if option in PROMPTS:
        return option
    try:
        template = Path(option).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"rollout.prompt must be {', '.join(PROMPTS)} or a template file, got {option!r}: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from error
    if "{question}" not in template:
        raise ValueError(f"rollout.prompt: the template {option} has no {{question}}")
    return template


def squeeze(text: str) -> str:
    """`text` without the white space around `<`, `>` and `/`."""
    return _SPACE_AT_MARKS.sub("", text)


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
    if which not in ("first", "longest"):
        raise ValueError(f"which must be 'first' or 'longest', got {which!r}")
    start = text.find(_OPENING)
    if start < 0:
        return None
    start += len(_OPENING)
    end = text.find(_CLOSING, start) if which == "first" else text.rfind(_CLOSING, start)
    return text[start:end].strip() if end >= 0 else None


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


def answer_opening(tokenizer, prompt_ids: Sequence[int]) -> str:
    """What the chat template has begun the answer with: `<think>` of a model that always thinks.

    It is not among the tokens that the model samples, but belongs to its answer.

    Args:
        tokenizer: of transformers.
        prompt_ids: of a whole prompt.

    Returns:
        `<think>` and the white space behind it; empty for other templates.
    """
    text = tokenizer.decode(prompt_ids[-OPENING_TOKENS:])
    return text[text.rfind(THINK) :] if text.rstrip().endswith(THINK) else ""


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
