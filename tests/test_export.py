"""Exports: folders that load as the checkpoint does, cards from the run's own data, uploads."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_stub import TOKEN, serve_hub
from PIL import Image
from sglang_support import PYTHON, make_server
from support import tiny
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tercet.core import commit
from tercet.core.config import DataConfig, ModelConfig, SftConfig, TapoConfig
from tercet.core.data.triplets import prepare_manifest
from tercet.core.models import load_policy
from tercet.train import export
from tercet.train.learner.lora import add_lora, added_weights, save_adapter, whole_weights
from tercet.train.logs.environment import describe
from tercet.train.publish import model_folder
from tercet.train.publish.trained import Trained
from tercet.train.run.complete import write_complete
from tercet.train.run.identity import Identity, options_of

BASE = "somebody/base-vl"
QUESTION = torch.tensor([[5, 6, 7, 8, 9]])


def run_of(config: TapoConfig | SftConfig, model: str) -> dict:
    """Identity of a run, as a checkpoint holds it."""
    command = "tapo" if isinstance(config, TapoConfig) else "sft"
    parts = {"id": "1", "command": command, "model": model, "data": {}, "launch": {}}
    return asdict(Identity(options=options_of(config), **parts))


def make_photos(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("red_bird", "blue_bird", "grey_bird", "pink_bird"):
        (folder / "bird" / name).mkdir(parents=True)
        for n in range(3):
            pixels = rng.integers(0, 255, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "bird" / name / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder: triplets, metrics, curves, and a checkpoint of its step 3."""
    root = tmp_path_factory.mktemp("export")
    folder, photos = root / "runs" / "mine", make_photos(root / "photos")
    options = DataConfig(path=str(photos), shots=2, sft_shots=0, seen_fraction=0.5)
    manifest = prepare_manifest(options, lambda keys: torch.eye(len(keys)))
    manifest.write(folder)
    (folder / "curves.png").write_bytes(b"curves")
    (folder / "environment.json").write_text('{"Tercet": "0.1.0, commit abc", "host": "h7"}')
    steps = [{"step": n, "reward": n / 10, "eval_unseen": n / 5, "own": 1.0} for n in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    checkpoint = folder / "checkpoints" / "step_000003"
    tiny().save(checkpoint)
    config = TapoConfig(data=options, model=ModelConfig(path=BASE))
    config.rollout.reward = "my_rewards:short"
    config.rollout.urls = ["http://10.0.0.7:30000"]
    config.rollout.judge_cache = str(root / "judge.sqlite")
    config.optim.lr = 2e-6
    write_complete(checkpoint, 3, 1, run_of(config, f"id {BASE}"))
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A checkpoint of a run with LoRA, whose base lies in the folder `base` beside it."""
    root = tmp_path_factory.mktemp("lora")
    tiny().save(root / "base")
    parts = tiny()
    options = ModelConfig(path=str(root / "base"), lora_rank=4, lora_alpha=8)
    add_lora(parts.model, options)
    with torch.no_grad():
        for _, added in added_weights(parts.model):
            added += 0.05 * torch.randn(added.shape, generator=torch.Generator().manual_seed(0))
    checkpoint = root / "run" / "checkpoints" / "step_000001"
    parts.save(checkpoint, dict(whole_weights(parts.model)))
    save_adapter(parts.model, dict(added_weights(parts.model)), checkpoint / "adapter")
    identity = run_of(TapoConfig(model=options), "digest")
    write_complete(checkpoint, 1, 1, identity)
    return checkpoint


def card_of(folder: Path) -> tuple[dict, str]:
    """Front matter and text of README.md."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=QUESTION).logits


def exported(source: Path, out: Path, *more: str) -> Path:
    print(export.export(export.read([str(source), "--out", str(out), *more])))
    return out


def test_a_checkpoint_loads_in_transformers_as_it_was(run, tmp_path, monkeypatch):
    checkpoint = run / "checkpoints" / "step_000003"
    monkeypatch.setattr(model_folder.write_merged, "__defaults__", (300_000,))
    out = exported(checkpoint, tmp_path / "birds")
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    model, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    ours = AutoTokenizer.from_pretrained(checkpoint)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == ours.get_vocab()
    load_policy(ModelConfig(path=str(out)))
    here = {path.name for path in out.iterdir()}
    assert {"README.md", "curves.png", "chat_template.jinja", "preprocessor_config.json"} <= here
    assert not here & {"complete.json", "trainer_state.pt", "triplets.json", "samples.png"}


def test_the_card_says_what_the_run_says(run, tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "tables.md").write_text(
        "## Closed-world\n\n| model |\n| --- |\n| mine |\n"
    )
    more = ["--licence", "apache-2.0", "--evaluation", str(tmp_path / "eval")]
    out = exported(run / "checkpoints" / "step_000003", tmp_path / "birds", *more)
    front, text = card_of(out)
    assert front["base_model"] == BASE and front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers" and "tapo" in front["tags"]
    assert "| bird | 4 | 2 | 4 |" in text  # half of four sub-categories, two photos of each
    # Steps after the checkpoint's third do not count.
    assert "| reward | mean reward of a response | 0.1 | 0.3 |" in text
    assert "| 0.2 | 0.6 |" in text and "own" not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["optim"] == {"lr": 2e-6}
    assert recipe["rollout"] == {"reward": "my_rewards:short", "judge_cache": "judge.sqlite"}
    assert recipe["data"] == {"seen_fraction": 0.5, "shots": 2, "sft_shots": 0}
    assert "](curves.png)" in text and "### Closed-world" in text and "| mine |" in text
    assert f"version {commit.code_version()} wrote" in text and "after 3 steps" in text
    assert "Tercet, version 0.1.0, commit abc." in text and "h7" not in text
    for secret in (str(tmp_path), str(run), "10.0.0.7", "photos/"):
        assert secret not in text


def test_an_adapter_on_its_base_is_the_merged_model(lora, tmp_path):
    from peft import PeftModel

    with pytest.raises(ValueError, match="which nobody else has: give its hub id, --base"):
        exported(lora, tmp_path / "adapter", "--adapter")
    assert not (tmp_path / "adapter").exists()
    out = exported(lora, tmp_path / "adapter", "--adapter", "--base", BASE)
    front, text = card_of(out)
    assert front["library_name"] == "peft" and front["base_model_relation"] == "adapter"
    assert "from_pretrained(model, 'adapter')" in text
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = AutoModelForImageTextToText.from_pretrained(lora.parents[2] / "base")
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, out))
    merged = exported(lora, tmp_path / "merged", "--merged")
    whole = logits(AutoModelForImageTextToText.from_pretrained(merged))
    torch.testing.assert_close(adapted, whole, atol=1e-4, rtol=1e-4)
    assert (adapted - plain).abs().max() > 0.01
    assert not (merged / "adapter").exists()
    bare = tmp_path / "bare" / "checkpoints" / "step_000001"  # as run.save_lora adapter leaves it
    bare.mkdir(parents=True)
    shutil.copytree(lora / "adapter", bare / "adapter")
    write_complete(bare, 1, 1, None)
    with pytest.raises(ValueError, match="run.save_lora adapter.: give --adapter"):
        exported(bare, tmp_path / "none")
    again = exported(bare, tmp_path / "again", "--adapter", "--base", BASE)
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (out / weights).read_bytes()


