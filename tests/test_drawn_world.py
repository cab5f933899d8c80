import colorsys
import itertools
import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from tercet.core.data.photos import read_photos
from tercet.core.data.records import read_sft
from tercet.core.names import names_in
from tercet.core.prompts import extract_answer
from tercet.core.rewards import fine_r1_reward
from tercet.train.demo import drawing, drawn_world
from tercet.train.demo.drawing import draw
from tercet.train.demo.drawn_world import write_world
from tercet.train.demo.species import (
    ATTRIBUTES,
    QUESTIONS,
    SPECIES,
    Species,
    caption,
    chain_of_thought,
    question,
    seen_species,
    vocabulary,
)

pytestmark = pytest.mark.core

COUNTS = {"train": 2, "sft": 1, "test": 3}
INSTRUCTION = (
    "You first think through the reasoning process as an internal monologue, enclosed within "
    "<think> </think> tags. Then, provide your final answer enclosed within <answer> </answer> "
    "tags."
)


def pixels(species, seed, size=112):
    return np.asarray(draw(species, np.random.default_rng(seed), size), dtype=np.float64)


def test_names_are_all_combinations_of_three_words():
    combinations = {
        " ".join(words)
        for attributes in ATTRIBUTES.values()
        for words in itertools.product(*attributes.values())
    }
    assert len(SPECIES) == 32
    assert {s.name for s in SPECIES} == combinations
    for super_category in ("butterfly", "fish"):
        assert sum(s.super_category == super_category for s in SPECIES) == 16
    assert all(s.name == " ".join(word for _, word in s.attributes) for s in SPECIES)


def test_no_word_contains_another():
    words = [
        w for attributes in ATTRIBUTES.values() for values in attributes.values() for w in values
    ]
    assert len(words) == 16
    for one, other in itertools.permutations([*words, *ATTRIBUTES], 2):
        assert one not in other


def test_captions_name_everything():
    for species in SPECIES:
        rng = np.random.default_rng(3)
        texts = {caption(species, rng) for _ in range(60)}
        assert len(texts) == 4
        for text in texts:
            assert species.super_category in text
            assert names_in(text, [s.name for s in SPECIES]) == [species.name]
            outside = text.replace(species.name, "")
            for attribute, word in species.attributes:
                assert attribute in outside.lower() and word in outside


def test_chain_of_thought_names_attributes_then_answers():
    for species in SPECIES:
        rng = np.random.default_rng(4)
        texts = {chain_of_thought(species, rng) for _ in range(40)}
        assert len(texts) == 2
        for text in texts:
            thought = re.fullmatch("<think>(.*)</think><answer>.*</answer>", text).group(1)
            assert extract_answer(text) == species.name
            assert names_in(thought, [s.name for s in SPECIES]) == []
            said = [word for word in re.findall("[a-z]+", thought) if word in species.name.split()]
            assert said == species.name.split()
            assert fine_r1_reward(text, species.name)["overall"] == 1.0
            assert len(text.split()) < 20


def test_questions_name_the_super_category_only():
    rng = np.random.default_rng(5)
    for super_category in ATTRIBUTES:
        texts = {question(super_category, rng) for _ in range(40)}
        assert len(texts) == 3
        assert all(super_category in text and text.endswith("?") for text in texts)
    with pytest.raises(ValueError, match="'dog'.*butterfly.*fish"):
        question("dog", rng)


def test_vocabulary_holds_every_text():
    texts = set(vocabulary())
    assert len(texts) == 32 * (4 + 2) + 2 * 3
    rng = np.random.default_rng(6)
    for species in SPECIES:
        for _ in range(8):
            assert caption(species, rng) in texts
            assert chain_of_thought(species, rng) in texts
            assert f"{question(species.super_category, rng)}\n\n{INSTRUCTION}" in texts


def differing(a, b):
    return sum(x != y for x, y in zip(a.split(), b.split(), strict=True))


def test_seen_species_cover_every_pair_of_values():
    for seed in range(30):
        seen = seen_species(seed)
        assert seen == seen_species(seed)
        for attributes in ATTRIBUTES.values():
            colours, *_ = attributes.values()
            own = [name for name in seen if name.split()[0] in colours]
            assert len(own) == 10
            for first, second in itertools.combinations(range(3), 2):
                values = list(attributes.values())
                pairs = {(name.split()[first], name.split()[second]) for name in own}
                assert pairs == set(itertools.product(values[first], values[second]))
            for name in own:
                assert min(differing(name, other) for other in own if other != name) == 1
    assert len({frozenset(seen_species(seed)) for seed in range(30)}) == 30


def test_drawings_follow_the_generator():
    for species in SPECIES[::5]:
        first, again, other = (pixels(species, seed) for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert np.abs(first - other).mean() > 10
    for size in (28, 56, 224):
        image = draw(SPECIES[0], np.random.default_rng(0), size)
        assert image.mode == "RGB" and image.size == (size, size)


def test_large_and_small_drawings_show_the_same():
    for species in SPECIES[::7]:
        large = draw(species, np.random.default_rng(9), 224).reduce(2)
        assert np.abs(np.asarray(large, float) - pixels(species, 9)).mean() < 6


@pytest.mark.parametrize(
    "species", [s for s in SPECIES if s.attributes[1][1] in ("dotted", "speckled")]
)
def test_body_colour_is_near_the_middle(species):
    """The median hue of the animal's saturated pixels lies nearest to the word's own hue."""
    hues = {word: drawing._HSV[word][0] for word in ATTRIBUTES[species.super_category]["colour"]}
    right = 0
    for seed in range(10):
        middle = pixels(species, seed)[36:76, 36:76].reshape(-1, 3) / 255
        hsv = np.array([colorsys.rgb_to_hsv(*rgb) for rgb in middle])
        hue = hsv[(hsv[:, 1] > 0.3) & (hsv[:, 2] > 0.3), 0]
        distance = {
            word: np.median(np.abs((hue - at + 0.5) % 1 - 0.5)) for word, at in hues.items()
        }
        right += min(distance, key=distance.get) == species.attributes[0][1]
    assert right >= 9


def test_each_attribute_changes_the_picture():
    """With one state of the generator, changing one attribute changes many pixels by much."""
    for a, b in itertools.combinations(SPECIES, 2):
        if a.super_category == b.super_category and differing(a.name, b.name) == 1:
            changed = np.abs(pixels(a, 12, 56) - pixels(b, 12, 56)).max(axis=-1) > 40
            assert changed.mean() > 0.02, (a.name, b.name)


def test_draw_refuses_what_it_cannot_draw():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="poodle"):
        draw(Species("dog", "poodle", (("colour", "crimson"),)), rng)
    with pytest.raises(ValueError, match="27"):
        draw(SPECIES[0], rng, 27)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "new" / "world"
    write_world(folder, 5, size=28, **COUNTS)
    return folder


