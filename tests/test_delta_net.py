"""A prototype: what a shared prefix must carry through a gated delta net, as Qwen3.5 has them.

docs/models.md tells what follows from it. transformers' own fallback computes in float32 and knows
no bounds between sequences, so the recurrence here is another one, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

pytestmark = pytest.mark.core

HEADS, VALUE_HEADS, HEAD_DIM, D, KERNEL, EPS = 2, 4, 8, 24, 4, 1e-6
KEYS = HEADS * HEAD_DIM


@dataclass
class Weights:
    """Of a layer, by transformers' names; C = 2 KEYS + VALUE_HEADS * HEAD_DIM channels."""

    qkv: Tensor  # [C, D]
    conv: Tensor  # [C, KERNEL]
    a: Tensor  # [VALUE_HEADS, D]
    b: Tensor  # [VALUE_HEADS, D]
    z: Tensor  # [VALUE_HEADS * HEAD_DIM, D]
    a_log: Tensor  # [VALUE_HEADS]
    dt_bias: Tensor  # [VALUE_HEADS]
    norm: Tensor  # [HEAD_DIM]
    out: Tensor  # [D, VALUE_HEADS * HEAD_DIM]


@dataclass
class Carried:
    """What a sequence leaves behind for the tokens that follow it."""

    state: Tensor  # [VALUE_HEADS, HEAD_DIM, HEAD_DIM]: keys to values
    columns: Tensor  # [KERNEL - 1, C]: the last inputs of the convolution


