"""Training photos among the questions: copies are found, other photos are not."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image
from test_rescore import line, write_lines

from tercet.core.data.manifest import Manifest
from tercet.core.types import Anchor, EvalQuestion, Photo
from tercet.train import eval_fgvr
from tercet.train.evaluation.leaks import find_leaks, training_photos


def picture(seed: int) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((140, 120), Image.Resampling.BICUBIC)


def question(image: Path, truth: str = "wren", n: int = 1) -> EvalQuestion:
    return EvalQuestion(
        str(image), "?", (truth,), truth, "bird", "seen", "bird", f"x/{image.name}", "q", n
    )


@pytest.fixture
def copies(tmp_path) -> dict[str, Path]:
    """A photo under other names: as it is, losslessly stored again, smaller and poor, cropped."""
    image = picture(0)
    files = {name: tmp_path / name for name in ("a.png", "same.bmp", "poor.jpg", "cropped.png")}
    image.save(files["a.png"])
    image.save(files["same.bmp"])
    image.resize((93, 80)).save(files["poor.jpg"], quality=40)
    image.crop((1, 1, 140, 120)).save(files["cropped.png"])
    picture(1).save(tmp_path / "other.png")
    return files | {"other": tmp_path / "other.png"}


def test_copies_are_found_and_other_photos_are_not(copies, tmp_path):
    asked = [question(path, n=n) for n, path in enumerate(copies.values(), start=1)]
    asked.append(question(tmp_path / "missing.png", n=9))
    picture(2).save(tmp_path / "unrelated.png")
    trained = [str(tmp_path / "unrelated.png"), str(copies["a.png"])]
    leaks = find_leaks(asked, trained, 8)
    assert [(leak.question.line, leak.same_pixels) for leak in leaks.found] == [
        (1, True),
        (2, True),
        (3, False),
        (4, False),
    ]
    assert all(leak.training_photo == str(copies["a.png"]) for leak in leaks.found)
    first = imagehash.phash(Image.open(copies["a.png"]))
    for leak in leaks.found:
        hashed = imagehash.phash(Image.open(leak.question.image).convert("RGB"))
        assert leak.distance == first - hashed <= 8
    assert leaks.places == {("q", n) for n in (1, 2, 3, 4)} and leaks.unreadable == 1
    assert len(find_leaks(asked, trained, 0).found) < 4
    assert find_leaks(asked, [], 8).found == []
    for_all = find_leaks(asked, trained, 64)
    assert len(for_all.found) == 5


def test_how_often_the_hash_errs_is_counted_over_pairs_of_one_sub_category(tmp_path):
    asked = []
    for n in range(12):
        picture(n // 2 if n < 4 else n).save(tmp_path / f"{n}.png")
        asked.append(question(tmp_path / f"{n}.png", "wren" if n < 8 else "gull", n))
    hashes = [imagehash.phash(picture(n // 2 if n < 4 else n)) for n in range(12)]
    for distance in (0, 20, 30):
        leaks = find_leaks(asked, [], distance)
        # 0 and 1, 2 and 3 have the same pixels: of each two one counts.
        groups = [[0, 2, 4, 5, 6, 7], [8, 9, 10, 11]]
        pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
        near = sum(hashes[i] - hashes[j] <= distance for i, j in pairs)
        assert (leaks.pairs, leaks.near_pairs) == (len(pairs), near)
    assert find_leaks(asked, [], 30).near_pairs > 0


def manifest(folder: Path, image: Path) -> str:
    more = (str(folder / "p.png"),), (str(folder / "n.png"),)
    anchor = Anchor("a", str(image), *more, "?", "bird", "wren")
    stage1 = [Photo(str(folder / "s.png"), "bird", "wren", "?")]
    made = Manifest([anchor], stage1, {"seen": [], "unseen": []}, {"bird": ["wren"]}, {}, {})
    return str(made.write(folder / "run"))


def test_training_photos_are_those_of_triplets_and_of_stage_1(copies, tmp_path):
    path = manifest(tmp_path, copies["a.png"])
    expected = [str(copies["a.png"]), *(str(tmp_path / f"{name}.png") for name in "pns")]
    assert training_photos(path) == training_photos(str(Path(path).parent)) == expected
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "wren"}]
    (tmp_path / "sft.json").write_text(json.dumps([{"messages": turns, "images": ["a.png"]}]))
    assert training_photos(str(tmp_path / "sft.json")) == [str(copies["a.png"])]


def test_the_command_names_and_drops_them(copies, tmp_path, monkeypatch, capsys):
    lines = [
        {"image_path": f"{tmp_path.name}/{name}", "question": "?", "options": ["wren", "gull"]}
        | {"ground_truth": "wren"}
        for name in ("poor.jpg", "other.png")
    ]
    write_lines(tmp_path / "q_seen.jsonl", lines)
    said = ["<answer>wren</answer>", "<answer>gull</answer>"]
    answers = [line("q_seen", n, "closed", text) for n, text in enumerate(said, start=1)]
    write_lines(tmp_path / "a.jsonl", answers)
    argv = ["eval_fgvr", f"--questions={tmp_path / 'q_seen.jsonl'}", "--text_encoder=null"]
    argv += [f"--rescore={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'out'}"]
    argv += [f"--images={tmp_path.parent}", f"--leaks={manifest(tmp_path, copies['a.png'])}"]
    figures = {}
    for more in ([], ["--drop_leaks=true"]):
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        eval_fgvr.main()
        with open(tmp_path / "out" / "table.csv", newline="") as file:
            (row,) = csv.DictReader(file)
        figures[len(more)] = row["n"], float(row["closed"])
        remark = (tmp_path / "out" / "tables.md").read_text()
        assert "1 questions show a training photo (0 the same pixels, 1 within 8 of 64" in remark
        assert ("left out" in remark) == bool(more)
    assert figures == {0: ("2", 50), 1: ("1", 0)}
    with open(tmp_path / "out" / "leaks.csv", newline="") as file:
        (leak,) = csv.DictReader(file)
    assert leak["line"] == "1" and leak["training_photo"] == str(copies["a.png"])
    monkeypatch.setattr(sys, "argv", [*argv[:-1], "--drop_leaks=true"])
    with pytest.raises(ValueError, match="--drop_leaks needs --leaks"):
        eval_fgvr.main()


@pytest.mark.photos
def test_on_real_photos_copies_are_found_and_no_other_photo_of_the_species(real_photos):
    photos = sorted((real_photos / "bird").glob("*/*.jpg"))
    asked = [question(path, path.parent.name, n) for n, path in enumerate(photos)]
    leaks = find_leaks(asked, map(str, photos[::10]), 8)
    assert len(leaks.found) == len(photos[::10]) and all(leak.same_pixels for leak in leaks.found)
    assert leaks.pairs > 500 and leaks.near_pairs == 0
