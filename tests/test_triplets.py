import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tercet.core.config import DataConfig
from tercet.core.data.manifest import Manifest
from tercet.core.data.triplets import (
    draw_partitions,
    draw_triplet,
    eval_questions,
    prepare_manifest,
    rank_similar,
    seeded_int,
    seeded_order,
    whitened,
)
from tercet.core.types import Anchor, Photo

pytestmark = pytest.mark.core

# Unit vectors by angle in degrees, which show what is nearest; of bird: a-b, c-d, e-d.
ANGLES = {"a": 0, "b": 10, "c": 40, "d": 65, "e": 78, "x": 0, "y": 30, "z": 50}
NEAREST = {
    "bird": {"a": "bcd", "b": "acd", "c": "dbe", "d": "ecb", "e": "dcb"},
    "car": {"x": "yz", "y": "zx", "z": "yx"},
}


def draw_folder(folder, photos=7, classes=None):
    for super_category, names in (classes or {"bird": "abcde", "car": "xyz"}).items():
        for name in names:
            for index in range(photos):
                path = folder / super_category / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    return str(folder)


class AngleEmbedder:
    """Embed a photo as its sub-category's angle plus a little by the photo's number."""

    def __init__(self):
        self.calls = []

    def __call__(self, keys):
        self.calls.append(keys)
        angles = [np.deg2rad(ANGLES[Path(k).parent.name] + 0.1 * int(Path(k).stem)) for k in keys]
        return torch.tensor([[3 * np.cos(a), 3 * np.sin(a)] for a in angles])


def refuse(keys):
    raise AssertionError("nothing is to be embedded")


def by_class(keys):
    return Counter((Path(key).parent.parent.name, Path(key).parent.name) for key in keys)


def test_seeded_int_is_63_bits_of_blake2b():
    digest = hashlib.blake2b(b'[3, "a/b", 1]', digest_size=8).digest()
    assert seeded_int(3, "a/b", 1) == int.from_bytes(digest, "big") // 2 < 2**63
    assert seeded_int(1, "1") != seeded_int("1", 1)
    assert seeded_order("abcd", 7) == seeded_order("dcba", 7)
    first = Counter(seeded_order("abcd", seed)[0] for seed in range(2000))
    assert all(400 < first[name] < 600 for name in "abcd")


@pytest.mark.parametrize(
    ("total", "seen"),
    [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (10, 6), (37, 22), (102, 61), (196, 118)],
)
def test_sixty_percent_are_seen_and_at_least_two(total, seen):
    names = [f"s{i}" for i in range(total)]
    partitions = draw_partitions(
        [("bird", name) for name in names] + [("car", "x"), ("car", "y")], 0.6, 0
    )
    assert len(partitions) == total + 2
    assert sum(partitions["bird", name] == "seen" for name in names) == seen
    assert partitions["car", "x"] == partitions["car", "y"] == "seen"


def test_the_split_depends_on_seed_and_super_category_but_not_on_order():
    classes = [("bird", f"s{i}") for i in range(20)] + [("car", f"s{i}") for i in range(20)]
    partitions = draw_partitions(classes, 0.6, 0)
    assert draw_partitions(classes[::-1], 0.6, 0) == partitions
    assert draw_partitions(classes[:20], 0.6, 0) == {
        k: w for k, w in partitions.items() if k[0] == "bird"
    }
    assert draw_partitions(classes, 0.6, 1) != partitions
    assert [partitions["bird", f"s{i}"] for i in range(20)] != [
        partitions["car", f"s{i}"] for i in range(20)
    ]


def test_similarity_is_the_cosine_of_mean_embeddings():
    rng = np.random.default_rng(0)
    embeddings = {name: rng.normal(size=(rng.integers(1, 5), 6)) + 3 for name in "dacbe"}
    ranked = rank_similar({name: torch.tensor(rows) for name, rows in embeddings.items()})
    mean = {name: rows.mean(axis=0) for name, rows in embeddings.items()}
    for name in embeddings:
        cosines = {
            other: mean[name]
            @ mean[other]
            / np.linalg.norm(mean[name])
            / np.linalg.norm(mean[other])
            for other in embeddings
            if other != name
        }
        assert ranked[name] == sorted(cosines, key=cosines.get, reverse=True)


def test_similarity_is_of_the_mean_and_ties_go_by_name():
    # The mean of p is (2, 2): nearest q, though each of its photos is nearer to r or s.
    rows = {"p": [[4.0, 0], [0, 4]], "q": [[1.0, 1]], "s": [[1.0, 0]], "r": [[0, 1.0]]}
    ranked = rank_similar({name: torch.tensor(values) for name, values in rows.items()})
    assert ranked["p"] == ["q", "r", "s"]


