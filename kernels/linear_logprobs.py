"""Log-probs and exact entropy of chosen tokens from hidden states, without [R, V].

    logits = hidden weight^T / temperature
    logprob_i = logits_i[label_i] - logsumexp(logits_i)
    entropy_i = logsumexp(logits_i) - sum_v p_iv logits_iv
    d logits_i = (g_i (onehot - p_i) - h_i p_i (log p_i + entropy_i)) / temperature

for incoming gradients g of the log-probs and h of the entropies. One chunk of rows at a time: one
GEMM gives its logits (float32, as bfloat16 logits would put up to 0.05 nat of noise on a log-prob),
then come the row operators of `rows`. The backward pass computes the logits again and adds two
GEMMs. 2 R V D FLOPs forward, 6 R V D backward; memory for the logits of one chunk. Log-probs are
the same to the last bit with and without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tercet.kernels.reference import check_head
from tercet.kernels.rows import operators

GPU_CHUNK_ROWS = 2048
"""Below about 800 rows, at V = 152k, adding to the float32 weight gradient is bound by memory."""
CPU_CHUNK_LOGITS = 6 << 20
"""Logits of a chunk on a CPU: 24 MiB in float32."""


class Head:
    """The head's GEMMs on chunks of rows; results are in max(float32, the weight's dtype).

    Args:
        weight: [V, D].
        needs_grad: whether `backward` also sums up the weight's gradient.
    """

    def __init__(self, weight: Tensor, needs_grad: bool = False):
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        # A GPU multiplies 16-bit numbers into float32 sums; on a CPU they become float32 first.
        self.mixed = weight.is_cuda and weight.dtype != self.dtype
        self.weight = weight.detach() if self.mixed else weight.detach().to(self.dtype)
        self.needs_grad = needs_grad
        self.grad: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[r, V] float32 (float64 for float64) of hidden states [r, D]."""
        if self.mixed:
            return torch.mm(hidden, self.weight.T, out_dtype=self.dtype)
        return hidden.to(self.dtype) @ self.weight.T

    def backward(self, d_logits: Tensor, hidden: Tensor, needs_hidden: bool) -> Tensor | None:
        """Add to the gradient of the weight; returns that of the hidden states [r, D]."""
        if self.needs_grad:
            self._add(d_logits.T, hidden)
        return (d_logits @ self.weight).to(hidden.dtype) if needs_hidden else None

    def _add(self, d_logits: Tensor, hidden: Tensor) -> None:
        options = {"out_dtype": self.dtype} if self.mixed else {}
        hidden = hidden.to(d_logits.dtype)
        if self.grad is None:
            self.grad = torch.mm(d_logits, hidden, **options)
        else:
            torch.addmm(self.grad, d_logits, hidden, out=self.grad, **options)


def chunks(rows: int, weight: Tensor, chunk_rows: int | None, branches: int = 1) -> list[slice]:
    """Slices of the rows whose logits, of all branches, exist at once; for no rows an empty one."""
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, or None, got {chunk_rows}")
    if chunk_rows is None:
        on_cpu = max(64, CPU_CHUNK_LOGITS // max(1, len(weight)))
        chunk_rows = GPU_CHUNK_ROWS if weight.is_cuda else on_cpu
    size = max(1, chunk_rows // branches)
    return [slice(start, min(start + size, rows)) for start in range(0, max(1, rows), size)]


class _LinearLogprobs(torch.autograd.Function):
    """Saves hidden states, weight and three numbers a row; backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, chunk_rows):
        head, rows = Head(weight), operators(hidden)
        outputs = torch.empty(3, len(hidden), dtype=head.dtype, device=hidden.device)
        for part in chunks(len(hidden), weight, chunk_rows):
            values = rows.row_logprobs(head.logits(hidden[part]), labels[part], temperature)
            outputs[:, part] = torch.stack(values)
        logprobs, lse, entropy = outputs
        ctx.save_for_backward(hidden, weight, labels, lse, entropy)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.set_materialize_grads(False)
        return logprobs.clone(), entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs, d_entropy):
        if d_logprobs is None and d_entropy is None:
            return None, None, None, None, None
        hidden, weight, labels, lse, entropy = ctx.saved_tensors
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(d_entropy)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head, rows = Head(weight, needs_weight), operators(hidden)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        for part in chunks(len(hidden), weight, ctx.chunk_rows):
            d_logits = rows.logits_grad_(
                head.logits(hidden[part]),
                labels[part],
                lse[part],
                entropy[part],
                d_logprobs[part].contiguous(),
                None if d_entropy is None else d_entropy[part].contiguous(),
                ctx.temperature,
                head.weight.dtype,
            )
            d_chunk = head.backward(d_logits, hidden[part], needs_hidden)
            del d_logits  # frees its memory for the next chunk
            if needs_hidden:
                d_hidden[part] = d_chunk
        d_weight = None if head.grad is None else head.grad.to(weight.dtype)
        return d_hidden, d_weight, None, None, None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of labels under softmax(hidden weight^T / temperature), and its entropy.

    Args:
        hidden: [R, D] bf16, fp16, fp32 or fp64: hidden states.
        weight: [V, D] dtype of `hidden`: the head.
        labels: [R] int64 in [0, V).
        temperature: what logits are divided by, positive.
        chunk_rows: rows whose logits exist at once; None: as many as suit the device.

    Returns:
        logprobs: [R] float32 (float64 for float64): natural logarithms.
        entropy: [R] same dtype: exact entropy of the whole distribution, in nats, differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature or chunk_rows that is
            not positive, or, on a CPU, a label outside [0, V). On a GPU such a row is NaN.
    """
    check_head(hidden, weight, labels, temperature)
    return _LinearLogprobs.apply(hidden, weight, labels, temperature, chunk_rows)