def test_the_base_is_followed_through_stages(run, tmp_path):
    stage1 = tmp_path / "stage1"
    tiny().save(stage1)
    write_complete(stage1, 1, 1, run_of(SftConfig(model=ModelConfig(path=BASE)), f"id {BASE}"))
    second = tmp_path / "second" / "checkpoints" / "step_000001"
    tiny().save(second)
    config = TapoConfig(model=ModelConfig(path=str(stage1)))
    write_complete(second, 1, 1, run_of(config, "digest"))
    found = Trained.read(second)
    assert found.base() == BASE and found.metrics == [] and found.manifest is None
    out = exported(second, tmp_path / "out")
    assert "The run's folder was not there" in card_of(out)[1]
    (second / "complete.json").unlink()
    gone = TapoConfig(model=ModelConfig(path="a/b"))
    write_complete(second, 1, 1, run_of(gone, "digest"))
    assert Trained.read(second).base() is None  # a folder a/b that is gone is no hub id
    (second / "complete.json").unlink()
    write_complete(second, 1, 1, None)
    assert "earlier version" in card_of(exported(second, tmp_path / "old"))[1]


def test_what_is_no_checkpoint_is_refused_and_nothing_is_left(run, lora, tmp_path, policy):
    out, step = tmp_path / "out", run / "checkpoints" / "step_000003"
    policy.save(tmp_path / "plain")
    cases = [
        ([str(tmp_path / "nothing")], "there is no .*nothing: give a checkpoint"),
        ([str(run)], "is a run's folder; give one of its checkpoints: step_000003"),
        ([str(tmp_path / "plain")], "has no complete.json"),
        ([str(step), "--adapter"], "holds no adapter"),
        ([str(step), "--adapter", "--merged"], "exclude each other"),
        ([str(step), "--photos"], "--photos is for stage-1 records"),
        ([str(step), "--evaluation", str(tmp_path)], "it needs a tables.md"),
        ([str(run / "curves.png"), "--adapter"], "--adapter is for checkpoints"),
        ([str(run / "curves.png")], "curves.png"),
        ([str(step), "--push", "birds"], "--push must be USER/NAME, got 'birds'"),
        ([str(step), "--push", "a/b c"], "--push must be USER/NAME"),
    ]
    for argv, message in cases:
        with pytest.raises(ValueError, match=message):
            export.export(export.read([*argv, "--out", str(out)]))
        assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already: give a new folder"):
        exported(step, tmp_path / "full")
    copied = tmp_path / "damaged"
    policy.save(copied)
    write_complete(copied, 1, 1, None)
    (copied / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no whole checkpoint: config.json has 2 bytes"):
        exported(copied, out)


def test_a_push_reaches_the_hub_whole(run, tmp_path, monkeypatch):
    step = run / "checkpoints" / "step_000003"
    with serve_hub(monkeypatch) as hub:
        out = exported(step, tmp_path / "birds", "--push", "somebody/birds")
    made = {"name": "birds", "organization": "somebody", "visibility": "private", "type": "model"}
    assert [{name: r[name] for name in made} for r in hub.repositories] == [made]
    local = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert hub.files == local and len(hub.objects) == 2  # weights and curves.png, by LFS
    assert {*hub.cards} == {(out / "README.md").read_text()}
    assert TOKEN not in "".join(hub.cards) and "'somebody/birds'" in hub.cards[0]
    copy = hub.write(tmp_path / "copy")
    ours = AutoModelForImageTextToText.from_pretrained(step)
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(copy)), logits(ours))


