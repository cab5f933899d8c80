"""The six data sets by their publishers' lists, and what Fine-R1 released about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.recfunctions import repack_fields
from PIL import Image
from scipy.io import loadmat, savemat

from tercet.core.data import matlab, publishers
from tercet.core.data.matlab import column, read_mat
from tercet.core.data.photos import read_photos
from tercet.core.data.records import read_sft
from tercet.core.data.six_sets import EDITIONS, find_sets
from tercet.core.tool_config import PrepareConfig
from tercet.train import prepare as command
from tercet.train.prepare import prepare

pytestmark = pytest.mark.core

LISTS = Path(__file__).parent / "publishers"
HEADER = b"MATLAB 5.0 MAT-file" + b" " * 105 + b"\x00\x01IM"


def write(path: Path, text: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def edition(title: str, **changes):
    (found,) = [edition for edition in EDITIONS if edition.title == title]
    return replace(found, **changes)


def lines(found) -> list[tuple[str, str, str]]:
    return [(photo.path, photo.sub_category, photo.split) for photo in found]


def test_aircraft_have_their_manufacturer_where_the_questions_name_it(tmp_path):
    write(tmp_path / "images_variant_trainval.txt", "1025794 707-320\n1340192 F-16A/B\n")
    write(
        tmp_path / "images_manufacturer_trainval.txt", "1025794 Boeing\n1340192 Lockheed Martin\n"
    )
    write(tmp_path / "images_variant_test.txt", "1514522 Boeing 717\n1161624 A300B4\n")
    write(tmp_path / "images_manufacturer_test.txt", "1514522 Boeing\n1161624 Airbus\n")
    assert lines(publishers.aircraft(tmp_path)) == [
        ("images/1025794.jpg", "Boeing 707-320", "train"),
        ("images/1340192.jpg", "F-16A/B", "train"),
        ("images/1514522.jpg", "Boeing 717", "test"),
        ("images/1161624.jpg", "Airbus A300B4", "test"),
    ]
    write(tmp_path / "images_manufacturer_test.txt", "1514522 Boeing\n")
    with pytest.raises(ValueError, match="images_variant_test.txt: 1161624 is not in images_manu"):
        list(publishers.aircraft(tmp_path))


def test_birds_of_both_editions(tmp_path):
    images = ["001.Black_footed_Albatross/a.jpg", "029.American_Crow/b.jpg"]
    write(tmp_path / "images.txt", f"1 {images[0]}\n2 {images[1]}\n")
    write(tmp_path / "train_test_split.txt", "1 0\n2 1\n")
    assert lines(publishers.birds(tmp_path)) == [
        (f"images/{images[0]}", "Black Footed Albatross", "test"),
        (f"images/{images[1]}", "American Crow", "train"),
    ]
    write(tmp_path / "lists/train.txt", images[0])
    write(tmp_path / "lists/test.txt", images[1])
    assert [line[1:] for line in lines(publishers.birds_2010(tmp_path))] == [
        ("Black Footed Albatross", "train"),
        ("American Crow", "test"),
    ]
    write(tmp_path / "train_test_split.txt", "1 0\n2 maybe\n")
    with pytest.raises(ValueError, match="photo 2 must be 0 or 1, got 'maybe'"):
        list(publishers.birds(tmp_path))


def cars_folder(folder: Path) -> Path:
    """The devkit, with a test list made of the training list's structs."""
    for name in ("cars_meta.mat", "cars_train_annos.mat"):
        write(folder / "devkit" / name, (LISTS / name).read_bytes())
    structs = loadmat(LISTS / "cars_train_annos.mat")["annotations"]
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": structs[:, :2]})
    for path, *_ in lines(publishers.cars(folder)):
        write(folder / path)
    return folder


