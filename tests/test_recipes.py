"""Every recipe of train/tapo.py: planned on the cards it names, and run for two steps on a tiny
policy, with only paths, engine, dtype, lengths, counts and the judge overridden.
"""

from __future__ import annotations

import json
import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support import tiny
from test_judge import Endpoint, serving
from test_tapo import workspace as workspace  # a fixture

from tercet.core.config import TapoConfig
from tercet.core.rollout_config import RolloutConfig
from tercet.train import plan as plan_command
from tercet.train import tapo
from tercet.train.cli.arguments import overridden
from tercet.train.cli.command_line import RECIPES, parse
from tercet.train.fit.estimate import run_time
from tercet.train.fit.roofline import CARDS, card_of
from tercet.train.fit.sizes import model_config
from tercet.train.run.run import length_lines, settle

RUNS = sorted(
    file.stem
    for file in RECIPES.glob("*.yaml")
    if not file.stem.startswith("demo_") and "train/sft.py" not in file.read_text()
)
SERVED = [name for name in RUNS if "engine: sglang" in (RECIPES / f"{name}.yaml").read_text()]


CARD_FILES = sorted((RECIPES / "cards").glob("*.yaml"))
ALGORITHM = (Path(__file__).parents[1] / "docs" / "algorithm.md").read_text(encoding="utf-8")
ABLATIONS = re.findall(r"`(--.*?)`", ALGORITHM.partition("| ablation |")[2].partition("\n\n")[0])
"""Options of docs/algorithm.md's table of ablations, in addition to the recipe tapo_3b."""


