"""Negatives by four rules, photos without positives or negatives, copies, the contact sheet."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tercet.core.config import DataConfig, LossConfig, ModelConfig
from tercet.core.data import copies
from tercet.core.data.copies import find_copies
from tercet.core.data.manifest import Manifest
from tercet.core.data.negatives import read_genera
from tercet.core.data.photos import read_photos
from tercet.core.data.sheet import CELL, draw_sheet
from tercet.core.data.triplets import draw_triplet, prepare_manifest
from tercet.core.models import build_tiny
from tercet.train.make_triplets import make_triplets
from tercet.train.run.assemble import _check_negatives

pytestmark = pytest.mark.core

SUBS = "abcde"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Noise photos: 5 sub-categories of 6."""
    rng = np.random.default_rng(0)
    for name in SUBS:
        (tmp_path / "photos" / "bird" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / "bird" / name / f"{number}.png")
    return tmp_path / "photos"


def angle_of(key: str) -> float:
    """Degrees: sub-categories 10 apart, photos spread over 24, so that neighbours overlap."""
    path = Path(key)
    return 10.0 * SUBS.index(path.parent.name) + 4.8 * ((int(path.stem) * 7) % 6)


def embed(keys: list[str]) -> torch.Tensor:
    rows = [[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in map(angle_of, keys)]
    return torch.tensor(rows, dtype=torch.float64) * 3


def refuse(keys):
    raise AssertionError("nothing is to be embedded")


def config(folder: Path, **more) -> DataConfig:
    given = {"seen_fraction": 1.0, "shots": 3, "sft_shots": 0} | more
    return DataConfig(path=str(folder), **given)


def class_of(key: str) -> str:
    return Path(key).parent.name


def test_the_nearest_photos_of_others_by_a_search_over_all(folder):
    manifest = prepare_manifest(config(folder, negatives="nearest_image"), embed)
    trained = [anchor.image for anchor in manifest.anchors]
    for anchor in manifest.anchors:
        others = [key for key in trained if class_of(key) != anchor.sub_category]
        by_angle = sorted(others, key=lambda key: abs(angle_of(key) - angle_of(anchor.image)))
        distances = [abs(angle_of(key) - angle_of(anchor.image)) for key in anchor.negatives]
        expected = [abs(angle_of(key) - angle_of(anchor.image)) for key in by_angle[:3]]
        assert distances == pytest.approx(expected)
    assert any(len({class_of(key) for key in a.negatives}) > 1 for a in manifest.anchors)


def test_random_negatives_need_no_embedder(folder):
    manifest = prepare_manifest(config(folder, negatives="random"), refuse)
    chosen = defaultdict(set)
    for anchor in manifest.anchors:
        classes = {class_of(key) for key in anchor.negatives}
        assert len(anchor.negatives) == 3 and anchor.sub_category not in classes
        chosen[anchor.sub_category] |= classes
    assert all(len(classes) > 1 for classes in chosen.values())
    assert manifest.nearest == {} and manifest.cosines == {}
    again = prepare_manifest(config(folder, negatives="random"), refuse)
    other = prepare_manifest(config(folder, negatives="random", seed=1), refuse)
    assert again == manifest and other.anchors != manifest.anchors


def test_genus_keeps_to_the_nearest_of_the_same_genus(folder, tmp_path):
    """c's nearest are b and d; its genus has a and e, of which the nearer is taken."""
    table = tmp_path / "genera.csv"
    table.write_text("genus,sub_category,note\nLarus,A,x\nLarus,c,\nAlca,b,\nUria,d,\nLarus,e,\n")
    nearest = prepare_manifest(config(folder), embed)
    by_genus = prepare_manifest(config(folder, negatives="genus", genus=str(table)), embed)
    ranked = by_genus.nearest["bird"]
    for anchor in by_genus.anchors:
        same = [
            n for n in ranked[anchor.sub_category] if n in "ace" and anchor.sub_category in "ace"
        ]
        expected = (same or ranked[anchor.sub_category])[0]
        assert {class_of(key) for key in anchor.negatives} == {expected}
    changed = {
        a.sub_category
        for a, b in zip(by_genus.anchors, nearest.anchors, strict=True)
        if a.negatives != b.negatives
    }
    assert changed and changed <= set("ace")
    right = sum(ranked[name][0] in "ace" for name in "ace")
    (note,) = by_genus.notes
    assert f"of the same genus for {right} of 3 sub-categories ({right / 3:.0%})" in note
    told = prepare_manifest(config(folder, genus=str(table)), embed)
    assert told.notes == [note] and told.anchors == nearest.anchors
    layer = prepare_manifest(config(folder, genus=str(table), embedder_layer=-1), embed)
    assert layer.notes == [note.replace("embedder policy", "embedder policy, layer -1")]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "t.csv has no column 'sub_category'; needed: sub_category, genus"),
        ("sub_category,genus\n", "holds no sub-category"),
        ("sub_category,genus\na,\n", r"t.csv:2: 'genus' must be a text"),
        ("sub_category,genus\na\n", r"t.csv:2: 'genus' must be a text, got None"),
        ("sub_category,genus\na,X\nA,Y\n", "t.csv:3: 'A' has two genera"),
        ('sub_category,genus\na,"X\n', "t.csv cannot be read"),
        ("sub_category,genus\na,X,b\n", "t.csv:2: more cells than 2 columns"),
        (b"sub_category,genus\na,\xff\n", "t.csv cannot be read"),
    ],
)
def test_a_faulty_table_of_genera_is_named(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_genera(path)


def test_genus_needs_its_table(folder):
    with pytest.raises(ValueError, match="data.negatives=genus needs data.genus"):
        prepare_manifest(config(folder, negatives="genus"), embed)


def test_the_cosine_with_the_nearest_is_that_of_the_means(folder, tmp_path):
    manifest = prepare_manifest(config(folder), embed)
    rows = {name: [] for name in SUBS}
    for anchor in manifest.anchors:
        rows[anchor.sub_category].append(embed([anchor.image])[0].numpy())
    means = {name: np.mean(values, axis=0) for name, values in rows.items()}
    for name, found in manifest.cosines["bird"].items():
        other = means[manifest.nearest["bird"][name][0]]
        product = means[name] @ other / np.linalg.norm(means[name]) / np.linalg.norm(other)
        assert found == pytest.approx(product, abs=1e-12)
    manifest.write(tmp_path / "out")
    assert Manifest.read(tmp_path / "out") == manifest


def test_one_photo_a_sub_category_where_the_anchor_may_stand_in(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9), (ord(name), 0, 0)).save(tmp_path / name / "0.png")
    one = config(tmp_path, super_category="bird", shots=1, on_missing="anchor")
    manifest = prepare_manifest(one, lambda keys: torch.eye(2)[: len(keys)])
    first = manifest.anchors[0]
    assert first.positives == (first.image,) and first.super_category == "bird"
    assert first.negatives == (manifest.anchors[1].image,)
    triplet = draw_triplet(first, 3, 0)
    assert (triplet.anchor, triplet.positive) == (first.image, first.image)
    with pytest.raises(ValueError, match="shots must be at least 2"):
        prepare_manifest(replace(one, on_missing="error"), embed)
    with pytest.raises(ValueError, match="has 1 training photo"):
        prepare_manifest(replace(one, on_missing="error", shots=2), embed)


