import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tercet.core.data import fields, photos
from tercet.core.data.eval_files import read_eval
from tercet.core.data.fields import as_words
from tercet.core.data.photos import check_images, read_photos
from tercet.core.data.records import read_sft
from tercet.core.data.vision import load_image
from tercet.core.types import Photo

pytestmark = pytest.mark.core


def noise(width=24, height=16, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise()).save(path)
    return str(path)


def write_lines(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def line(image, **more):
    return {"image": image, "super_category": "bird", "sub_category": "wren"} | more


def test_folder_is_read_in_one_order_with_names_as_words(tmp_path):
    for name in ["z.TIFF", "b.JPG", "a.jpeg", "c.png", "d.WebP", "e.tif"]:
        save(tmp_path / "garden_bird" / "Least__Auklet" / name)
    save(tmp_path / "car" / "mini" / "1.jpg")
    save(tmp_path / "car" / "mini" / ".hidden.jpg")
    (tmp_path / "car" / "mini" / "notes.txt").write_text("no photo")
    save(tmp_path / ".cache" / "x" / "1.jpg")
    read = read_photos(tmp_path)
    auklets = tmp_path / "garden_bird" / "Least__Auklet"
    names = ["a.jpeg", "b.JPG", "c.png", "d.WebP", "e.tif", "z.TIFF"]
    assert read.photos == [
        Photo(str(tmp_path / "car" / "mini" / "1.jpg"), "car", "mini"),
        *(Photo(str(auklets / name), "garden bird", "Least Auklet") for name in names),
    ]
    assert (read.root, read.skipped, read.partitions, read.splits) == (
        str(tmp_path),
        [],
        None,
        None,
    )


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "holds no photos"),
        (["bird/1.jpg"], "bird holds photos; they must lie one folder deeper"),
        (["bird/wren/1.jpg", "bird/tit/heic"], r"tit holds no photo \(.* jpeg .*, but .*1 .heic"),
    ],
)
def test_folder_of_another_shape_is_refused(tmp_path, paths, message):
    for path in paths:
        saved = Path(save(tmp_path / path.replace("heic", "1.jpg")))
        if path.endswith("heic"):
            saved.rename(saved.with_suffix(".heic"))
    with pytest.raises(ValueError, match=message):
        read_photos(tmp_path)


def test_missing_path_and_unknown_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        read_photos(tmp_path / "nowhere")
    (tmp_path / "photos.tsv").write_text("a,b")
    with pytest.raises(ValueError, match="photos.tsv: no such folder, nor a .jsonl file"):
        read_photos(tmp_path / "photos.tsv")


def listed_folder(tmp_path, **changes):
    for name in ["wren/1", "wren/2", "wren/3", "wren/unlisted", "tit/1", "crow/1"]:
        save(tmp_path / "bird" / f"{name}.jpg")
    save(tmp_path / "stage1" / "bird" / "9.jpg")

    def image(name, split, **more):
        sub_category = name.split("/")[0]
        labels = {"super_category": "bird", "sub_category": sub_category, "split": split}
        return {"path": f"bird/{name}.jpg"} | labels | more

    classes = [
        {"super_category": "bird", "sub_category": "wren", "partition": "seen"},
        {"super_category": "bird", "sub_category": "tit", "partition": "unseen"},
    ]
    images = [
        image("wren/2", "train", partition="seen", in_stage1=False),
        image("wren/1", "train", in_stage1=True, question="Which bird?"),
        image("wren/3", "test"),
        image("tit/1", "test"),
        image("crow/1", "train"),
    ]
    listing = {"classes": classes, "images": images} | changes
    (tmp_path / "manifest.json").write_text(json.dumps(listing))
    return listing


