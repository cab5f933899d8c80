"""The drawn world: its sub-categories, texts and pictures, and the files that are written."""

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
from tercet.train.demo.drawing import FIELD, PLATE, draw
from tercet.train.demo.drawn_world import write_base, write_world
from tercet.train.demo.species import (
    ATTRIBUTES,
    QUESTIONS,
    SPECIES,
    caption,
    chain_of_thought,
    fact,
    is_seen,
    question,
    species_of,
    vocabulary,
)

pytestmark = pytest.mark.core

COUNTS = {"train": 2, "sft": 1, "test": 3}
INSTRUCTION = (
    "You first think through the reasoning process as an internal monologue, enclosed within "
    "<think> </think> tags. Then, provide your final answer enclosed within <answer> </answer> "
    "tags."
)
WORDS = [word for words in ATTRIBUTES.values() for word in words]


def pixels(species, seed, setting=FIELD, size=84):
    return np.asarray(draw(species, np.random.default_rng(seed), setting, size), dtype=np.float64)


def differing(a, b):
    return sum(x != y for x, y in zip(a.values, b.values, strict=True))


def seen(seed, names="spelled"):
    return {s.name for s, is_one in zip(species_of(names), is_seen(seed), strict=True) if is_one}


def test_names_are_all_combinations_of_three_words():
    assert [s.name for s in SPECIES] == [
        " ".join(w) for w in itertools.product(*ATTRIBUTES.values())
    ]
    assert len(SPECIES) == 125 and len(set(WORDS)) == 15
    assert SPECIES[27].values == (1, 0, 2)
    assert SPECIES[27].attributes == (("wings", "amber"), ("tail", "rosy"), ("body", "satyr"))


def test_no_word_contains_another():
    for one, other in itertools.permutations([*WORDS, *ATTRIBUTES, "butterfly"], 2):
        assert one not in other


def test_opaque_names_spell_nothing():
    opaque = species_of("opaque")
    assert [s.attributes for s in opaque] == [s.attributes for s in SPECIES]
    names = [s.name for s in opaque]
    assert len(set(names)) == 125
    assert not [n for n in names if any(word in n.lower() for word in WORDS)]
    assert all(names_in(name, names) == [name] for name in names)
    for place in range(3):  # sub-categories with a common value have all kinds of beginnings
        for value in range(5):
            assert len({s.name[:2] for s in opaque if s.values[place] == value}) == 5


def test_captions_name_everything_or_only_the_attributes():
    for names in ("spelled", "opaque"):
        every = species_of(names)
        for species in every[::7]:
            rng = np.random.default_rng(3)
            texts = {caption(species, rng) for _ in range(60)}
            assert len(texts) == 2
            for text in texts:
                assert names_in(text, [s.name for s in every]) == [species.name]
                for attribute, word in species.attributes:
                    assert f"{attribute} {word}" in text
            nameless = {caption(species, rng, named=False) for _ in range(60)}
            assert len(nameless) == 2
            assert not [t for t in nameless if names_in(t, [s.name for s in every])]


def test_chain_of_thought_names_attributes_then_answers():
    for names in ("spelled", "opaque"):
        for species in species_of(names):
            text = chain_of_thought(species)
            thought = re.fullmatch("<think>(.*)</think><answer>.*</answer>", text).group(1)
            assert extract_answer(text) == species.name
            assert names_in(thought, [s.name for s in species_of(names)]) == []
            said = [word for word in re.findall("[a-z]+", thought) if word in WORDS]
            assert said == [word for _, word in species.attributes]
            assert fine_r1_reward(text, species.name)["overall"] == 1.0


def test_facts_tie_an_opaque_name_to_its_attributes():
    for species in species_of("opaque")[::9]:
        rng = np.random.default_rng(4)
        pairs = {fact(species, rng) for _ in range(40)}
        assert len(pairs) == 3
        for asked, said in pairs:
            assert asked == "Think of a butterfly." or any(
                w in asked for w in [species.name, *WORDS]
            )
            together = asked + said
            assert species.name in together
            assert all(f"{part} {word}" in together.lower() for part, word in species.attributes)


