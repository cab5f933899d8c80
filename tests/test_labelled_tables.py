"""Labelled photos in tables: folders that `datasets` has saved, and Parquet files as hubs have."""

import json
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tercet.core.config import DataConfig
from tercet.core.data.manifest import Manifest
from tercet.core.data.photos import read_photos
from tercet.core.data.triplets import prepare_manifest
from tercet.core.data.vision import load_image

pytestmark = pytest.mark.core

NAMES = ["001.red_bird", "002.blue_bird", "003.grey_bird"]
WORDS = ["red bird", "blue bird", "grey bird"]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}


def png(shade: int) -> bytes:
    stored = BytesIO()
    Image.new("RGB", (8, 6), (shade, 255 - shade, 7)).save(stored, "PNG")
    return stored.getvalue()


def table(rows: range, features: dict | None = FEATURES, **columns) -> pa.Table:
    """Row i shows shade i, and its label is i modulo three."""
    photos = [{"bytes": png(i), "path": f"{i}.png"} for i in rows]
    found = pa.table({"image": photos, "label": [i % 3 for i in rows]} | columns)
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    return found if features is None else found.replace_schema_metadata(about)


def saved(folder, *tables):
    """A split as `Dataset.save_to_disk` writes it, with a record batch for every four rows."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(tables):05}.arrow" for n in range(len(tables))]
    for name, of_file in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink:
            with pa.ipc.new_stream(sink, of_file.schema) as stream:
                stream.write_table(of_file, max_chunksize=4)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))


def saved_splits(root, **splits):
    for name, of_split in splits.items():
        saved(root / name, of_split)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def shades(photo_set) -> dict[int, str]:
    """Name by what the photo shows."""
    assert all(load_image(p.image).size == (8, 6) for p in photo_set.photos)
    found = {load_image(p.image).getpixel((0, 0))[0]: p.sub_category for p in photo_set.photos}
    assert len(found) == len(photo_set.photos)
    return found


def test_a_folder_of_datasets_is_read(tmp_path):
    saved(tmp_path / "set", table(range(10), None), table(range(10, 15), None))
    read = read_photos(tmp_path / "set", super_category="bird")
    assert shades(read) == {i: WORDS[i % 3] for i in range(15)}
    assert read.splits is None and {p.super_category for p in read.photos} == {"bird"}
    assert read.root == str(tmp_path / "set")
    assert [note[:38] for note in read.notes] == ["index prefixes taken off 3 names of '.'"[:38]]


def hub(root, **splits):
    (root / "data").mkdir(parents=True)
    for name, of_split in splits.items():
        pq.write_table(of_split, root / "data" / f"{name}-00000-of-00001.parquet", row_group_size=4)


@pytest.mark.parametrize("write", [saved_splits, hub])
def test_splits_are_those_of_the_data_set(tmp_path, write):
    write(tmp_path / "set", train=table(range(9)), validation=table(range(20, 23)))
    read = read_photos(tmp_path / "set", super_category="bird")
    assert shades(read) == {i: WORDS[i % 3] for i in (*range(9), *range(20, 23))}
    held = {load_image(key).getpixel((0, 0))[0]: split for key, split in read.splits.items()}
    assert held == {i: "train" if i < 9 else "test" for i in held} and len(held) == 12
    assert "9 photos to learn from, 3 held out (validation)" in read.notes[-1]


def test_texts_are_labels_and_a_column_says_what_is_shown(tmp_path):
    supers = {"label": ["wren", "rose"], "super_category": ["bird", "flower"]}
    pq.write_table(table(range(2), None, **supers), tmp_path / "mine.parquet")
    (tmp_path / "names.json").write_text('{"wren": "winter wren"}')
    read = read_photos(tmp_path / "mine.parquet", names=tmp_path / "names.json")
    labels = [(p.super_category, p.sub_category) for p in read.photos]
    assert labels == [("bird", "winter wren"), ("flower", "rose")]
    with pytest.raises(ValueError, match="super_category is for tables without that column"):
        read_photos(tmp_path / "mine.parquet", super_category="bird")


def test_columns_are_found_by_their_types(tmp_path):
    renamed = table(range(3)).rename_columns(["picture", "species"])
    features = {"picture": FEATURES["image"], "species": FEATURES["label"]}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(renamed.replace_schema_metadata(about), tmp_path / "a.parquet")
    assert shades(read_photos(tmp_path, super_category="bird")) == dict(enumerate(WORDS))


def test_triplets_are_made_written_and_read_back(tmp_path):
    """A photo that is held out and learnt as well is found in its cell."""
    hub(tmp_path / "set", train=table(range(12)), test=table(range(9, 14)))
    config = DataConfig(
        path=str(tmp_path / "set"), super_category="bird", shots=4, sft_shots=0, seen_fraction=1.0
    )

    def embed(keys):
        return torch.tensor([[float(load_image(k).getpixel((0, 0))[0] % 3), 1.0] for k in keys])

    manifest = prepare_manifest(config, embed)
    assert len(manifest.anchors) == 12 and len(manifest.test["seen"]) == 2
    assert sum("learnt and held out" in note for note in manifest.notes) == 3
    again = Manifest.read(manifest.write(tmp_path / "out"))
    assert again.anchors == manifest.anchors
    for anchor in again.anchors:
        shade = load_image(anchor.image).getpixel((0, 0))[0]
        assert anchor.sub_category == WORDS[shade % 3]


@pytest.mark.parametrize(
    ("columns", "features", "said"),
    [
        ({"label": [0, 1, 3]}, FEATURES, "a.parquet#2: column 'label' must be 0 to 2, got 3"),
        ({"label": [0, None, 1]}, FEATURES, "a.parquet#1: column 'label' must be 0 to 2, got None"),
        ({}, None, "a.parquet: nothing names the numbers of column 'label'"),
        ({}, {"label": {"_type": "ClassLabel"}}, "feature 'label': 'names' must be a list of"),
        ({"label": ["wren", " ", "x"]}, None, "a.parquet#1: column 'label' must be a text"),
        ({"back": [None] * 3}, FEATURES | {"back": FEATURES["image"]}, "several columns of photos"),
        ({"image": [{"bytes": b"", "path": None}] * 3}, FEATURES, "a.parquet#1/image/0.*is empty"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path, columns, features, said):
    pq.write_table(table(range(3), features, **columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=said):
        read_photos(tmp_path / "a.parquet", super_category="bird")


def test_what_is_wrong_with_a_data_set_is_named(tmp_path):
    hub(tmp_path / "one", train=table(range(3)))
    with pytest.raises(ValueError, match="train-0.* does not say .*: --data.super_category bird"):
        read_photos(tmp_path / "one")
    hub(tmp_path / "tests", test=table(range(3)))
    with pytest.raises(ValueError, match="tests has the splits test, but no train"):
        read_photos(tmp_path / "tests", super_category="bird")
    hub(tmp_path / "other", train=table(range(3)), extra=table(range(3)))
    with pytest.raises(ValueError, match="extra-0.* is of no split .*others beside it are"):
        read_photos(tmp_path / "other", super_category="bird")
    saved(tmp_path / "cut", table(range(40)))
    (file,) = (tmp_path / "cut").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="data-00000-of-00001.arrow cannot be read as a table"):
        read_photos(tmp_path / "cut", super_category="bird")
    file.unlink()
    with pytest.raises(ValueError, match="data-00000-of-00001.arrow cannot be read as a table"):
        read_photos(tmp_path / "cut", super_category="bird")
    (tmp_path / "cut" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="state.json: '_data_files' must list"):
        read_photos(tmp_path / "cut", super_category="bird")
