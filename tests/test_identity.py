"""What a run is, and which of its options may change when it goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny

from tercet.core.config import SftConfig, TapoConfig
from tercet.train.run.identity import (
    KINDS,
    Identity,
    Kind,
    kind_of,
    launch,
    model_digest,
    options_of,
    photos_digest,
    same_launch,
    shown,
)

pytestmark = pytest.mark.core


def names(kind: Kind, config) -> set[str]:
    return {name for name in options_of(config) if kind_of(name) is kind}


def test_every_option_has_a_kind_and_every_kind_an_option():
    every = options_of(TapoConfig()) | options_of(SftConfig())
    assert len(every) > 80 and all(kind_of(name) in Kind for name in every)
    unkept = {name for name, kind in KINDS.items() if kind is Kind.UNKEPT}
    sections = {name.partition(".")[0] for name in every}
    assert unkept == {"rollout.api_key", "run.overwrite"}
    assert KINDS.keys() - unkept <= every.keys() | sections and sections <= KINDS.keys()


def test_what_may_never_change():
    data = "names questions seen_fraction shots sft_shots embedder similarity seed".split()
    data += "embedder_layer super_category negatives genus on_missing duplicates".split()
    fixed = {f"data.{name}" for name in data} | {"run.seed", "optim.states"}
    fixed |= {"model.lora_rank", "model.lora_alpha", "model.lora_targets"}
    assert names(Kind.FIXED, TapoConfig()) == fixed
    assert names(Kind.CONTENT, TapoConfig()) == {"data.path", "model.path"}
    sft = {name for name in fixed if not name.startswith("data.")} | {"data.held_out"}
    sft |= {"optim.samples_per_step"}
    assert names(Kind.FIXED, SftConfig()) == sft


def test_what_changes_the_training_is_listed():
    listed = names(Kind.LISTED, TapoConfig()) | names(Kind.STEP, TapoConfig())
    assert {"optim.lr", "optim.schedule", "run.preset", "rollout.reward", "loss.kl_coef"} <= listed
    assert {"rollout.n_anchor", "rollout.temperature", "model.system_prompt"} <= listed
    assert {"model.freeze_vision", "model.max_pixels", "run.steps", "data.positive"} <= listed
    free = names(Kind.FREE, TapoConfig())
    assert {"run.out", "run.keep_last", "rollout.urls", "parallel.micro_batch_tokens"} <= free


def test_the_api_key_is_never_stored():
    config = TapoConfig()
    config.rollout.api_key = "secret"
    assert "secret" not in json.dumps(options_of(config))


def test_changes_are_one_line():
    changed = {
        "optim.lr": (1e-6, 1e-5),
        "model.system_prompt": (None, "Be\nbrief."),
        "data.seed": (1, "y " * 200),
    }
    first, second, third = shown(changed).split(", ")
    assert (first, second) == (
        "optim.lr 1e-06 -> 1e-05",
        r'model.system_prompt null -> "Be\nbrief."',
    )
    assert third.startswith('data.seed 1 -> "y y ') and third.endswith("y ...") and len(third) < 99


@pytest.mark.parametrize(
    "stored", [None, 7, [], "id", {}, {"id": "x"}, {"options": 3}, {"more": 1}], ids=str
)
def test_what_is_no_identity(stored):
    whole = {
        "id": "a",
        "command": "sft",
        "options": {"optim.lr": 1},
        "model": "m",
        "data": {},
        "launch": {},
    }
    assert Identity.of(whole).options == {"optim.lr": 1}
    assert Identity.of(stored) is None
    if isinstance(stored, dict) and len(stored) == 1:
        assert Identity.of(whole | stored) is None or "id" in stored


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "policy"
    tiny(hidden_size=64, layers=1, vision_layers=1).save(folder)
    return folder


def test_a_models_digest_is_that_of_a_copy(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("mine")
    (tmp_path / "copy" / "eval.json").write_text("{}")
    assert model_digest(str(model)) == model_digest(str(tmp_path / "copy"))
    assert model_digest("Org/Model-3B") == "id Org/Model-3B"


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def train_projections(folder):
    """As LoRA merged into it: same names, same sizes, same header."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weight += 1e-3 * torch.ones_like(weight)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rename_weights(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def other_end_of_turn(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')


@pytest.mark.parametrize(
    "change", [change_config, train_projections, rename_weights, other_end_of_turn]
)
def test_another_model_has_another_digest(model, tmp_path, change):
    shutil.copytree(model, tmp_path / "other")
    change(tmp_path / "other")
    assert model_digest(str(model)) != model_digest(str(tmp_path / "other"))


def test_photos_are_told_by_name_and_content(tmp_path):
    for name in ("a.png", "b.png", "rows.parquet"):
        (tmp_path / name).write_bytes(b"x" * 10)
    keys = [str(tmp_path / "a.png"), str(tmp_path / "rows.parquet#0/images/0")]
    first = photos_digest(keys, str(tmp_path))
    assert photos_digest(keys[::-1], str(tmp_path)) == first
    shutil.copytree(tmp_path, tmp_path / "moved")
    moved = [key.replace(str(tmp_path), str(tmp_path / "moved")) for key in keys]
    assert photos_digest(moved, str(tmp_path / "moved")) == first
    assert photos_digest([*keys, str(tmp_path / "b.png")], str(tmp_path)) != first
    (tmp_path / "rows.parquet").write_bytes(b"y" + b"x" * 9)  # of the same size
    assert photos_digest(keys, str(tmp_path)) != first
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="a.png, which the run trains on, cannot be read"):
        photos_digest(keys, str(tmp_path))


def test_a_restart_is_told_from_another_start(monkeypatch):
    here = launch()
    assert same_launch(here, launch())
    assert not same_launch(here | {"parent": "7 since 9"}, here)
    assert not same_launch({}, here)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # rank 0 may come up on another node
    several = launch()
    assert same_launch(several | {"host": "other"}, several)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert not same_launch(several | {"host": "other"}, launch())
