"""Other ways to compute the loss of `fused_linear_tapo_loss`: plain PyTorch, Liger, CCE, TRL.

The loss is the token-level clipped policy loss with old log-probs: no KL, no entropy terms and no
negative, as all peers can compute it. Peers are called through their own packages with their own
defaults. Liger's fused linear cross entropy is missing because it takes no row weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tercet.core.config import LossConfig
from tercet.kernels.reference import tapo_loss_reference
from tercet.kernels.tapo_loss import fused_linear_tapo_loss

SEQUENCE = 64  # tokens that share one advantage
LOSS = LossConfig(kl_coef=0.0, entropy_coef=0.0, neg_entropy_coef=0.0)
CLIPS = {"epsilon_low": LOSS.clip_low, "epsilon_high": LOSS.clip_high, "delta": LOSS.clip_dual}


@dataclass(frozen=True)
class Case:
    """One shape's tensors."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    old_logprobs: Tensor
    advantages: Tensor

    def loss(self, logprobs: Tensor) -> Tensor:
        """The loss all methods share, from log-probs [R]."""
        rows = (logprobs, self.old_logprobs, None, self.advantages)
        return tapo_loss_reference(*rows, loss=LOSS, num_loss_tokens=len(self.labels))[0]

    def by_sequence(self, rows: Tensor) -> Tensor:
        """[R, ...] as [sequences, tokens, ...]."""
        length = SEQUENCE if len(rows) % SEQUENCE == 0 else len(rows)
        return rows.view(-1, length, *rows.shape[1:])


def make_case(rows: int, dim: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    """Hidden states of unit scale with likely labels, like those of a trained policy's samples."""
    noise = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, dim, generator=noise, device=device)
    weight = torch.randn(vocabulary, dim, generator=noise, device=device) * 2 / dim**0.5
    labels = torch.randint(vocabulary, (rows,), generator=noise, device=device)
    hidden += 1.5 * weight[labels]
    length = SEQUENCE if rows % SEQUENCE == 0 else rows
    advantages = torch.randn(rows // length, generator=noise, device=device)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    old = [
        functional.cross_entropy((h @ weight.T).float(), of, reduction="none").neg()
        for h, of in zip(hidden.split(512), labels.split(512), strict=True)
    ]
    old = torch.cat(old) + 0.1 * torch.randn(rows, generator=noise, device=device)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    return Case(*leaves, labels, old, advantages.repeat_interleave(length))


def gemms(case: Case) -> None:
    """The three GEMMs alone, as an upper limit on speed; computes no gradient of the loss."""
    with torch.no_grad():
        for hidden in case.hidden.split(2048):
            logits = hidden @ case.weight.T
            logits @ case.weight
            logits.T @ hidden


def ours(case: Case) -> Tensor:
    """`fused_linear_tapo_loss`."""
    return fused_linear_tapo_loss(
        case.hidden,
        None,
        case.weight,
        case.labels,
        case.old_logprobs,
        case.advantages,
        loss=LOSS,
        num_loss_tokens=len(case.labels),
    )[0]


def _logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def eager(case: Case) -> Tensor:
    """Plain PyTorch: all logits, kept."""
    return case.loss(_logprobs(case.hidden, case.weight, case.labels))


def compiled(case: Case) -> Tensor:
    """The same under torch.compile."""
    logprobs = torch.compile(_logprobs, dynamic=False)(case.hidden, case.weight, case.labels)
    return case.loss(logprobs)


def checkpointed(case: Case) -> Tensor:
    """The same in checkpointed chunks of 1,024 rows."""
    parts = zip(case.hidden.split(1024), case.labels.split(1024), strict=True)
    found = [checkpoint(_logprobs, h, case.weight, of, use_reentrant=False) for h, of in parts]
    return case.loss(torch.cat(found))


def liger_grpo(case: Case) -> Tensor:
    """Liger's chunked GRPO loss with its defaults (one sequence a chunk)."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    on_gpu = case.hidden.is_cuda
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=on_gpu, **CLIPS)
    return loss(
        case.by_sequence(case.hidden),
        case.weight,
        case.by_sequence(case.labels),
        torch.ones_like(case.by_sequence(case.labels)),
        case.by_sequence(case.advantages)[:, 0],
        old_per_token_logps=case.by_sequence(case.old_logprobs),
    )[0]


def liger_triton_grpo(case: Case) -> Tensor:
    """Liger's Triton GRPO loss, on logits of the whole batch."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    logits = case.by_sequence(case.hidden) @ case.weight.T
    logits = functional.pad(logits, (0, 0, 0, 1))  # it expects one position more than labels
    loss, _ = triton_grpo_loss(
        logits,
        case.by_sequence(case.old_logprobs),
        None,
        case.by_sequence(case.labels),
        case.by_sequence(case.advantages)[:, 0].contiguous(),
        temperature=1.0,
        beta=0.0,
        eps_low=CLIPS["epsilon_low"],
        eps_high=CLIPS["epsilon_high"],
        delta=CLIPS["delta"],
        reduce=True,
    )
    return loss


def liger_scaled_cross_entropy(case: Case) -> Tensor:
    """Liger's newest head: CUTLASS on sm_90; elsewhere PyTorch in a loop of 512 rows at a time."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    function = module.LigerFusedLinearScaledCrossEntropyFunction
    losses = function.apply(case.hidden, case.weight, case.labels)
    return case.loss(-losses.float())


def cce(case: Case, filter_eps: str | None = "high") -> Tensor:
    """Apple's cut cross-entropy, with its gradient filter."""
    from cut_cross_entropy import linear_cross_entropy

    inputs = (case.hidden, case.weight, case.labels)
    losses = linear_cross_entropy(*inputs, reduction="none", impl="cce", filter_eps=filter_eps)
    return case.loss(-losses.float())


def cce_exact(case: Case) -> Tensor:
    """Apple's cut cross-entropy without its filter."""
    return cce(case, None)


def torch_linear_cross_entropy(case: Case) -> Tensor:
    """torch.nn.functional.linear_cross_entropy (torch >= 2.13), chunked."""
    losses = functional.linear_cross_entropy(
        case.hidden,
        case.weight,
        case.labels,
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return case.loss(-losses.float())


def trl(case: Case) -> Tensor:
    """TRL's chunked log-prob."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    inputs = (case.hidden, case.weight, None, case.labels, 1.0, 16_384)
    return case.loss(ChunkedLogProbFunction.apply(*inputs, None, 1.0, ())[0])


METHODS: list[Callable[[Case], Tensor]] = [
    ours,
    eager,
    compiled,
    checkpointed,
    liger_grpo,
    liger_triton_grpo,
    liger_scaled_cross_entropy,
    cce,
    cce_exact,
    torch_linear_cross_entropy,
    trl,
]
GPU_ONLY = (compiled, liger_triton_grpo, cce, cce_exact)
