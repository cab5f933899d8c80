"""Optimiser, learning rate and the clipped step.

float32 parameters go to torch.optim.AdamW. bfloat16 parameters go to KahanAdamW below, with every
state in bfloat16 (10 bytes a parameter with its gradient) or in float32 (16 bytes). Rounding to
nearest would lose what AdamW adds in small portions: beta2 = 0.999 changes the second moment by
0.1 % a step where bfloat16 resolves 0.4 %, so it hardly ever falls, and weight decay multiplied
into the parameter, lr * weight_decay = 1e-8 of it, never arrives. torch-optimi rounds that way:
over 3,000 steps whose gradients shrink tenfold it moves the weights 0.27 to 0.58 times as far as
float64, KahanAdamW 1.00. Here the decay joins the compensated update, and bfloat16 states are
rounded with a dither that follows from the step number: right on average over steps, without random
numbers, the same after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from tercet.core.config import OptimConfig, TapoOptimConfig
from tercet.core.costs import CHUNK_ELEMENTS

STATES = ("exp_avg", "exp_avg_sq", "compensation")
GOLDEN = 0.6180339887498949
"""Its multiples modulo 1 fill [0, 1) evenly from the first few on."""


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]], config: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW of all parameters that require a gradient.

    Args:
        named_parameters: all of one dtype, float32 (or float64) or bfloat16; DTensors are fine.
        config: lr, beta1, beta2, eps, weight_decay, decay_norms_and_biases and states are used.

    Returns:
        torch.optim.AdamW, or KahanAdamW for bfloat16; its lr is set by `optimizer_step`.

    Raises:
        ValueError: An option out of range, nothing to train, or mixed or other dtypes.
    """
    _check(config)
    trained = [(name, param) for name, param in named_parameters if param.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient: there is nothing to train")
    first, dtype = trained[0][0], trained[0][1].dtype
    for name, param in trained:
        if param.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(f"{name} is {param.dtype}; trained are float32 and bfloat16")
        if param.dtype != dtype:
            raise ValueError(
                f"{name} is {param.dtype} but {first} is {dtype}: trained parameters must share "
                "one dtype (model.dtype float32 or bfloat16)"
            )
    params = _groups([param for _, param in trained], config)
    options = dict(
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if dtype == torch.bfloat16:
        return KahanAdamW(params, states=getattr(torch, config.states), **options)
    fused = all(param.device.type in ("cpu", "cuda") for _, param in trained)
    return torch.optim.AdamW(params, fused=fused, **options)


def _groups(params: list[Parameter], config: OptimConfig) -> list[dict]:
    """Parameter groups. Norms and biases are the vectors among a transformer's parameters."""
    if config.decay_norms_and_biases:
        return [{"params": params}]
    plain = [param for param in params if param.ndim < 2]
    groups = [{"params": [param for param in params if param.ndim >= 2]}]
    groups.append({"params": plain, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _check(config: OptimConfig) -> None:
    """Raises ValueError for an option out of its range."""
    checks = {
        "lr": (config.lr >= 0, "at least 0"),
        "beta1": (0 <= config.beta1 < 1, "in [0, 1)"),
        "beta2": (0 <= config.beta2 < 1, "in [0, 1)"),
        "eps": (config.eps > 0, "positive"),
        "weight_decay": (config.weight_decay >= 0, "at least 0"),
        "max_grad_norm": (config.max_grad_norm > 0, "positive"),
        "warmup_steps": (config.warmup_steps >= 0, "at least 0"),
        "schedule": (config.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    }
    for name, (ok, allowed) in checks.items():
        if not ok:
            raise ValueError(f"optim.{name} must be {allowed}, got {getattr(config, name)!r}")


SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Factor on the learning rate; progress runs from 0 after the warm-up to 1 at the last step."""


def learning_rate(
    step: int | Fraction, total_steps: int | Fraction, config: OptimConfig, first_rollout: bool
) -> float:
    """Learning rate of one optimiser step.

    Args:
        step: optimiser step, from 0; a Schedule's may be a fraction.
        total_steps: optimiser steps of the whole run; later ones keep the last one's rate.
        config: lr, schedule, warmup_steps, rates and, of TAPO, skip_first_rollout_lr are used.
        first_rollout: whether the step belongs to the run's first rollout step.

    Returns:
        The rate: (step + 1) / warmup_steps of config.lr in the warm-up, config.lr right after it,
        0 at the last step unless the schedule is constant or that step is the only one after it.
        With rates "transformers" step / warmup_steps in the warm-up, and 0 only one step later.

    Raises:
        ValueError: A negative step.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if first_rollout and isinstance(config, TapoOptimConfig) and config.skip_first_rollout_lr:
        return 0.0
    early = config.rates == "transformers"
    if step < config.warmup_steps:
        return config.lr * (step + (not early)) / config.warmup_steps
    decay_steps = total_steps - (not early) - config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / decay_steps) if decay_steps > 0 else 0.0
    return config.lr * SCHEDULES[config.schedule](progress)


class Schedule:
    """The learning rate of a run whose steps may have more or fewer mini-batches than others.

    The warm-up counts the optimiser steps that were taken. After it the rate follows the share of
    the run that is done: mini-batch j of n in rollout step s stands at s + j / n steps. In a run
    whose steps all have n mini-batches this is the optimiser step's number over their total.

    Args:
        config: see `learning_rate`.
        total_steps: rollout steps of the run, or optimiser steps where there are no mini-batches.
    """

    def __init__(self, config: OptimConfig, total_steps: int):
        self._config, self._total_steps = config, total_steps
        self.taken = 0
        """Optimiser steps that were taken; skipped ones do not count."""
        self._warm: Fraction | None = None
        """Where in the run the warm-up ended, in steps."""

    def rate(self, step: int, minibatch: int = 0, minibatches: int = 1) -> float:
        """Learning rate of a mini-batch, from 0, of a step, from 0, that has `minibatches`."""
        warmup, place = self._config.warmup_steps, step + Fraction(minibatch, minibatches)
        if self.taken < warmup:
            self._warm = None
            return learning_rate(self.taken, self.taken, self._config, step == 0)
        if self._warm is None:
            self._warm = place - Fraction(self.taken - warmup, minibatches)
        done, whole = ((x - self._warm) * minibatches for x in (place, self._total_steps))
        return learning_rate(warmup + done, warmup + whole, self._config, step == 0)

    def state(self) -> dict:
        """For a checkpoint."""
        warm = None if self._warm is None else self._warm.as_integer_ratio()
        return {"optimizer_steps": self.taken, "warm": warm}

    def restore(self, state: dict) -> None:
        """Go on from where `state` was taken; earlier versions stored no `warm`."""
        self.taken = state.get("optimizer_steps", state["steps_done"])
        warm = state.get("warm")
        self._warm = None if warm is None else Fraction(*warm)


HALF_UPDATED = "weights may be half updated: no checkpoint is written"
"""A note on every exception that comes out of the optimiser's own step."""


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Parameter],
    lr: float,
    max_grad_norm: float,
) -> tuple[float, bool]:
    """Clips the gradients by their global norm, takes one step, and clears them.

    Waits for the device once, to read the norm. With sharded gradients a collective: every rank
    calls it and gets the same answer.

    Args:
        optimizer: as `build_optimizer` gives it.
        parameters: those whose gradients count in the norm.
        lr: learning rate of this step.
        max_grad_norm: larger gradients are scaled by max_grad_norm / (norm + 1e-6).

    Returns:
        The norm before clipping, and whether the step was taken: not when the norm is not finite.

    Raises:
        ValueError: No parameter has a gradient, or memory runs out in the optimiser's own step. An
            exception that comes out of that step has the note HALF_UPDATED.
    """
    grads = [param.grad for param in parameters if param.grad is not None]
    if not grads:
        raise ValueError("no parameter has a gradient: call backward() before optimizer_step()")
    norms = [
        torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        for grad in grads
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    grad_norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
    stepped = math.isfinite(grad_norm)
    if stepped:
        scale = max_grad_norm / (grad_norm + 1e-6)
        if scale < 1:
            for grad in grads:
                grad.mul_(scale)
        for group in optimizer.param_groups:
            group["lr"] = lr
        _take_step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, stepped


def _take_step(optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except torch.OutOfMemoryError as error:
        named = ValueError(
            "out of memory in the optimiser's own step: optim.states bfloat16, model.lora_rank, "
            "parallel.offload or more ranks need less"
        )
        named.add_note(HALF_UPDATED)
        raise named from error
    except BaseException as error:
        error.add_note(HALF_UPDATED)
        raise


class KahanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) of bfloat16 parameters.

    The weight is the sum of the parameter and its state `compensation`, which holds what the
    rounding of the parameter left over (Kahan summation). All arithmetic is float32.

    Args:
        params: bfloat16 tensors, or DTensors of which each rank updates its own shard.
        lr: learning rate.
        betas: decay of the mean of gradients and of their squares.
        eps: added to the root of the mean square.
        weight_decay: lr times this is the share of the weight taken off a step.
        states: dtype of the states, bfloat16 or float32.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        states: torch.dtype = torch.bfloat16,
    ):
        self._dtype = states
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every parameter that has a gradient; takes no closure."""
        if closure is not None:
            raise ValueError("KahanAdamW takes no closure")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state |= {name: torch.zeros_like(param, dtype=self._dtype) for name in STATES}
                state["step"] += 1
                tensors = [_rows(t) for t in (param, param.grad, *map(state.get, STATES))]
                rows = max(1, CHUNK_ELEMENTS * len(tensors[0]) // max(1, tensors[0].numel()))
                for chunk in zip(*(t.split(rows) for t in tensors), strict=True):
                    _update(*chunk, step=int(state["step"]), group=group)


def _rows(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, with at least one dimension, sharing its memory."""
    return torch.atleast_1d(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def _update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compensation: Tensor,
    *,
    step: int,
    group: dict,
) -> None:
    """One AdamW update, in place, of five tensors of one shape: two of bfloat16, three states."""
    kept = _dithered if exp_avg.dtype == torch.bfloat16 else lambda values, step: values
    lr, (beta1, beta2) = group["lr"], group["betas"]
    grad = grad.float()
    mean = exp_avg.float().lerp_(grad, 1 - beta1)
    square = exp_avg_sq.float().lerp_(grad.square(), 1 - beta2)
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    old = param.float()
    change = compensation.float().addcdiv_(mean, root, value=-lr / (1 - beta1**step))
    change.add_(old, alpha=-lr * group["weight_decay"])
    param.copy_(old + change)
    compensation.copy_(kept(change - (param.float() - old), step))
    exp_avg.copy_(kept(mean, step))
    exp_avg_sq.copy_(kept(square, step))


def _dithered(values: Tensor, step: int) -> Tensor:
    """float32 values cut to bfloat16 precision, away from 0 in as many steps as their rest says."""
    offset = int(step * GOLDEN % 1 * 65536)
    bits = values.view(torch.int32).add_(offset).bitwise_and_(-65536)
    return bits.view(torch.float32)