def test_whitened_embeddings_have_even_variance_within_sub_categories():
    """Half shrunk: variance v along an axis, with mean m over the axes, becomes 2 v / (v + m)."""
    rng = np.random.default_rng(1)
    turned, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    spread = np.array([9.0, 1.0, 0.25, 0.01])
    noise = rng.normal(size=(500, 40, 4)) @ np.diag(spread) @ turned
    rows = {str(i): torch.tensor(own + rng.normal(size=4)) for i, own in enumerate(noise)}
    found = whitened(rows)
    assert torch.cat(list(found.values())).mean(dim=0).abs().max() < 1e-9
    within = torch.cat([of - of.mean(dim=0) for of in found.values()])
    covariance = within.T @ within / (len(within) - 500)
    variances = spread**2
    expected = sorted(2 * variances / (variances + variances.mean()))
    assert np.allclose(torch.linalg.eigvalsh(covariance), expected, rtol=0.03, atol=1e-4)


def test_whitening_finds_the_neighbour_that_a_noisy_feature_hides():
    # The first feature varies within sub-categories, the second one tells them apart.
    rng = np.random.default_rng(2)
    places = {"a": 0.0, "b": 0.1, "c": 1.0, "d": 1.1}
    rows = {
        name: torch.tensor(
            np.stack([rng.normal(size=8) * 20, place + rng.normal(size=8) * 0.01], 1)
        )
        for name, place in places.items()
    }
    nearest = {name: others[0] for name, others in rank_similar(whitened(rows)).items()}
    assert nearest == {"a": "b", "b": "a", "c": "d", "d": "c"}


def test_a_folder_becomes_disjoint_shots_of_the_right_numbers(tmp_path):
    embed = AngleEmbedder()
    manifest = prepare_manifest(DataConfig(path=draw_folder(tmp_path), shots=4, sft_shots=1), embed)
    anchors = by_class(anchor.image for anchor in manifest.anchors)
    seen = sorted(anchors)
    assert Counter(super_category for super_category, _ in seen) == {"bird": 3, "car": 2}
    assert set(anchors.values()) == {4}
    assert by_class(photo.image for photo in manifest.sft) == Counter(seen)
    assert by_class(photo.image for photo in manifest.test["seen"]) == Counter(seen * 2)
    unseen = by_class(photo.image for photo in manifest.test["unseen"])
    assert set(unseen.values()) == {7} and not set(unseen) & set(seen) and len(unseen) == 3
    photos = [*manifest.sft, *manifest.test["seen"], *manifest.test["unseen"]]
    used = [anchor.image for anchor in manifest.anchors] + [photo.image for photo in photos]
    assert len(used) == len(set(used)) == 8 * 7
    assert manifest.names == {"bird": list("abcde"), "car": list("xyz")}
    assert len(embed.calls) == 1
    assert sorted(embed.calls[0]) == sorted(anchor.image for anchor in manifest.anchors)


def test_positives_share_the_name_and_negatives_are_of_the_nearest_other(tmp_path):
    path = draw_folder(tmp_path)
    manifest = prepare_manifest(DataConfig(path=path, seen_fraction=1.0), AngleEmbedder())
    assert manifest.nearest == {
        super_category: {name: list(others)[:3] for name, others in of.items()}
        for super_category, of in NEAREST.items()
    }
    shots = {}
    for anchor in manifest.anchors:
        shots.setdefault((anchor.super_category, anchor.sub_category), set()).add(anchor.image)
    orders = set()
    for anchor in manifest.anchors:
        labels = anchor.super_category, anchor.sub_category
        assert anchor.id == os.path.relpath(anchor.image, path)
        assert anchor.id.split("/")[:2] == list(labels)
        assert set(anchor.positives) == shots[labels] - {anchor.image}
        nearest = NEAREST[labels[0]][labels[1]][0]
        assert set(anchor.negatives) == shots[labels[0], nearest] and len(anchor.negatives) == 4
        orders.add(tuple(sorted(anchor.negatives).index(key) for key in anchor.negatives))
    assert len(orders) > 5


