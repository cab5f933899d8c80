"""The policy: a transformers model, shared-prefix attention, and the loss, as one module.

`Policy.forward` is the only entry (and the root of a sharded model): body and head + loss run
inside it, and the head's weight is touched nowhere else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tercet.core.advantages import sequence_old_logprobs
from tercet.core.config import LossConfig
from tercet.core.models import family_of
from tercet.core.types import MicroBatch, PackedBatch, PolicyParts, to_device
from tercet.kernels.linear_logprobs import linear_logprobs
from tercet.kernels.prefix_attention import ATTENTION_NAME
from tercet.kernels.reference import entropy_slopes, tapo_loss_reference
from tercet.kernels.tapo_loss import fused_linear_cross_entropy, fused_linear_tapo_loss
from tercet.kernels.varlen import VISION_NAME, backend_of
from tercet.train.learner.lora import whole_weights

Task = Literal["update", "negative", "logprobs", "cross_entropy"]
Metrics = dict[str, Tensor]
NamedWeights = Iterator[tuple[str, Tensor]]


class Policy(nn.Module):
    """Body, head and loss of a policy on packed batches.

    Args:
        parts: the transformers model; its text part is switched to shared-prefix attention.
        loss: coefficients and forms of the TAPO loss; not needed for stage 1.
        temperature: sampling temperature; log-probs are those of the scaled distribution.
        chunk_rows: response rows that reach the head at once; None: what suits the device.
        device: what is computed on; None: where the parameters are.
        dtype: what is computed in; None: the parameters' own.
        sampler_weights: what the sampler gets of the model: see train.learner.lora.
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
        sampler_weights: Callable[[nn.Module], NamedWeights] = whole_weights,
    ):
        super().__init__()
        self.model = parts.model
        self.family = family_of(parts.model.config)
        self.shape = self.family.shape(parts.model.config)
        """Sizes, for counting operations."""
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
        self._sampler_weights = sampler_weights

    def forward(self, batch: MicroBatch | PackedBatch, task: Task, **given):
        """The language model on a batch's packs, then the head, and what the task makes of it.

        Args:
            batch: a PackedBatch for `logprobs`, else a MicroBatch.
            task: `update`: the TAPO loss, on batch.negative too where there is one.
                `negative`: a loss with the gradient that `update` has through the negative image
                alone, given logprobs [R] of the update's, and with batch.neg_logprobs.
                `logprobs`: given labels [R]. `cross_entropy`: the loss of stage 1.
            given: what the task needs besides; `update` takes return_logprobs and apart.

        Returns:
            `logprobs`: [R] float32; given entropy=True a pair, the second the exact entropies.
            Otherwise (loss, metrics): a 0-d tensor, already divided by num_loss_tokens, and 0-d
            detached tensors that add up over micro-batches and ranks (with return_logprobs also
            `logprobs` [R], and `neg_logprobs` [R] where they are). With apart the loss ends at the
            hidden states: `hidden` lists each pack's and the leaf that stands for it.

        Raises:
            ValueError: another task.
        """
        if task not in get_args(Task):
            raise ValueError(f"task must be one of {get_args(Task)}, got {task!r}")
        batch = to_device(batch, self.device)
        sides = {"update": ("negative", "update"), "negative": ("negative",)}.get(task, ("update",))
        hidden: dict[str, Tensor] = {}
        for side in sides:
            pack = batch if task == "logprobs" else getattr(batch, side)
            if pack is None:
                continue
            constant = len(sides) == 2 and side == "negative" and self.loss.neg_grad == "detach"
            with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
                inputs = self.family.text_inputs(self.model, self._with_photo(pack))
                output = self.model.model.language_model(
                    **inputs, use_cache=False, segments=pack.segments
                )
                hidden[side] = output.last_hidden_state[0][pack.hidden_index]
        if task == "logprobs":
            labels = given["labels"].to(self.device)
            found = linear_logprobs(hidden["update"], labels=labels, **self._head())
            return found if given.get("entropy") else found[0]
        if task == "cross_entropy":
            rows = {"loss_mask": batch.loss_mask, "num_loss_tokens": batch.num_loss_tokens}
            hidden, labels = hidden["update"], batch.labels
            return fused_linear_cross_entropy(hidden, labels=labels, **rows, **self._head())
        if task == "negative":
            return self._negative(batch, hidden["negative"], **given)
        return self._tapo(batch, hidden["update"], hidden.get("negative"), **given)

    def accumulate(
        self, batch: MicroBatch, branches: Literal["joint", "one_at_a_time"] = "joint"
    ) -> tuple[Tensor, Metrics]:
        """Add a micro-batch's gradients to those that are there.

        Args:
            batch: with or without a negative to be computed now.
            branches: `joint`: the activations of both photos exist at once, and the backward pass
                goes through one after the other. `one_at_a_time`: log-probs on the negative are
                computed without gradient first, then each photo has its own forward and backward
                pass, with the other one's log-probs as constants. The gradient is the same, with
                half the activations and one more forward pass.

        Returns:
            The loss and its metrics, detached; `logprobs` [R] among them, and `neg_logprobs` [R]
            where the loss has them.
        """
        if batch.response_index is not None and batch.old_logprobs is not None:
            # A response's ratio is that of all its tokens: their log-probs are needed first.
            with torch.no_grad():
                now = self(batch.update, "logprobs", labels=batch.labels).cpu()
            old = sequence_old_logprobs(now, batch.old_logprobs.to(now.dtype), batch.response_index)
            batch = replace(batch, old_logprobs=old)
        if batch.negative is not None and branches == "one_at_a_time":
            with torch.no_grad():
                found = self(batch.negative, "logprobs", labels=batch.labels, entropy=True)
            negative_apart = replace(batch, neg_logprobs=found[0], neg_entropy=found[1])
            batch = replace(negative_apart, negative=None)
        else:
            negative_apart = None
        # In one pass a parameter's gradient would wait, whole, for both images' shares.
        apart = batch.negative is not None
        value, metrics = self(batch, "update", return_logprobs=True, apart=apart)
        value.backward()
        for hidden, leaf in metrics.pop("hidden", ()):
            if leaf.grad is not None:
                hidden.backward(leaf.grad)
        if negative_apart and self.loss.neg_grad == "flow":
            self(negative_apart, "negative", logprobs=metrics["logprobs"])[0].backward()
        return value.detach(), metrics

    def named_weights(self) -> NamedWeights:
        """Parameters as (name, tensor on this policy's device): see train.lora.whole_weights."""
        for name, weight in whole_weights(self.model):
            yield name, weight.to(self.device)

    def sampled_weights(self) -> NamedWeights:
        """What changes in the sampler with each update, as (name, tensor on this policy's device).

        Sharded parameters are gathered one at a time: a collective.
        """
        for name, weight in self._sampler_weights(self.model):
            yield name, weight.to(self.device)

    def gather_weights(self) -> None:
        """Take part where another rank iterates sampled_weights."""
        deque(self.sampled_weights(), maxlen=0)

    def _with_photo(self, pack: PackedBatch) -> PackedBatch:
        """The pack; a sharded policy's gets a photo of one token, for no prompt, if it has none.

        The vision tower's passes are collectives, which ranks with photos would wait in for ever.
        """
        if pack.pixel_values is not None or not isinstance(self, FSDPModule):
            return pack
        side, like = self.shape.merge, {"device": self.device}
        pixels = torch.zeros(side**2, self.shape.patch, **like)
        return replace(
            pack, pixel_values=pixels, image_grid_thw=torch.tensor([[1, side, side]], **like)
        )

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
            "ref_logprobs": batch.ref_logprobs,
        }

    def _tapo(
        self,
        batch: MicroBatch,
        hidden: Tensor,
        neg_hidden: Tensor | None,
        return_logprobs: bool = False,
        apart: bool = False,
    ) -> tuple[Tensor, Metrics]:
        ends = [x for x in (hidden, neg_hidden) if x is not None]
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in ends] if apart else ends
        value, metrics = fused_linear_tapo_loss(
            leaves[0],
            leaves[1] if len(leaves) == 2 else None,
            **self._head(),
            **self._loss(batch),
            labels=batch.labels,
            neg_logprobs=batch.neg_logprobs,
            neg_entropy=batch.neg_entropy,
            return_logprobs=return_logprobs,
        )
        if apart:
            metrics["hidden"] = list(zip(ends, leaves, strict=True))
        return value, metrics

    def _negative(
        self, batch: MicroBatch, neg_hidden: Tensor, logprobs: Tensor
    ) -> tuple[Tensor, Metrics]:
        leaves = [x.detach().requires_grad_() for x in (batch.neg_logprobs, batch.neg_entropy)]
        with torch.enable_grad():
            given = {"neg_logprobs": leaves[0], "neg_entropy": leaves[1]}
            # The entropy of the update's image is a constant here: any will do.
            given |= {"entropy": torch.zeros_like(logprobs), **self._loss(batch)}
            value, _ = tapo_loss_reference(logprobs, **given)
            found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return fused_linear_tapo_loss(
            neg_hidden,
            None,
            **self._head(),
            labels=batch.labels,
            old_logprobs=None,
            advantages=None,
            coefficients=found[0],
            d_entropy=found[1] if entropy_slopes(self.loss) else None,
            num_loss_tokens=batch.num_loss_tokens,
            loss_mask=batch.loss_mask,
        )