def test_cars_by_the_devkit_and_by_one_file(tmp_path):
    """The classes are those of the publisher's web page: 14 is the Audi TTS, 91 a Dodge."""
    found = lines(publishers.cars(cars_folder(tmp_path)))
    assert found[:2] == [
        ("cars_train/00001.jpg", "Audi TTS Coupe 2012", "train"),
        ("cars_train/00002.jpg", "Acura TL Sedan 2012", "train"),
    ]
    assert found[-2:] == [
        ("cars_test/00001.jpg", "Audi TTS Coupe 2012", "test"),
        ("cars_test/00002.jpg", "Acura TL Sedan 2012", "test"),
    ]
    names = loadmat(LISTS / "cars_meta.mat")["class_names"]
    structs = np.zeros((1, 2), dtype=[(n, "O") for n in ("relative_im_path", "class", "test")])
    structs[0, 0] = ("car_ims/000001.jpg", 1, 0)
    structs[0, 1] = ("car_ims/000002.jpg", 196, 1)
    savemat(tmp_path / "cars_annos.mat", {"annotations": structs, "class_names": names})
    assert lines(publishers.cars_in_one(tmp_path)) == [
        ("car_ims/000001.jpg", "AM General Hummer SUV 2000", "train"),
        ("car_ims/000002.jpg", "smart fortwo Convertible 2012", "test"),
    ]


def test_dogs_and_pets_are_named_by_their_folders_and_files(tmp_path):
    dogs = ["n02085620-Chihuahua/n02085620_5927.jpg", "n02089078-black-and-tan_coonhound/x.jpg"]
    for part, name in zip(("train", "test"), dogs, strict=True):
        files = np.empty((1, 1), dtype=object)
        files[0, 0] = name
        write(tmp_path / "lists" / "a")
        savemat(tmp_path / "lists" / f"{part}_list.mat", {"file_list": files})
    assert lines(publishers.dogs(tmp_path)) == [
        (f"Images/{dogs[0]}", "Chihuahua", "train"),
        (f"Images/{dogs[1]}", "Black And Tan Coonhound", "test"),
    ]
    write(tmp_path / "annotations/trainval.txt", "#Image CLASS-ID SPECIES\nAbyssinian_100 1 1 1\n")
    write(tmp_path / "annotations/test.txt", "american_pit_bull_terrier_2 3 2 2\n")
    assert lines(publishers.pets(tmp_path)) == [
        ("images/Abyssinian_100.jpg", "Abyssinian", "train"),
        ("images/american_pit_bull_terrier_2.jpg", "American Pit Bull Terrier", "test"),
    ]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory) -> Path:
    """Flowers-102 with its own lists; its photos are empty files, but one of each label."""
    root = tmp_path_factory.mktemp("sets")
    folder = root / "flower102"
    for name in ("imagelabels.mat", "setid.mat"):
        write(folder / name, (LISTS / name).read_bytes())
    (folder / "jpg").mkdir()
    for photo in publishers.flowers(folder):
        (folder / photo.path).touch()
    return root


def test_flowers_have_their_counts_and_names(flowers):
    (found,), missing = find_sets(flowers)
    assert str(found) == (
        f"flower: Oxford Flowers-102 in {flowers / 'flower102'}: 102 sub-categories, "
        "2,040 + 6,149 photos (train + test)"
    )
    named = {photo.path: photo.sub_category for photo in found.listed}
    # as flower_data/train/83/image_01760.jpg and 77/image_00001.jpg of public copies by label
    assert named["jpg/image_01760.jpg"] == "hibiscus"
    assert named["jpg/image_00001.jpg"] == "passion flower"
    assert [line.partition(":")[0] for line in missing] == ["aircraft", "bird", "car", "dog", "pet"]
    assert "bird: not found; CUB-200-2011 is at https://www.vision.caltech.edu/" in missing[1]