def test_choices_depend_on_the_seed_and_not_on_where_the_folder_lies(tmp_path):
    first = draw_folder(tmp_path / "first")
    shutil.copytree(first, tmp_path / "deep" / "second")
    config = DataConfig(path=first)
    manifest = prepare_manifest(config, AngleEmbedder())
    assert prepare_manifest(config, AngleEmbedder()) == manifest
    second = prepare_manifest(
        replace(config, path=str(tmp_path / "deep" / "second")), AngleEmbedder()
    )
    moved = second.with_keys(lambda key: key.replace("deep/second", "first"))
    assert replace(moved, settings=manifest.settings) == manifest
    assert second.anchors[0].image.startswith(str(tmp_path / "deep"))
    other = prepare_manifest(replace(config, seed=1), AngleEmbedder())
    assert {a.id for a in other.anchors} != {a.id for a in manifest.anchors}


def test_questions_come_from_templates_or_from_the_photo(tmp_path):
    folder = draw_folder(tmp_path / "photos")
    (tmp_path / "q.yaml").write_text("bird: ['One {super_category}?', 'Two?']\ncar: ['Three?']\n")
    config = DataConfig(path=folder, questions=str(tmp_path / "q.yaml"))
    manifest = prepare_manifest(config, AngleEmbedder())
    photos = [*manifest.anchors, *manifest.sft, *manifest.test["seen"], *manifest.test["unseen"]]
    asked = {name: {p.question for p in photos if p.super_category == name} for name in NEAREST}
    assert asked == {"bird": {"One bird?", "Two?"}, "car": {"Three?"}}
    lines = [
        {"image": f"photos/bird/{name}/{i}.png", "super_category": "bird", "sub_category": name}
        | ({"question": "My own?"} if i == 0 else {})
        for name in "ab"
        for i in range(6)
    ]
    (tmp_path / "photos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    manifest = prepare_manifest(DataConfig(path=str(tmp_path / "photos.jsonl")), AngleEmbedder())
    photos = [*manifest.anchors, *manifest.sft, *manifest.test["seen"]]
    assert len(photos) == 12
    own = {photo.image for photo in photos if photo.question == "My own?"}
    assert own == {str(tmp_path / "photos" / "bird" / name / "0.png") for name in "ab"}


def give_split(folder, stage1=()):
    partitions = {"a": "seen", "b": "seen", "c": "unseen"}
    images = [
        {
            "path": f"bird/{name}/{i}.png",
            "super_category": "bird",
            "sub_category": name,
            "partition": partition,
            "split": "train" if i < 4 else "test",
            "in_stage1": (name, i) in stage1,
        }
        for name, partition in partitions.items()
        for i in range(7)
    ]
    classes = [
        {"super_category": "bird", "sub_category": name, "partition": partition}
        for name, partition in partitions.items()
    ]
    listing = {"classes": classes, "images": images}
    (Path(folder) / "manifest.json").write_text(json.dumps(listing))


def test_a_given_split_overrides_the_drawn_one(tmp_path):
    path = draw_folder(tmp_path)
    give_split(path)
    manifest = prepare_manifest(DataConfig(path=path, shots=3, sft_shots=1), AngleEmbedder())
    assert manifest.names == {"bird": ["a", "b", "c"]}
    train = {f"bird/{name}/{i}.png" for name in "ab" for i in range(4)}
    anchors = {anchor.id for anchor in manifest.anchors}
    sft = {os.path.relpath(photo.image, path) for photo in manifest.sft}
    assert anchors | sft == train and not anchors & sft
    assert by_class(anchors) == {("bird", "a"): 3, ("bird", "b"): 3}
    test = {w: {os.path.relpath(p.image, path) for p in manifest.test[w]} for w in manifest.test}
    assert test["seen"] == {f"bird/{name}/{i}.png" for name in "ab" for i in (4, 5, 6)}
    assert test["unseen"] == {f"bird/c/{i}.png" for i in (4, 5, 6)}


def test_photos_that_stage_1_has_used_do_not_train_tapo(tmp_path):
    path = draw_folder(tmp_path)
    give_split(path, stage1=[("a", 2), ("b", 0), ("b", 3)])
    with pytest.warns(UserWarning, match=r"2 of 2 .* data.shots = 4: a \(3\), b \(2\)"):
        manifest = prepare_manifest(DataConfig(path=path), AngleEmbedder())
    anchors = {anchor.id for anchor in manifest.anchors}
    assert anchors == {f"bird/{x}.png" for x in ("a/0", "a/1", "a/3", "b/1", "b/2")}
    assert len(manifest.sft) == 2 and manifest.sft[0].image == str(
        tmp_path / "bird" / "a" / "2.png"
    )


def test_few_photos_go_to_tapo_first_and_are_warned_of(tmp_path):
    path = draw_folder(tmp_path, photos=4, classes={"bird": "ab"})
    with pytest.warns(UserWarning, match="0 photos are left for stage 1"):
        manifest = prepare_manifest(DataConfig(path=path, shots=4), AngleEmbedder())
    assert len(manifest.anchors) == 8 and manifest.sft == [] and manifest.test["seen"] == []


@pytest.mark.parametrize(
    ("photos", "classes", "message"),
    [
        (1, {"bird": "ab"}, "sub-category 'a' of 'bird' has 1 training photo.*no positive.*add"),
        (
            6,
            {"bird": "ab", "car": "x"},
            "'car' has one seen sub-category, 'x', so no negative.*add",
        ),
    ],
)
def test_what_gives_no_triplet_is_named(tmp_path, photos, classes, message):
    path = draw_folder(tmp_path, photos, classes)
    with pytest.raises(ValueError, match=message):
        prepare_manifest(DataConfig(path=path), AngleEmbedder())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, "data.path is empty"),
        ({"seen_fraction": 0.0}, r"data.seen_fraction must lie in \(0, 1\], got 0.0"),
        ({"shots": 1}, "data.shots must be at least 2 .*got 1 and 1"),
        ({"sft_shots": -1}, "data.sft_shots at least 0, got 4 and -1"),
    ],
)
def test_options_without_meaning_are_named(tmp_path, options, message):
    config = replace(DataConfig(path=draw_folder(tmp_path)), **options)
    with pytest.raises(ValueError, match=message):
        prepare_manifest(config, AngleEmbedder())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda n: torch.zeros(n), r"must give 20 rows of finite numbers, got \(20,\)"),
        (lambda n: torch.zeros(n - 1, 2), r"got \(19, 2\) with 0 that are not finite"),
        (lambda n: torch.full((n, 2), torch.nan), r"got \(20, 2\) with 40 that are not finite"),
    ],
)
def test_a_faulty_embedder_is_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        prepare_manifest(DataConfig(path=draw_folder(tmp_path)), lambda keys: rows(len(keys)))


