import json
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tercet.core.config import DataConfig
from tercet.core.data.parquet import read_parquet, write_parquet
from tercet.core.data.triplets import prepare_manifest
from tercet.core.data.vision import load_image
from tercet.core.families.qwen2_vl import resized
from tercet.core.prompts import STAGE2_INSTRUCTION, stage2_text
from tercet.core.types import Anchor

pytestmark = pytest.mark.core


def png(colour, size=(4, 4)):
    stored = BytesIO()
    Image.new("RGB", size, colour).save(stored, "PNG")
    return stored.getvalue()


def row(cell, **more):
    columns = {
        "problem": "<image>Which bird?",
        "answer": "Least_Auklet",
        "images": cell("red"),
        "image_noisy": cell("lime"),
        "image_aug": cell("blue"),
    }
    return columns | more


CELLS = {
    "list of structs": lambda colour: [{"bytes": png(colour), "path": None}],
    "struct": lambda colour: {"bytes": png(colour), "path": None},
    "list of paths": lambda colour: [f"{colour}.png"],
    "path in struct": lambda colour: {"bytes": None, "path": f"{colour}.png"},
    "path": lambda colour: f"{colour}.png",
    "list of bytes": lambda colour: [png(colour)],
    "bytes": lambda colour: png(colour),
}


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("form", CELLS)
def test_every_form_of_cell_is_read(tmp_path, form):
    for colour in ("red", "lime", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    path = write(tmp_path / "t.parquet", [row(CELLS[form])] * 2)
    anchors = read_parquet(path)
    assert anchors[1] == Anchor(
        id="t.parquet#1",
        image=f"{path}#1/images/0",
        positives=(f"{path}#1/image_noisy/0",),
        negatives=(f"{path}#1/image_aug/0",),
        question="Which bird?",
        super_category="",
        sub_category="Least Auklet",
    )
    keys = (anchors[1].image, anchors[1].positives[0], anchors[1].negatives[0])
    colours = [load_image(key).getpixel((0, 0)) for key in keys]
    assert colours == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_lists_of_positives_and_negatives_are_kept_whole(tmp_path):
    two = [{"bytes": png("lime"), "path": ""}, {"bytes": png("black"), "path": ""}]
    path = write(tmp_path / "t.parquet", [row(CELLS["list of structs"], image_noisy=two)])
    (anchor,) = read_parquet(path)
    assert anchor.positives == (f"{path}#0/image_noisy/0", f"{path}#0/image_noisy/1")
    assert load_image(anchor.positives[1]).getpixel((0, 0)) == (0, 0, 0)


def test_a_folder_of_files_is_read_in_the_order_of_names_and_rows(tmp_path):
    for name, count in (("b", 2), ("a", 70)):
        rows = [row(CELLS["bytes"], answer=f"{name}{i}") for i in range(count)]
        write(tmp_path / f"{name}.parquet", rows)
    anchors = read_parquet(tmp_path)
    expected = [f"a{i}" for i in range(70)] + ["b0", "b1"]
    assert [anchor.sub_category for anchor in anchors] == expected
    assert anchors[69].id == "a.parquet#69" and anchors[70].id == "b.parquet#0"


@pytest.mark.parametrize(
    "problem",
    [
        "<image>Which bird?",
        "Which bird? <image>",
        "<image>\n" + stage2_text("Which bird?"),
        f"<image>Which bird? {STAGE2_INSTRUCTION}\n",
        "Which bird?",
    ],
)
def test_the_question_is_bare(tmp_path, problem):
    path = write(tmp_path / "t.parquet", [row(CELLS["bytes"], problem=problem)])
    assert read_parquet(path)[0].question == "Which bird?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_aug": None}, r"t.parquet#1: column 'image_aug' holds no photo"),
        ({"image_noisy": []}, r"t.parquet#1: column 'image_noisy' holds no photo"),
        ({"answer": " "}, r"t.parquet#1: column 'answer' must be a text, got ' '"),
        ({"problem": None}, r"t.parquet#1: column 'problem' must be a text, got None"),
        ({"problem": "<image>Which <|image_pad|>?"}, r"column 'problem' must not hold <.image_pad"),
        ({"answer": "<image>"}, r"column 'answer' must not hold <image>"),
        ({"problem": "<image><image>?"}, r"t.parquet#1: .*got 1 photos and 2 <image>"),
        (
            {"images": CELLS["list of bytes"]("red") * 2},
            r"t.parquet#1: .*got 2 photos and 1 <image>",
        ),
    ],
)
def test_a_faulty_row_is_named(tmp_path, change, message):
    good = row(CELLS["list of bytes"])
    path = write(tmp_path / "t.parquet", [good, good | change])
    with pytest.raises(ValueError, match=message):
        read_parquet(path)


@pytest.mark.parametrize("column", ["problem", "images", "answer", "image_noisy", "image_aug"])
def test_a_missing_column_is_named(tmp_path, column):
    columns = row(CELLS["bytes"])
    del columns[column]
    path = write(tmp_path / "t.parquet", [columns])
    with pytest.raises(ValueError, match=f"t.parquet has no column '{column}'; needed: problem"):
        read_parquet(path)


