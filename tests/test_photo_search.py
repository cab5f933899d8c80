"""Photos are found by the longest end of their path, never by their bare name."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tercet.core.types import EvalQuestion
from tercet.train.evaluation.questions import find_photo, place_photos, unusable

pytestmark = pytest.mark.core


def photo(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 60)).save(path)
    return str(path)


def test_the_longest_end_of_a_path_counts(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    short = photo(one / "cars_test" / "00002.jpg")
    assert find_photo("/home/you/stanford-cars/cars_test/00002.jpg", [str(one)]) == short
    assert find_photo("C:\\data\\cars_test\\00002.jpg", [str(one)]) == short
    assert find_photo("../../x/./cars_test/00002.jpg", [str(one)]) == short
    longer = photo(other / "stanford-cars" / "cars_test" / "00002.jpg")
    roots = [str(one), str(other)]
    assert find_photo("/home/you/stanford-cars/cars_test/00002.jpg", roots) == longer
    assert find_photo("cars_test/00002.jpg", roots) == short


def test_a_bare_name_never_matches(tmp_path):
    photo(tmp_path / "cars_train" / "00002.jpg")
    photo(tmp_path / "00002.jpg")
    roots = [str(tmp_path), str(tmp_path / "cars_train")]
    for path in ("00002.jpg", "cars_test/00002.jpg", "/x/cars_test/00002.jpg", "../00002.jpg", ""):
        assert find_photo(path, roots) is None
    assert find_photo("a/cars_train", roots) is None  # a folder is no photo
    assert find_photo("a/../../cars_train/../00002.jpg", [str(tmp_path / "cars_train")]) is None


def test_missing_and_damaged_photos_are_named(tmp_path):
    photo(tmp_path / "a" / "1.jpg")
    (tmp_path / "a" / "2.jpg").write_bytes(b"no photo")
    paths = ["x/a/1.jpg", "x/a/2.jpg", "x/a/3.jpg"]
    questions = [EvalQuestion("?", "Which?", (), "wren", "", "", path=path) for path in paths]
    placed, counted = place_photos(questions, [str(tmp_path)]), []
    assert [Path(q.image).name for q in placed] == ["1.jpg", "2.jpg", ""]
    bad = unusable(placed, counted.append)
    assert list(bad) == paths[1:] and sum(counted) == 3
    assert "2.jpg" in bad["x/a/2.jpg"]
    assert bad["x/a/3.jpg"] == "photo 'x/a/3.jpg' is under none of the roots"