def test_a_manifest_gives_partition_and_split_and_only_its_classes_are_read(tmp_path):
    listed_folder(tmp_path)
    read = read_photos(tmp_path)
    key = {name: str(tmp_path / "bird" / f"{name}.jpg") for name in ("tit/1", "wren/1", "wren/2")}
    test = str(tmp_path / "bird" / "wren" / "3.jpg")
    assert read.photos == [
        Photo(key["tit/1"], "bird", "tit"),
        Photo(key["wren/1"], "bird", "wren", "Which bird?"),
        Photo(key["wren/2"], "bird", "wren"),
        Photo(test, "bird", "wren"),
    ]
    assert read.partitions == {("bird", "wren"): "seen", ("bird", "tit"): "unseen"}
    splits = {"tit/1": "test", "wren/1": "stage1", "wren/2": "train"}
    assert read.splits == {key[name]: split for name, split in splits.items()} | {test: "test"}


def test_a_manifest_of_another_kind_is_no_split(tmp_path):
    listed_folder(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "app", "icons": []}')
    read = read_photos(tmp_path)
    assert read.partitions is None and read.splits is None and len(read.photos) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda listing: listing.pop("classes"), "needs the two lists 'classes' and 'images'"),
        (
            lambda listing: listing["classes"][1].update(partition="hidden"),
            r"classes\[1\]: 'partition' must be seen or unseen, got 'hidden'",
        ),
        (
            lambda listing: listing["images"][2].update(split="val"),
            r"images\[2\]: 'split' must be train or test, got 'val'",
        ),
        (
            lambda listing: listing["images"][3].update(partition="seen"),
            r"images\[3\]: partition 'seen' is not that of its class",
        ),
        (
            lambda listing: listing["images"][2].update(path="bird/wren/1.jpg"),
            r"images\[2\]: .*1.jpg is listed before",
        ),
        (lambda listing: listing["images"][0].pop("path"), r"images\[0\]: 'path' must be a text"),
        (lambda listing: listing.update(classes=[1]), r"classes\[0\]: 'super_category' must be a"),
        (lambda listing: listing.update(images=["a"]), r"images\[0\]: 'super_category' must be a"),
    ],
)
def test_a_faulty_manifest_is_named(tmp_path, change, message):
    listing = listed_folder(tmp_path)
    change(listing)
    (tmp_path / "manifest.json").write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=message):
        read_photos(tmp_path)


def test_json_lines_are_relative_to_their_file(tmp_path):
    outside = save(tmp_path / "b.jpg")
    save(tmp_path / "set" / "deep" / "a.png")
    read = read_photos(
        write_lines(
            tmp_path / "set" / "photos.jsonl",
            line("../b.jpg", sub_category="great_tit", question="Which?"),
            "",
            line("deep/a.png", super_category="bird"),
        )
    )
    assert read.photos == [
        Photo(outside, "bird", "great tit", "Which?"),
        Photo(str(tmp_path / "set" / "deep" / "a.png"), "bird", "wren"),
    ]


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ('{"image": "a.jpg", ', r"photos.jsonl:3: malformed JSON line"),
        ('["a.jpg"]', r"photos.jsonl:3: a line must be a JSON object"),
        (
            {"image": "b.jpg", "super_category": "bird"},
            r":3: 'sub_category' must be a text, got No",
        ),
        (line(" "), r":3: 'image' must be a text, got ' '"),
        (line("b.jpg", question=7), r":3: 'question' must be a text, got 7"),
        (line("b.jpg", question="<image>Which?"), r":3: 'question' must not hold <image>"),
        (line("b.jpg", question="Which\ud800?"), r":3: 'question' holds '\\ud800', half a"),
        (line("b.jpg", sub_category=737), r":3: 'sub_category' must be a text, got 737"),
        (line("b.jpg", sub_category="a<|im_end|>"), r":3: 'sub_category' must not hold <\|im_end"),
        (line("b.jpg", size=float("inf")), r":3: malformed JSON line: Infinity is no JSON number"),
        ("[" * 100_000, r":3: malformed JSON line: it is nested too deeply"),
        ("1" * 5000, r":3: malformed JSON line: Exceeds the limit"),
        (line("./a.jpg", sub_category="tit"), r":3: .*a.jpg is listed before"),
    ],
)
def test_a_faulty_line_is_named(tmp_path, faulty, message):
    save(tmp_path / "a.jpg")
    path = write_lines(tmp_path / "photos.jsonl", line("a.jpg"), "", faulty)
    with pytest.raises(ValueError, match=message):
        read_photos(path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    save(tmp_path / "a.jpg")
    path = tmp_path / "photos.jsonl"
    path.write_bytes(json.dumps(line("a.jpg")).encode() + b'\n{"image": "\xff"}\n')
    with pytest.raises(ValueError, match=r"photos.jsonl:2: malformed"):
        read_photos(path)


def cut(path, share):
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: int(len(whole) * share)])
    return path


