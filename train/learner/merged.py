"""A policy's folder, and with LoRA what rounding takes from its merged weights.

W + alpha / r * B A is rounded to the dtype of W. In bfloat16 most merged weights of a short run are
those of the base, so the adapter is written beside them, and each step measures the error.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tercet.core.types import PolicyParts
from tercet.train.learner.lora import added_weights, merge_squares, save_adapter
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks

MERGE_ERROR = "lora_merge_error"
LARGE_ERROR = 0.2
ADAPTER_FOLDER = "adapter"
MERGED = """# A LoRA adapter, merged

The weights of this folder are W + alpha / r * B A, computed in float32 and rounded to {dtype}.
Relative error of what was added, caused by rounding: {error:.3g} (root of the sums of squares).
"""
ADAPTER = """
The adapter by itself is in `{adapter}/`, for its base, `{base}`:

    from peft import PeftModel
    model = PeftModel.from_pretrained(base_model, "{adapter}")
"""


def merge_error(policy: Policy, ranks: Ranks) -> float:
    """|round(W + s B A) - W - s B A| / |s B A|, Frobenius norms over all layers; a collective.

    0 where nothing has been added.
    """
    sums = ranks.add(merge_squares(policy.model, ranks.device))
    return float((sums["lost"] / sums["added"]).sqrt()) if sums["added"] > 0 else 0.0


def lora_figures(policy: Policy, ranks: Ranks) -> dict[str, float]:
    """A step's figures of LoRA, none without it; warns where merging loses much. A collective."""
    if not hasattr(policy.model, "adapter_config"):
        return {}
    error = merge_error(policy, ranks)
    if error > LARGE_ERROR and ranks.is_first:
        warnings.warn(
            f"{MERGE_ERROR} is above {LARGE_ERROR}: rounding takes more than that share of what "
            "LoRA has learnt from merged weights, those of checkpoints and servers (where servers "
            "sample, mismatch_mean is the gap of log-probs that follows). Ways out: a checkpoint's "
            f"{ADAPTER_FOLDER}/, --rollout.served_dtype float32, --model.dtype float32",
            stacklevel=2,
        )
    return {MERGE_ERROR: error}


@dataclass(frozen=True)
class Export:
    """What a policy's folder is written from: tensors on the CPU of rank 0, none elsewhere."""

    weights: dict[str, Tensor]
    """Whole and merged; empty for the adapter alone."""
    added: dict[str, Tensor]
    """Of LoRA, by their names in the model; empty for the merged weights alone."""
    error: float
    """As `merge_error`."""
    lora: str
    """What is written of a policy with LoRA: run.save_lora; empty without it."""

    @classmethod
    def take(cls, policy: Policy, ranks: Ranks, copy: bool, parts: str = "both") -> Export:
        """Gather a policy's weights; a collective.

        Args:
            policy: with or without LoRA.
            ranks: of the run.
            copy: whether the policy may change before they are written.
            parts: with LoRA, what is written: run.save_lora.
        """
        weights, added = {}, {}
        lora = parts if hasattr(policy.model, "adapter_config") else ""
        named = [] if lora == "adapter" else [(weights, policy.named_weights())]
        named += [] if lora == "merged" else [(added, added_weights(policy.model))]
        for kept, items in named:
            for name, weight in items:
                if ranks.is_first:
                    kept[name] = weight.to("cpu", copy=copy)
        return cls(weights, added, merge_error(policy, ranks), lora)

    def save(self, parts: PolicyParts, folder: Path) -> None:
        """Write a folder that transformers loads; with LoRA also adapter/, or that alone, and
        README.md about them."""
        text = ""
        if self.lora != "adapter":
            parts.save(folder, self.weights)
        if self.lora in ("both", "merged"):
            dtype = str(parts.model.dtype).removeprefix("torch.")
            text = MERGED.format(dtype=dtype, error=self.error)
        if self.lora in ("both", "adapter"):
            base = save_adapter(parts.model, self.added, folder / ADAPTER_FOLDER)
            text += ADAPTER.format(base=base, adapter=ADAPTER_FOLDER)
        if text:
            (folder / "README.md").write_text(text.lstrip(), encoding="utf-8")
