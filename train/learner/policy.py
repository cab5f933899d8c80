"""The policy: a transformers model, shared-prefix attention, and the loss, as one module.

`Policy.forward` is the only entry (and the root of a sharded model): body and head + loss run
inside it, and the head's weight is touched nowhere else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tercet.core.config import LossConfig
from tercet.core.models import family_of
from tercet.core.types import MicroBatch, PackedBatch, PolicyParts, to_device
from tercet.kernels.linear_logprobs import linear_logprobs
from tercet.kernels.prefix_attention import ATTENTION_NAME
from tercet.kernels.reference import tapo_loss_reference
from tercet.kernels.tapo_loss import fused_linear_cross_entropy, fused_linear_tapo_loss
from tercet.kernels.varlen import VISION_NAME, backend_of
from tercet.train.learner.lora import whole_weights

Branch = Literal["joint", "update", "negative", "logprobs", "cross_entropy"]
Metrics = dict[str, Tensor]


class Policy(nn.Module):
    """Body, head and loss of a policy on packed batches.

    Args:
        parts: the transformers model; its text part is switched to shared-prefix attention.
        loss: coefficients and forms of the TAPO loss; not needed for stage 1.
        temperature: sampling temperature; log-probs are those of the scaled distribution.
        chunk_rows: response rows that reach the head at once; None: what suits the device.
        device: what is computed on; None: where the parameters are.
        dtype: what is computed in; None: the parameters' own.
    """

    def __init__(
        self,
        parts: PolicyParts,
        loss: LossConfig | None = None,
        *,
        temperature: float = 1.0,
        chunk_rows: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.model = parts.model
        self.family = family_of(parts.model.config)
        self.device = device or self.model.device
        like = torch.empty(0, device=self.device, dtype=dtype or self.model.dtype)
        backend = backend_of(like)
        self.attention = backend.name if backend else "dense masks"
        """What computes attention; it suits device and dtype."""
        # On a CPU the vision tower stays with transformers' own attention.
        vision = VISION_NAME if backend and self.device.type != "cpu" else "sdpa"
        self.model.set_attn_implementation({"text_config": ATTENTION_NAME, "vision_config": vision})
        self.loss = loss
        self.temperature = temperature
        self.chunk_rows = chunk_rows

    def forward(self, batch: MicroBatch | PackedBatch, branch: Branch = "joint", **given):
        """Score a batch; which way is said by `branch`.

        Args:
            batch: a MicroBatch for `joint` and `update`, a PackedBatch for the others.
            branch: `joint`: TAPO loss, the negative scored too; `update`: TAPO loss with
                batch.neg_logprobs (or none); `negative`: a loss with the gradient that `joint` has
                through the negative image alone, given logprobs [R] of the update's, and with
                batch.neg_logprobs; `logprobs`: given labels [R]; `cross_entropy`: given labels
                [R], loss_mask [R] and num_loss_tokens.
            given: what the branch needs besides; `joint` and `update` take return_logprobs, `joint`
                takes apart.

        Returns:
            `logprobs`: [R] float32. Otherwise (loss, metrics): a 0-d tensor, already divided by
            num_loss_tokens, and 0-d detached tensors that add up over micro-batches and ranks
            (with return_logprobs also `logprobs` [R], and `neg_logprobs` [R] where they are). With
            apart the loss ends at the hidden states: `hidden` lists each branch's and the leaf that
            stands for it.
        """
        batch = to_device(batch, self.device)
        if branch == "joint":
            return self._tapo(batch, batch.negative, **given)
        if branch == "update":
            return self._tapo(batch, None, **given)
        if branch == "negative":
            return self._negative(batch, given["logprobs"])
        if branch == "logprobs":
            labels = given["labels"].to(self.device)
            return linear_logprobs(self._hidden(batch), labels=labels, **self._head())[0]
        if branch == "cross_entropy":
            given |= {name: given[name].to(self.device) for name in ("labels", "loss_mask")}
            return fused_linear_cross_entropy(self._hidden(batch), **self._head(), **given)
        raise ValueError(f"branch must be one of {get_args(Branch)}, got {branch!r}")

    @torch.no_grad()
    def logprobs(self, packed: PackedBatch, labels: Tensor) -> Tensor:
        """Log-probs [R] float32 of `labels` [R], without gradient."""
        return self(packed, "logprobs", labels=labels)

    def accumulate(
        self, batch: MicroBatch, branches: Literal["joint", "one_at_a_time"] = "joint"
    ) -> tuple[Tensor, Metrics]:
        """Add a micro-batch's gradients to those that are there.

        Args:
            batch: with or without a negative to be scored now.
            branches: `joint`: both branches' activations exist at once, and are gone through
                backwards one after the other; `one_at_a_time`: the negative is scored without
                gradient first, then each branch has its own forward and backward pass, with the
                other one's log-probs as constants. The gradient is the same, the activations half,
                at the price of one more forward pass.

        Returns:
            The loss and its metrics, detached; `logprobs` [R] among them.
        """
        if batch.negative is None:
            value, metrics = self(batch, "update", return_logprobs=True)
            value.backward()
            return value.detach(), metrics
        if branches == "joint":
            value, metrics = self(batch, "joint", return_logprobs=True, apart=True)
            value.backward()
            # In one pass a parameter's gradient would wait, whole, for both branches' shares.
            for hidden, leaf in metrics.pop("hidden"):
                if leaf.grad is not None:
                    hidden.backward(leaf.grad)
            return value.detach(), metrics
        neg_logprobs = self.logprobs(batch.negative, batch.labels)
        batch = replace(batch, neg_logprobs=neg_logprobs)
        value, metrics = self(batch, "update", return_logprobs=True)
        value.backward()
        if self.loss.neg_grad == "flow":
            self(batch, "negative", logprobs=metrics["logprobs"])[0].backward()
        return value.detach(), metrics

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters as (name, tensor on this policy's device): see train.lora.whole_weights."""
        for name, weight in whole_weights(self.model):
            yield name, weight.to(self.device)

    def gather_weights(self) -> None:
        """Take part where another rank iterates named_weights."""
        deque(self.named_weights(), maxlen=0)

    def _hidden(self, packed: PackedBatch) -> Tensor:
        """[R, D]: the hidden states that predict the pack's response tokens."""
        output = self.model.model.language_model(
            **self.family.text_inputs(self.model, packed), use_cache=False, segments=packed.segments
        )
        return output.last_hidden_state[0][packed.hidden_index]

    def _head(self) -> dict:
        return {
            "weight": self.model.lm_head.weight,
            "temperature": self.temperature,
            "chunk_rows": self.chunk_rows,
        }

    def _loss(self, batch: MicroBatch) -> dict:
        """What the loss is told about a micro-batch's rows."""
        return {
            "loss": self.loss,
            "old_logprobs": batch.old_logprobs,
            "advantages": batch.advantages,
            "num_loss_tokens": batch.num_loss_tokens,
            "loss_mask": batch.loss_mask,
            "is_weights": batch.is_weights,
        }

    def _tapo(
        self,
        batch: MicroBatch,
        negative: PackedBatch | None,
        return_logprobs: bool = False,
        apart: bool = False,
    ) -> tuple[Tensor, Metrics]:
        neg_hidden = None
        if negative is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.loss.neg_grad == "flow"):
                neg_hidden = self._hidden(negative)
        hidden = [self._hidden(batch.update), neg_hidden]
        leaves = [h.detach().requires_grad_(h.requires_grad) for h in hidden] if apart else hidden
        value, metrics = fused_linear_tapo_loss(
            *leaves,
            **self._head(),
            **self._loss(batch),
            labels=batch.labels,
            neg_logprobs=batch.neg_logprobs,
            return_logprobs=return_logprobs,
        )
        if apart:
            metrics["hidden"] = list(zip(hidden, leaves, strict=True))
        return value, metrics

    def _negative(self, batch: MicroBatch, logprobs: Tensor) -> tuple[Tensor, Metrics]:
        neg_logprobs = batch.neg_logprobs.detach().requires_grad_()
        with torch.enable_grad():
            value, _ = tapo_loss_reference(logprobs, neg_logprobs=neg_logprobs, **self._loss(batch))
            (coefficients,) = torch.autograd.grad(value, neg_logprobs)
        return fused_linear_tapo_loss(
            self._hidden(batch.negative),
            None,
            **self._head(),
            labels=batch.labels,
            old_logprobs=None,
            advantages=None,
            coefficients=coefficients,
            num_loss_tokens=batch.num_loss_tokens,
            loss_mask=batch.loss_mask,
        )
