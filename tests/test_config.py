"""Options: what is refused and how it is named, presets, and who knows the options of the loss."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, asdict, fields
from operator import attrgetter
from pathlib import Path

import pytest

from tercet.core.config import LossConfig, SftConfig, TapoConfig
from tercet.core.presets import PRESETS
from tercet.train.cli.command_line import parse

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("update_on", "both", "'anchor' or 'own'"),
        ("entropy_form", "mean", "'sampled' or 'exact'"),
        ("policy_term", "ppo", "'clip' or 'cispo'"),
        ("neg_grad", "stop", "'flow' or 'detach'"),
        ("neg_at", "later", "'now' or 'step_start'"),
        ("kl_ratio", "k1", "'neg_over_policy' or 'policy_over_neg'"),
        (
            "mean_over",
            "tokens",
            "'batch' or 'group' or 'response' or 'virtual_batch' or 'constant' or 'micro_batch'",
        ),
        ("clip_low", -0.1, "at least 0"),
        ("clip_low", math.nan, "at least 0"),
        ("clip_high", None, "at least 0"),
        ("clip_dual", 0.5, "at least 1, or None for off"),
        ("log_ratio_clamp", 0.0, "positive, or None for off"),
        ("kl_log_clamp", math.nan, "positive, or None for off"),
        ("kl_clamp", -1.0, "positive, or None for off"),
        ("is_cap", 0.0, "positive, or None for off"),
        ("carried_cap", -1.0, "positive, or None for off"),
        ("kl_coef", math.nan, "finite"),
        ("entropy_coef", math.inf, "finite"),
        ("neg_entropy_coef", -math.inf, "finite"),
        ("ref_kl_coef", math.nan, "finite"),
        ("mean_over_size", 0, "at least 1"),
    ],
)
def test_a_loss_option_out_of_its_range_is_named_with_its_value(option, value, allowed):
    with pytest.raises(ValueError) as raised:
        LossConfig(**{option: value})
    assert str(raised.value) == f"loss.{option} must be {allowed}, got {value!r}"


def test_bounds_themselves_and_clamps_that_are_off_are_allowed():
    LossConfig(clip_low=0.0, clip_high=0.0, clip_dual=1.0, mean_over_size=1, kl_coef=-1.0)
    off = dict.fromkeys(["clip_dual", "log_ratio_clamp", "kl_log_clamp", "kl_clamp", "is_cap"])
    assert {name: getattr(LossConfig(**off), name) for name in off} == off


def test_old_names_of_options_are_read():
    assert LossConfig(mean_over="micro_batch").mean_over == "virtual_batch"
    config, _, _ = parse(TapoConfig, ["--loss.mean_over=micro_batch"], "")
    assert config.loss.mean_over == "virtual_batch"


def test_pi_neg_of_the_start_of_a_step_has_no_gradient():
    with pytest.raises(ValueError, match="loss.neg_at 'step_start' .* needs loss.neg_grad 'detach"):
        LossConfig(neg_at="step_start")


def test_exact_entropies_are_not_kept_of_the_start_of_a_step():
    given = {"entropy_form": "exact", "neg_at": "step_start", "neg_grad": "detach"}
    with pytest.raises(ValueError, match="loss.entropy_form 'exact' needs loss.neg_at 'now'"):
        LossConfig(**given)
    LossConfig(**given, neg_entropy_coef=0.0)


def test_where_the_negative_entropy_works_against_the_kl():
    assert "0.03 is at least loss.kl_coef 0.01" in LossConfig().works_against_kl
    for better in (
        {"entropy_form": "exact"},
        {"neg_grad": "detach"},
        {"neg_entropy_coef": 0.0},
        {"neg_entropy_coef": 0.009},
        {"kl_coef": 0.0},
    ):
        assert LossConfig(**better).works_against_kl == ""


def test_the_options_of_the_loss_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        LossConfig().kl_coef = 0.5


def test_one_loss_config_travels_from_the_command_line(monkeypatch):
    made = []
    check = LossConfig.__post_init__

    def counted(self):
        made.append(self)
        check(self)

    monkeypatch.setattr(LossConfig, "__post_init__", counted)
    argv = ["--loss.kl_coef", "0.02", "--run.preset", "released"]
    config = parse(TapoConfig, argv, "")[0]
    assert (config.loss.kl_coef, config.loss.neg_grad) == (0.02, "detach")
    assert [loss for loss in made if loss.kl_coef == 0.02] == [config.loss]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("data.shots", "0"),
        ("data.sft_shots", "-1"),
        ("model.max_pixels", "0"),
        ("model.lora_rank", "-1"),
        ("rollout.groups_per_step", "0"),
        ("rollout.prompts_per_batch", "0"),
        ("rollout.max_rounds", "-3"),
        ("rollout.max_response_tokens", "0"),
        ("rollout.max_rows", "0"),
        ("rollout.max_in_flight", "0"),
        ("rollout.weight_bucket_mib", "0"),
        ("rollout.n_anchor", "-1"),
        ("rollout.n_positive", "-1"),
        ("rollout.temperature", "0"),
        ("rollout.top_p", "0.0"),
        ("rollout.top_p", "1.5"),
        ("rollout.request_timeout_s", "0"),
        ("loss.clip_low", "-0.5"),
        ("loss.mean_over_size", "0"),
        ("optim.lr", "-0.5"),
        ("optim.groups_per_minibatch", "0"),
        ("optim.max_skipped", "0"),
        ("parallel.head_chunk_rows", "0"),
        ("parallel.replicas", "0"),
        ("run.steps", "0"),
        ("run.save_every", "0"),
        ("run.keep_last", "2.5"),
    ],
)
def test_a_number_out_of_its_range_is_named_with_its_value(option, value):
    with pytest.raises(ValueError) as raised:
        parse(TapoConfig, [f"--{option}={value}"], "")
    assert option in str(raised.value) and value in str(raised.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("optim.samples_per_step", "0"), ("optim.max_tokens", "-4"), ("run.epochs", "0")],
)
def test_stage_1_refuses_them_too(option, value):
    with pytest.raises(ValueError) as raised:
        parse(SftConfig, [f"--{option}={value}"], "")
    assert option in str(raised.value) and value in str(raised.value)


@pytest.mark.parametrize("other", [{}, {"policy_term": "cispo"}, {"is_cap": 2.0}])
def test_a_response_with_one_ratio_has_one_weight(other):
    given = {"mean_over": "batch"} if not other else {"mean_over": "response", **other}
    with pytest.raises(ValueError, match="loss.ratio_of 'sequence' needs loss.mean_over 'respons"):
        LossConfig(ratio_of="sequence", **given)
    LossConfig(ratio_of="sequence", mean_over="response")


def test_numbers_have_plain_types():
    """A checkpoint holds some of them, and must not name classes of jsonargparse."""
    argv = ["--optim.lr=2", "--rollout.max_rounds=3", "--run.steps=7", "--run.save_every=4"]
    config = parse(TapoConfig, argv, "")[0]
    assert (config.optim.lr, config.rollout.max_rounds, config.run.steps) == (2.0, 3, 7)
    plain = {bool, int, float, str, list, type(None)}
    for section in asdict(config).values():
        assert {type(value) for value in section.values()} <= plain


def test_the_tercet_preset_is_the_default_of_every_option_that_others_set():
    default = TapoConfig(loss=LossConfig(kl_coef=0.03, neg_entropy_coef=0.0))
    with pytest.warns(FutureWarning, match="run.preset 'paper' is called 'tercet' now"):
        older = parse(TapoConfig, ["--run.preset=paper"], "")[0]
    assert older == parse(TapoConfig, ["--run.preset=tercet"], "")[0] == default
    assert parse(TapoConfig, [], "")[0] == default
    for preset in ("released", "equation_4"):
        other = parse(TapoConfig, [f"--run.preset={preset}"], "")[0]
        for name, value in PRESETS[preset].items():
            assert attrgetter(name)(other) == value != attrgetter(name)(default)
        assert (other.loss.kl_coef, other.loss.neg_entropy_coef) == (0.01, 0.03)  # the paper's


@pytest.mark.filterwarnings("ignore:kl_ratio")
def test_equation_4_is_the_paper_to_the_letter():
    """No clamp, pi over pi_neg, mean within the group, and only groups of the step's weights."""
    config = parse(TapoConfig, ["--run.preset=equation_4"], "")[0]
    loss = config.loss
    assert [loss.clip_dual, loss.log_ratio_clamp, loss.kl_log_clamp, loss.kl_clamp] == [None] * 4
    assert (loss.kl_ratio, loss.mean_over) == ("policy_over_neg", "group")
    assert (loss.update_on, loss.neg_grad, loss.neg_at) == ("anchor", "flow", "now")
    assert (loss.entropy_form, config.rollout.surplus) == ("sampled", "drop")