def run(workspace: Path, out: Path, *more: str, recipe: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl of two steps."""
    argv = [
        *([] if recipe is None else [f"--config={RECIPES / recipe}.yaml"]),
        *(f"--data.path={workspace / 'photos'}", f"--model.path={workspace / 'policy'}"),
        *(f"--run.out={out}", "--run.steps=2", "--run.device=cpu", "--model.dtype=float32"),
        *("--data.shots=3", "--data.sft_shots=0", "--data.embedder=policy"),
        *("--model.min_pixels=null", "--model.max_pixels=null"),
        *("--rollout.engine=local", "--rollout.colocated=false"),
        *("--rollout.groups_per_step=2", "--rollout.prompts_per_batch=2"),
        *("--rollout.max_prompt_tokens=512", "--rollout.max_response_tokens=8"),
        *("--rollout.max_rounds=1", "--rollout.on_exhausted=keep_last_round"),
        *("--optim.groups_per_minibatch=1", "--parallel.micro_batch_tokens=2048"),
    ]
    config, _, resolved = parse(TapoConfig, overridden(argv, more), "")
    tapo.train(config, resolved)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", RUNS)
def test_a_recipe_runs_for_two_steps(recipe, workspace, tmp_path):
    judged = "judge_reasoning" in (RECIPES / f"{recipe}.yaml").read_text()
    scores = iter(range(10**6))
    judge = serving(Endpoint(lambda body: str(next(scores) % 101))) if judged else nullcontext()
    with judge as url:
        more = [f"--rollout.judge_url={url}"] if judged else []
        rows = run(workspace, tmp_path, *more, recipe=recipe)
    assert [row["step"] for row in rows] == [1, 2]
    if judged:
        assert all(0 < row["judge_reasoning"] < 1 for row in rows)
        assert all(row["judge_reasoning_left_out"] == 0 and row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("recipe", SERVED)
def test_a_recipe_fits_the_cards_that_it_names(recipe):
    text = (RECIPES / f"{recipe}.yaml").read_text()
    gpus = re.search(r"--nproc-per-node (\d+)", text)[1]
    plan, _ = plan_command.read(["--recipe", recipe, "--gpus", gpus, "--gpu", "A6000"])
    assert plan.lacks == [] and plan.engines.count * plan.engines.gpus == int(gpus)
    words = plan.config.rollout.sglang_args.split()
    assert float(words[words.index("--mem-fraction-static") + 1]) <= plan.server_share


@pytest.mark.parametrize("file", CARD_FILES, ids=lambda file: file.stem)
def test_a_preset_of_cards_fits_them_and_runs(file, workspace, tmp_path):
    """As the command in its first lines has it, on top of the recipe that it names."""
    (command,) = re.findall(r"tercet\.train\.plan (.*)", file.read_text())
    argv = shlex.split(command.replace("train/recipes/cards", str(file.parent)))
    plan, _ = plan_command.read(argv)
    assert plan.lacks == [] and plan.engines.count * plan.engines.gpus == plan.gpus
    words = plan.config.rollout.sglang_args.split()
    assert float(words[words.index("--mem-fraction-static") + 1]) <= plan.server_share
    assert ("--tp" in words) == (plan.engines.gpus > 1)
    recipe = argv[argv.index("--recipe") + 1]
    rows = run(workspace, tmp_path, f"--config={file}", recipe=recipe)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(("lora_merge_error" in row) == (plan.config.model.lora_rank > 0) for row in rows)


@pytest.mark.parametrize("options", ABLATIONS)
def test_an_ablation_is_the_recipe_with_these_options(options, workspace, tmp_path):
    argv = ["--recipe", "tapo_3b", "--gpus", "4", "--gpu", "A6000", *shlex.split(options)]
    plan, _ = plan_command.read(argv)
    assert plan.lacks == [] and plan.step.group_size == 10
    if "coef" in options:  # another forward pass; the others differ in counts alone
        rows = run(workspace, tmp_path, *shlex.split(options.replace(" 0", "=0")), recipe="tapo_3b")
        assert [row["step"] for row in rows] == [1, 2] and not any("margin" in row for row in rows)


def test_every_ablation_is_in_the_table():
    assert len(ABLATIONS) == len(set(ABLATIONS)) == 6


def test_the_plan_counts_the_servers_of_the_cards_it_is_given():
    for gpus, count in (("1", 1), ("2", 2), ("4", 4), ("8", 4)):
        plan, _ = plan_command.read(["--recipe", "tapo_3b", "--gpus", gpus, "--gpu", "H200"])
        assert plan.engines.count == count
    argv = ["--recipe", "tapo_3b", "--gpus", "1", "--gpu", "H200"]
    pair, _ = plan_command.read([*argv, "--rollout.server_gpus", "['0,1']"])
    assert pair.lacks == ["a server needs 2 GPUs of 1"]
    (said,) = [line for line in plan_command.remarks(plan_command.read(argv)[0]) if "names" in line]
    assert said == "rollout.server_gpus names 4 GPUs of 1: 1 servers of 1 are counted"


def test_the_plan_counts_a_frozen_reference():
    argv = ["--recipe", "cls_rl", "--gpus", "4", "--gpu", "A6000"]
    with_copy, without = (
        plan_command.read([*argv, "--loss.ref_kl_coef", beta])[0] for beta in ("0.04", "0")
    )
    shard = with_copy.model.parameters.total * 2 / 4
    for name, part in with_copy.memory().items():
        assert part.parameters - without.memory()[name].parameters == shard, name
    assert {p.name for p in with_copy.phases()} - {p.name for p in without.phases()} == {
        "reference"
    }
    lora = plan_command.read([*argv, "--model.lora_rank", "8"])[0]
    assert lora.reference == 0


GRPO = ("--loss.kl_coef=0", "--loss.entropy_coef=0", "--loss.neg_entropy_coef=0")
OBJECTIVES = {
    "gspo": (*GRPO, "--loss.ratio_of=sequence", "--loss.mean_over=response"),
    "dr_grpo": (*GRPO, "--loss.mean_over=constant", "--loss.advantage_std=false"),
    "cispo": (*GRPO, "--loss.policy_term=cispo"),
    "exact": ("--loss.entropy_form=exact", "--parallel.branches=one_at_a_time"),
    "positive alone": ("--rollout.n_anchor=0", "--rollout.n_positive=4"),
    "positive alone, own": (
        *("--rollout.n_anchor=0", "--rollout.n_positive=4"),
        "--loss.update_on=own",
    ),
}


@pytest.fixture
def by_length(monkeypatch):
    def length(rows):
        return [
            {"overall": float(n + row["response_length"]), "accuracy": float(n % 2)}
            for n, row in enumerate(rows)
        ]

    monkeypatch.setattr(tapo, "load_reward", lambda config: length)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains(name, workspace, tmp_path, by_length):
    more = ["--rollout.n_anchor=3", "--rollout.n_positive=1", "--optim.lr=1e-3"]
    rows = run(workspace, tmp_path, *overridden(more, OBJECTIVES[name]))
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 and row["skipped_steps"] == 0 for row in rows)
    assert ("margin" in rows[0]) == (name not in ("gspo", "dr_grpo", "cispo"))
    if name == "exact":
        assert all(row["exact_neg_entropy"] > 0 for row in rows)
        assert all(
            row["margin"] == pytest.approx(row["neg_entropy"] - row["entropy"], abs=1e-6)
            for row in rows
        )


@pytest.mark.parametrize("lora", ["0", "4"])
def test_a_reference_is_what_the_run_began_from(lora, workspace, tmp_path, by_length):
    """Its KL is 0 until the first update, and then not; LoRA's reference is the base."""
    more = [*GRPO, "--loss.ref_kl_coef=0.1", f"--model.lora_rank={lora}", "--optim.lr=1e-2"]
    more += ["--rollout.n_anchor=4", "--rollout.n_positive=0", "--run.save_every=1"]
    rows = run(workspace, tmp_path, *more, "--optim.groups_per_minibatch=2")
    assert rows[0]["ref_kl"] == pytest.approx(0, abs=1e-9)
    assert rows[1]["ref_kl"] > 1e-6


def test_without_dynamic_sampling_every_group_is_kept(monkeypatch, workspace, tmp_path):
    def equal(rows):
        return [{"overall": 1.0, "accuracy": 1.0} for _ in rows]

    monkeypatch.setattr(tapo, "load_reward", lambda config: equal)
    rows = run(workspace, tmp_path, "--rollout.dynamic_sampling=false")
    assert all(row["acceptance"] == 1 and row["filled_up"] == 0 for row in rows)


def test_a_reward_that_ties_every_group_is_told_while_sampling(
    monkeypatch, workspace, tmp_path, capsys
):
    def equal(rows):
        return [{"overall": 1.0, "accuracy": 1.0} for _ in rows]

    monkeypatch.setattr(tapo, "load_reward", lambda config: equal)
    more = ("--rollout.max_rounds=4", "--rollout.on_exhausted=error")
    with pytest.raises(ValueError, match="0 of 2 groups passed in rollout.max_rounds = 4"):
        run(workspace, tmp_path, *more)
    assert capsys.readouterr().out.count("step 1: 0 of 2 groups kept so far\n") == 1


def test_a_run_of_few_optimiser_steps_is_warned_of():
    config = TapoConfig()
    config.rollout.groups_per_step = 384  # in one mini-batch
    said = length_lines(config, 2, "2 h")
    assert said[0] == "2 steps of 384 groups: 2 optimiser steps, 7,680 responses; 2 h"
    assert said[1].startswith("2 optimiser steps are few (under 20) at optim.lr 1e-06: lower")
    config.optim.groups_per_minibatch = 100
    assert length_lines(config, 5, "2 h") == [
        "5 steps of 384 groups: 20 optimiser steps, 19,200 responses; 2 h"
    ]


@pytest.mark.parametrize(
    ("anchors", "epochs", "groups", "steps"),
    [(96, 10, 48, 20), (5, 3, 1, 15), (4000, 10, 384, 104), (100, 10, 50, 20), (99, 10, 49, 20)],
)
def test_groups_per_step_follow_from_anchors_and_epochs(anchors, epochs, groups, steps):
    config = TapoConfig()
    config.run.epochs = epochs
    assert settle(config, tiny(), anchors, {}) == steps
    assert config.rollout.groups_per_step == groups
    # A run that goes on keeps its own number, unless another one is asked for.
    later = TapoConfig()
    later.run.epochs = 2 * epochs
    assert (
        settle(later, tiny(), anchors, {"groups_per_step": groups})
        == anchors * 2 * epochs // groups
    )
    asked = TapoConfig(rollout=RolloutConfig(groups_per_step=7))
    settle(asked, tiny(), anchors, {"groups_per_step": groups})
    assert asked.rollout.groups_per_step == 7


@pytest.mark.parametrize(("parameters", "tokens"), [(10**9, 2048), (10**9 - 1, 256)])
def test_the_longest_response_follows_from_the_models_size(parameters, tokens):
    rollout, given = RolloutConfig(), RolloutConfig(max_response_tokens=77)
    for config in (rollout, given):
        config.settle(parameters, None)
    assert (rollout.max_response_tokens, rollout.groups_per_step) == (tokens, 384)
    assert given.max_response_tokens == 77


def test_auto_options_of_a_run_and_what_its_first_lines_say(workspace, tmp_path, by_length, capsys):
    """A tiny model and few anchors: few groups a step, and 256 tokens at most."""
    more = ["--rollout.groups_per_step=auto", "--rollout.max_response_tokens=auto"]
    more += [
        "--run.epochs=5",
        "--rollout.n_anchor=2",
        "--rollout.n_positive=1",
        "--rollout.top_k=9",
    ]
    more += ["--parallel.micro_batch_tokens=4096", "--rollout.prompts_per_batch=1"]
    rows = run(workspace, tmp_path, *more)
    anchors = len(json.loads((tmp_path / "triplets.json").read_text())["anchors"])
    assert [row["groups"] for row in rows] == [anchors * 5 // 20] * 2
    expected = f"2 steps of {anchors * 5 // 20} groups: "
    assert expected in (said := capsys.readouterr().out) and "no estimate of time on a CPU" in said


def test_the_plan_takes_anchors_for_the_groups_of_a_step():
    argv = ["--gpus", "4", "--gpu", "A6000", "--model.path", "Qwen/Qwen2-VL-2B-Instruct"]
    assert plan_command.read(argv)[0].step.groups == 384
    assert plan_command.read([*argv, "--anchors", "96"])[0].step.groups == 48


def test_a_run_on_a_card_says_how_long_it_takes(monkeypatch):
    """As the plan has it, for as many steps."""
    argv = ["--recipe", "tapo_3b", "--gpus", "4", "--gpu", "A100-80"]
    plan, _ = plan_command.read(argv)
    asked = (plan.config, model_config(plan.config.model.path), 30, torch.device("cuda"), 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    hours = 30 * sum(phase.seconds for phase in plan.phases()) / 0.4 / 3600
    assert run_time(*asked) == f"about {hours:.1f} h, at 40% of the datasheet's speed"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert run_time(*asked) == "no estimate of time: train/fit/roofline.py has no Tesla T4"


@pytest.mark.parametrize(
    ("called", "card"),
    [
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_cards_are_known_by_the_names_that_cuda_gives_them(called, card):
    assert card_of(called) is CARDS[card]
