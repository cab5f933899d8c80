"""The demo's own parts: the permuted reward, the verdicts, and one small run of every arm."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest

from tercet.core.rewards import fine_r1_strict
from tercet.train.demo import experiment as demo
from tercet.train.demo.experiment import (
    PERMUTED,
    START,
    Scores,
    markdown,
    permuted_reward,
    verdicts,
)


def test_permuted_rewards_keep_what_a_group_earns_and_lose_who_earned_it():
    names = ("least auklet", "crested auklet")
    said = ["least auklet"] * 3 + ["crested auklet"] * 7
    moved = 0
    for group in range(20):
        rows = [
            {
                "response": f"<think>.</think><answer>{name}</answer>",
                "ground_truth": "least auklet",
                "names": names,
                "group_id": f"g{group}",
            }
            for name in said
        ]
        true, dealt = fine_r1_strict(rows), permuted_reward(rows)
        assert Counter(r["overall"] for r in dealt) == Counter(r["overall"] for r in true)
        assert dealt == permuted_reward(rows)
        moved += dealt != true
    assert moved > 15


def runs(gain: float, unseen: float, permuted: float) -> list[dict[str, Scores]]:
    start = Scores(50, 20, 40, 40)
    return [
        {
            START: start,
            "TAPO": Scores(50 + gain, 20 + unseen, 50, 40, 100),
            PERMUTED: Scores(50 + permuted, 20, 40, 40, 100),
        }
    ]


@pytest.mark.parametrize(
    ("given", "failed"),
    [
        ((10, -2, 2.9), []),
        ((9, 0, 0), ["seen: mean"]),
        ((-1, 0, 0), ["seen: mean", "seen: every"]),
        ((12, -2.1, 0), ["unseen"]),
        ((12, 0, 3), ["permuted"]),
    ],
)
def test_verdicts(given, failed):
    lines = verdicts(runs(*given))
    assert len(lines) == 4
    fails = [line for line in lines if line.startswith("FAIL")]
    assert len(fails) == len(failed)
    assert all(name in line for name, line in zip(failed, fails, strict=True))


def test_the_table_shows_every_number():
    row = markdown(runs(12, 1, 0)[0]).splitlines()[3]
    assert row == "| TAPO | 62.0 | 21.0 | 50.0 | 40.0 | 100 s |"


def test_scores_of_other_options_are_not_shown_as_these(tmp_path):
    """A finished seed is not run again, so its folder must be of the same options."""
    scores = {"TAPO": Scores(60, 30, 50, 40, 9.0)}
    (tmp_path / "scores.json").write_text(json.dumps({"TAPO": asdict(scores["TAPO"])}))
    for more in ([], ["--run.keep_last=5"]):
        assert demo.run_seed(tmp_path, 0, more, controls=False) == scores
    for seed, more, said in (
        (1, [], "run.seed 0 -> 1"),
        (0, ["--loss.kl_coef=0.5"], "loss.kl_coef [0-9.]+ -> 0.5"),
    ):
        with pytest.raises(ValueError, match=f"holds the demo with other options .{said}.: give"):
            demo.run_seed(tmp_path, seed, more, controls=False)


def test_all_stages_in_small(tmp_path, monkeypatch):
    """From nothing to scores, with every control; finished seeds are not run again."""
    monkeypatch.setattr(demo, "BASE_PICTURES", 12)
    monkeypatch.setattr(demo, "PICTURES", {"train": 2, "sft": 1, "test": 1})
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in ("demo_base.yaml", "demo_stage1.yaml", "demo.yaml"):
        text = (demo.RECIPES / name).read_text()
        text = text.replace("samples_per_step: 64", "samples_per_step: 4")
        (recipes / name).write_text(text.partition("run:")[0] + "run: {steps: 1}\n")
    monkeypatch.setattr(demo, "RECIPES", recipes)
    # Nothing is learnt here: groups are trained on whether or not they pass.
    argv = ["--data.shots=2", "--data.sft_shots=1", "--rollout.groups_per_step=2"]
    argv += ["--rollout.max_rounds=1", "--rollout.max_response_tokens=8"]
    argv += ["--rollout.on_exhausted=keep_last_round"]
    scores = demo.run_seed(tmp_path / "out", 5, argv, controls=True)
    assert list(scores) == [
        "stage 1 (start)",
        "TAPO",
        "DAPO",
        "TAPO, rewards permuted",
        "SFT",
    ]
    kept = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert kept["TAPO"]["seconds"] > 0
    assert demo.run_seed(tmp_path / "out", 5, argv, controls=True) == scores
    manifest = json.loads((tmp_path / "out" / "tapo" / "triplets.json").read_text())
    assert len(manifest["anchors"]) == 40 and len(manifest["test"]["unseen"]) == 12
