"""Folder layouts that people have: what becomes of splits, indices, numbers and stray files."""

import json
import os
from hashlib import blake2b

import pytest
from PIL import Image

from tercet.core.config import DataConfig
from tercet.core.data.decoding import photo_suffixes
from tercet.core.data.photos import read_photos
from tercet.core.data.triplets import prepare_manifest
from tercet.core.types import Photo

pytestmark = pytest.mark.core


def lay(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shade = tuple(blake2b(os.fsencode(path), digest_size=3).digest())  # no two are the same
        Image.new("RGB", (8, 8), shade).save(root / path)


def named(tmp_path, names):
    path = tmp_path / "names.json"
    path.write_text(json.dumps(names))
    return path


def labels(photo_set):
    return sorted({(photo.super_category, photo.sub_category) for photo in photo_set.photos})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("001.Black_footed_Albatross", "017.Cardinal"), ("Black footed Albatross", "Cardinal")),
        (("n02085620-Chihuahua", "n02085782-Japanese_spaniel"), ("Chihuahua", "Japanese spaniel")),
        (("7_rose", "12_tulip"), ("rose", "tulip")),
        (("1-rose", "2-tulip"), ("rose", "tulip")),
        (("1. Ara", "2. 2nd wren"), ("2nd wren", "Ara")),
    ],
)
def test_an_index_before_every_name_is_taken_off_with_a_line(tmp_path, before, after):
    lay(tmp_path, *(f"bird/{name}/1.png" for name in before))
    read = read_photos(tmp_path)
    assert labels(read) == [("bird", name) for name in after]
    (note,) = read.notes
    assert note.startswith("index prefixes taken off 2 names of 'bird': ")
    assert all(name in note for name in (*before, *after))


@pytest.mark.parametrize(
    "names",
    [
        ("001.Cardinal", "Wren"),  # not every one
        ("1_Series", "3_Series"),  # not unique without
        ("737-200ER", "747-400F"),  # what follows begins with no letter
        ("2007_Audi_S4", "2012_BMW_M3"),  # years
        ("1_rose", "1_tulip"),  # no index of its own
        ("3d rose", "4x tulip"),
    ],
)
def test_what_is_no_index_stays(tmp_path, names):
    lay(tmp_path, *(f"thing/{name}/1.png" for name in names))
    read = read_photos(tmp_path)
    assert labels(read) == [("thing", name.replace("_", " ")) for name in sorted(names)]
    assert read.notes == []


def test_folders_that_read_as_the_same_words_are_refused_or_given(tmp_path):
    lay(
        tmp_path / "photos", "bird/Least_Auklet/1.png", "bird/Least Auklet/1.png", "bird/Wren/1.png"
    )
    with pytest.raises(ValueError, match="'Least Auklet' and 'Least_Auklet' both read as"):
        read_photos(tmp_path / "photos")
    path = named(tmp_path, {"Least Auklet": "Least Auklet", "Least_Auklet": "Least Auklet"})
    read = read_photos(tmp_path / "photos", names=path)
    assert labels(read) == [("bird", "Least Auklet"), ("bird", "Wren")] and len(read.photos) == 3


@pytest.mark.parametrize("names", [("1", "2"), ("737-200", "A320"), ("n02085620", "wren")])
def test_names_without_letters_are_refused_or_given(tmp_path, names):
    lay(tmp_path / "photos", *(f"thing/{name}/1.png" for name in names))
    with pytest.raises(ValueError, match=rf"without letters \({names[0]}.*--data\.names FILE"):
        read_photos(tmp_path / "photos")
    path = named(tmp_path, {names[0]: "rose", f"thing/{names[1]}": "737-200"})
    assert labels(read_photos(tmp_path / "photos", names=path)) == [
        ("thing", "737-200"),
        ("thing", "rose"),
    ]


@pytest.mark.parametrize("folder", ["images", "JPEGImages", "data", "102"])
def test_a_super_category_that_says_nothing_is_refused_or_given(tmp_path, folder):
    lay(tmp_path / "photos", *(f"{folder}/00{i}.{n}/1.png" for i, n in enumerate(("Auk", "Wren"))))
    with pytest.raises(ValueError, match=rf'{folder}.*--data\.names FILE.*{{"{folder}": "bird"}}'):
        read_photos(tmp_path / "photos")
    read = read_photos(tmp_path / "photos", names=named(tmp_path, {folder: "sea_bird"}))
    assert labels(read) == [("sea bird", "Auk"), ("sea bird", "Wren")]


def test_a_folder_of_sub_categories_alone_is_refused_or_its_super_category_given(tmp_path):
    lay(tmp_path / "photos", "rose/1.png", "tulip/1.png")
    with pytest.raises(
        ValueError, match=r'must lie one folder deeper.*{"\.": "bird"}.*data\.names'
    ):
        read_photos(tmp_path / "photos")
    names = tmp_path / "names.yaml"
    names.write_text(".: flower\nrose: Rosa canina\n")
    read = read_photos(tmp_path / "photos", names=names)
    assert labels(read) == [("flower", "Rosa canina"), ("flower", "tulip")]


SPLIT_LAYOUTS = {
    "{split}/flower/{name}/{photo}": {},
    "flower/{split}/{name}/{photo}": {},
    "flower/{name}/{split}/{photo}": {},
    "{split}/{name}/{photo}": {".": "flower"},
}