def flip(path, position):
    stored = bytearray(Path(path).read_bytes())
    stored[position] ^= 0xFF
    Path(path).write_bytes(stored)
    return path


def test_check_images_agrees_with_load_image(tmp_path):
    big = noise(300, 200)
    grey16 = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100)
    good = [
        save(tmp_path / "rgb.jpg", big),
        save(tmp_path / "progressive.jpg", big),
        save(tmp_path / "cmyk.jpg", noise(mode="CMYK")),
        save(tmp_path / "grey.jpg", noise(mode="L")),
        save(tmp_path / "alpha.png", noise(mode="RGBA")),
        save(tmp_path / "palette.png", noise(mode="P")),
        save(tmp_path / "grey16.png", grey16),
        save(tmp_path / "pixel.png", noise(1, 1)),
        save(tmp_path / "pixel.jpg", noise(1, 1)),
        save(tmp_path / "long.png", noise(200, 1)),
        save(tmp_path / "a.webp", big),
        save(tmp_path / "a.tif", big),
        save(tmp_path / "really_a_png.jpg"),
    ]
    big.save(good[1], progressive=True)
    noise().save(good[-1], "PNG")
    bad = [
        cut(save(tmp_path / "cut.jpg", big), 0.9),
        cut(save(tmp_path / "cut_early.jpg", big), 0.02),
        cut(save(tmp_path / "cut.png", big), 0.9),
        flip(save(tmp_path / "flipped.png", big), 5000),
        cut(save(tmp_path / "cut.webp", big), 0.5),
        cut(save(tmp_path / "cut.tif", big), 0.5),
        cut(save(tmp_path / "empty.jpg"), 0),
        save(tmp_path / "too_long.png", noise(201, 1)),
        save(tmp_path / "too_high.jpg", noise(2, 403)),
        str(tmp_path / "missing.jpg"),
    ]
    (tmp_path / "text.jpg").write_text("not a photo")
    bad.append(str(tmp_path / "text.jpg"))
    for key in good:
        load_image(key)
    for key in bad:
        with pytest.raises(ValueError):
            load_image(key)
    found = check_images([bad[0], *good, *bad[::-1]], "skip")
    assert list(found) == [bad[0], *bad[:0:-1]]
    assert all(Path(key).name in reason for key, reason in found.items())
    assert check_images(good) == {}


def test_a_photo_is_checked_again_only_when_its_file_holds_something_else(tmp_path, monkeypatch):
    """Bad ones are checked each time, for the reason."""
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    one, two = (save(tmp_path / f"{n}.png", noise(n, n)) for n in (40, 50))
    (tmp_path / "text.png").write_text("not a photo")
    bad, checked = str(tmp_path / "text.png"), []
    check = photos.check_image
    monkeypatch.setattr(photos, "check_image", lambda key: checked.append(key) or check(key))
    first = check_images([one, two, bad], "skip")
    assert sorted(set(checked)) == sorted([one, two, bad])
    checked.clear()
    assert check_images([one, two, bad], "skip") == first and list(first) == [bad]
    assert checked == [bad]
    checked.clear()
    save(tmp_path / "40.png", noise(41, 41))
    copy = shutil.copy(two, tmp_path / "copy.png")
    assert check_images([one, two, str(copy)]) == {} and checked == [one]
    checked.clear()
    monkeypatch.setattr(photos, "_rules", lambda: b"those of another Pillow")
    assert check_images([one]) == {} and checked == [one]


