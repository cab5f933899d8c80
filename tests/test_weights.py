"""Sending weights to servers: names, buckets, files, payloads."""

from __future__ import annotations

import base64
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tercet.core.models import checkpoint_names
from tercet.rollout import weight_folder
from tercet.rollout.guard import remove_abandoned
from tercet.rollout.weight_folder import buckets, own_folder, roomy_folder, write_weights
from tercet.rollout.weights import open_sync, pickled

pytestmark = pytest.mark.core


def test_buckets_keep_order_and_hold_one_dtype():
    named = [
        ("a", torch.zeros(4)),  # 16 bytes
        ("b", torch.zeros(4)),
        ("c", torch.zeros(1)),
        ("d", torch.zeros(100)),  # more than a bucket
        ("e", torch.zeros(4)),
        ("f", torch.zeros(4, dtype=torch.bfloat16)),
        ("g", torch.zeros(4, dtype=torch.bfloat16)),
    ]
    found = [[name for name, _ in bucket] for bucket in buckets(named, 32)]
    assert found == [["a", "b"], ["c"], ["d"], ["e"], ["f", "g"]]
    assert list(buckets([], 32)) == []


def test_names_are_those_of_published_checkpoints(parts):
    found = {
        name for name, _ in checkpoint_names(parts.model.config, parts.model.named_parameters())
    }
    if parts.model.config.model_type == "qwen3_vl":
        assert "model.language_model.layers.0.self_attn.q_norm.weight" in found
        assert "model.visual.deepstack_merger_list.1.linear_fc1.weight" in found
        assert all(name.startswith(("model.visual.", "model.language_model.")) for name in found)
        return
    assert "model.layers.0.self_attn.q_proj.weight" in found and "model.norm.weight" in found
    assert all(name.startswith(("model.", "visual.", "lm_head.")) for name in found)
    assert not any("language_model" in name or "model.visual" in name for name in found)


@pytest.mark.parametrize("shard_bytes", [50_000, 1 << 30])
def test_written_weights_are_loaded_by_transformers(parts, tmp_path, shard_bytes):
    parts.save(tmp_path / "policy")
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.add_(0.1)
    (tmp_path / "new").mkdir()
    named = parts.model.named_parameters()
    write_weights(named, tmp_path / "policy", tmp_path / "new", shard_bytes)
    assert (len(list((tmp_path / "new").glob("*.safetensors"))) > 1) == (shard_bytes == 50_000)
    loaded = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "new").named_parameters())
    for name, parameter in parts.model.named_parameters():
        assert torch.equal(loaded[name], parameter), name


def test_a_payload_is_the_tensors_and_no_code():
    """SGLang unpickles only names that it knows: those of torch."""
    named = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.ones(2, dtype=torch.bfloat16))]
    payload = base64.b64decode(pickled(named))
    for (name, tensor), (want, original) in zip(pickle.loads(payload), named, strict=True):
        assert name == want and torch.equal(tensor, original)
    assert b"tercet" not in payload


def test_weights_go_to_memory_where_there_is_room(monkeypatch, tmp_path):
    monkeypatch.setattr(weight_folder, "MEMORY_DISK", tmp_path)
    elsewhere = Path("elsewhere")
    assert roomy_folder(1000, elsewhere) == tmp_path
    assert roomy_folder(1 << 60, elsewhere) == elsewhere
    monkeypatch.setattr(weight_folder, "MEMORY_DISK", tmp_path / "none")
    assert roomy_folder(1000, elsewhere) == elsewhere


def test_folders_of_killed_processes_are_removed_and_those_in_use_stay(tmp_path):
    """A lock tells them apart, so that the number of an ended process may come again."""
    if not (child := os.fork()):
        with own_folder(tmp_path) as folder:
            (folder / "model.safetensors").write_bytes(b"x" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (abandoned,) = tmp_path.iterdir()
    assert (abandoned / "model.safetensors").exists()
    (tmp_path / "tercet-other").mkdir()
    (tmp_path / "tercet-weights-link").symlink_to(tmp_path / "tercet-other")
    with own_folder(tmp_path) as used:
        (used / "a").write_text("b")
        assert remove_abandoned(tmp_path) == [abandoned]
        assert (used / "a").exists() and not abandoned.exists()
    assert not used.exists() and (tmp_path / "tercet-other").exists()
    assert remove_abandoned(tmp_path / "none") == []


def test_an_unknown_way_is_named(tmp_path):
    with pytest.raises(ValueError, match="must be disk, distributed or tensor, got 'pigeon'"):
        open_sync("pigeon", parent=tmp_path, config_from=tmp_path)