def test_what_is_no_parquet_is_named(tmp_path):
    (tmp_path / "t.parquet").write_text("no Parquet")
    for name in ("t.parquet", "gone.parquet"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as Parquet"):
            read_parquet(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no Parquet rows"):
        read_parquet(tmp_path / "empty")


def test_the_clone_of_a_data_set_is_read_and_other_splits_are_not(tmp_path):
    data = tmp_path / "clone" / "data"
    data.mkdir(parents=True)
    (data.parent / "README.md").write_text("A data set.")
    photos = dict.fromkeys(("images", "image_noisy", "image_aug"), {"_type": "Image"})
    about = {"huggingface": json.dumps({"info": {"features": photos}})}  # as a hub has it
    for name in ("test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"):
        table = pa.Table.from_pylist([row(CELLS["bytes"])]).replace_schema_metadata(about)
        pq.write_table(table, data / f"{name}.parquet")
    manifest = prepare_manifest(DataConfig(path=str(data.parent)), refuse)
    assert [anchor.id for anchor in manifest.anchors] == [
        "train-00000-of-00002.parquet#0",
        "train-00001-of-00002.parquet#0",
    ]
    assert manifest.notes == ["Parquet files of other splits left out: test-00000-of-00001.parquet"]


def refuse(keys):
    raise AssertionError("nothing is to be embedded")


def test_files_that_are_damaged_or_still_to_be_downloaded_are_named(tmp_path):
    path = write(tmp_path / "t.parquet", [row(CELLS["bytes"])] * 3)
    whole = Path(path).read_bytes()
    for place in range(4, len(whole) - 8, 37):
        Path(path).write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_parquet(path)
        except ValueError as error:
            assert "t.parquet" in str(error) and "\n" not in str(error)
    Path(path).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="t.parquet cannot be read as Parquet.*git lfs pull"):
        read_parquet(path)
    table = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["problem", "problem"])
    pq.write_table(table, path)
    with pytest.raises(ValueError, match="has several columns 'problem'"):
        read_parquet(path)


def smooth(path, size, colour):
    ramp = np.linspace(0, 1, size[0])[None, :, None] * np.linspace(0.5, 1, size[1])[:, None, None]
    Image.fromarray((ramp * np.array(colour)).astype(np.uint8)).save(path)
    return str(path)


def test_written_rows_are_resized_alike_and_read_back(tmp_path):
    colours = {"red": (255, 40, 0), "green": (0, 255, 40), "blue": (40, 0, 255)}
    sizes = {"red": (400, 250), "green": (100, 300), "blue": (64, 64)}
    key = {name: smooth(tmp_path / f"{name}.png", sizes[name], colours[name]) for name in colours}
    anchors = [
        Anchor("1", key["red"], (key["green"], key["blue"]), (key["blue"],), "Which?", "s", "one"),
        Anchor("2", key["green"], (key["red"],), (key["blue"], key["red"]), "What?", "s", "two"),
    ] * 40
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 5000, "longest_edge": 30000})
    path = tmp_path / "out" / "t.parquet"
    write_parquet(iter(anchors), path, partial(resized, processor))
    assert [file.name for file in path.parent.iterdir()] == ["t.parquet"]
    names = ["problem", "images", "answer", "image_noisy", "image_aug"]
    assert pq.read_schema(path).names == names
    read = read_parquet(path)
    assert len(read) == 80
    assert [(a.question, a.sub_category) for a in read] == [
        ("Which?", "one"),
        ("What?", "two"),
    ] * 40
    # 400 x 250: scaled by sqrt(30000 / 100000), down to multiples of 28. 100 x 300 would round to
    # 112 x 308, over the limit, so it is scaled by 1 and rounded down.
    photos = (("red", "green", "blue"), ("green", "red", "blue"))
    for index, size in ((78, (196, 112)), (79, (84, 280))):
        written = read[index]
        for stored, name in zip(
            (written.image, written.positives[0], written.negatives[0]),
            photos[index - 78],
            strict=True,
        ):
            image = load_image(stored)
            assert image.size == size
            grid = processor(image, return_tensors="pt")["image_grid_thw"].tolist()
            assert grid == [[1, size[1] // 14, size[0] // 14]]
            expected = load_image(key[name]).resize(size, Image.Resampling.BICUBIC)
            error = np.asarray(image, dtype=float) - np.asarray(expected, dtype=float)
            assert np.abs(error).max() <= 6


def test_a_photo_that_fails_leaves_no_file(tmp_path):
    good = smooth(tmp_path / "a.png", (60, 60), (9, 9, 9))
    anchor = Anchor("1", good, (str(tmp_path / "gone.png"),), (good,), "Which?", "s", "one")
    path = tmp_path / "out" / "t.parquet"
    with pytest.raises(ValueError, match="gone.png"):
        write_parquet([anchor], path, partial(resized, Qwen2VLImageProcessorPil()))
    assert list(path.parent.iterdir()) == []


def test_two_spellings_of_an_answer_are_refused(tmp_path):
    rows = [row(CELLS["bytes"], answer=name) for name in ("S4_Sedan", "S4 Sedan", "s4 sedan")]
    assert len(read_parquet(write(tmp_path / "t.parquet", rows[:2]))) == 2
    with pytest.raises(ValueError, match="t.parquet: the sub-categories 'S4 Sedan' and 's4 sedan'"):
        read_parquet(write(tmp_path / "t.parquet", rows))
