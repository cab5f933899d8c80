import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tercet.core.config import DataConfig, ModelConfig
from tercet.core.data.manifest import Manifest
from tercet.core.data.parquet import read_parquet
from tercet.core.data.triplets import prepare_manifest
from tercet.core.data.vision import load_image
from tercet.core.models import build_tiny
from tercet.train.make_triplets import make_triplets, summary


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of 2 x 3 x 6 photos of different shapes, and a tiny policy."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for super_category, names in {"bird": "abc", "car": "xyz"}.items():
        for name in names:
            (folder / "photos" / super_category / name).mkdir(parents=True)
            for index in range(6):
                shape = (int(rng.integers(30, 90)), int(rng.integers(30, 90)), 3)
                photo = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                photo.save(folder / "photos" / super_category / name / f"{index}.png")
    build_tiny(["a bird"]).save(folder / "policy")
    return folder


def test_the_command_writes_what_training_reads(inputs, tmp_path):
    out, parquet = tmp_path / "out", tmp_path / "rows" / "train.parquet"
    command = [sys.executable, "-m", "tercet.train.make_triplets", "--data.seed=2"]
    command += [f"--data.path={inputs / 'photos'}", f"--model.path={inputs / 'policy'}"]
    command += [f"--out={out}", f"--parquet={parquet}", "--data.shots=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "bird: 3 sub-categories (2 seen), 6 anchors, 2 stage-1 photos, 4 + 6 test" in done.stdout
    manifest = prepare_manifest(DataConfig(path=str(out)), embed=None)
    assert manifest.settings["seed"] == 2
    rows = read_parquet(parquet)
    assert [(r.question, r.sub_category) for r in rows] == [
        (a.question, a.sub_category) for a in manifest.anchors
    ]
    for row, anchor in zip(rows, manifest.anchors, strict=True):
        stored = (row.image, row.positives[0], row.negatives[0])
        meant = (anchor.image, anchor.positives[0], anchor.negatives[0])
        width, height = load_image(row.image).size
        assert width % 28 == height % 28 == 0 and 112**2 / 2 <= width * height <= 112**2
        for cell, key in zip(stored, meant, strict=True):
            expected = load_image(key).resize((width, height), Image.Resampling.BICUBIC)
            error = np.asarray(load_image(cell), float) - np.asarray(expected, float)
            assert np.abs(error).mean() < 6


def test_bad_input_ends_with_one_line(tmp_path):
    command = [sys.executable, "-m", "tercet.train.make_triplets", "--out=out"]
    command.append(f"--data.path={tmp_path / 'nowhere'}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "nowhere: no such folder, nor a .jsonl file of photos" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_same_manifest_is_made_again_and_from_a_manifest(inputs, tmp_path):
    data, model = DataConfig(path=str(inputs / "photos")), ModelConfig(path=str(inputs / "policy"))
    first = make_triplets(data, model, str(tmp_path / "one"))
    assert make_triplets(data, model, str(tmp_path / "two")) == first
    copied = make_triplets(
        DataConfig(path=str(tmp_path / "one")), ModelConfig(), str(tmp_path / "three")
    )
    assert copied == first == Manifest.read(tmp_path / "three")


def test_out_must_not_be_the_folder_of_photos(inputs):
    photos = str(inputs / "photos")
    with pytest.raises(ValueError, match="out must differ from data.path"):
        make_triplets(DataConfig(path=photos), ModelConfig(), photos + "/")


def test_where_nothing_can_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.parquet").mkdir()
    data = DataConfig(path="nowhere")
    for out, parquet, named in (
        ("file", None, "--out: .*file is no folder"),
        ("file/deep", None, "--out: .*file is no folder"),
        ("new/out", "folder.parquet", "--parquet: .*folder.parquet is a folder"),
    ):
        parquet = parquet and str(tmp_path / parquet)
        with pytest.raises(ValueError, match=named):
            make_triplets(data, ModelConfig(), str(tmp_path / out), parquet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.parquet"]


def test_the_policy_must_be_named_where_it_is_needed(inputs, tmp_path):
    with pytest.raises(ValueError, match="model.path is empty"):
        make_triplets(DataConfig(path=str(inputs / "photos")), ModelConfig(), str(tmp_path / "o"))


def test_summary_counts_what_was_left_out(inputs, tmp_path):
    data, model = DataConfig(path=str(inputs / "photos")), ModelConfig(path=str(inputs / "policy"))
    manifest = make_triplets(data, model, str(tmp_path / "out"))
    manifest.skipped += ["image 'q' is bad", "image 'r' is bad"]
    lines = summary(manifest).splitlines()
    assert lines[-3:] == ["left out: image 'q' is bad", "left out: image 'r' is bad", "2 left out"]
    assert Counter(line.split(":")[0] for line in lines[:2]) == {"bird": 1, "car": 1}


def test_genera_are_told_for_every_layer(inputs, tmp_path, capsys):
    """As a command that embeds by that layer tells them."""
    table = tmp_path / "genera.csv"
    table.write_text("sub_category,genus\na,X\nb,Y\nc,X\nx,Z\ny,Z\nz,Z\n")
    photos, model = str(inputs / "photos"), ModelConfig(path=str(inputs / "policy"))
    shared = {"path": photos, "genus": str(table), "seen_fraction": 1.0}
    data = DataConfig(**shared)
    make_triplets(data, model, str(tmp_path / "all"), by_layer=True)
    lines = capsys.readouterr().out.splitlines()
    for layer in (0, 1, 2, None):
        named = "policy" if layer is None else f"policy, layer {layer}"
        (line,) = {text for text in lines if text.endswith(f"(embedder {named})")}
        one = DataConfig(**shared, embedder_layer=layer)
        found = make_triplets(one, model, str(tmp_path / f"one{layer}"))
        assert found.notes == [line] and " of 5 sub-categories" in line
    assert lines.count(line) == 2  # in the summary as well
    with pytest.raises(ValueError, match="by_layer needs data.genus"):
        make_triplets(DataConfig(path=photos), model, str(tmp_path / "x"), by_layer=True)