@pytest.mark.parametrize("name", ["bird", "dog", "pet"])
def test_names_are_spelled_as_in_the_released_questions(name, released):
    for path in (released / "eval").glob(f"{name}_*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            folder, file = record["image_path"].split("/")[-2:]
            spelled = publishers.words(file.rpartition("_")[0] if name == "pet" else folder)
            assert spelled == record["ground_truth"]


def test_cars_and_aircraft_are_all_those_of_the_released_questions(released, tmp_path):
    def asked(name: str) -> set[str]:
        paths = (released / "eval").glob(f"{name}_*.jsonl")
        return {json.loads(s)["ground_truth"] for p in paths for s in p.read_text().splitlines()}

    assert set(loadmat(LISTS / "cars_meta.mat", squeeze_me=True)["class_names"]) == asked("car")
    variants = (LISTS / "aircraft_variants.txt").read_text().splitlines()
    makers = {True: "Airbus", False: "another"}
    for part in ("trainval", "test"):
        write(
            tmp_path / f"images_variant_{part}.txt",
            "".join(f"{n:07d} {v}\n" for n, v in enumerate(variants)),
        )
        maker = [
            "Boeing" if v[:1] == "7" or "Boe" in v else makers[v[:2] == "A3"] for v in variants
        ]
        write(
            tmp_path / f"images_manufacturer_{part}.txt",
            "".join(f"{n:07d} {m}\n" for n, m in enumerate(maker)),
        )
    assert {photo.sub_category for photo in publishers.aircraft(tmp_path)} == asked("aircraft")


def test_prepare_takes_partitions_questions_and_records_from_the_released_files(
    flowers, released, tmp_path, capsys
):
    stage1 = released / "Fine-R1-Stage1-data.json"
    config = PrepareConfig(
        root=str(flowers), out=str(tmp_path), questions=str(released / "eval"), stage1=str(stage1)
    )
    prepare(config)
    said = capsys.readouterr().out
    assert "flower: 6,149 released questions about test photos\n" in said
    assert "stage 1: 59 released records with their photos\n" in said
    assert "stage 1: 117 record(s) of car left out, without stanford_cars_train/images/" in said
    listing = json.loads((tmp_path / "manifest.json").read_text())
    partitions = [entry["partition"] for entry in listing["classes"]]
    assert (partitions.count("seen"), partitions.count("unseen")) == (61, 41)
    images = {entry["path"]: entry for entry in listing["images"]}
    assert sum("question" in entry for entry in images.values()) == 6149
    assert all(entry["split"] == "test" for entry in images.values() if "question" in entry)
    assert sum(entry.get("in_stage1", False) for entry in images.values()) == 59
    first = json.loads((released / "eval" / "flower_seen.jsonl").read_text().split("\n")[0])
    assert images[first["image_path"]]["question"] == first["question"]
    records = json.loads((tmp_path / "stage1.json").read_text())
    published = {r["images"][0]: r["messages"] for r in json.loads(stage1.read_text())}
    for record in records:
        (path,) = record["images"]
        assert (tmp_path / path).resolve().parent == flowers / "flower102" / "jpg"
        key = f"flower102_train/image/train/{Path(path).name}"
        assert record["messages"] == published[key] and set(record) == {"messages", "images"}


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """Six flowers of two labels, as real photos, by lists of the publisher's form."""
    root = tmp_path / "sets"
    folder = root / "102flowers"
    (folder / "jpg").mkdir(parents=True)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 1, 2, 2, 2, 1]])})
    ids = {"trnid": np.array([[1, 3]]), "valid": np.array([[2, 4]]), "tstid": np.array([[5, 6]])}
    savemat(folder / "setid.mat", ids)
    for number in range(1, 7):
        Image.new("RGB", (30, 30), (number, 0, 0)).save(folder / f"jpg/image_{number:05d}.jpg")
    cut = (edition("Oxford Flowers-102", counts=(2, 4, 2)),)
    monkeypatch.setattr("tercet.core.data.six_sets.find_sets.__defaults__", ("error", cut))
    return root


def test_every_command_reads_what_prepare_writes(small, tmp_path):
    prepare(PrepareConfig(root=str(small)))
    found = read_photos(small)
    assert [photo.sub_category for photo in found.photos] == ["hard-leaved pocket orchid"] * 3 + [
        "pink primrose"
    ] * 3
    folder = small / "102flowers" / "jpg"
    assert found.splits[str(folder / "image_00005.jpg")] == "test"
    assert sorted(found.partitions.values()) == ["seen", "seen"]
    prepare(PrepareConfig(root=str(small), out=str(tmp_path / "elsewhere")))
    moved = read_photos(tmp_path / "elsewhere")
    assert (moved.root, moved.photos, moved.splits) == (found.root, found.photos, found.splits)


