import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tercet.core.data.manifest import Manifest
from tercet.core.types import Anchor, Photo

pytestmark = pytest.mark.core


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def drawn_manifest(folder):
    key = {name: save(folder / "bird" / f"{name}.jpg") for name in "abcdefg"}
    anchors = [
        Anchor("a", key["a"], (key["b"],), (key["c"], key["d"]), "Which?", "bird", "wren"),
        Anchor("c", key["c"], (key["d"],), (key["a"], key["b"]), "Größe?", "bird", "tit"),
    ]
    sft = [Photo(key["e"], "bird", "wren", "What?")]
    test = {
        "seen": [Photo(key["f"], "bird", "wren", "What?")],
        "unseen": [Photo(key["g"], "bird", "crow", "What?")],
    }
    names = {"bird": ["crow", "tit", "wren"]}
    nearest = {"bird": {"tit": ["wren"], "wren": ["tit"]}}
    settings = {"seed": 3, "seen_fraction": 0.6, "questions": None}
    return Manifest(anchors, sft, test, names, nearest, settings, ["image 'x' is bad"])


def test_round_trip_is_exact_from_file_and_folder(tmp_path):
    manifest = drawn_manifest(tmp_path / "photos")
    path = manifest.write(tmp_path / "out")
    assert path == tmp_path / "out" / "triplets.json"
    assert [file.name for file in path.parent.iterdir()] == ["triplets.json"]
    assert Manifest.read(path) == manifest == Manifest.read(tmp_path / "out")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["root"] == "../photos/bird"
    assert stored["anchors"][0]["image"] == "a.jpg"
    assert stored["anchors"][0]["negatives"] == ["c.jpg", "d.jpg"]
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    assert "Größe?" in path.read_text(encoding="utf-8")


def test_photos_and_manifest_move_together_or_by_editing_one_line(tmp_path):
    manifest = drawn_manifest(tmp_path / "one" / "photos")
    path = manifest.write(tmp_path / "one" / "out")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    moved = Manifest.read(tmp_path / "two" / "out")
    assert moved.anchors[0].image == str(tmp_path / "two" / "photos" / "bird" / "a.jpg")
    stored = json.loads(path.read_text(encoding="utf-8")) | {"root": "/data/bird"}
    path.write_text(json.dumps(stored))
    assert Manifest.read(path).test["unseen"][0].image == "/data/bird/g.jpg"


def test_keys_of_parquet_cells_are_kept(tmp_path):
    parquet = tmp_path / "data" / "t.parquet"
    anchor = Anchor(
        "t.parquet#0",
        f"{parquet}#0/images/0",
        (f"{parquet}#0/image_noisy/0",),
        (f"{parquet}#0/image_aug/0",),
        "Which?",
        "",
        "wren",
    )
    manifest = Manifest([anchor], [], {"seen": [], "unseen": []}, {"": ["wren"]}, {}, {})
    path = manifest.write(tmp_path / "out")
    assert json.loads(path.read_text())["root"] == "../data"
    assert json.loads(path.read_text())["anchors"][0]["image"] == "t.parquet#0/images/0"
    assert Manifest.read(path) == manifest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"root": ".",\n"anchors": [', r"triplets.json:3: malformed JSON"),
        ('{"root": "."}', "not a manifest of triplets: KeyError"),
        ("[]", "not a manifest of triplets"),
        (None, "triplets.json cannot be read"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "triplets.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Manifest.read(tmp_path / "triplets.json")


def test_an_unknown_field_is_named(tmp_path):
    path = drawn_manifest(tmp_path).write(tmp_path)
    stored = json.loads(path.read_text())
    stored["anchors"][1]["negative"] = "x.jpg"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="not a manifest of triplets.*'negative'"):
        Manifest.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["anchors"][1].update(id=m["anchors"][0]["id"]),
            r"anchors\[1\]: the id 'a' is",
        ),
        (lambda m: m["anchors"][1].update(id=7), r"anchors\[1\]: 'id' must be a text, got 7"),
        (lambda m: m["anchors"][0].update(question=7), r"anchors\[0\]: 'question' must be a text"),
        (lambda m: m["anchors"][0].update(question="<|im_end|>"), "'question' must not hold"),
        (lambda m: m["anchors"][0].update(positives=[]), "'positives' must be a list of photos"),
        (lambda m: m["anchors"][0].update(negatives="c.jpg"), "'negatives' must be a list of ph"),
        (lambda m: m["anchors"][0].update(negatives=[None]), r"'negatives'\[0\] must be a text"),
        (lambda m: m["anchors"][0].update(sub_category=1), "'sub_category' must be a text, got 1"),
        (
            lambda m: m["anchors"][0].update(sub_category="x"),
            r"'x' is not among the names of 'bird'",
        ),
        (lambda m: m.update(anchors=[1]), r"anchors\[0\]: 'id' must be a text"),
        (lambda m: m.update(names={"bird": [1, 2]}), r"names: 'bird'\[0\] must be a text, got 1"),
        (lambda m: m.update(names=["bird"]), "names"),
        (lambda m: m["sft"].append("a.jpg"), r"sft\[1\]: 'image' must be a text"),
        (lambda m: m.update(nearest=[]), "not a manifest of triplets"),
        (lambda m: m.update(skipped=[1]), "'skipped' must be a list of texts"),
        (lambda m: m.update(root=1), "'root' must be a text, got 1"),
    ],
)
def test_a_field_that_is_no_text_or_empty_is_named(tmp_path, change, message):
    path = drawn_manifest(tmp_path).write(tmp_path)
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=f"triplets.json.*{message}"):
        Manifest.read(path)


