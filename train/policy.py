"""The policy: a transformers model, shared-prefix attention, and the loss, as one module.

`Policy.forward` is the only entry (and the root of a sharded model): body and head + loss run
inside it, and the head's weight is touched nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tercet.core.config import LossConfig
from tercet.core.model import PolicyParts
from tercet.core.types import MicroBatch, PackedBatch, to_device
from tercet.kernels.prefix_attention import ATTENTION_NAME
from tercet.kernels.reference import linear_logprobs_reference, tapo_loss_reference

Branch = Literal["joint", "update", "logprobs", "cross_entropy"]
Metrics = dict[str, Tensor]


class Policy(nn.Module):
    """Body, head and loss of a Qwen2-VL / Qwen2.5-VL policy on packed batches.

    Args:
        parts: the transformers model; its text part is switched to shared-prefix attention.
        loss: coefficients and forms of the TAPO loss; not needed for stage 1.
        temperature: sampling temperature; log-probs are those of the scaled distribution.
        chunk_rows: response rows that reach the head at once.
    """

    def __init__(
        self,
        parts: PolicyParts,
        loss: LossConfig | None = None,
        *,
        temperature: float = 1.0,
        chunk_rows: int = 2048,
    ):
        super().__init__()
        self.model = parts.model
        self.model.set_attn_implementation({"text_config": ATTENTION_NAME, "vision_config": "sdpa"})
        self.loss = loss
        self.temperature = temperature
        self.chunk_rows = chunk_rows

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, batch: MicroBatch | PackedBatch, branch: Branch = "joint", **given):
        """Score a batch; which way is said by `branch`.

        Args:
            batch: a MicroBatch for `joint` and `update`, a PackedBatch for the others.
            branch: `joint`: TAPO loss, the negative scored too; `update`: TAPO loss with
                batch.neg_logprobs (or none); `logprobs`: given labels [R]; `cross_entropy`: given
                labels [R], loss_mask [R] and num_loss_tokens.

        Returns:
            `logprobs`: [R] float32. Otherwise (loss, metrics): a 0-d tensor, already divided by
            num_loss_tokens, and 0-d detached tensors that add up over micro-batches and ranks.
        """
        batch = to_device(batch, self.device)
        if branch == "joint":
            return self._tapo(batch, batch.negative)
        if branch == "update":
            return self._tapo(batch, None)
        if branch == "logprobs":
            return self._score(batch, given["labels"].to(self.device))[0]
        if branch == "cross_entropy":
            return self._cross_entropy(batch, **given)
        raise ValueError(f"branch must be one of {get_args(Branch)}, got {branch!r}")

    @torch.no_grad()
    def logprobs(self, packed: PackedBatch, labels: Tensor) -> Tensor:
        """Log-probs [R] float32 of `labels` [R], without gradient."""
        return self(packed, "logprobs", labels=labels)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters as (Hugging Face name, tensor), in one order on all ranks, tied ones once."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def _hidden(self, packed: PackedBatch) -> Tensor:
        """[R, D]: the hidden states that predict the pack's response tokens."""
        body = self.model.model
        embeddings = body.get_input_embeddings()(packed.input_ids)
        if packed.pixel_values is not None:
            features = body.get_image_features(packed.pixel_values, packed.image_grid_thw)
            image = (packed.input_ids == self.model.config.image_token_id)[:, None]
            merged = torch.cat(features.pooler_output).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(image, merged)
        output = body.language_model(
            inputs_embeds=embeddings[None],
            position_ids=packed.position_ids[:, None],
            attention_mask={"full_attention": None},
            use_cache=False,
            segments=packed.segments,
        )
        return output.last_hidden_state[0][packed.hidden_index]

    def _score(self, packed: PackedBatch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob and exact entropy [R] of every row; at most chunk_rows x V logits exist."""
        weight = self.model.lm_head.weight
        scored = [
            checkpoint(
                linear_logprobs_reference, rows, weight, of, self.temperature, use_reentrant=False
            )
            for rows, of in zip(
                self._hidden(packed).split(self.chunk_rows),
                labels.split(self.chunk_rows),
                strict=True,
            )
        ]
        logprobs, entropies = zip(*scored, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _tapo(self, batch: MicroBatch, negative: PackedBatch | None) -> tuple[Tensor, Metrics]:
        loss = self.loss
        logprobs, entropy = self._score(batch.update, batch.labels)
        neg_logprobs = batch.neg_logprobs
        if negative is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and loss.neg_grad == "flow"):
                neg_logprobs, _ = self._score(negative, batch.labels)
        total, metrics = tapo_loss_reference(
            logprobs,
            batch.old_logprobs,
            neg_logprobs,
            batch.advantages,
            num_loss_tokens=batch.num_loss_tokens,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            clip_dual=loss.clip_dual,
            log_ratio_clamp=loss.log_ratio_clamp,
            kl_coef=loss.kl_coef,
            kl_ratio=loss.kl_ratio,
            kl_log_clamp=loss.kl_log_clamp,
            kl_clamp=loss.kl_clamp,
            entropy_coef=loss.entropy_coef,
            neg_entropy_coef=loss.neg_entropy_coef,
            neg_grad=loss.neg_grad,
            loss_mask=batch.loss_mask,
        )
        metrics["exact_entropy"] = _masked_mean(
            entropy.detach(), batch.loss_mask, batch.num_loss_tokens
        )
        return total, metrics

    def _cross_entropy(
        self, packed: PackedBatch, labels: Tensor, loss_mask: Tensor, num_loss_tokens: float
    ) -> tuple[Tensor, Metrics]:
        logprobs, _ = self._score(packed, labels.to(self.device))
        loss = _masked_mean(-logprobs, loss_mask.to(self.device), num_loss_tokens)
        return loss, {"cross_entropy": loss.detach()}


def _masked_mean(values: Tensor, loss_mask: Tensor, num_loss_tokens: float) -> Tensor:
    return torch.where(loss_mask != 0, values * loss_mask, 0).sum() / num_loss_tokens