def test_missing_photos_are_named_or_left_out(small, tmp_path):
    os.remove(small / "102flowers/jpg/image_00003.jpg")
    with pytest.raises(ValueError, match=r"102flowers: 1 of the 6 photos .* jpg/image_00003.jpg"):
        find_sets(small)
    (found,), _ = find_sets(small, "skip")
    assert found.lost == ["jpg/image_00003.jpg"] and len(found.listed) == 5
    assert str(found).endswith("3 + 2 photos (train + test); 1 listed photos are missing")


def test_a_set_without_one_of_its_lists_is_said(small):
    os.remove(small / "102flowers/setid.mat")
    found, missing = find_sets(small)
    assert found == []
    (line,) = missing
    assert "102flowers lacks setid.mat of Oxford Flowers-102; Oxford Flowers-102 is at http" in line
    with pytest.raises(ValueError, match="holds none of the six data sets: flower: .*lacks setid"):
        prepare(PrepareConfig(root=str(small)))


def test_lists_in_a_folder_of_their_own_are_one_set(tmp_path):
    cars_folder(tmp_path / "cars")
    cut = edition("Stanford Cars", counts=(5, 6, 2))
    (found,), missing = find_sets(tmp_path, editions=[cut])
    assert found.folder == tmp_path / "cars" and missing == []


def test_labels_that_only_the_labelled_test_list_has(tmp_path):
    folder = cars_folder(tmp_path)
    labelled = folder / "cars_test_annos_withlabels.mat"
    structs = loadmat(labelled)["annotations"]
    fields = [name for name in structs.dtype.names if name != "class"]
    savemat(labelled, {"annotations": repack_fields(structs[fields])})
    with pytest.raises(ValueError, match="withlabels.mat: 'annotations' has no field 'class'"):
        list(publishers.cars(folder))
    os.remove(labelled)
    _, missing = find_sets(tmp_path, editions=[edition("Stanford Cars")])
    assert "lacks devkit/cars_test_annos_withlabels.mat of Stanford Cars" in missing[0]


def test_another_release_is_named_by_its_counts(small):
    with pytest.raises(ValueError, match=r"lists 2 sub-categories and 4 \+ 2 .* has 102 and 2,040"):
        find_sets(small, editions=[edition("Oxford Flowers-102")])
    savemat(small / "102flowers/setid.mat", {"trnid": [1, 1]})
    with pytest.raises(ValueError, match="setid.mat holds no 'valid', but trnid: is it of another"):
        find_sets(small)
    savemat(small / "102flowers/imagelabels.mat", {"labels": [1, 103]})
    with pytest.raises(ValueError, match="imagelabels.mat: a label must be 1 to 102, got 103"):
        savemat(small / "102flowers/setid.mat", {"trnid": [2], "valid": [1], "tstid": [1]})
        find_sets(small)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no MATLAB file of version 5"),
        (b"MATLAB 7.3 MAT-file, Platform: GLNXA64" + b" " * 100, "no MATLAB file of version 5"),
        (
            b"MATLAB 5.0 MAT-file"
            + b" " * 105
            + b"\x00\x01IM"
            + b"\x0f\0\0\0\x10\0\0\0"
            + b"?" * 16,
            "",
        ),
        ((LISTS / "setid.mat").read_bytes()[:9000], ""),
        (b"MATLAB 5.0 MAT-file" + b"\xff" * 500, ""),
    ],
)
def test_damaged_mat_files_are_named(tmp_path, content, message):
    path = write(tmp_path / "a.mat", content)
    with pytest.raises(ValueError, match=f"a.mat cannot be read: .*{message}"):
        column(read_mat(path), "tstid", path)


def test_a_mat_file_that_unpacks_to_more_than_it_may_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(matlab, "MAX_UNPACKED", 2**20)
    packed = zlib.compress(bytes(2**20 + 1))
    element = b"\x0f\0\0\0" + len(packed).to_bytes(4, "little") + packed
    with pytest.raises(ValueError, match="larger than 1,048,576 bytes unpacked"):
        read_mat(write(tmp_path / "a.mat", HEADER + element))
    assert set(read_mat(LISTS / "setid.mat")) == {"trnid", "valid", "tstid"}