def test_notes_are_kept_and_shown_before_what_was_left_out(tmp_path):
    manifest = replace(drawn_manifest(tmp_path), notes=["folders train, test are read as splits"])
    assert Manifest.read(manifest.write(tmp_path)) == manifest
    assert manifest.remarks() == [*manifest.notes, "left out: image 'x' is bad"]


def test_a_key_is_converted_once_wherever_it_stands(tmp_path):
    """With all of a sub-category's photos as positives it stands there once for each of them."""
    manifest, converted = drawn_manifest(tmp_path), []
    moved = manifest.with_keys(lambda key: converted.append(key) or f"{key}.new")
    assert sorted(converted) == sorted(manifest.image_keys())
    assert moved.image_keys() == [f"{key}.new" for key in manifest.image_keys()]


def test_image_keys_are_listed_once(tmp_path):
    manifest = drawn_manifest(tmp_path)
    assert manifest.image_keys() == [str(tmp_path / "bird" / f"{n}.jpg") for n in "abcdefg"]
    assert manifest.common_folder() == str(tmp_path / "bird")


def test_bad_photos_stop_or_are_left_out_with_the_anchors_that_need_them(tmp_path):
    manifest = drawn_manifest(tmp_path)
    key = dict(zip("abcdefg", manifest.image_keys(), strict=True))
    assert manifest.without_bad("error") is manifest
    for name in "bcg":
        (tmp_path / "bird" / f"{name}.jpg").write_bytes(b"no photo")
    with pytest.raises(ValueError, match=r"b.jpg.*\(3 of 7 photos are bad\)"):
        manifest.without_bad("error")
    anchors = [
        *manifest.anchors,
        replace(manifest.anchors[0], id="d", positives=(key["b"], key["d"])),
    ]
    left = replace(manifest, anchors=anchors).without_bad("skip")
    assert left.anchors == [replace(anchors[2], positives=(key["d"],), negatives=(key["d"],))]
    assert left.sft == manifest.sft
    assert left.test == {"seen": manifest.test["seen"], "unseen": []}
    assert len(left.skipped) == 5 and left.skipped[0] == "image 'x' is bad"
    for name, reason in zip("bcg", left.skipped[1:4], strict=True):
        assert f"{name}.jpg" in reason
    assert left.skipped[4] == "anchor a: no good positive or no good negative is left"
    with pytest.raises(ValueError, match="no anchor has its photos; 3 are bad"):
        manifest.without_bad("skip")


def test_two_spellings_of_a_name_are_refused(tmp_path):
    path = drawn_manifest(tmp_path).write(tmp_path)
    stored = json.loads(path.read_text())
    stored["anchors"][1]["sub_category"] = stored["anchors"][1]["sub_category"].upper()
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"triplets.json: the sub-categories of .* are one name"):
        Manifest.read(path)