def test_a_progressive_jpeg_of_many_scans_is_refused(tmp_path):
    """The last scan of a good one, repeated: few bytes, but each goes over every pixel."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "scans.jpg"
    Image.fromarray(pixels).save(path, progressive=True)
    load_image(str(path))
    content = path.read_bytes()
    last = content[content.rindex(b"\xff\xda") : -2]
    path.write_bytes(content[:-2] + 300 * last + content[-2:])
    with pytest.raises(ValueError, match="scans.jpg.*31[0-9] scans, more than 200"):
        load_image(str(path))


def test_bad_photos_stop_the_reading_or_are_skipped_and_listed(tmp_path):
    good = [save(tmp_path / "bird" / "wren" / f"{i}.jpg", noise(300, 200)) for i in range(3)]
    bad = [
        cut(save(tmp_path / "bird" / "wren" / f"bad{i}.jpg", noise(300, 200)), 0.5) for i in (1, 2)
    ]
    with pytest.raises(ValueError, match=r"bad1.jpg.*\(2 of 5 photos are bad\).*on_bad_image=skip"):
        read_photos(tmp_path)
    read = read_photos(tmp_path, on_bad_image="skip")
    assert [photo.image for photo in read.photos] == good
    assert len(read.skipped) == 2
    assert all(Path(key).name in reason for key, reason in zip(bad, read.skipped, strict=True))
    with pytest.raises(ValueError, match="on_bad_image must be 'error' or 'skip', got 'ignore'"):
        read_photos(tmp_path, on_bad_image="ignore")


def record(user="<image>Which bird?", images=("a.jpg",), **more):
    messages = [
        {"role": "system", "content": "Think first."},
        {"role": "user", "content": user},
        {"role": "assistant", "content": "<think>small</think><answer>wren</answer>"},
    ]
    return {"messages": messages, "images": list(images)} | more


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def test_stage1_records_become_samples(tmp_path):
    image = save(tmp_path / "a.jpg")
    second = save(tmp_path / "deep" / "b.jpg")
    records = [record(), record("<image><image>Same?", ["deep/b.jpg", "a.jpg"])]
    samples, skipped = read_sft(write_json(tmp_path / "cot.json", records))
    assert [sample.id for sample in samples] == ["cot/0", "cot/1"] and skipped == []
    assert samples[0].messages == (
        ("system", "Think first."),
        ("user", "<image>Which bird?"),
        ("assistant", "<think>small</think><answer>wren</answer>"),
    )
    assert [sample.images for sample in samples] == [(image,), (second, image)]


def test_stage1_records_with_bad_photos_are_skipped_and_listed(tmp_path):
    save(tmp_path / "a.jpg")
    path = write_json(tmp_path / "cot.json", [record(images=["gone.jpg"]), record()])
    with pytest.raises(ValueError, match="gone.jpg"):
        read_sft(path)
    samples, skipped = read_sft(path, "skip")
    assert [sample.id for sample in samples] == ["cot/1"]
    assert len(skipped) == 1 and "record cot/0" in skipped[0] and "gone.jpg" in skipped[0]


ASSISTANT = {"role": "assistant", "content": "wren"}
USER = {"role": "user", "content": "<image>Which?"}


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (record("Which bird?"), "0 <image> in its user turns, but 1 images"),
        (record("<image><image>?"), "2 <image> in its user turns, but 1 images"),
        (record(messages=[USER, ASSISTANT, USER, ASSISTANT]), "exactly one assistant message"),
        (record(messages=[USER, ASSISTANT, USER]), "exactly one assistant message, the last one"),
        (record(messages=[USER]), r"its roles are \['user'\]"),
        (
            record(messages=[{"role": "tool", "content": "x"}]),
            "'role' must be system or user or as",
        ),
        (record(messages=[USER, {"role": "assistant", "content": ""}]), "'content' must be a text"),
        (record(messages=["Which?"]), "'role' must be system or user or as"),
        (record(images=[3]), "'images' must be a list of paths"),
        (record(images=[""]), "'images' must be a list of paths"),
        (record(messages="Which?"), "needs a list 'messages'"),
        (record("<image>Which <|image_pad|>?"), r"'content' must not hold <\\|image_pad"),
        (record("<image>Which <|im_end|>"), r"'content' must not hold <\\|im_end"),
        (record("<image>Which\ud800?"), "'content' holds '.*ud800'"),
        (
            record(messages=[USER, {"role": "assistant", "content": "a<|im_end|>b<|im_end|>"}]),
            r"'content' must not hold <\\|im_end",
        ),
        (
            record(messages=[{"role": "system", "content": "<|vision_start|>"}, USER, ASSISTANT]),
            r"'content' must not hold <\\|vision_start",
        ),
        ({"images": []}, "needs a list 'messages'"),
    ],
)
def test_a_faulty_stage1_record_is_named(tmp_path, faulty, message):
    save(tmp_path / "a.jpg")
    path = write_json(tmp_path / "cot.json", [record(), faulty])
    with pytest.raises(ValueError, match=f"cot.json: record 1: .*{message}"):
        read_sft(path)


def test_an_answer_may_end_with_its_end_of_turn(tmp_path):
    save(tmp_path / "a.jpg")
    turns = [USER, {"role": "assistant", "content": "wren<|im_end|>\n"}]
    samples, _ = read_sft(write_json(tmp_path / "cot.json", [record(messages=turns)]))
    assert samples[0].messages[1] == ("assistant", "wren<|im_end|>\n")


def test_records_that_all_lack_their_photos_are_an_error(tmp_path):
    path = write_json(tmp_path / "cot.json", [record(images=["gone.jpg"])] * 2)
    with pytest.raises(ValueError, match=r"cot.json: no record has its photos; .*gone.jpg"):
        read_sft(path, "skip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" + "1" * 5000 + "]", "Exceeds the limit"),
        ("[NaN]", "NaN is no JSON number"),
        (b"[\xff]", "cannot be read: 'utf-8'"),
    ],
)
def test_json_that_no_parser_takes_is_named(tmp_path, content, message):
    path = tmp_path / "cot.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"cot.json.*{message}"):
        read_sft(path)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "cot.json")
    for path in (tmp_path / "cot.json", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match=f"{path} cannot be read: it is not a regular file"):
            read_sft(path)
    os.mkfifo(tmp_path / "photo.png")
    for key in (str(tmp_path / "photo.png"), "/dev/zero"):
        assert "not a regular file" in check_images([key], "skip")[key]
    (tmp_path / "long.jsonl").write_text(" " * 101)
    monkeypatch.setattr(fields, "MAX_JSON_BYTES", 100)
    with pytest.raises(ValueError, match="long.jsonl cannot be read: it is larger than 100 bytes"):
        read_photos(tmp_path / "long.jsonl")


def test_a_photo_whose_name_is_not_utf8_is_bad(tmp_path):
    good = save(tmp_path / "bird" / "wren" / "1.png")
    odd = os.fsencode(save(tmp_path / "bird" / "wren" / "x.png"))
    os.rename(odd, odd[:-5] + b"\xff.png")
    with pytest.raises(ValueError, match="not UTF-8: rename it") as caught:
        read_photos(tmp_path)
    assert str(caught.value).isprintable()
    read = read_photos(tmp_path, "skip")
    assert [photo.image for photo in read.photos] == [good] and len(read.skipped) == 1


def test_a_folder_of_bad_photos_alone_is_an_error(tmp_path):
    (tmp_path / "bird" / "wren").mkdir(parents=True)
    (tmp_path / "bird" / "wren" / "1.png").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"all 1 photos are bad: image '.*1\.png'"):
        read_photos(tmp_path, "skip")


def test_faulty_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "cot.json"
    path.write_text('[\n {"messages": []},\n {"messages" []}\n]')
    with pytest.raises(ValueError, match=r"cot.json:3: malformed JSON"):
        read_sft(path)
    with pytest.raises(ValueError, match="must hold a JSON list"):
        read_sft(write_json(path, {}))


def question(**more):
    return {
        "image_path": "garden_bird/wren/1.jpg",
        "question": "Which?",
        "options": ["wren", "great_tit"],
        "ground_truth": "great_tit",
    } | more


def test_eval_questions_are_read_with_names_as_written(tmp_path):
    lines = [question(), question(world="seen"), question(partition="seen")]
    path = write_lines(tmp_path / "made_eval_bird_unseen.jsonl", *lines)
    first, second, third = read_eval(path)
    assert third.partition == "seen"
    assert first.image == str(tmp_path / "garden_bird" / "wren" / "1.jpg")
    assert (first.question, first.options, first.truth) == (
        "Which?",
        ("wren", "great_tit"),
        "great_tit",
    )
    assert (first.super_category, first.dataset, first.partition) == ("bird", "bird", "unseen")
    assert [q.line for q in (first, second, third)] == [1, 2, 3]
    assert (first.file, first.path) == (path.stem, "garden_bird/wren/1.jpg")
    assert second.partition == "seen"
    (own,) = read_eval(write_lines(tmp_path / "q.jsonl", question(super_category="tiny_bird")))
    assert (own.super_category, own.dataset, own.partition) == ("tiny bird", "bird", "")
    moss = question(image_path="wet_moss/1.jpg")
    (other,) = read_eval(write_lines(tmp_path / "my_plants_seen.jsonl", moss))
    assert (other.super_category, other.dataset) == ("wet moss", "my_plants")


@pytest.mark.parametrize(
    "names",
    [
        ("Least_Auklet", "least auklet"),
        (unicodedata.normalize("NFD", "Citroën_C4"), "Citroën_C4"),
        ("Boeing 737-200", "Boeing 737\u2011200"),
        ("Brewer's Blackbird", "Brewer’s Blackbird"),
    ],
    ids=["case", "accents", "hyphen", "apostrophe"],
)
def test_two_spellings_of_a_class_are_refused_by_every_reader(tmp_path, names):
    """Else a negative could be of the same sub-category."""
    for folder in (*names, "Laysan Albatross"):
        save(tmp_path / "photos" / "bird" / folder / "1.png")
    photos = ["photos/bird/Laysan Albatross/1.png", f"photos/bird/{names[0]}/1.png"]
    rows = [line(photo, sub_category=name) for photo, name in zip(photos, names, strict=True)]
    listed = {"classes": [{**row, "partition": "seen"} for row in rows], "images": []}
    listed["images"] = [{**rows[0], "path": "1.png", "split": "train"}]
    save(tmp_path / "listed" / "1.png")
    (tmp_path / "listed" / "manifest.json").write_text(json.dumps(listed))
    write_lines(tmp_path / "photos.jsonl", *rows)
    options = [question(options=["wren", name, "great_tit"]) for name in names]
    write_lines(tmp_path / "questions.jsonl", *options)
    readers = {"photos": read_photos, "listed": read_photos, "photos.jsonl": read_photos}
    shown = [repr(as_words(name)) for name in names]
    for name, read in (readers | {"questions.jsonl": read_eval}).items():
        with pytest.raises(ValueError, match="are one name in two spellings") as caught:
            read(tmp_path / name)
        assert all(word in str(caught.value) for word in [f"{tmp_path / name}: ", *shown])


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (question(ground_truth="crow"), r":2: ground_truth 'crow' is not among the options"),
        (question(options="wren"), r":2: 'options' must be a list of names"),
        (question(options=["great_tit", "_"]), r":2: the option '_' holds no name"),
        (question(partition="old"), r":2: 'partition' must be seen or unseen"),
        (question(image_path=None), r":2: 'image_path' must be a text"),
        ("{", r":2: malformed JSON line"),
    ],
)
def test_a_faulty_eval_question_is_named(tmp_path, faulty, message):
    path = write_lines(tmp_path / "q.jsonl", question(), faulty)
    with pytest.raises(ValueError, match=r"q.jsonl" + message):
        read_eval(path)
    with pytest.raises(ValueError, match="holds no questions"):
        read_eval(write_lines(path, ""))


@pytest.mark.photos
def test_real_photos_records_and_questions(real_photos):
    read = read_photos(real_photos)
    assert len(read.photos) == 590 and read.skipped == []
    assert (
        sum(partition == "seen" for partition in read.partitions.values()) == 25
        and len(read.partitions) == 40
    )
    used = [read.splits[photo.image] for photo in read.photos]
    assert [used.count(split) for split in ("train", "stage1", "test")] == [142, 18, 430]
    samples, skipped = read_sft(real_photos / "stage1_subset.json")
    assert len(samples) == 176 and skipped == []
    assert samples[0].messages[1] == (
        "user",
        "<image>Can you tell the type of car visible in this image?",
    )
    first = read_eval(real_photos / "eval_flower_seen.jsonl")[0]
    assert (first.truth, first.partition, first.super_category) == ("hibiscus", "seen", "flower")
    assert first.options == ("hibiscus", "mallow", "tree mallow", "cape flower")
    load_image(first.image)


def table(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    for number in range(3):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number},a.png")
    return path


def test_a_csv_table_of_photos(tmp_path):
    path = table(
        tmp_path,
        '\ufeffimage,sub_category,super_category,split,question,x\n"0,a.png",tit_mouse,bird,Train,,1\n'
        '"1,a.png",wren,bird,valid,"Which, then?",\n"2,a.png",wren,bird,test,,\n',
    )
    found = read_photos(path)
    assert found.photos == [
        Photo(str(tmp_path / "0,a.png"), "bird", "tit mouse", ""),
        Photo(str(tmp_path / "1,a.png"), "bird", "wren", "Which, then?"),
        Photo(str(tmp_path / "2,a.png"), "bird", "wren", ""),
    ]
    assert list(found.splits.values()) == ["train", "test", "test"]
    path = table(tmp_path, 'image,sub_category\n"0,a.png",wren\n"1,a.png",tit\n')
    found = read_photos(path, super_category="garden_bird")
    assert {photo.super_category for photo in found.photos} == {"garden bird"}
    assert found.splits is None and found.root == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'image'; needed: image, sub_category, super_category"),
        ("image,sub_category\n", "has no column 'super_category'"),
        ("image,sub_category,super_category\n", "holds no photos"),
        (
            "image,sub_category,super_category\nx.png,,bird\n",
            "t.csv:2: 'sub_category' must be a te",
        ),
        (
            "image,sub_category,super_category\nx.png,a\n",
            "t.csv:2: 'super_category' must be a text",
        ),
        ("image,sub_category,super_category\nx,a,b\ny/../x,a,b\n", "t.csv:3: .*x is listed before"),
        ("image,sub_category,super_category,split\nx,a,b,all\n", "t.csv:2: 'split' must be train"),
        ("image,sub_category,super_category\nx.png,a,b\n", "image '.*x.png': no such file"),
        ("image,sub_category,super_category\nx,<image>,b\n", "must not hold <image>"),
        ('image,sub_category,super_category\n"x,a,b\n', "t.csv cannot be read"),
    ],
)
def test_a_faulty_table_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_photos(table(tmp_path, text))