def test_questions_name_the_super_category_only():
    rng = np.random.default_rng(5)
    texts = {question(rng) for _ in range(40)}
    assert texts == {template.replace("{super_category}", "butterfly") for template in QUESTIONS}
    assert len(texts) == 3 and all(text.endswith("?") for text in texts)


def test_vocabulary_holds_every_text():
    texts = set(vocabulary("opaque"))
    rng = np.random.default_rng(6)
    for species in species_of("opaque"):
        for _ in range(8):
            said = {
                caption(species, rng),
                caption(species, rng, named=False),
                fact(species, rng)[1],
            }
            assert said | {chain_of_thought(species)} <= texts
            assert f"{question(rng)}\n\n{INSTRUCTION}" in texts


def test_seen_species_are_three_latin_squares():
    """No pair of values tells whether a name is seen, and hard negatives are at hand."""
    for seed in range(30):
        chosen = [s for s, is_one in zip(SPECIES, is_seen(seed), strict=True) if is_one]
        assert len(chosen) == 75
        for first, second in itertools.combinations(range(3), 2):
            pairs = [(s.values[first], s.values[second]) for s in chosen]
            assert sorted(pairs) == sorted(3 * list(itertools.product(range(5), repeat=2)))
        for species in chosen:
            distances = [differing(species, other) for other in chosen if other != species]
            assert min(distances) == 1 and distances.count(1) == 6
    assert len({frozenset(seen(seed)) for seed in range(30)}) > 20