def test_a_preset_gives_way_to_yaml_and_yaml_to_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "loss: {update_on: anchor, mean_over: response}\n"
        "rollout: {max_rounds: 7, surplus: carry}\n"
        "run: {preset: released}\n"
    )
    config = parse(TapoConfig, [f"--config={recipe}", "--rollout.max_rounds=9"], "")[0]
    assert (config.loss.update_on, config.loss.mean_over) == ("anchor", "response")
    assert (config.loss.neg_at, config.rollout.surplus) == ("step_start", "carry")
    assert config.rollout.max_rounds == 9
    recipe.write_text("run: {preset: released}\nrollout: {max_rounds: 7}\n")
    config = parse(TapoConfig, [f"--config={recipe}", "--run.preset=tercet"], "")[0]
    assert (config.loss.neg_at, config.rollout.max_rounds) == ("now", 7)


def test_the_loss_options_are_named_in_three_files_only():
    """Everything between the command line and the kernels hands them on as one object; presets only
    give them values."""
    read_by_the_trainer = {"update_on", "neg_at", "is_cap", "mean_over", "mean_over_size"}
    read_by_the_trainer |= {"carried_cap"}
    read_by_the_trainer |= {"ratio_of", "advantage_std"}
    at_both_ends = {"neg_grad"}  # also decides which forward passes keep what gradients need
    names = {field.name for field in fields(LossConfig)} - read_by_the_trainer - at_both_ends
    assert len(names) == 13
    files = {
        file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
        for folder in ("core", "kernels", "rollout", "train/learner", "train/run")
        for file in (ROOT / folder).rglob("*.py")
        if file.name != "presets.py"
    }
    home = {"core/config.py", "kernels/reference.py", "kernels/rows_triton.py"}
    for name in names:
        assert {file for file, text in files.items() if name in text} == home, name
