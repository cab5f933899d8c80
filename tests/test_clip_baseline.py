"""CLIP-style baselines: equal to the model's own logits in a plain loop over questions."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_support import siglip
from PIL import Image
from test_eval_fgvr import answers_in, evaluate
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    SiglipImageProcessorPil,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tercet.train.evaluation.clip_baseline import templates_of

NAMES = ["wren", "puffin", "herring_gull", "black tern", "auk", "Boeing 737-200"]
SIZE = {"height": 16, "width": 16}


def make_siglip(folder: Path) -> Path:
    siglip(folder)
    SiglipImageProcessorPil(size=SIZE).save_pretrained(folder)
    return with_large_weights(folder)


def make_clip(folder: Path) -> Path:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {w: n for n, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE).save_pretrained(folder)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text = CLIPTextConfig(
        **sizes,
        vocab_size=len(vocab),
        eos_token_id=vocab["<|endoftext|>"],
        bos_token_id=vocab["<|startoftext|>"],
        max_position_embeddings=77,
    )
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    CLIPModel(config).save_pretrained(folder)
    return with_large_weights(folder)


def with_large_weights(folder: Path) -> Path:
    """With those of initialisation every photo is closest to the same name."""
    model = AutoModel.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.dim() > 1:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def write_questions(folder: Path, n: int = 40) -> list[dict]:
    rng, lines = np.random.default_rng(0), []
    (folder / "photos" / "bird").mkdir(parents=True)
    for i in range(n):
        pixels = rng.integers(0, 255, (*rng.integers(20, 60, 2), 3), dtype=np.uint8)
        colour = rng.integers(0, 255, 3, dtype=np.uint8)
        Image.fromarray(pixels // 2 + colour // 2).save(folder / "photos" / "bird" / f"{i}.png")
        options = rng.permutation(NAMES)[:4].tolist()
        line = {"image_path": f"bird/{i}.png", "question": "?", "options": options}
        lines.append(line | {"ground_truth": options[0]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "my_seen.jsonl").write_text(text)
    return lines


@torch.no_grad()
def by_hand(model_folder: Path, photos: Path, lines: list[dict], templates: list[str]) -> list[str]:
    """One question at a time through the model's own cosines."""
    model = AutoModel.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    processor = AutoImageProcessor.from_pretrained(model_folder)
    chosen = []
    for line in lines:
        image = Image.open(photos / line["image_path"]).convert("RGB")
        pixels = processor(image, return_tensors="pt")
        scores = []
        for name in line["options"]:
            texts = [t.replace("{}", name.replace("_", " ")) for t in templates]
            ids = tokenizer(texts, padding="max_length", max_length=64, return_tensors="pt")
            found = model(**ids, **pixels)
            mean = torch.nn.functional.normalize(found.text_embeds.mean(dim=0), dim=0)
            scores.append((found.image_embeds[0] @ mean).item())
        chosen.append(line["options"][int(np.argmax(scores))])
    return chosen


@pytest.mark.parametrize("make", [make_clip, make_siglip])
@pytest.mark.parametrize("kind", ["one", "imagenet"])
def test_choices_are_those_of_a_plain_loop(make, kind, tmp_path, monkeypatch):
    lines = write_questions(tmp_path, 40 if kind == "one" else 8)
    model = make(tmp_path / "clip")
    more = [f"--questions={tmp_path / 'my_seen.jsonl'}", f"--clip={model}", "--modes=closed"]
    more.append("--model.path=")
    (row,) = evaluate(monkeypatch, tmp_path, *more, f"--clip_templates={kind}")
    found = {a["line"]: a["output"] for a in answers_in(tmp_path)}
    expected = by_hand(model, tmp_path / "photos", lines, templates_of(kind))
    said = [f"<answer>{name}</answer>" for name in expected]
    assert [found[n] for n in range(1, len(lines) + 1)] == said
    right = sum(line["ground_truth"] == e for line, e in zip(lines, expected, strict=True))
    assert float(row["closed_strict"]) == pytest.approx(100 * right / len(lines))
    assert len(set(expected)) > 3


def test_templates_are_80_and_each_holds_one_name():
    found = templates_of("imagenet")
    assert len(set(found)) == 80 and all(t.count("{}") == 1 and t == t.strip() for t in found)
    assert found[0] == "a bad photo of a {}." and found[-1] == "a tattoo of the {}."
    assert templates_of("one") == ["a photo of a {}"]


def test_what_is_no_clip_is_named(tmp_path, monkeypatch):
    write_questions(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    more = [f"--questions={tmp_path / 'my_seen.jsonl'}", f"--clip={tmp_path / 'empty'}"]
    more.append("--model.path=")
    with pytest.raises(ValueError, match="--clip chooses among the options: it needs --modes"):
        evaluate(monkeypatch, tmp_path, *more)
    with pytest.raises(ValueError, match=r"--clip '.*empty' cannot be loaded: (?!.*null)"):
        evaluate(monkeypatch, tmp_path, *more, "--modes=closed")