def test_one_sub_category_trains_only_where_the_loss_needs_no_negative(tmp_path):
    (tmp_path / "bird" / "a").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "bird" / "a" / f"{number}.png")
    lone = config(tmp_path, on_missing="anchor")
    manifest = prepare_manifest(lone, lambda keys: torch.ones(len(keys), 2))
    assert all(a.negatives == (a.image,) and len(a.positives) == 2 for a in manifest.anchors)
    assert manifest.nearest == {"bird": {"a": []}} and manifest.cosines == {"bird": {}}
    assert LossConfig().needs_negative
    assert not LossConfig(kl_coef=0.0, neg_entropy_coef=0.0).needs_negative
    with pytest.raises(ValueError, match="3 anchor.* no negative.*terms on the negative must be 0"):
        _check_negatives(manifest)
    with pytest.raises(ValueError, match="one seen sub-category, 'a', so no negative"):
        prepare_manifest(replace(lone, on_missing="error"), embed)


def test_parquet_without_positives_and_negatives(tmp_path, folder):
    photo = (folder / "bird" / "a" / "0.png").read_bytes()
    table = {"problem": ["<image>Which?"], "answer": ["a"], "images": [[{"bytes": photo}]]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    path = tmp_path / "t.parquet"
    (anchor,) = prepare_manifest(config(path, on_missing="anchor"), refuse).anchors
    assert anchor.positives == anchor.negatives == (anchor.image,)
    with pytest.raises(ValueError, match="no column 'image_noisy'"):
        prepare_manifest(config(path), refuse)
    cell = [[{"bytes": (folder / "bird" / "b" / "0.png").read_bytes()}]]
    path = tmp_path / "u.parquet"
    pq.write_table(pa.table(table | {"image_noisy": cell, "image_aug": [[]]}), path)
    (anchor,) = prepare_manifest(config(path, on_missing="anchor"), refuse).anchors
    assert anchor.positives[0].endswith("#0/image_noisy/0") and anchor.negatives == (anchor.image,)


def test_one_level_of_folders(folder, tmp_path):
    found = read_photos(folder / "bird", super_category="wild_bird")
    assert {(p.super_category, p.sub_category) for p in found.photos} == {
        ("wild bird", name) for name in SUBS
    }
    for split in ("train", "test"):
        shutil.copytree(folder / "bird", tmp_path / "imagefolder" / split)
    found = read_photos(tmp_path / "imagefolder", super_category="bird")
    assert len(found.photos) == 60 and set(found.splits.values()) == {"train", "test"}
    assert {p.sub_category for p in found.photos} == set(SUBS)
    with pytest.raises(ValueError, match="data.super_category is for folders of sub-categories al"):
        read_photos(folder, super_category="bird")
    with pytest.raises(ValueError, match="data.super_category is for folders of photos"):
        read_photos(folder / "x.jsonl", super_category="bird")
    with pytest.raises(ValueError, match="--data.super_category bird"):
        read_photos(folder / "bird")


def test_copies_are_found_by_content(folder, monkeypatch):
    a, b = folder / "bird" / "a", folder / "bird" / "b"
    shutil.copy(a / "0.png", b / "0.png")
    shutil.copy(a / "0.png", b / "9.png")
    (a / "1.png").write_bytes(b"x" * 10_000)
    (b / "1.png").write_bytes(b"x" * 9_999 + b"y")
    monkeypatch.setattr(copies, "CHUNK", 100)
    keys = [str(path) for path in sorted(folder.rglob("*.png"))]
    assert find_copies(keys) == [[str(a / "0.png"), str(b / "0.png"), str(b / "9.png")]]
    assert find_copies(keys * 2) == find_copies(keys)


def split_folder(folder: Path) -> Path:
    """Three photos of each sub-category to learn from, three held out."""
    root = folder.parent / "split"
    for path in folder.rglob("*.png"):
        split = "train" if int(path.stem) < 3 else "test"
        target = root / split / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return root


def test_held_out_copies_of_trained_photos_are_left_out_and_said(folder):
    root = split_folder(folder)
    shutil.copy(root / "train/bird/a/0.png", root / "test/bird/a/3.png")
    shutil.copy(root / "test/bird/b/3.png", root / "test/bird/c/3.png")
    shutil.copy(root / "train/bird/d/0.png", root / "train/bird/e/0.png")
    shutil.copy(root / "test/bird/a/4.png", root / "test/bird/a/5.png")
    manifest = prepare_manifest(config(root), embed)
    tests = [Path(p.image).relative_to(root).as_posix() for p in manifest.test["seen"]]
    gone = {"test/bird/a/3.png", "test/bird/b/3.png", "test/bird/c/3.png"}
    assert len(tests) == 12 and not gone & set(tests)
    assert {"test/bird/a/4.png", "test/bird/a/5.png"} <= set(tests)
    assert len(manifest.anchors) == 15
    said = [note for note in manifest.notes if note.startswith("one photo")]
    assert len(said) == 3
    assert "learnt and held out: " in said[0] and "1 left out of the tests" in said[0]
    assert any("under the labels bird/b, bird/c" in s and "2 left out" in s for s in said)
    assert any("under the labels bird/d, bird/e" in s and "left out" not in s for s in said)
    with pytest.raises(ValueError, match=r"one photo learnt and held out.*\(3 such groups\)"):
        prepare_manifest(config(root, duplicates="error"), embed)


def test_the_sheet_shows_each_sub_category_once(folder, tmp_path, capsys):
    build_tiny(["a bird"]).save(tmp_path / "policy")
    model = ModelConfig(path=str(tmp_path / "policy"))
    make_triplets(config(folder), model, str(tmp_path / "out"), sheet=4)
    assert "triplets.png: 4 triplets to look at" in capsys.readouterr().out
    manifest = Manifest.read(tmp_path / "out")
    assert draw_sheet(manifest, tmp_path / "all.png", 99) == 5
    with Image.open(tmp_path / "all.png") as stored:
        sheet = np.asarray(stored.convert("RGB"), int)
    for photo_of in ("image", "positives", "negatives"):
        anchor = manifest.anchors[0]
        key = anchor.image if photo_of == "image" else getattr(anchor, photo_of)[0]
        left = 8 + ("image", "positives", "negatives").index(photo_of) * (CELL + 8)
        with Image.open(key) as photo:
            pixels = np.asarray(photo.convert("RGB"), int)
        height, width = pixels.shape[:2]
        top, left = 8 + (CELL - height) // 2, left + (CELL - width) // 2
        assert (sheet[top : top + height, left : left + width] == pixels).all()
    assert not (tmp_path / "out2").exists()
    make_triplets(config(folder), model, str(tmp_path / "out2"))
    assert not (tmp_path / "out2" / "triplets.png").exists()
