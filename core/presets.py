"""Presets: what `run.preset` sets before YAML and command line, by the option's dotted name."""

from __future__ import annotations

PRESETS: dict[str, dict[str, object]] = {
    # The paper's method in the form that trains well (docs/algorithm.md, "Which form of the loss"):
    # every field's default, but for the negative's terms.
    "tercet": {"loss.kl_coef": 0.03, "loss.neg_entropy_coef": 0.0},
    # The paper's equations 1 to 4 to the letter. Without clamps a step may overflow: it is skipped.
    "equation_4": {
        "loss.kl_ratio": "policy_over_neg",
        "loss.mean_over": "group",
        "loss.clip_dual": None,
        "loss.log_ratio_clamp": None,
        "loss.kl_log_clamp": None,
        "loss.kl_clamp": None,
        "rollout.surplus": "drop",
    },
    # What the published Fine-R1 code does where it differs from the paper.
    "released": {
        "loss.update_on": "own",
        "loss.neg_grad": "detach",
        "loss.neg_at": "step_start",
        "loss.mean_over": "virtual_batch",
        "rollout.max_rounds": None,
        "rollout.on_exhausted": "keep_last_round",
        "rollout.dispatch": "batch",
        "rollout.surplus": "drop",
        "data.positive": "fixed",
        "optim.minibatch_by": "response",
        "optim.skip_first_rollout_lr": True,
    },
}
