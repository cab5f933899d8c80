"""Stage-1 records from a canned teacher: descriptions, concepts, samples, faults, review."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import Hostile, as_json, plain
from PIL import Image
from sglang_support import PYTHON
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tercet.core.concepts import concept_scores, select_concepts
from tercet.core.data.manifest import Manifest
from tercet.core.data.records import read_sft
from tercet.core.data.text_embedder import text_embedder
from tercet.core.tool_config import CotConfig
from tercet.core.types import Photo
from tercet.rollout import endpoint
from tercet.rollout.chat import ChatClient
from tercet.rollout.server import ServerError, free_ports
from tercet.train import make_cot as command
from tercet.train.cot.photos import stage1_photos
from tercet.train.cot.prompts import INSTRUCTIONS
from tercet.train.cot.samples import read_samples
from tercet.train.make_cot import make_cot

pytestmark = pytest.mark.core

NAMES = ("Black-capped Chickadee", 'F/A-18, "Hornet"', "Zaunkönig")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def triplets(tmp_path) -> Path:
    """A triplets.json with two photos of each of three sub-categories set aside for stage 1."""
    photos = []
    for name, folder in zip(NAMES, "abc", strict=True):
        for number in range(2):
            path = tmp_path / "photos" / folder / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = 40 * (len(photos) + 1)
            Image.fromarray(np.full((20, 30, 3), shade, dtype=np.uint8)).save(path)
            photos.append(Photo(str(path), "bird", name, f"What bird is number {number}?"))
    names = {"bird": sorted(NAMES)}
    Manifest([], photos, {"seen": [], "unseen": []}, names, {}, {}).write(tmp_path / "triplets")
    return tmp_path / "triplets"


def good(label: str) -> str:
    return (
        f"<analysis>It has a dark crown.</analysis><options>- {label}\n- Other</options>"
        f"<comparison>The crown decides.</comparison><prediction>{label}</prediction>"
    )


class Canned:
    """A teacher: `chain(label, seed)` is what it says to Table 5, text or a whole choice."""

    def __init__(self, chain=lambda label, seed: good(label), reply=None):
        self.chain, self.reply = chain, reply
        self.questions: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, path: str, body: dict) -> bytes:
        if path == "/v1/embeddings":
            rows = [{"index": i, "embedding": vector(t)} for i, t in enumerate(body["input"])]
            return as_json({"data": rows[::-1]})
        assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 1
        *photos, text = body["messages"][0]["content"]
        question = text["text"]
        with self.lock:
            self.questions.append(question)
            number = len(self.questions)
        if self.reply and (found := self.reply(question, number)):
            return found
        if question.startswith("This is a picture of a "):
            assert len(photos) == 1
            label = next(name for name in NAMES if f" of a {name} with" in question)
            said = self.chain(label, body["seed"])
        elif question.startswith("List distinctive") or question.startswith("These texts"):
            assert not photos
            said = "- a dark crown\n- a long bill\n- webbed feet\n- red eyes\n- A dark crown"
        else:
            assert photos[0]["image_url"]["url"].startswith("data:image/png;base64,")
            said = f"{question} seed {body['seed']}"
        choice = said if isinstance(said, dict) else {"message": {"content": said}}
        usage = {"prompt_tokens": 100, "completion_tokens": 7}
        return as_json({"choices": [{"finish_reason": "stop"} | choice], "usage": usage})


def vector(text: str) -> list[float]:
    """Eight numbers that depend on a text."""
    generator = torch.Generator().manual_seed(sum(map(ord, text)))
    return torch.randn(8, generator=generator).tolist()


def options(triplets: Path, out: Path, url: str, **more) -> CotConfig:
    given = {"embedder": "endpoint", "descriptions": 1, "patience_s": 5.0} | more
    return CotConfig(data=str(triplets), out=str(out), url=f"{url}/v1", teacher="m", **given)


def test_a_teacher_makes_records_that_stage_1_reads(triplets, tmp_path, capsys):
    out, teacher = tmp_path / "cot", Canned()
    with Hostile(teacher) as server:
        assert make_cot(options(triplets, out, server.url)) == 3
    samples, skipped = read_sft(out / "stage1.json")
    assert skipped == [] and len(samples) == 3
    for sample, name in zip(samples, sorted(NAMES), strict=True):
        (system, _), (_, asked), (_, answer) = sample.messages
        assert asked == "<image>What bird is number 0?"
        assert answer.startswith("<think> Analysis of Visual Features:\nIt has a dark crown.")
        assert answer.endswith(f"<answer>{name}</answer>") and "<image>" not in answer
        folder = "abc"[NAMES.index(name)]
        assert sample.images == (str(tmp_path / "photos" / folder / "0.png"),)
    # six photos: 5 descriptions and one list of concepts each; 3 chains of thought
    assert len(teacher.questions) == 6 * 6 + 3
    said = capsys.readouterr().out
    assert "6 photos for stage 1" in said
    assert "3 of 3 samples kept (100.0%); 39 requests, 3,900 + 273 tokens" in said
    assert not (out / "review.html").exists()


def test_the_concepts_in_the_prompt_are_the_selected_ones(triplets, tmp_path):
    """Recomputed from the texts that the teacher gave, for one photo."""
    teacher = Canned()
    with Hostile(teacher) as server:
        make_cot(options(triplets, tmp_path / "cot", server.url))

    def embed(texts):
        return torch.nn.functional.normalize(torch.tensor([vector(t) for t in texts]), dim=1)

    own = [f"{text.format(super_category='bird')} seed 0" for text in INSTRUCTIONS]
    candidates = ["a dark crown", "a long bill", "webbed feet", "red eyes"]
    # the other five photos were described in the same words
    scores = concept_scores(embed(own), embed(candidates), embed(own * 5))
    expected = ", ".join(select_concepts(candidates, scores))
    asked = [q for q in teacher.questions if q.startswith("This is a picture")]
    assert all(f"with the following visual features: {expected}. Based" in q for q in asked)
    (kept, *_) = read_samples(tmp_path / "cot" / "kept.jsonl")
    assert ", ".join(kept.concepts) == expected


def test_concepts_of_a_label_are_asked_for_once(triplets, tmp_path):
    teacher = Canned()
    with Hostile(teacher) as server:
        make_cot(options(triplets, tmp_path / "cot", server.url, concepts="label"))
    lists = [q for q in teacher.questions if q.startswith("List distinctive")]
    assert sorted(q.split(" of the ")[1].split(" that help")[0] for q in lists) == sorted(NAMES)


@pytest.mark.parametrize("concepts", ["label", "photo"])
def test_a_teacher_that_names_no_concept_is_asked_all_the_same(concepts, triplets, tmp_path):
    def reply(question, number):
        if question.startswith(("List distinctive", "These texts")):
            return as_json({"choices": [{"message": {"content": " "}, "finish_reason": "stop"}]})
        return None

    teacher = Canned(reply=reply)
    with Hostile(teacher) as server:
        assert make_cot(options(triplets, tmp_path / "cot", server.url, concepts=concepts)) == 3
    (kept, *_) = read_samples(tmp_path / "cot" / "kept.jsonl")
    assert kept.concepts == ()


def test_nothing_is_asked_twice(triplets, tmp_path):
    """Neither by a second run, at another address, nor where the first one was cut off."""

    def fail_later(question, number):
        return plain("no", status="401 Unauthorized") if number > 20 else None

    out, broken = tmp_path / "cot", Canned(reply=fail_later)
    with Hostile(broken) as server, pytest.raises(ServerError, match="teacher: .*: 401 no"):
        make_cot(options(triplets, out, server.url, concurrency=1))
    assert not (out / "stage1.json").exists()
    teacher = Canned()
    with Hostile(teacher) as server:
        assert make_cot(options(triplets, out, server.url)) == 3
        assert len(teacher.questions) == 39 - 20
        assert make_cot(options(triplets, out, server.url)) == 3
        assert len(teacher.questions) == 39 - 20


def test_a_teacher_is_asked_again_until_the_prediction_is_right(triplets, tmp_path):
    def chain(label, seed):
        return good("Other") if seed < 5 else good(label)

    teacher = Canned(chain)
    with Hostile(teacher) as server:
        assert make_cot(options(triplets, tmp_path / "cot", server.url)) == 3
    rejected = read_samples(tmp_path / "cot" / "rejected.jsonl")
    assert len(rejected) == 15
    assert {sample.reason for sample in rejected} == {"prediction: another sub-category"}
    assert {sample.said for sample in rejected} == {good("Other")}
    chains = [q for q in teacher.questions if q.startswith("This is a picture")]
    assert len(chains) == 18


def cut(label, seed):
    return {"message": {"content": good(label)}, "finish_reason": "length"}


FAULTS = {
    "tags": lambda label, seed: good(label)[:-4],
    "options": lambda label, seed: good(label).replace(f"- {label}", "- a\n- b\n- c\n- d"),
    "prediction": lambda label, seed: good("Other"),
    "language": lambda label, seed: good(label).replace("It has", "它有"),
    "cut off": cut,
    "empty": lambda label, seed: "  ",
    "text": lambda label, seed: good(label).replace("It has", "<|image_pad|> It has"),
    "no answer": lambda label, seed: {"message": {"content": 3}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_kept_with_its_reason_and_costs_one_sub_category(fault, triplets, tmp_path):
    def chain(label, seed):
        return FAULTS[fault](label, seed) if label == NAMES[0] else good(label)

    out = tmp_path / "cot"
    with Hostile(Canned(chain)) as server:
        assert make_cot(options(triplets, out, server.url, tries=2)) == 2
    rejected = read_samples(out / "rejected.jsonl")
    assert [sample.sub_category for sample in rejected] == [NAMES[0]] * 2
    assert all(sample.reason.startswith(fault) for sample in rejected), rejected
    if fault not in ("no answer", "empty"):
        said = FAULTS[fault](NAMES[0], 0)
        assert rejected[0].said == (said if isinstance(said, str) else good(NAMES[0]))


@pytest.mark.parametrize("status", ["429 Too Many Requests", "500 Internal Server Error"])
def test_what_passes_by_itself_is_waited_for(status, triplets, tmp_path):
    def reply(question, number):
        return plain("later", status=status) if number % 2 else None

    with Hostile(Canned(reply=reply)) as server:
        assert make_cot(options(triplets, tmp_path / "cot", server.url)) == 3


@pytest.mark.parametrize("status", ["400 Bad Request", "413 Too Large"])
def test_a_photo_that_is_refused_costs_itself_alone(status, triplets, tmp_path):
    def reply(question, number):
        refused = question.startswith(f"This is a picture of a {NAMES[1]} ")
        return plain("too many pixels", status=status) if refused else None

    with Hostile(Canned(reply=reply)) as server:
        assert make_cot(options(triplets, tmp_path / "cot", server.url, tries=2)) == 2
    (first, _) = read_samples(tmp_path / "cot" / "rejected.jsonl")
    assert re.search("no answer: teacher: .* refused a request: 4.* too many pixels", first.reason)


def test_a_photo_without_descriptions_is_left_out_with_a_reason(triplets, tmp_path):
    def reply(question, number):
        if question.startswith("Describe"):
            return as_json({"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]})
        return None

    with (
        Hostile(Canned(reply=reply)) as server,
        pytest.raises(ValueError, match="nothing was kept"),
    ):
        make_cot(options(triplets, tmp_path / "cot", server.url))
    rejected = read_samples(tmp_path / "cot" / "rejected.jsonl")
    assert [s.reason for s in rejected] == ["description: the teacher gave none"] * 6


def test_a_teacher_that_is_down_ends_the_run_in_one_line(triplets, tmp_path):
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ServerError, match=rf"^teacher {url}/v1: no answer in 0 s: ConnectError"):
        make_cot(options(triplets, tmp_path / "cot", url, patience_s=0.01))


def test_several_records_of_a_sub_category(triplets, tmp_path):
    """Its photos in turn, and never the same text twice."""

    def chain(label, seed):
        return good(label).replace("dark", "dark and round") if seed >= 17 else good(label)

    out = tmp_path / "cot"
    with Hostile(Canned(chain)) as server:
        config = options(triplets, out, server.url, cots_per_class=3, tries=2)
        assert make_cot(config) == 3
        assert make_cot(options(triplets, out, server.url, cots_per_class=3)) == 6
    with Hostile(Canned(lambda label, seed: good(label).replace("dark", f"dark {seed}"))) as server:
        again = options(triplets, tmp_path / "more", server.url, cots_per_class=3, tries=2)
        assert make_cot(again) == 9
    samples, _ = read_sft(tmp_path / "more" / "stage1.json")
    photos = [Path(sample.images[0]).name for sample in samples]
    assert photos == ["0.png", "1.png", "0.png"] * 3


def test_a_page_is_written_and_read_back(triplets, tmp_path, monkeypatch):
    """One sample corrected by hand, one not to be kept, one as it was."""

    def chain(label, seed):
        said = good(label).replace("crown.<", '<b>crown</b> & "tail".<')
        return said.replace("It has", "它有") if label == NAMES[2] else said

    out = tmp_path / "cot"
    with Hostile(Canned(chain)) as server:
        assert make_cot(options(triplets, out, server.url, review=True, tries=1)) == 2
    page = (out / "review.html").read_text()
    assert page.count("<article ") == 3 and page.count(" checked>") == 2
    assert page.count("data:image/jpeg;base64,") == 3 and page.count("<textarea ") == 12
    assert "&lt;b&gt;crown&lt;/b&gt; &amp; &quot;tail&quot;" in page and "<b>" not in page
    assert "它有" in page and "is not English" in page and "<li>a dark crown</li>" in page
    assert "http" not in page  # nothing comes from elsewhere
    ids = re.findall(r'data-id="([^"]+)"', page)
    assert [name.rpartition("photos/")[2] for name in ids] == [
        "a/0.png#0",
        "b/0.png#0",
        "c/0.png#0",
    ]
    corrected = {
        "keep": True,
        "analysis": "It has a corrected crown.",
        "options": f"{NAMES[2]}, Other",
        "comparison": "x",
        "prediction": NAMES[2],
    }
    dropped = corrected | {"keep": False}
    review = tmp_path / "review.json"
    review.write_text(json.dumps({"samples": {ids[2]: corrected, ids[1]: dropped}}))
    argv = ["make_cot", "--data=x", f"--out={out}", f"--reviewed={review}"]
    monkeypatch.setattr(sys, "argv", argv)
    command.main()
    samples, _ = read_sft(out / "stage1.json")
    answers = [sample.messages[-1][1] for sample in samples]
    assert "<b>crown</b>" in answers[0] and "It has a corrected crown." in answers[1]
    assert len(answers) == 2 and answers[1].endswith(f"<answer>{NAMES[2]}</answer>")
    (rejected,) = read_samples(out / "rejected.jsonl")
    assert (rejected.sub_category, rejected.reason) == (NAMES[1], "review: not to be kept")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "malformed JSON"),
        ("[]", "must hold 'samples'"),
        ('{"samples": {"x#0": {}}}', "'x#0' is no sample"),
        ('{"samples": {"ID": {"keep": 1}}}', "'keep' must be true or false"),
        ('{"samples": {"ID": {"keep": true}}}', "needs the texts analysis, options"),
        (
            '{"samples": {"ID": {"keep": true, "analysis": "a", "options": "b", "comparison": "c", '
            '"prediction": "d"}}}',
            "is to be kept, but: options: the prediction is not among them",
        ),
    ],
)
def test_a_review_that_does_not_fit_is_named(content, message, triplets, tmp_path):
    out, review = tmp_path / "cot", tmp_path / "review.json"
    with Hostile(Canned()) as server:
        make_cot(options(triplets, out, server.url))
    before = (out / "stage1.json").read_text()
    review.write_text(content.replace("ID", read_samples(out / "kept.jsonl")[0].id))
    with pytest.raises(ValueError, match=f"review.json.*{message}"):
        make_cot(CotConfig(data="x", out=str(out), reviewed=str(review)))
    assert (out / "stage1.json").read_text() == before


def test_direct_records_need_no_teacher(triplets, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["make_cot", f"--data={triplets}", f"--out={tmp_path / 'd'}", "--direct"]
    )
    command.main()
    samples, _ = read_sft(tmp_path / "d" / "stage1.json")
    assert len(samples) == 6
    assert samples[0].messages == (
        ("user", "<image>What bird is number 0?"),
        ("assistant", f"<answer>{NAMES[0]}</answer>"),
    )


def test_photos_of_a_photo_set_are_those_not_held_out(tmp_path):
    classes, images = [], []
    for name, partition in (("wren", "seen"), ("tit", "unseen")):
        labels = {"super_category": "bird", "sub_category": name}
        classes.append(labels | {"partition": partition})
        for number, split in enumerate(("test", "train", "train", "train")):
            image = labels | {"path": f"{name}{number}.png", "split": split}
            images.append(image | {"in_stage1": number == 2})
            Image.new("RGB", (9, 9), (number, len(name), 0)).save(tmp_path / f"{name}{number}.png")
    listing = {"classes": classes, "images": images}
    (tmp_path / "manifest.json").write_text(json.dumps(listing))
    photos, remarks = stage1_photos(tmp_path, 1)
    assert [Path(photo.image).name for photo in photos] == ["wren2.png"] and remarks == []
    assert photos[0].question.endswith(" bird is this?") or "bird" in photos[0].question
    photos, _ = stage1_photos(tmp_path, 9)
    assert sorted(Path(p.image).name for p in photos) == ["wren1.png", "wren2.png", "wren3.png"]


def test_what_is_missing_is_named(triplets, tmp_path):
    with pytest.raises(ValueError, match="--url and --teacher name the teacher; --direct needs"):
        make_cot(CotConfig(data=str(triplets), out=str(tmp_path / "cot")))
    stored = json.loads((triplets / "triplets.json").read_text())
    (triplets / "triplets.json").write_text(json.dumps(stored | {"sft": []}))
    with pytest.raises(ValueError, match="sets no photo aside for stage 1: data.sft_shots was 0"):
        make_cot(CotConfig(data=str(triplets), out=str(tmp_path / "cot"), direct=True))
    done = subprocess.run(
        [sys.executable, "-m", "tercet.train.make_cot", "--data=nowhere", "--out=o", "--direct"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("make_cot.py: ") and "nowhere: no such folder" in done.stderr


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """A tiny random BERT with a tokenizer of words."""
    folder = str(tmp_path_factory.mktemp("bert"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    BertModel(config).save_pretrained(folder)
    words = "[PAD] [UNK] a dark crown red long bill webbed feet eyes the of and".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


def test_text_embeddings_are_means_of_unit_length_whatever_is_beside_them(bert):
    """Against the model run on one text at a time, without padding."""
    texts = ["a dark crown", "red", "the long red bill and the webbed feet of the", "red " * 40] * 9
    found = text_embedder(bert)(texts)
    model, tokenizer = (
        BertModel.from_pretrained(bert),
        PreTrainedTokenizerFast.from_pretrained(bert),
    )
    for text, row in zip(texts[:4], found, strict=False):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :12]
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(found[:4], found[32:36], atol=1e-6) and found.dtype == torch.float32
    assert text_embedder(bert)([]).shape == (0, 16)
    with pytest.raises(ValueError, match="text embedder '/nowhere' cannot be loaded"):
        text_embedder("/nowhere")


def test_a_folder_embeds_in_place_of_the_endpoint(bert, triplets, tmp_path):
    teacher = Canned()
    with Hostile(teacher) as server:
        assert make_cot(options(triplets, tmp_path / "cot", server.url, embedder=bert)) == 3
    assert "/v1/embeddings" not in server.asked


@pytest.mark.parametrize(
    "rows, fault",
    [
        ([{"index": 0, "embedding": [1.0]}], "1 embeddings for 2 texts"),
        ([{"index": 0, "embedding": [1.0]}] * 2, "2 embeddings for 2 texts"),
        ([{"index": n, "embedding": [1.0] * (n + 1)} for n in (0, 1)], "of several sizes"),
        ([{"index": n, "embedding": []} for n in (0, 1)], "embedding"),
        ([{"index": n, "embedding": ["1"]} for n in (0, 1)], "embedding"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(rows, fault):
    import asyncio

    with Hostile(lambda path, body: as_json({"data": rows})) as server:
        client = ChatClient(f"{server.url}/v1", "m", what="teacher")
        with pytest.raises(ServerError, match=f"5 bad answers, the last one: .*{fault}"):
            asyncio.run(client.embed(["a", "b"]))


@pytest.mark.sglang
@pytest.mark.skipif(not PYTHON, reason="no SGLang server: run make test-sglang")
def test_a_real_endpoint_is_asked_about_photos(server, bert, triplets, tmp_path):
    """A tiny random policy as teacher: what it says is kept whole, and has no tags."""
    out = tmp_path / "cot"
    small = {"description_tokens": 8, "concept_tokens": 8, "cot_tokens": 8, "tries": 2}
    config = options(triplets, out, server.url, embedder=bert, patience_s=60.0, **small)
    for _ in range(2):
        with pytest.raises(ValueError, match="stage1.json: nothing was kept"):
            make_cot(replace(config, teacher="default"))
    rejected = read_samples(out / "rejected.jsonl")
    assert len(rejected) == 6
    reasons = {sample.reason.partition(":")[0] for sample in rejected}
    assert reasons <= {"tags", "cut off", "empty"}
    assert any(sample.said for sample in rejected)