def test_a_written_manifest_is_read_back_and_its_choices_hold(tmp_path):
    config = DataConfig(path=draw_folder(tmp_path / "photos"))
    manifest = prepare_manifest(config, AngleEmbedder())
    path = manifest.write(tmp_path / "out")
    for stored in (path, path.parent):
        assert prepare_manifest(DataConfig(path=str(stored), seed=9, shots=2), refuse) == manifest
    Path(manifest.anchors[0].image).unlink()
    with pytest.raises(ValueError, match="no such file"):
        prepare_manifest(DataConfig(path=str(path)), refuse)
    left = prepare_manifest(DataConfig(path=str(path), on_bad_image="skip"), refuse)
    assert [a.id for a in left.anchors] == [a.id for a in manifest.anchors[1:]]
    assert len(left.skipped) == 1


ANCHOR = Anchor("bird/a/1.png", "x", ("p0", "p1", "p2"), ("n0", "n1"), "Which?", "bird", "a")


def test_fixed_triplets_take_the_first_of_each_list():
    for epoch in range(3):
        triplet = draw_triplet(ANCHOR, epoch, 0, "fixed")
        assert (triplet.id, triplet.anchor) == (ANCHOR.id, "x")
        assert (triplet.positive, triplet.negative) == ("p0", "n0")
        assert (triplet.question, triplet.super_category, triplet.sub_category) == (
            "Which?",
            "bird",
            "a",
        )


def test_redrawn_triplets_depend_on_seed_epoch_and_id_alone():
    for seed, epoch in ((0, 0), (0, 7), (5, 0)):
        drawn = {}
        for name, keys in (("positive", ANCHOR.positives), ("negative", ANCHOR.negatives)):
            parts = json.dumps([seed, epoch, ANCHOR.id, name]).encode()
            digest = hashlib.blake2b(parts, digest_size=8).digest()
            drawn[name] = keys[(int.from_bytes(digest, "big") >> 1) % len(keys)]
        triplet = draw_triplet(ANCHOR, epoch, seed)
        assert {"positive": triplet.positive, "negative": triplet.negative} == drawn
        moved = replace(ANCHOR, image="y", question="What?")
        again = draw_triplet(moved, epoch, seed)
        assert (again.positive, again.negative) == (triplet.positive, triplet.negative)


def test_redrawn_triplets_are_even_over_epochs_and_pairs():
    pairs = Counter(
        (triplet.positive, triplet.negative)
        for triplet in (draw_triplet(ANCHOR, epoch, 0) for epoch in range(3000))
    )
    # 6 pairs of 500 expected, standard deviation 20.4.
    assert len(pairs) == 6 and all(abs(count - 500) < 82 for count in pairs.values())


