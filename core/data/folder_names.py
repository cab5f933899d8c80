"""Names of folders: index prefixes taken off, names from a file, bare numbers refused."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import yaml

from tercet.core.data.fields import as_words, load_json
from tercet.core.data.files import check_text, read_yaml, shown

Parts = tuple[str, ...]
"""A folder as the names of the folders on the way to it."""

NO_NAMES = frozenset(
    "all class classes data dataset datasets file files folder image imagefolder images img imgs "
    "jpeg jpegimages jpegs jpg jpgs photo photos pic pics picture pictures png raw root".split()
)
"""Names of folders that say nothing about what photos show."""
INDEX = re.compile(r"(?:\d+\.\s*(?=.*[^\W\d_])|\d+[-_](?=[^\W\d_])|n\d{8}[-_](?=[^\W\d_]))")
"""`001.`, `17_` or `n02085620-` before a name."""
WORDNET_ID = re.compile(r"n\d{8}")
YEARS = range(1900, 2100)
MAX_NAMES_BYTES = 2**22


def read_names(path: str | Path) -> dict[str, str]:
    """Names by folder, from a JSON or YAML file that maps one to the other.

    Args:
        path: the file. A folder is given by its name, or by its path below data.path without split
            folders; "." gives the super-category of a folder that holds its sub-categories alone.

    Raises:
        ValueError: naming file and entry at fault.
    """
    path = Path(path)
    if path.suffix == ".json":
        names = load_json(path)
    else:
        names = read_yaml(path, MAX_NAMES_BYTES, yaml.BaseLoader)
    if not isinstance(names, dict) or not names:
        raise ValueError(f'{path} must map folders to names, like {{"001": "pink primrose"}}')
    return {check_text(k, f"{path}: a folder"): _name_of(v, k, path) for k, v in names.items()}


def _name_of(value: object, folder: str, path: Path) -> str:
    return as_words(check_text(value, f"{path}: the name of {shown(folder)}"))


def names_of(
    root: Path, classes: list[Parts], given: Mapping[str, str]
) -> tuple[dict[Parts, str], list[str]]:
    """The name of every super-category's and sub-category's folder, and notes."""
    words, notes, used = {}, [], set()
    of_super: dict[str, list[Parts]] = defaultdict(list)
    for label in classes:
        of_super[label[0]].append(label)
    for label in [*((name,) for name in of_super), *classes]:
        for key in ("/".join(label), label[-1]):
            if key in given:
                words[label] = given[key]
                used.add(key)
                break
    if given and not used:
        raise ValueError(f"data.names: {shown(next(iter(given)))} is no folder in {root}")
    for name, subs in of_super.items():
        own = [label for label in subs if label not in words]
        short = _without_index([label[1] for label in own])
        words |= {label: as_words(short.get(label[1], label[1])) for label in own}
        _refuse_merging(root / name, {label[1]: words[label] for label in own})
        if short:
            pairs = [f"{shown(k)} -> {shown(as_words(v))}" for k, v in list(short.items())[:3]]
            pairs += ["..."] if len(short) > 3 else []
            notes.append(
                f"index prefixes taken off {len(short)} names of {name!r}: {', '.join(pairs)}"
            )
        words.setdefault((name,), as_words(name))
        _check_names(root, name, words[name,], {label[1]: words[label] for label in own}, given)
    if unused := [key for key in given if key not in used]:
        notes.append(f"{len(unused)} entries of data.names are no folders: {shown(unused[0])}, ...")
    return words, notes


def _refuse_merging(folder: Path, words: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for own, name in words.items():
        if (other := first.setdefault(name, own)) != own:
            raise ValueError(
                f"{folder}: the folders {other!r} and {own!r} both read as {name!r}: rename or "
                "merge them, or name both in --data.names FILE"
            )


def _without_index(folders: list[str]) -> dict[str, str]:
    """Names by folder, where each begins with an index of its own and all differ without it."""
    found = {folder: INDEX.match(folder) for folder in folders}
    if len(folders) < 2 or not all(found.values()):
        return {}
    short = {folder: folder[match.end() :] for folder, match in found.items()}
    indices = [re.sub(r"\W|_", "", match.group()) for match in found.values()]
    are_years = all(index.isdecimal() and int(index) in YEARS for index in indices)
    is_unique = len({as_words(name).casefold() for name in short.values()}) == len(folders)
    return short if is_unique and len(set(indices)) == len(folders) and not are_years else {}


def _check_names(
    root: Path, folder: str, name: str, subs: Mapping[str, str], given: Mapping[str, str]
) -> None:
    """ValueError for folder names that no answer could give.

    Args:
        root: of the photos.
        folder: of the super-category.
        name: of the super-category.
        subs: names of sub-categories by folder, without those that data.names gives.
        given: names by folder, which may be anything.
    """
    way = "--data.names FILE gives names, in JSON or YAML"
    for own in (folder, *subs):
        check_text(as_words(own), f"{root}: the folder name {own!r}")
    if folder not in given and not _has_letters(name):
        raise ValueError(
            f"{root / folder}: a super-category's name needs letters; {way}: "
            f'{{"{folder}": "bird"}}'
        )
    if folder not in given and name.casefold() in NO_NAMES:
        raise ValueError(
            f"{root / folder}: {name!r} is no super-category: it says nothing of photos; {way}: "
            f'{{"{folder}": "bird"}}'
        )
    bare = [sub for sub, words in subs.items() if not _has_letters(words)]
    if bare:
        more = ", ..." if len(bare) > 3 else ""
        raise ValueError(
            f"{root / folder}: {len(bare)} sub-categories have names without letters "
            f'({", ".join(bare[:3])}{more}); {way}: {{"{bare[0]}": "pink primrose", ...}}'
        )


def _has_letters(name: str) -> bool:
    return any(letter.isalpha() for letter in name) and not WORDNET_ID.fullmatch(name)
