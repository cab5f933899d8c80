"""The analyses against computations by hand, and the command on a tiny policy."""

from __future__ import annotations

import csv
import sys
from math import sqrt

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tercet.train import analyse
from tercet.train.evaluation.analysis import (
    compare_differences,
    genera_of,
    genus_differences,
    linear_probe,
    principal_components,
)
from tercet.train.evaluation.hidden_states import DESCRIBE, HiddenStates


def test_a_probe_finds_what_is_linear_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 3
    centres = 6 * torch.eye(3, 16)
    rows = centres[labels] + 3 * torch.randn(4000, 16, generator=generator)
    half = (rows[:3000], labels[:3000], rows[3000:], labels[3000:])
    found = linear_probe(*half)
    bayes = (rows[3000:] @ centres.T).argmax(dim=1) == labels[3000:]  # centres have one length
    assert found.last == pytest.approx(100 * bayes.float().mean().item(), abs=3)
    assert found.best >= found.last
    noise = labels[torch.randperm(4000, generator=generator)]
    lost = linear_probe(rows[:3000], noise[:3000], rows[3000:], noise[3000:])
    assert lost.last == pytest.approx(100 / 3, abs=6)
    assert linear_probe(*half) == found


def test_genus_differences_are_hand_counted():
    angles = {"Larus a": 0, "Larus b": 10, "Sterna a": 50, "Sterna b": 65, "Alca a": 120}
    embeddings = {
        name: 3 * torch.tensor([np.cos(np.deg2rad(a)), np.sin(np.deg2rad(a))])
        for name, a in angles.items()
    }
    genera = genera_of([*angles, "wren"])
    assert genera == {name: name.split()[0].lower() for name in angles}

    def cosine(one: str, other: str) -> float:
        return np.cos(np.deg2rad(angles[one] - angles[other]))

    far = {
        "Larus a": ("Sterna a", "Sterna b", "Alca a"),
        "Sterna a": ("Larus a", "Larus b", "Alca a"),
    }
    found = genus_differences(embeddings, genera)
    assert set(found) == {"Larus a", "Larus b", "Sterna a", "Sterna b"}
    for name, others in far.items():
        near = name[:-1] + "b"
        mean = sum(cosine(name, other) for other in others) / 3
        assert found[name] == pytest.approx(cosine(name, near) - mean, abs=1e-6)
    # Four of many are drawn, the same ones for every model.
    many = {
        f"Genus{n} x": torch.randn(4, generator=torch.Generator().manual_seed(n)) for n in range(9)
    }
    many |= {"Genus0 y": many["Genus0 x"]}
    drawn = genus_differences(many, genera_of(list(many)))
    assert set(drawn) == {"Genus0 x", "Genus0 y"}
    assert drawn == genus_differences({k: 2 * v for k, v in many.items()}, genera_of(list(many)))


def test_the_t_test_is_the_formula():
    first = {"a": 0.1, "b": 0.3, "c": 0.2, "only": 9.0}
    second = {"a": 0.4, "b": 0.5, "c": 0.6}
    t, p = compare_differences(first, second)
    gains = np.array([0.3, 0.2, 0.4])
    assert t == pytest.approx(gains.mean() / (gains.std(ddof=1) / sqrt(3)))
    # Student's t with two degrees of freedom: P(|T| > t) = 1 - t / sqrt(2 + t^2).
    assert p == pytest.approx(1 - t / sqrt(2 + t * t))
    with pytest.raises(ValueError, match="at least two species, got 1"):
        compare_differences({"a": 1.0}, {"a": 2.0})


def test_genera_from_a_file(tmp_path):
    (tmp_path / "g.csv").write_text("name,genus\nhouse_wren,Troglodytes\nHerring Gull,Larus\n")
    names = ["House Wren", "herring gull", "puffin"]
    expected = {"House Wren": "troglodytes", "herring gull": "larus"}
    assert genera_of(names, tmp_path / "g.csv") == expected
    (tmp_path / "g.csv").write_text("name,genus\nwren,A\nWren,B\n")
    with pytest.raises(ValueError, match="g.csv: 'Wren' has two genera, a and b"):
        genera_of(names, tmp_path / "g.csv")
    (tmp_path / "g.csv").write_text("species;genus\n")
    with pytest.raises(ValueError, match="needs the columns name and genus"):
        genera_of(names, tmp_path / "g.csv")


def test_principal_components_are_those_of_the_covariance():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)
    points, shares = principal_components(rows)
    values = np.linalg.eigvalsh(np.cov(rows.numpy().T))[::-1]
    assert shares == pytest.approx(values[:2] / values.sum(), rel=1e-4)
    assert points.var(axis=0, ddof=1) == pytest.approx(values[:2], rel=1e-4)
    assert points.mean(axis=0) == pytest.approx([0, 0], abs=1e-6)


def test_hidden_states_are_those_of_plain_transformers(photos, tmp_path):
    parts = tiny()
    parts.save(tmp_path / "policy")
    found = HiddenStates(parts)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "policy")
    photo = processor(Image.open(photos[0]).convert("RGB"), return_tensors="pt")
    pads = photo["image_grid_thw"].prod().item() // processor.merge_size**2
    content = [{"type": "image"}, {"type": "text", "text": DESCRIBE}]
    turns = [{"role": "user", "content": content}]
    text = parts.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = parts.tokenizer(
        text.replace("<|image_pad|>", "<|image_pad|>" * pads), return_tensors="pt"
    )
    is_image = ids["input_ids"] == parts.model.config.image_token_id
    with torch.no_grad():
        output = parts.model(
            **ids, **photo, mm_token_type_ids=is_image.int(), output_hidden_states=True
        )
        named = parts.tokenizer("red longbill", return_tensors="pt", add_special_tokens=False)
        alone = parts.model(**named, output_hidden_states=True).hidden_states[-1][0]
    states = output.hidden_states[-1][0]
    assert torch.allclose(found.photo(photos[0]), states[is_image[0]].mean(dim=0), atol=1e-4)
    assert torch.allclose(found.question(DESCRIBE, photos[0]), states[-1], atol=1e-4)
    assert torch.allclose(found.name("red longbill"), alone.mean(dim=0), atol=1e-4)


def test_the_command_compares_two_models(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for name in ("Larus fuscus", "Larus canus", "Sterna hirundo"):
        (tmp_path / "photos" / "bird" / name).mkdir(parents=True)
        for n in range(4):
            pixels = rng.integers(0, 255, (60, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / "bird" / name / f"{n}.png")
    for seed, name in enumerate(("mine", "base")):
        tiny(seed=seed).save(tmp_path / name)
    argv = ["analyse", f"--photos={tmp_path / 'photos'}", f"--model.path={tmp_path / 'mine'}"]
    argv += [f"--other={tmp_path / 'base'}", f"--out={tmp_path / 'new' / 'out'}", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    analyse.main()
    said = capsys.readouterr().out
    assert said.count("linear probe") == 2 and "6 + 6 photos, 3 classes" in said
    assert said.count("same genus minus other genera") == 2 and "paired t = " in said
    with open(tmp_path / "new" / "out" / "genus.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["species"] for row in rows] == ["Larus canus", "Larus fuscus"]
    for n in (1, 2):
        assert Image.open(tmp_path / "new" / "out" / f"plane_{n}.png").size[0] > 500