def nothing() -> Carried:
    state = torch.zeros(VALUE_HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    return Carried(
        state, torch.zeros(KERNEL - 1, 2 * KEYS + VALUE_HEADS * HEAD_DIM, dtype=torch.float64)
    )


def delta_net(w: Weights, x: Tensor, before: Carried) -> tuple[Tensor, Carried]:
    """[T, D] behind `before` to [T, D], and what it leaves behind."""
    mixed = torch.cat([before.columns, x @ w.qkv.T])
    convolved = silu(sum(mixed[j : j + len(x)] * w.conv[:, j] for j in range(KERNEL)))
    query, key, value = convolved.split([KEYS, KEYS, VALUE_HEADS * HEAD_DIM], dim=-1)
    query, key = (
        (part * (part.square().sum(-1, keepdim=True) + EPS).rsqrt()).repeat_interleave(
            VALUE_HEADS // HEADS, dim=1
        )
        for part in (query.reshape(len(x), HEADS, -1), key.reshape(len(x), HEADS, -1))
    )
    value = value.reshape(len(x), VALUE_HEADS, HEAD_DIM)
    decay = (-w.a_log.exp() * softplus(x @ w.a.T + w.dt_bias)).exp()
    beta = (x @ w.b.T).sigmoid()
    state, rows = before.state, []
    for t in range(len(x)):
        state = state * decay[t, :, None, None]
        delta = (value[t] - (state * key[t, :, :, None]).sum(-2)) * beta[t, :, None]
        state = state + key[t, :, :, None] * delta[:, None]
        rows.append((state * query[t, :, :, None]).sum(-2) / HEAD_DIM**0.5)
    found = torch.stack(rows)
    found = w.norm * found * (found.square().mean(-1, keepdim=True) + EPS).rsqrt()
    gate = silu(x @ w.z.T).reshape(found.shape)
    return (found * gate).flatten(1) @ w.out.T, Carried(state, mixed[-(KERNEL - 1) :])


def one_by_one(w: Weights, prompt: Tensor, responses: list[Tensor]) -> list[Tensor]:
    """Outputs of the prompt's last token and of each response, every sequence computed whole."""
    whole = [delta_net(w, torch.cat([prompt, r]), nothing())[0] for r in responses]
    return [rows[len(prompt) - 1 :] for rows in whole]


def shared(w: Weights, prompt: Tensor, responses: list[Tensor]) -> tuple[list[Tensor], list]:
    """The same with the prompt computed once; also (what it left, a response's leaves of it)."""
    rows, left = delta_net(w, prompt, nothing())
    outputs, leaves = [], []
    for response in responses:
        leaf = Carried(*(getattr(left, f.name).detach().requires_grad_() for f in fields(left)))
        outputs.append(torch.cat([rows[-1:], delta_net(w, response, leaf)[0]]))
        leaves.append(leaf)
    return outputs, [(left, leaf) for leaf in leaves]


# the test of it


def layer() -> Qwen3_5GatedDeltaNet:
    torch.manual_seed(0)
    sizes = {"linear_num_key_heads": HEADS, "linear_num_value_heads": VALUE_HEADS}
    sizes |= {"linear_key_head_dim": HEAD_DIM, "linear_value_head_dim": HEAD_DIM}
    config = Qwen3_5TextConfig(
        hidden_size=D, linear_conv_kernel_dim=KERNEL, rms_norm_eps=EPS, num_hidden_layers=1, **sizes
    )
    made = Qwen3_5GatedDeltaNet(config, 0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return made


def weights_of(made: Qwen3_5GatedDeltaNet) -> Weights:
    found = [made.in_proj_qkv.weight, made.conv1d.weight[:, 0], made.in_proj_a.weight]
    found += [made.in_proj_b.weight, made.in_proj_z.weight, made.A_log, made.dt_bias]
    found += [made.norm.weight, made.out_proj.weight]
    return Weights(*(weight.detach().double().requires_grad_() for weight in found))


def made_inputs(lengths=(5, 1, 9, 2)) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    prompt, *responses = (
        torch.randn(n, D, dtype=torch.float64, generator=generator).requires_grad_()
        for n in (7, *lengths)
    )
    return prompt, responses


def test_the_recurrence_is_that_of_the_model():
    made, (prompt, _) = layer(), made_inputs()
    with torch.no_grad():
        theirs = made(prompt.detach().float()[None])[0].double()
    ours = delta_net(weights_of(made), prompt, nothing())[0]
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_shared_prompt_gives_what_sequences_give_one_by_one():
    """Outputs, and the gradient of every weight and of every token, the prompt's among them."""
    w, (prompt, responses) = weights_of(layer()), made_inputs()
    leaves = [*(getattr(w, f.name) for f in fields(w)), prompt, *responses]
    wanted = one_by_one(w, prompt, responses)
    slopes = [torch.randn_like(rows) for rows in wanted]
    exact = torch.autograd.grad(wanted, leaves, slopes)
    found, carried = shared(w, prompt, responses)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    torch.autograd.backward(found, slopes, retain_graph=True)  # responses, one after the other
    left = carried[0][0]
    sums = [
        torch.stack([getattr(leaf, f.name).grad for _, leaf in carried]).sum(0)
        for f in fields(Carried)
    ]
    torch.autograd.backward([left.state, left.columns], sums)  # then the prompt, once
    for leaf, gradient in zip(leaves, exact, strict=True):
        assert gradient.norm() > 1e-3
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lost", ["state", "columns"])
def test_both_are_needed(lost):
    w, (prompt, responses) = weights_of(layer()), made_inputs()
    whole = one_by_one(w, prompt, responses)
    left = delta_net(w, prompt, nothing())[1]
    setattr(left, lost, getattr(nothing(), lost))
    for response, rows in zip(responses, whole, strict=True):
        assert (delta_net(w, response, left)[0] - rows[1:]).abs().max() > 1e-2


def test_a_prompt_shorter_than_the_convolution_leaves_what_came_before_it():
    w, (prompt, responses) = weights_of(layer()), made_inputs()
    first, second = prompt[:2], prompt[2:]
    left = delta_net(w, first, nothing())[1]
    assert torch.equal(left.columns[0], torch.zeros(left.columns.shape[1], dtype=torch.float64))
    joined = delta_net(w, torch.cat([second, responses[0]]), left)[0]
    assert (joined[-5:] - one_by_one(w, prompt, responses)[0][1:]).abs().max() < 1e-12