def test_a_push_without_a_token_or_with_a_wrong_one_is_refused(run, tmp_path, monkeypatch):
    step = run / "checkpoints" / "step_000003"
    with serve_hub(monkeypatch) as hub:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(ValueError, match="--push needs a token"):
            exported(step, tmp_path / "birds", "--push", "somebody/birds")
        assert not (tmp_path / "birds").exists()
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(ValueError, match="the hub refuses: .*401") as refused:
            exported(step, tmp_path / "birds", "--push", "somebody/birds")
        assert "hf_wrong" not in str(refused.value) and not hub.files


@pytest.mark.sglang
@pytest.mark.skipif(not PYTHON, reason="no SGLang server: run make test-sglang")
def test_an_export_loads_on_a_server(run, tmp_path):
    out = exported(run / "checkpoints" / "step_000003", tmp_path / "birds")
    with make_server(None, out) as server:
        assert server.is_healthy()


def test_records_become_a_data_set(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos")
    said = "<think>It is red.</think><answer>red bird</answer>"
    messages = [{"role": "user", "content": "<image>Which bird?"}]
    messages += [{"role": "assistant", "content": said}]
    records = [
        {"messages": messages, "images": [f"../photos/bird/{name}/0.png"]}
        for name in ("red_bird", "pink_bird")
    ]
    (tmp_path / "cots").mkdir()
    (tmp_path / "cots" / "stage1.json").write_text(json.dumps(records))
    source = tmp_path / "cots" / "stage1.json"
    out = exported(source, tmp_path / "bare", "--licence", "mit")
    found = json.loads((out / "stage1.json").read_text())
    assert [r["images"] for r in found] == [["red_bird/0.png"], ["pink_bird/0.png"]]
    assert [r["messages"] for r in found] == [messages] * 2
    front, text = card_of(out)
    assert front["license"] == "mit" and front["size_categories"] == ["n<1K"]
    assert "red bird (2)" in text and "not part of this repository" in text
    with serve_hub(monkeypatch) as hub:
        exported(source, tmp_path / "whole", "--photos", "--push", "somebody/birds")
    assert hub.repositories[0]["type"] == "dataset"
    from tercet.core.data.records import read_sft

    samples, _ = read_sft(hub.write(tmp_path / "copy") / "stage1.json")
    assert samples[0].images[0] == str(tmp_path / "copy" / "photos" / "red_bird" / "0.png")
    (photos / "bird" / "red_bird" / "0.png").unlink()
    with pytest.raises(ValueError, match="red_bird/0.png"):
        exported(source, tmp_path / "third")


def test_the_version_names_the_commit_where_there_is_one(monkeypatch, tmp_path):
    import subprocess

    root = Path(commit.__file__).resolve().parents[1]
    ask = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    if head:
        assert f"commit {head[:12]}" in commit.code_version()
    assert describe(torch.device("cpu"), 1)["Tercet"] == commit.code_version()
    monkeypatch.setattr(commit, "__file__", str(tmp_path / "core" / "commit.py"))
    assert "commit" not in commit.code_version()
