"""Plans of the recipes, what makes others fit, sizes, and the command's text."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from support import tiny

from tercet.core.config import ModelConfig, TapoConfig
from tercet.core.models import FAMILIES, published
from tercet.train import plan as command
from tercet.train.cli.command_line import RECIPES, parse
from tercet.train.fit.estimate import GIB, Plan, changed, remedies
from tercet.train.fit.memory import Breakdown
from tercet.train.fit.roofline import CARDS, Lengths
from tercet.train.fit.sizes import ModelSizes, count, element_bytes
from tercet.train.learner.lora import add_lora

TOTALS = {  # of the published checkpoints
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
}


def planned(*options: str) -> Plan:
    return command.read(options)[0]


@pytest.mark.parametrize("path", list(published()))
def test_published_sizes(path):
    sizes = ModelSizes.of(TapoConfig(model=ModelConfig(path=path)))
    assert sizes.parameters.total == sizes.parameters.trained == TOTALS[path]
    assert sizes.shape.vocabulary * sizes.shape.hidden == sizes.parameters.trained_head
    assert (sizes.element_bytes.weight, sizes.element_bytes.states) == (2, 6)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_local_folder_is_counted_as_the_model_is(architecture, tmp_path):
    parts = tiny(architecture)
    parts.save(tmp_path)
    options = ModelConfig(path=str(tmp_path), freeze_vision=True)
    sizes = ModelSizes.of(TapoConfig(model=options))
    model, blocks = parts.model, [*parts.model.model.visual.blocks]
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    layer = sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for n, p in model.model.visual.named_parameters() if "merger" not in n)
    found = sizes.parameters
    assert found.total == total
    assert found.root == total - sizes.shape.layers * layer - sum(in_blocks)
    assert found.block == max(layer, *in_blocks)
    assert found.trained == total - frozen
    assert not found.trains_vision
    assert sizes.element_bytes == element_bytes(torch.float32)


def test_lora_is_counted_as_it_is_added(tmp_path):
    parts = tiny()
    parts.save(tmp_path)
    options = ModelConfig(path=str(tmp_path), lora_rank=3)
    found = ModelSizes.of(TapoConfig(model=options)).parameters
    add_lora(parts.model, options)
    assert found == count(parts.model)
    assert found.trained == sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    assert found.ranks == 7 * 3  # seven linear layers
    assert found.trained_head == found.trained_root == 0


QWEN3_VL = [f"tapo_qwen3vl_{size}" for size in ("2b", "4b", "8b")]


@pytest.mark.parametrize("name", ["tapo_3b", "tapo_7b", *QWEN3_VL])
def test_recipes_fit_four_gpus_of_48_gb(name):
    plan = planned("--recipe", name, "--gpus", "4", "--gpu", "A6000")
    assert plan.lacks == []
    assert all(part.total < 44.2 * GIB for part in plan.memory().values())
    assert plan.kv_tokens > 20 * (4096 + 2048)
    # Photos of the largest size fit as well.
    photo = 1_003_520 // (32 if name in QWEN3_VL else 28) ** 2
    largest = ["--photo_tokens", f"{photo}", "--prompt_tokens", f"{photo + 60}"]
    assert planned("--recipe", name, *largest).lacks == []
    words = plan.config.rollout.sglang_args.split()
    assert "--enable-memory-saver" in words
    assert float(words[words.index("--mem-fraction-static") + 1]) <= plan.server_share


@pytest.mark.parametrize(
    ("name", "groups", "minibatch", "epochs"),
    [("tapo_3b", 384, 128, 10), ("tapo_7b", 192, 64, 5)]
    + [(name, 192, 64, 5) if "8b" in name else (name, 384, 128, 10) for name in QWEN3_VL],
)
def test_recipes_are_the_released_settings(name, groups, minibatch, epochs):
    """As train/tapo.py reads them."""
    argv = ["--config", str(RECIPES / f"{name}.yaml"), "--data.path", "D", "--run.out", "O"]
    config, _, _ = parse(TapoConfig, argv, "")
    rollout, model = config.rollout, config.model
    assert (rollout.groups_per_step, config.optim.groups_per_minibatch) == (groups, minibatch)
    assert (rollout.n_anchor, rollout.n_positive, config.run.epochs) == (5, 5, epochs)
    assert (rollout.max_prompt_tokens, rollout.max_response_tokens) == (4096, 2048)
    assert (model.min_pixels, model.max_pixels) == (200_704, 1_003_520)
    assert (model.dtype, model.gradient_checkpointing, config.optim.lr) == ("bfloat16", True, 1e-6)
    gpus = ",".join(rollout.server_gpus)
    assert (rollout.engine, rollout.colocated, gpus) == ("sglang", True, "0,1,2,3")
    assert (config.data.path, config.run.out, rollout.temperature) == ("D", "O", 1.0)


@pytest.mark.parametrize("name", QWEN3_VL)
def test_lora_of_qwen3_vl_on_one_card_of_24_gb(name):
    """As docs/models.md says: 2B and 4B fit, 8B with its shards on the CPU only."""
    card = ["--gpus", "1", "--gpu", "RTX3090", "--rollout.server_gpus", "['0']"]
    plan = planned("--recipe", name, *card, "--model.lora_rank", "64")
    if "8b" not in name:
        assert plan.lacks == []
        return
    assert [line.split()[0] for line in plan.lacks] == ["head", "backward", "generate"]
    assert remedies(plan) == [[("parallel.offload", True)]]


def test_parts_of_the_7b_plan_by_hand():
    plan = planned("--recipe", "tapo_7b")
    total, shard = TOTALS["Qwen/Qwen2.5-VL-7B-Instruct"], 2 * 8_292_166_656 / 4
    memory = plan.memory()
    assert memory["step"] == Breakdown(shard, shard, 3 * shard + 32 * (1 << 24))
    embedding = 152_064 * 3584
    assert memory["generate"].parameters == shard + 2 * embedding
    assert memory["generate"].server == 2 * total + 3 * GIB
    patch = 3 * 2 * 14 * 14 * 1280
    merger = 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
    root = 2 * embedding + 3584 + patch + merger
    assert memory["head"].parameters == shard + 2 * root
    free = 0.92 * 48 * GIB - memory["generate"].total
    assert plan.kv_tokens == int(free / (2 * 28 * 4 * 128 * 2))


def test_a_step_that_is_sampled_ahead_takes_as_long_as_its_longer_half():
    apart = ["--recipe", "tapo_7b", "--rollout.colocated", "false", "--gpus"]
    for gpus, servers in ((4, "['4','5','6','7']"), (7, "['7']"), (15, "['15']")):
        options = [*apart, f"{gpus}", "--rollout.server_gpus", servers]
        plan = planned(*options)
        generate, old, update, sync = (phase.seconds for phase in plan.phases())
        assert plan.step_seconds == pytest.approx(generate + old + update + sync)
        ahead = planned(*options, "--rollout.overlap", "one_step")
        assert ahead.step_seconds == pytest.approx(max(generate, old + update) + sync)
    assert generate > old + update  # of the last


def test_one_gpu_holds_everything_whole():
    plan = planned("--recipe", "tapo_3b", "--gpus", "1", "--gpu", "H200")
    assert plan.memory()["head"].parameters == 2 * TOTALS["Qwen/Qwen2.5-VL-3B-Instruct"]
    replicas = planned("--recipe", "tapo_3b", "--gpus", "4", "--parallel.replicas", "2")
    halves = replicas.memory()["step"].parameters
    assert halves == TOTALS["Qwen/Qwen2.5-VL-3B-Instruct"]
    with pytest.raises(ValueError, match="multiple of parallel.replicas, 2, got 3"):
        planned("--recipe", "tapo_3b", "--gpus", "3", "--parallel.replicas", "2")


def test_other_bytes_of_numbers():
    narrow = planned("--recipe", "tapo_7b").memory()
    wide = planned("--recipe", "tapo_7b", "--optim.states", "float32").memory()
    quarter = TOTALS["Qwen/Qwen2.5-VL-7B-Instruct"] / 4
    assert wide["head"].optimiser - narrow["head"].optimiser == 6 * quarter
    options = ["--parallel.mixed_precision", "true", "--model.dtype", "float32"]
    in_two = planned("--recipe", "tapo_7b", *options)
    assert (in_two.weights, in_two.synced) == (8 * quarter, 16 * quarter)
    mixed = in_two.memory()
    assert mixed["step"] == Breakdown(4 * quarter, 4 * quarter, 8 * quarter)
    assert mixed["backward"].activations == narrow["backward"].activations
    offloaded = planned("--recipe", "tapo_7b", "--parallel.offload", "true").memory()
    assert offloaded["step"] == Breakdown()
    assert offloaded["generate"] == Breakdown(server=narrow["generate"].server)
    with pytest.raises(ValueError, match="model.dtype must be float32 with"):
        planned("--recipe", "tapo_7b", "--parallel.mixed_precision", "true")


def test_where_servers_and_copies_are():
    apart = planned("--recipe", "tapo_7b", "--rollout.colocated", "false").memory()
    total = TOTALS["Qwen/Qwen2.5-VL-7B-Instruct"]
    assert apart["generate"] == Breakdown(server=2 * total + 3 * GIB)
    pairs = ["--rollout.server_gpus", "['0,1', '2,3']"]
    assert planned("--recipe", "tapo_7b", *pairs).memory()["generate"].server == total + 3 * GIB
    local = planned("--recipe", "tapo_7b", "--rollout.engine", "local").memory()
    assert {part.server for part in local.values()} == {2 * total}


def test_remedies_are_found_by_trying():
    plan = planned("--recipe", "tapo_7b", "--parallel.micro_batch_tokens", "32768")
    assert any(line.startswith("backward needs") for line in plan.lacks)
    found = remedies(plan)
    assert [("parallel.branches", "one_at_a_time")] in found
    assert [("parallel.micro_batch_tokens", 16384)] in found
    for settings in found:
        assert changed(plan, settings).lacks == []
    assert changed(plan, [("parallel.head_chunk_rows", 256)]).lacks
    small = ["--recipe", "tapo_7b", "--gpu", "RTX3090", "--gpus", "1"]
    assert remedies(planned(*small)) == [[("parallel.offload", True)]]
    assert remedies(planned(*small, "--model.dtype", "float32")) == []  # the server has no room


def test_remedies_together_where_none_suffices():
    options = ["--model.gradient_checkpointing", "false", "--parallel.branches", "joint"]
    plan = planned("--recipe", "tapo_7b", "--gpu", "A100-40", *options)
    (settings,) = remedies(plan)
    assert len(settings) > 1
    assert changed(plan, settings).lacks == []
    assert changed(plan, settings[:-1]).lacks
    assert all(number == 1 for number in Counter(name for name, _ in settings).values())


def test_the_text(capsys):
    command.main(["--recipe", "tapo_7b", "--gpus", "4", "--gpu", "A6000"])
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines() if line.split()}
    assert "8.29 B parameters" in said
    assert "192 groups of 10 responses = 1,920 responses on 384 prompts" in said
    assert "3 mini-batches; a GPU has 16 groups of one" in said
    assert lines["optimiser"].split() == ["optimiser", "11.6", "11.6", "12.1", "11.6"]
    assert lines["total"].split()[0] == "total" and len(lines["total"].split()) == 5
    assert [name for name in lines if name in ("generate", "old", "update", "sync")]
    assert said.splitlines()[-1] == "It fits."
    command.main(["--recipe", "tapo_7b", "--parallel.micro_batch_tokens", "32768"])
    said = capsys.readouterr().out
    assert "It does not fit: backward needs" in said
    assert "  --parallel.branches one_at_a_time\n" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "tapo_9b"], "recipe must be one of .*tapo_3b, tapo_7b, .*got 'tapo_9b'"),
        (["--recipe", "tapo_7b", "--gpu", "K80"], "gpu must be one of .*A6000.*, got 'K80'"),
        (["--recipe", "tapo_7b", "--gpus", "some"], "gpus must be a whole .* got 'some'"),
        (["--recipe", "tapo_7b", "--gpus", "0"], "gpus must be .* got 0$"),
        (
            ["--recipe", "tapo_7b", "--photo_tokens", "500"],
            "photo_tokens must be at most",
        ),
        (["--recipe", "tapo_7b", "--parallel.foo", "3"], "parallel.foo"),
        (["--model.path", "somewhere"], "'somewhere' is no folder .*Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_what_is_not_known_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        planned(*options)


def test_the_command_ends_with_one_line():
    """As a newcomer starts it."""
    found = subprocess.run(
        [sys.executable, "-m", "tercet.train.plan", "--recipe", "tapo_9b"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1 and found.stdout == ""
    (line,) = found.stderr.strip().splitlines()
    assert line.startswith("plan.py: recipe must be one of")


def test_lengths_change_the_plan():
    short, long = (
        Plan(plan.config, plan.model, 4, CARDS["A6000"], Lengths(316, 256, tokens))
        for plan in [planned("--recipe", "tapo_7b")]
        for tokens in (175, 350)
    )
    assert long.step.group_tokens - short.step.group_tokens == 10 * 175
    update = [next(p for p in plan.phases() if p.name == "update").flops for plan in (short, long)]
    assert 1.7 < update[1] / update[0] < 2
