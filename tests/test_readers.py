"""Every reader, with each value of a good file replaced by each of many bad ones in turn."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tercet.core.data.eval_files import read_eval
from tercet.core.data.folder_names import read_names
from tercet.core.data.manifest import Manifest
from tercet.core.data.parquet import read_parquet
from tercet.core.data.photos import check_images, read_photos
from tercet.core.data.questions import read_questions
from tercet.core.data.records import read_sft
from tercet.core.types import Anchor, Photo

pytestmark = pytest.mark.core

VALUES: list = [None, True, 7, -1.5, float("nan"), float("inf"), 10**30, "", " ", "text", "a\0b"]
VALUES += ["\ud800", "a\nb", "<|image_pad|>", "<|im_end|>", "<image>", "../../..", "/dev/zero", "~"]
VALUES += [[], [[]], [1], ["text"], {}, {"a": 1}, {"": []}, [None] * 3, "x" * 5000]


def places(node: object, place: tuple = ()) -> Iterator[tuple]:
    """Where the values of a document are, the whole of it first."""
    yield place
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(value, (*place, key))


def replaced(document: object, place: tuple, value: object) -> object:
    if not place:
        return value
    changed = copy.deepcopy(document)
    node = changed
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return changed


def outcome(path: Path, read: Callable[[Path], object]) -> str:
    try:
        read(path)
    except ValueError as error:
        assert str(path.parent) in str(error) or "image '" in str(error), error
        assert "\n" not in str(error) and len(str(error)) < 12_000
        str(error).encode()
        return "refused"
    return "read"


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    return tmp_path


LABELS = {"super_category": "bird", "sub_category": "wren"}
TURNS = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "wren"}]
QUESTION = {"image_path": "a.png", "question": "Which?", "options": ["x", "y"], "ground_truth": "x"}
LISTING = {
    "classes": [LABELS | {"partition": "seen"}],
    "images": [LABELS | {"path": "a.png", "split": "train", "question": "Which?"}],
}


def manifest_document(folder: Path) -> dict:
    a, b, c = (str(folder / f"{name}.png") for name in "abc")
    anchor = Anchor("a", a, (b,), (c,), "Which?", "bird", "wren")
    photo = Photo(b, "bird", "wren", "Which?")
    names, nearest = {"bird": ["wren", "tit"]}, {"bird": {"wren": ["tit"]}}
    test = {"seen": [photo], "unseen": []}
    manifest = Manifest([anchor], [photo], test, names, nearest, {"seed": 0}, ["x"], ["y"])
    return json.loads(manifest.write(folder / "out").read_text())


def read_checked(path: Path) -> list[str]:
    """A manifest and its photos, as a run reads them."""
    return list(check_images(Manifest.read(path).image_keys()))


JSON_READERS = {
    "sft": ("sft.json", lambda _: [{"messages": TURNS, "images": ["a.png"]}], read_sft),
    "listing": ("manifest.json", lambda _: LISTING, lambda path: read_photos(path.parent)),
    "triplets": ("triplets.json", manifest_document, read_checked),
    "lines": ("p.jsonl", lambda _: LABELS | {"image": "a.png", "question": "Q?"}, read_photos),
    "evaluation": ("e_seen.jsonl", lambda _: QUESTION | {"super_category": "bird"}, read_eval),
    "names": ("names.json", lambda _: {"1": "wren"}, read_names),
}


@pytest.mark.parametrize("kind", JSON_READERS)
def test_json_with_any_value_is_read_or_refused_in_one_line(folder, kind):
    name, make, read = JSON_READERS[kind]
    document = make(folder)
    path = folder / ("out" if kind == "triplets" else "") / name
    path.write_text(json.dumps(document))
    assert outcome(path, read) == "read"
    found = []
    for place in places(document):
        for value in VALUES:
            path.write_text(json.dumps(replaced(document, place, value)))
            found.append(outcome(path, read))
    assert found.count("refused") > len(found) / 2
    content = json.dumps(document)
    for end in range(0, len(content), max(1, len(content) // 50)):
        path.write_bytes(content[:end].encode() + b"\xff\x00{[")
        assert outcome(path, read) == "refused"


def test_yaml_with_any_value_is_read_or_refused_in_one_line(folder):
    document = {"bird": ["Which {super_category}?", "What?"], "default": ["What is it?"]}
    path = folder / "questions.yaml"
    for place in places(document):
        for value in VALUES:
            text = yaml.dump(replaced(document, place, value), Dumper=NoAliases)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            outcome(path, read_questions)


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def test_parquet_with_columns_of_any_kind_is_read_or_refused_in_one_line(folder):
    photo = (folder / "a.png").read_bytes()
    good = {"problem": ["Which?"], "answer": ["wren"]}
    good |= dict.fromkeys(("images", "image_noisy", "image_aug"), [[{"bytes": photo}]])
    cells = [None, True, 7, 1.5, "", "text", b"", b"\xff", [], [None], [[photo]], [7], {"a": 1}]
    cells += [{"bytes": 7}, {"bytes": None, "path": "/dev/zero"}, [{"path": "a.png"}], "a.png"]
    path = folder / "rows.parquet"

    def read(path: Path) -> None:
        for anchor in read_parquet(path):
            check_images((anchor.image, *anchor.positives, *anchor.negatives))

    found = []
    for number, (column, cell) in enumerate((c, cell) for c in good for cell in cells):
        path = folder / f"rows{number}.parquet"
        pq.write_table(pa.table(good | {column: [cell]}), path)
        found.append(outcome(path, read))
    assert found.count("read") >= 10 and found.count("refused") >= 50


def test_a_folder_that_cannot_be_entered_or_loops_does_no_harm(folder):
    (folder / "photos" / "bird" / "wren").mkdir(parents=True)
    os.rename(folder / "a.png", folder / "photos" / "bird" / "wren" / "a.png")
    os.symlink(folder / "photos", folder / "photos" / "bird" / "loop")
    with pytest.raises(ValueError, match="loop.* holds photos; they must lie as"):
        read_photos(folder / "photos")