QUESTION = {
    "image_path": "flower102/jpg/image_00005.jpg",
    "question": "What kind of flower is this?",
    "options": ["hard-leaved pocket orchid", "rose"],
    "ground_truth": "hard-leaved pocket orchid",
}
OTHER = QUESTION | {"image_path": "/x/jpg/image_00006.jpg", "ground_truth": "pink primrose"}


def released_files(folder: Path, seen: list[dict], unseen: list[dict]) -> str:
    for name, records in (("seen", seen), ("unseen", unseen)):
        write(folder / f"flower_{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


def test_seen_and_unseen_come_from_the_question_files(small, tmp_path):
    questions = released_files(tmp_path / "q", [QUESTION], [OTHER])
    prepare(PrepareConfig(root=str(small), questions=questions))
    found = read_photos(small)
    assert found.partitions == {
        ("flower", "hard-leaved pocket orchid"): "seen",
        ("flower", "pink primrose"): "unseen",
    }
    asked = {Path(p.image).name: p.question for p in found.photos if p.question}
    assert asked == dict.fromkeys(["image_00005.jpg", "image_00006.jpg"], QUESTION["question"])


@pytest.mark.parametrize(
    "seen, unseen, message",
    [
        ([QUESTION, OTHER], [OTHER], "flower_unseen.jsonl:1: 'pink primrose' is seen and unseen"),
        ([QUESTION], [], "q: the flower 'pink primrose' is only among the photos"),
        (
            [QUESTION, OTHER | {"ground_truth": "rose"}],
            [],
            "jpg/image_00006.jpg is 'rose' here",
        ),
        (
            [QUESTION, {"image_path": "a/b"}],
            [],
            "seen.jsonl:2: 'ground_truth' must be a text",
        ),
    ],
)
def test_question_files_that_do_not_fit_are_named(small, tmp_path, seen, unseen, message):
    questions = released_files(tmp_path / "q", seen, unseen)
    with pytest.raises(ValueError, match=message):
        prepare(PrepareConfig(root=str(small), questions=questions))
    assert not (small / "manifest.json").exists()


def record(image: str) -> dict:
    turns = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "rose"}]
    return {"messages": turns, "images": [image]}


def test_records_are_found_by_folder_and_name_never_by_name_alone(small, tmp_path, capsys):
    paths = ["/data/flower102_train/image/train/image_00001.jpg"]
    paths += ["flower102_train/image/train/image_00005.jpg", "bird_200/images_train/a/b.jpg"]
    stage1 = write(tmp_path / "s.json", json.dumps([record(path) for path in paths]))
    prepare(PrepareConfig(root=str(small), stage1=str(stage1)))
    said = capsys.readouterr().out
    assert "stage 1: 1 released records with their photos" in said
    assert "stage 1: 1 record(s) of flower left out, without flower102_train/image/train" in said
    samples, _ = read_sft(small / "stage1.json")
    assert [Path(s.images[0]).name for s in samples] == ["image_00001.jpg"]
    split = read_photos(small).splits
    assert split[samples[0].images[0]] == "stage1"
    for bad, message in (
        ([record("00001.jpg")], "record 0: 00001.jpg is in none of the folders"),
        ([record("a/jpg/image_00001.jpg")], "is in none of the folders"),
        ([{"images": []}], "record 0: needs one photo"),
        ([], "must hold a JSON list of records"),
    ):
        stage1.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            prepare(PrepareConfig(root=str(small), stage1=str(stage1)))


def test_the_command_takes_the_folder_first(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare", str(small), f"--out={tmp_path / 'out'}"])
    command.main()
    assert "manifest.json: 6" in capsys.readouterr().out.splitlines()[-1]
    done = subprocess.run(
        [sys.executable, "-m", "tercet.train.prepare", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.endswith("nowhere: no such folder\n")
