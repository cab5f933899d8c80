"""Stage-1 records: conversations about photos."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tercet.core.data.fields import choice_of, load_json
from tercet.core.data.files import check_text, shown
from tercet.core.data.photos import OnBadImage, check_images

END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class SftSample:
    """One stage-1 conversation; its user turns hold one `<image>` per photo."""

    id: str
    messages: tuple[tuple[str, str], ...]
    """(role, content) in order; the last one is the only assistant turn."""
    images: tuple[str, ...]


def read_sft(
    path: str | Path, on_bad_image: OnBadImage = "error"
) -> tuple[list[SftSample], list[str]]:
    """Read stage-1 records, a JSON list of {"messages": [...], "images": [...]}.

    Args:
        path: the JSON file; image paths are relative to its folder.
        on_bad_image: "error" raises for a bad photo, "skip" leaves its record out and lists it.

    Returns:
        The samples, and for each record that was left out the reason.

    Raises:
        ValueError: naming file and record at fault.
    """
    path = Path(os.path.abspath(path))
    records = load_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a JSON list of at least one record")
    samples = [_sft_sample(record, path, index) for index, record in enumerate(records)]
    bad = check_images([image for sample in samples for image in sample.images], on_bad_image)
    kept, skipped = [], []
    for sample in samples:
        reasons = [bad[image] for image in sample.images if image in bad]
        if reasons:
            skipped.append(f"record {sample.id}: {reasons[0]}")
        else:
            kept.append(sample)
    if not kept:
        raise ValueError(f"{path}: no record has its photos; {skipped[0]}")
    return kept, skipped


def _sft_sample(record: object, path: Path, index: int) -> SftSample:
    where = f"{path}: record {index}"
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError(f"{where}: needs a list 'messages'")
    images = record.get("images")
    if not isinstance(images, list):
        raise ValueError(f"{where}: 'images' must be a list of paths, got {shown(images)}")
    for image in images:
        check_text(image, f"{where}: 'images' must be a list of paths; one")
    messages = tuple(_message(message, where) for message in record["messages"])
    roles = [role for role, _ in messages]
    if roles.count("assistant") != 1 or roles[-1] != "assistant":
        raise ValueError(
            f"{where}: needs exactly one assistant message, the last one; its roles are {roles}"
        )
    pads = sum(content.count("<image>") for role, content in messages if role == "user")
    if pads != len(images):
        raise ValueError(f"{where}: {pads} <image> in its user turns, but {len(images)} images")
    keys = tuple(os.path.normpath(path.parent / image) for image in images)
    return SftSample(f"{path.stem}/{index}", messages, keys)


def _message(message: object, where: str) -> tuple[str, str]:
    """Role and content; an answer may end with its end of turn, and no text holds another."""
    role = choice_of(message, "role", ("system", "user", "assistant"), where)
    content = message.get("content")
    text = content
    if role == "assistant" and isinstance(content, str):
        text = content.rstrip().removesuffix(END_OF_TURN)
    check_text(text, f"{where}: 'content'", markers=True)
    return role, content