@pytest.mark.parametrize(("layout", "names"), SPLIT_LAYOUTS.items())
def test_splits_are_used_wherever_their_level_is(tmp_path, layout, names):
    root = tmp_path / "photos"
    for split, photos in {"Train": "abc", "valid": "d", "test": "ef"}.items():
        for name in ("rose", "tulip"):
            lay(root, *(layout.format(split=split, name=name, photo=f"{p}.png") for p in photos))
    lay(root, layout.format(split="test", name="daisy", photo="g.png"))
    path = named(tmp_path, names) if names else None
    read = read_photos(root, names=path)
    assert labels(read) == [("flower", "daisy"), ("flower", "rose"), ("flower", "tulip")]
    assert {key.rpartition("/")[2]: split for key, split in read.splits.items()} == {
        **dict.fromkeys(("a.png", "b.png", "c.png"), "train"),
        **dict.fromkeys(("d.png", "e.png", "f.png", "g.png"), "test"),
    }
    (note,) = read.notes
    assert "6 photos to learn from, 7 held out (test, valid)" in note

    def embed(keys):
        import torch

        return torch.tensor([[1.0, float("rose" in key)] for key in keys])

    config = DataConfig(str(root), path and str(path), seen_fraction=1.0, shots=3, sft_shots=0)
    manifest = prepare_manifest(config, embed)
    trained = {key.rpartition("/")[2] for a in manifest.anchors for key in (a.image, *a.positives)}
    assert trained <= {"a.png", "b.png", "c.png"}
    held_out = [photo.image[-5:] for photos in manifest.test.values() for photo in photos]
    assert sorted(held_out) == ["d.png"] * 2 + ["e.png"] * 2 + ["f.png"] * 2 + ["g.png"]
    assert [photo.sub_category for photo in manifest.test["unseen"]] == ["daisy"]
    assert manifest.remarks() == read.notes


def test_a_train_folder_alone_is_no_split(tmp_path):
    lay(tmp_path, "train/flower/rose/1.png")
    read = read_photos(tmp_path)
    assert labels(read) == [("flower", "rose")] and read.splits is None
    assert read.notes == ["folder train is read as a split; held-out photos are drawn from it"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["test/a/b/1.png", "val/a/b/1.png"], "splits test, val, but no folder train"),
        (
            ["test/a/b/1.png", "train/a/b/1.png", "extra/a/b/1.png"],
            "test, train look like splits, but 'extra' beside them is none",
        ),
        (["CUB/bird/a/b/1.png", "CUB/bird/c/d/1.png"], r"give --data.path .*CUB"),
        (["bird/wren/1.png", "bird/tit/new/1.png"], "must lie as <super_category>/<sub_category>"),
        (["bird/<|endoftext|>/1.png"], r"must not hold <\|endoftext\|>"),
        ([b"bird/wr\xffn/1.png".decode(errors="surrogateescape")], "half a character"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, paths, message):
    lay(tmp_path, *paths)
    with pytest.raises(ValueError, match=message) as caught:
        read_photos(tmp_path)
    assert str(caught.value).isprintable()


def test_a_vehicle_called_train_is_no_split(tmp_path):
    lay(tmp_path, "train/ICE_4/1.png", "car/Audi_S5/1.png")
    assert labels(read_photos(tmp_path)) == [("car", "Audi S5"), ("train", "ICE 4")]


def test_what_is_left_out_is_counted_and_what_pillow_reads_is_read(tmp_path):
    read_too = ["1.bmp", "2.GIF", "3.jp2", "5.jpe"]
    read_too += ["4.avif"] if ".avif" in photo_suffixes() else []  # Pillow 11.3 and later
    lay(tmp_path, *(f"bird/wren/{name}" for name in read_too), "bird/wren/deeper/1.png", "9.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "bird" / "wren" / "6.jfif", "JPEG")
    for name in ("7.heic", "8.heic", "raw", "notes.txt"):
        (tmp_path / "bird" / "wren" / name).write_bytes(b"?")
    (tmp_path / "annotations" / "wren").mkdir(parents=True)
    read = read_photos(tmp_path)
    names = sorted([*read_too, "6.jfif"])
    wrens = tmp_path / "bird" / "wren"
    assert read.photos == [Photo(str(wrens / name), "bird", "wren") for name in names]
    assert [note.partition(" left out")[0] for note in read.notes] == [
        "file(s) 2 .heic, 1 without suffix",
        f"1 photo(s) directly in {tmp_path}",
        "folder(s) without photos",
        "1 photo(s) in folders of sub-categories' folders",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must map folders to names"),
        ('{"1": 7}', "the name of '1' must be a text, got 7"),
        ('{"1": ["rose"]}', "the name of '1' must be a text"),
        ('{"9": "rose"}', "data.names: '9' is no folder in"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_faulty_names_are_named(tmp_path, text, message):
    lay(tmp_path / "photos", "bird/1/1.png")
    path = tmp_path / "names.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_photos(tmp_path / "photos", names=path)


def test_names_are_for_folders(tmp_path):
    (tmp_path / "photos.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="data.names is for folders of photos"):
        read_photos(tmp_path / "photos.jsonl", names=named(tmp_path, {"1": "rose"}))