def test_a_triplet_that_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match="'bird/a/1.png' needs at least one positive"):
        draw_triplet(replace(ANCHOR, positives=()), 0, 0)
    with pytest.raises(ValueError, match="data.positive must be 'redraw' or 'fixed', got 'first'"):
        draw_triplet(ANCHOR, 0, 0, "first")


def test_eval_questions_offer_the_truth_and_the_most_similar_others(tmp_path):
    config = DataConfig(path=draw_folder(tmp_path), seen_fraction=1.0, shots=2, sft_shots=0)
    manifest = prepare_manifest(config, AngleEmbedder())
    questions = eval_questions(manifest, "seen")
    assert [q.image for q in questions] != sorted(q.image for q in questions)
    assert Counter(q.image for q in questions) == Counter(p.image for p in manifest.test["seen"])
    asked = {photo.image: photo for photo in manifest.test["seen"]}
    for question in questions:
        photo = asked[question.image]
        assert (question.truth, question.question) == (photo.sub_category, photo.question)
        assert (question.super_category, question.partition) == (photo.super_category, "seen")
        others = NEAREST[photo.super_category][photo.sub_category][:3]
        assert sorted(question.options) == sorted(question.truth + others)
    birds = [q for q in questions if q.super_category == "bird"]
    places = Counter(q.options.index(q.truth) for q in birds)
    assert len(birds) == 25 and len(places) == 4 and max(places.values()) < 15


def test_eval_questions_about_unseen_names_draw_the_others():
    names = [f"s{i}" for i in range(9)]
    photos = [
        Photo(f"/data/{n}/{i}.jpg", "bird", n, "Which?") for n in names[:6] for i in range(40)
    ]
    manifest = Manifest([], [], {"seen": [], "unseen": photos}, {"bird": names}, {}, {})
    questions = eval_questions(manifest, "unseen", per_class=30, seed=3)
    assert set(Counter(q.truth for q in questions).values()) == {30} and len(questions) == 180
    assert all(len(set(q.options)) == 4 and q.truth in q.options for q in questions)
    wrong = Counter(name for q in questions for name in q.options if name != q.truth)
    # A name is a wrong option of 3/8 of the questions about others: 180 or 150 of them.
    for name in names:
        expected = 3 / 8 * (150 if name in names[:6] else 180)
        assert abs(wrong[name] - expected) < 4 * (expected * 5 / 8) ** 0.5
    shuffled = replace(
        manifest, test={"seen": [], "unseen": photos[::-1]}, names={"bird": names[::-1]}
    )
    assert eval_questions(shuffled, "unseen", 30, 3) == questions
    moved = manifest.with_keys(lambda key: key.replace("/data", "/other/place"))
    again = eval_questions(moved, "unseen", 30, 3)
    assert [q.options for q in again] == [q.options for q in questions]
    assert {q.image for q in eval_questions(manifest, "unseen", 30, 4)} != {
        q.image for q in questions
    }
    with pytest.raises(ValueError, match="holds no test photos of seen sub-categories"):
        eval_questions(manifest, "seen")
    with pytest.raises(ValueError, match="partition must be 'seen' or 'unseen', got 'all'"):
        eval_questions(manifest, "all")


def hue_grid(keys):
    rows = [np.asarray(Image.open(key).convert("HSV").resize((8, 8)), np.float32) for key in keys]
    rows = torch.from_numpy(np.stack(rows)).flatten(1)
    return rows - rows.mean(dim=0)


@pytest.mark.photos
@pytest.mark.filterwarnings("ignore:.*data.s:UserWarning")
def test_real_photos_become_triplets_of_similar_birds(real_photos):
    manifest = prepare_manifest(DataConfig(path=str(real_photos)), hue_grid)
    assert len(manifest.anchors) == 18 * 3 + 7 * 4 and len(manifest.sft) == 18
    assert {partition: len(photos) for partition, photos in manifest.test.items()} == {
        "seen": 268,
        "unseen": 162,
    }
    listed = {
        entry["path"]: entry
        for entry in json.loads((real_photos / "manifest.json").read_text())["images"]
    }
    for anchor in manifest.anchors:
        entry = listed[anchor.id]
        assert (entry["split"], entry["world"]) == ("train", "seen") and not entry["in_stage1"]
    # Even a grid of hues finds sea birds of one family.
    near = {name: others[0].split()[-1] for name, others in manifest.nearest["bird"].items()}
    for name, family in near.items():
        if name != "Red Winged Blackbird":
            assert family == name.split()[-1]