def test_world_has_the_pictures_its_manifest_lists(world):
    manifest = json.loads((world / "manifest.json").read_text())
    seen = seen_species(5)
    assert len(manifest["classes"]) == 32
    for entry in manifest["classes"]:
        is_seen = entry["sub_category"] in seen
        assert entry["partition"] == ("seen" if is_seen else "unseen")
        given = {split: entry[split] for split in COUNTS}
        assert given == (COUNTS if is_seen else {"train": 0, "sft": 0, "test": 3})
    listed = [entry["path"] for entry in manifest["images"]]
    assert len(listed) == len(set(listed)) == 20 * 6 + 12 * 3
    assert sorted(listed) == sorted(p.relative_to(world).as_posix() for p in world.rglob("*.png"))
    for entry in manifest["images"]:
        name = entry["sub_category"].replace(" ", "_")
        assert re.fullmatch(rf"{entry['super_category']}/{name}/00\d\.png", entry["path"])
        assert entry["partition"] == ("seen" if entry["sub_category"] in seen else "unseen")
    names = {p.parent.name for p in world.rglob("*.png")}
    assert names == {s.name.replace(" ", "_") for s in SPECIES}
    assert len({(world / path).read_bytes() for path in listed}) == len(listed)


def test_world_is_read_with_its_split(world):
    read = read_photos(world)
    seen = seen_species(5)
    assert read.partitions == {
        (s.super_category, s.name): "seen" if s.name in seen else "unseen" for s in SPECIES
    }
    splits = {}
    for photo in read.photos:
        splits.setdefault(photo.sub_category, []).append(read.splits[photo.image])
    for name, own in splits.items():
        trained = ["stage1", "train", "train"] if name in seen else []
        assert sorted(own) == sorted([*trained, "test", "test", "test"])


def test_stage1_records_ask_as_stage_2_and_answer_right(world):
    samples, bad = read_sft(world / "stage1.json")
    assert not bad
    answers = []
    for sample in samples:
        (user, asked), (assistant, said) = sample.messages
        (image,) = sample.images
        *_, super_category, sub_category, _ = image.split("/")
        name = sub_category.replace("_", " ")
        assert (user, assistant) == ("user", "assistant")
        templates = [t.format(super_category=super_category) for t in QUESTIONS]
        assert asked in [f"<image>{text}\n\n{INSTRUCTION}" for text in templates]
        assert fine_r1_reward(said, name)["overall"] == 1.0
        assert read_photos(world).splits[image] == "stage1"
        answers.append(name)
    assert sorted(answers) == sorted(seen_species(5))


def test_questions_file_holds_the_templates(world):
    written = yaml.safe_load((world / "questions.yaml").read_text())
    rng = np.random.default_rng(0)
    assert list(written) == ["butterfly", "fish"]
    for super_category, templates in written.items():
        assert {question(super_category, rng) for _ in range(60)} == set(templates)


def test_same_seed_same_bytes(world, tmp_path):
    write_world(tmp_path / "again", 5, size=28, **COUNTS)
    write_world(tmp_path / "other", 6, size=28, **COUNTS)
    files = sorted(p.relative_to(world) for p in world.rglob("*") if p.is_file())
    assert len(files) == 20 * 6 + 12 * 3 + 3
    assert all((world / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    changed = "butterfly/amber_dotted_roundwing/000.png"
    assert (world / changed).read_bytes() != (tmp_path / "other" / changed).read_bytes()


def test_test_pictures_do_not_depend_on_the_training_ones(world, tmp_path):
    write_world(tmp_path / "small", 5, train=1, sft=0, test=2, size=28)

    def test_pictures(folder):
        images = json.loads((folder / "manifest.json").read_text())["images"]
        return [
            (folder / entry["path"]).read_bytes()
            for entry in images
            if entry["split"] == "test" and entry["sub_category"] == SPECIES[3].name
        ]

    assert len(test_pictures(tmp_path / "small")) == 2
    assert test_pictures(tmp_path / "small") == test_pictures(world)[:2]


def test_world_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="sft.*-1"):
        write_world(tmp_path / "world", 0, train=1, sft=-1, test=1)
    drawn = []

    def fails(species, rng, size):
        drawn.append(species)
        if len(drawn) > 3:
            raise OSError("disc full")
        return Image.new("RGB", (size, size))

    monkeypatch.setattr(drawn_world, "draw", fails)
    with pytest.raises(OSError, match="disc full"):
        write_world(tmp_path / "world", 0, train=1, sft=1, test=1)
    assert len(drawn) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        write_world(tmp_path, 0, train=0, sft=0, test=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
