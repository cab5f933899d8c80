"""bench/learning.py: every stage once on drawn pictures, a small policy and a made-up teacher."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tercet.bench.learning import ARMS, BASE, LABELS, STAGE1, Bench, Sizes, learn, table
from tercet.bench.learning_records import (
    SHOTS,
    choose_classes,
    look_alikes,
    read_flowers,
    response,
    stem,
)
from tercet.bench.learning_tower import (
    SIDE,
    TowerSizes,
    linear_probe,
    nearest_mean,
    patches,
    view,
)
from tercet.core.models import build_tiny
from tercet.core.names import normal_form
from tercet.core.prompts import STAGE2_INSTRUCTION
from tercet.train.evaluation.questions import read_all

NAMES = {"1": "rose", "2": "lotus", "3": "azalea", "4": "primula", "5": "mallow"}
SEEN = ("rose", "lotus", "azalea")


def teacher(pixels):
    """Six colour features a place."""
    small = torch.nn.functional.adaptive_avg_pool2d(pixels / 255, 4)
    return torch.cat([small, small.square()], 1)


def frame():
    texts = [*NAMES.values(), STAGE2_INSTRUCTION, "Which flower is this? <answer> </answer>"]
    sizes = {"hidden_size": 64, "layers": 1, "vision_size": 32, "vision_layers": 1}
    return build_tiny(texts, image_size=SIDE, **sizes)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """Root of the photos, and the two files of questions."""
    root, rng = tmp_path_factory.mktemp("flowers"), np.random.default_rng(0)
    questions = {"seen": [], "unseen": []}
    for label, name in NAMES.items():
        colour = rng.integers(60, 200, 3)
        for number in range(SHOTS + 4):
            file = f"image_{label}{number}.jpg"
            path = root / "photos" / ("train", "test")[number % 2] / label / file
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(colour + rng.normal(0, 20, (150, 170, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            if number < 2:
                line = {"image_path": f"flower102/jpg/{file}", "question": "What is it?"}
                line |= {"options": [name, *(n for n in NAMES.values() if n != name)][:4]}
                questions["seen" if name in SEEN else "unseen"].append(
                    line | {"ground_truth": name}
                )
    files = []
    for partition, lines in questions.items():
        files.append(root / f"flower_{partition}.jsonl")
        files[-1].write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(root / "photos"), tuple(map(str, files))


def test_every_stage_once_and_none_twice(flowers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: None)  # most of the time
    images, questions = flowers
    found = read_flowers(images, read_all(questions).all)
    tower = TowerSizes(views=2, epochs=1)
    sizes = Sizes(1, views=2, base_steps=2, stage1_steps=1, steps=1, groups=2, tower=tower)
    ledger = tmp_path / "learning.jsonl"
    bench = Bench(tmp_path / "out", ledger, questions, found, sizes, lambda: teacher, frame)
    shown = learn(bench, 5, [3])
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    arms = [BASE, STAGE1, LABELS, *ARMS]
    of_arms = [stage for arm in arms for stage in (f"{arm}, training", arm)]
    assert [row["stage"] for row in rows] == ["teacher", "tower", "probe", *of_arms]
    assert all(row["cpu_s"] > 0 and row["commit"] for row in rows)
    for row in rows[4::2]:
        assert [len(hits) for hits in row["hits"].values()] == [3, 2, 3, 2]
        assert row["unseen_closed"] == 50 * row["hits"]["unseen_closed"].count("1")
    assert [line.split(" | ")[0] for line in shown.splitlines()[2:]] == [f"| {a}" for a in arms]

    folder = tmp_path / "out" / "seed3"
    asked = {stem(q.path) for q in read_all(questions).all}
    assert {file.stem for file in (folder / "asked" / "jpg").iterdir()} < asked
    base = json.loads((folder / "base.json").read_text())
    trained = {stem(stem(r["images"][0])) for r in base}
    shots = {file.stem for file in (folder / "photos").glob("*.png")}
    assert len(base) == 2 * len(trained) == 2 * 5 * 2  # two photos a class are left, two views
    assert len(shots) == 3 * SHOTS  # of seen classes alone
    assert not trained & shots and not (trained | shots) & asked
    stage1 = json.loads((folder / "stage1.json").read_text())
    said = [record["messages"][-1]["content"] for record in stage1]
    assert len(said) == 3 * 2 and not any(n in text for n in ("primula", "mallow") for text in said)

    assert learn(bench, 5, [3]) == shown
    assert len(ledger.read_text().splitlines()) == len(rows)
    with pytest.raises(ValueError, match="holds stages of {'classes': 5"):
        learn(bench, 4, [3])
    capsys.readouterr()


def test_the_table_has_paired_differences():
    hits = {"seen": "0011", "unseen": "10", "seen_closed": "1111", "unseen_closed": "00"}
    after = hits | {"seen": "0111", "unseen": "00"}
    rows = [
        {"seed": 0, "stage": STAGE1, "hits": hits, "form": 50.0},
        {"seed": 0, "stage": "DAPO", "hits": after, "form": 100.0},
        {"seed": 0, "stage": "tower"},
    ]
    first, second = table(rows).splitlines()[2:]
    assert first.startswith("| stage 1 | 1 | 50.0 [15, 85] | 50.0 [9, 91] | 100.0 [51, 100] |")
    cells = second.split(" | ")
    assert cells[2].startswith("75.0 ") and cells[6].startswith("+25.0 [+0.0, +75.0]")
    assert cells[7].startswith("-50.0 [-100.0, ") and cells[8] == "+0.0 [+0.0, +0.0]"


def test_photos_reach_the_tower_as_the_processor_gives_them():
    parts, rng = frame(), np.random.default_rng(1)
    photos = rng.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    wanted = parts.image_processor(images=list(map(Image.fromarray, photos)), return_tensors="pt")
    assert torch.equal(patches(torch.from_numpy(photos), parts), wanted["pixel_values"])


def test_a_view_is_the_same_at_every_size():
    ramp = np.linspace(0, 255, 160).astype(np.uint8)
    kept = np.stack([np.broadcast_to(ramp, (160, 160)), np.broadcast_to(ramp[:, None], (160, 160))])
    kept = np.stack([*kept, kept[0]], -1)
    large, small = (view(kept, 5, 7, side).astype(float) for side in (128, 64))
    assert np.abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).max() < 4
    assert np.array_equal(view(kept, 0, 7, 160), kept)
    assert not np.array_equal(view(kept, 5, 8, 64), small)


def test_probes_and_look_alikes_of_three_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[10.0, 0, 0], [9, 2, 0], [0, 0, 10]])
    labels = [0, 1, 2] * 20
    train, test = (
        torch.tensor(centres[labels] + rng.normal(0, 0.2, (60, 3)), dtype=torch.float32)
        for _ in range(2)
    )
    assert nearest_mean(train, labels, test, labels) == 100
    assert linear_probe(train, labels, test, labels) == 100
    assert nearest_mean(train, labels, test, [0] * 60) == pytest.approx(100 / 3)
    near = look_alikes(train.numpy(), ["abc"[label] for label in labels])
    assert near["a"] == ["b", "c"] and near["b"] == ["a", "c"]


def test_bad_photos_and_classes_are_named(flowers, tmp_path):
    images, questions = flowers
    official = read_all(questions).all
    with pytest.raises(ValueError, match="takes 6 seen ones, of 3"):
        choose_classes(official, 10, 0)
    with pytest.raises(ValueError, match="10 photos are missing, image_10"):
        read_flowers(str(tmp_path), official)
    chosen = choose_classes(official, 3, 0)
    assert sorted(chosen.values()) == ["seen", "seen", "unseen"]
    assert all((name in SEEN) == (of == "seen") for name, of in chosen.items())
    text = response("rose", "lotus", np.random.default_rng(0))
    assert normal_form(text.split("<answer>")[1].removesuffix("</answer>")) == "rose"