def test_drawings_follow_the_generator():
    for species in SPECIES[::25]:
        first, again, other = (pixels(species, seed) for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert np.abs(first - other).mean() > 10
    for size in (28, 56, 224):
        image = draw(SPECIES[0], np.random.default_rng(0), size=size)
        assert image.mode == "RGB" and image.size == (size, size)
    with pytest.raises(ValueError, match="27"):
        draw(SPECIES[0], np.random.default_rng(0), size=27)


def test_large_and_small_drawings_show_the_same():
    for species in SPECIES[::31]:
        large = draw(species, np.random.default_rng(9), size=168).reduce(2)
        assert np.abs(np.asarray(large, float) - pixels(species, 9)).mean() < 8


def test_body_colour_is_in_the_middle_of_a_plate():
    """The hue of the picture's middle is nearest to the hue of the body's word."""
    right = []
    for seed, species in enumerate(SPECIES):
        middle = pixels(species, seed, PLATE)[40:44, 40:44].reshape(-1, 3) / 255
        hue = np.median([colorsys.rgb_to_hsv(*rgb)[0] for rgb in middle])
        away = [abs((hue - at + 0.5) % 1 - 0.5) for at, *_ in drawing._HSV]
        right.append(int(np.argmin(away)) == species.values[2])
    assert np.mean(right) > 0.75


def test_each_attribute_changes_the_picture_and_nothing_else():
    """With one state of the generator, one other value changes a part of what two change."""
    for a in SPECIES[::11]:
        for b in (s for s in SPECIES if differing(a, s) == 1):
            changed = np.abs(pixels(a, 12, size=56) - pixels(b, 12, size=56)).max(axis=-1)
            assert 0.01 < (changed > 25).mean() < 0.35, (a.name, b.name)
            further = next(s for s in SPECIES if differing(a, s) == 2 and differing(b, s) == 1)
            both = np.abs(pixels(a, 12, size=56) - pixels(further, 12, size=56)).max(axis=-1)
            assert (both > 25).sum() > (changed > 25).sum()


def test_the_field_has_another_light_than_the_plates():
    """A grey wall would be as warm as FIELD.light says, and about neutral on a plate."""
    for setting in (PLATE, FIELD):
        pictures = [pixels(s, 7, setting, 28).mean(axis=(0, 1)) for s in SPECIES]
        red, green, blue = np.mean(pictures, axis=0)
        light = np.array(setting.light)
        plain = [
            pixels(s, 7, drawing.Setting(setting.wild, (1, 1, 1)), 28).mean(axis=(0, 1))
            for s in SPECIES
        ]
        expected = np.mean(plain, axis=0) * light
        assert np.allclose((red, green, blue), expected, rtol=0.03)
    assert FIELD.light[2] < 0.7 * FIELD.light[0] and len(set(PLATE.light)) == 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "new" / "world"
    write_world(folder, 5, size=28, **COUNTS)
    return folder


def test_world_has_the_pictures_its_manifest_lists(world):
    manifest = json.loads((world / "manifest.json").read_text())
    own = seen(5)
    assert len(manifest["classes"]) == 125
    for entry in manifest["classes"]:
        trained = entry["sub_category"] in own
        assert entry["partition"] == ("seen" if trained else "unseen")
        given = {split: entry[split] for split in COUNTS}
        assert given == (COUNTS if trained else {"train": 0, "sft": 0, "test": 3})
    listed = [entry["path"] for entry in manifest["images"]]
    assert len(listed) == len(set(listed)) == 75 * 6 + 50 * 3
    assert sorted(listed) == sorted(p.relative_to(world).as_posix() for p in world.rglob("*.png"))
    for entry in manifest["images"]:
        name = entry["sub_category"].replace(" ", "_")
        assert re.fullmatch(rf"{entry['super_category']}/{name}/00\d\.png", entry["path"])
        assert entry["partition"] == ("seen" if entry["sub_category"] in own else "unseen")
    names = {p.parent.name for p in world.rglob("*.png")}
    assert names == {s.name.replace(" ", "_") for s in SPECIES}
    assert len({(world / path).read_bytes() for path in listed}) == len(listed)


def test_world_is_read_with_its_split(world):
    read, own = read_photos(world), seen(5)
    assert read.partitions == {
        (s.super_category, s.name): "seen" if s.name in own else "unseen" for s in SPECIES
    }
    splits = {}
    for photo in read.photos:
        splits.setdefault(photo.sub_category, []).append(read.splits[photo.image])
    for name, of_class in splits.items():
        trained = ["stage1", "train", "train"] if name in own else []
        assert sorted(of_class) == sorted([*trained, "test", "test", "test"])


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
    assert sorted(answers) == sorted(seen(5))


def test_questions_file_holds_the_templates(world):
    written = yaml.safe_load((world / "questions.yaml").read_text())
    rng = np.random.default_rng(0)
    assert list(written) == ["butterfly"]
    assert {question(rng) for _ in range(60)} == set(written["butterfly"])


def test_same_seed_same_bytes(world, tmp_path):
    write_world(tmp_path / "again", 5, size=28, **COUNTS)
    write_world(tmp_path / "other", 6, size=28, **COUNTS)
    files = sorted(p.relative_to(world) for p in world.rglob("*") if p.is_file())
    assert len(files) == 75 * 6 + 50 * 3 + 3
    assert all((world / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    changed = "butterfly/amber_rosy_satyr/000.png"
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

    def fails(species, rng, *, size):
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


@pytest.mark.parametrize("names", ["spelled", "opaque"])
def test_base_records_show_plates_of_every_sub_category(tmp_path, names, monkeypatch):
    """Spelled names come with pictures, opaque ones only in records without a picture."""
    monkeypatch.setattr(
        drawn_world, "draw", lambda species, rng, setting, size: Image.new("RGB", (size, size))
    )
    write_base(tmp_path / "base", 3, 600, 28, names)
    samples, bad = read_sft(tmp_path / "base" / "records.json")
    assert len(samples) == 600 and not bad
    known = [s.name for s in species_of(names)]
    named = {True: set(), False: set()}
    for sample in samples:
        texts = " ".join(content for _, content in sample.messages)
        named[bool(sample.images)] |= set(names_in(texts, known))
    if names == "spelled":
        assert len(named[True]) > 110 and not named[False]
        asked = [sample.messages[0][1] for sample in samples]
        assert 60 < sum("based on the options provided" in text for text in asked) < 120
    else:
        assert not named[True] and len(named[False]) > 90
        thoughts = [sample.messages[1][1] for sample in samples if sample.images]
        assert 150 < sum(said.endswith("</think>") for said in thoughts) < 270
