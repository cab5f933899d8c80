"""The benchmark of attention: methods compute one thing, and rows say what was measured."""

from __future__ import annotations

import csv

import pytest
import torch
from torch.nn.attention import flex_attention

from tercet.bench import attention, attention_peers
from tercet.bench.attention_peers import METHODS, Heads, Sizes, make_case
from tercet.kernels.varlen import Varlen

HEADS, SIZES = Heads("tiny", 4, 2, 16), Sizes(7, 3, 5, 2)


def tiny_case(dtype=torch.float64):
    return make_case(HEADS, SIZES, dtype, "cpu")


def masked_attention(case, seen):
    """Output and gradients by softmax over an explicit mask [T, T]."""
    leaves = [x.clone().requires_grad_() for x in case.tensors]
    q, k, v = leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])
    scores = torch.einsum("ihd,jhd->hij", q, k) * case.scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    out = torch.einsum("hij,jhd->ihd", weights, v)
    return out.detach(), torch.autograd.grad(out, leaves, case.upstream)


def seen_by_hand():
    seen = torch.zeros(44, 44, dtype=torch.bool)
    for start in (0, 22):
        seen[start : start + 22, start : start + 7] = True
        for response in range(3):
            own = slice(start + 7 + 5 * response, start + 12 + 5 * response)
            seen[own, own] = True
    return seen.tril()


def test_every_method_has_the_gradients_of_the_masked_attention():
    case = tiny_case()
    _, wanted = masked_attention(case, seen_by_hand())
    for one, other in zip(attention.exact_gradients(case), wanted, strict=True):
        assert (one - other).abs().max() < 1e-12
    for name in METHODS.keys() - attention_peers.GPU_ONLY:
        found = METHODS[name](case)
        for one, other in zip(found.gradients(), wanted, strict=True):
            assert (found.packed(one) - other).abs().max() < 1e-12, name


def test_one_call_on_copied_keys_has_the_same_gradients(monkeypatch):
    """With the softmax written out, aligned as flash attention aligns it."""

    def attend(q, k, v, bounds, scale):
        ends = zip(*(b.tolist() for b in bounds[:2]), strict=True)
        parts, begin = [], (0, 0)
        for end in list(ends)[1:]:
            rows, keys = (slice(a, b) for a, b in zip(begin, end, strict=True))
            wide = [x[keys].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)]
            scores = torch.einsum("ihd,jhd->hij", q[rows], wide[0]) * scale
            seen = torch.ones(scores.shape[1:]).tril(scores.shape[2] - scores.shape[1]).bool()
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            parts.append(torch.einsum("hij,jhd->ihd", weights, wide[1]))
            begin = end
        return torch.cat(parts)

    def forward(q, k, v, bounds, causal, scale):
        assert causal and (bounds.max_seqlen_q, bounds.max_seqlen_k) == (7, 12)
        return attend(q, k, v, bounds, scale), q.new_zeros(())

    def backward(grad, q, k, v, out, lse, bounds, causal, scale):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            return torch.autograd.grad(attend(*leaves, bounds, scale), leaves, grad)

    backend = Varlen("written out", forward, backward)
    monkeypatch.setattr(attention_peers, "backend_of", lambda q: backend)
    case = tiny_case()
    _, wanted = masked_attention(case, seen_by_hand())
    for one, other in zip(attention_peers.one_call(case).gradients(), wanted, strict=True):
        assert (one - other).abs().max() < 1e-12


def test_flex_attention_has_the_same_output(monkeypatch):
    """Uncompiled; it has no gradients on a CPU."""
    monkeypatch.setattr(attention_peers, "compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(attention_peers, "PACK", 256)
    case = tiny_case()
    found = attention_peers.flex(case)
    out = found.packed(found.attend(*found.tensors))
    assert (
        found.tokens == 256
        and (out - masked_attention(case, seen_by_hand())[0]).abs().max() < 1e-12
    )


def test_pairs_are_those_that_see_each_other(monkeypatch):
    """Causal ones count as half a square, as FLOPs of attention do."""
    case = tiny_case()
    assert attention_peers.ours(case).pairs == 2 * (49 / 2 + 3 * (25 / 2 + 35))
    assert attention_peers.one_by_one(case).pairs == 6 * 144 / 2
    assert attention_peers.dense(case).pairs == 44**2
    assert attention_peers.ours(case).tokens == 44 and attention_peers.one_by_one(case).tokens == 72
    # Five blocks of 128 tokens behind the pack see themselves alone.
    monkeypatch.setattr(attention_peers, "PACK", 6 * 128)
    assert attention_peers.flex(case).pairs == 6 * 128**2


def test_a_gpu_s_packs_are_full():
    for heads, sizes in attention.GPU_CASES:
        assert attention_peers.PACK // 2 < sizes.groups * sizes.group <= attention_peers.PACK, sizes
        assert heads.heads % heads.key_heads == 0 and heads.head_dim == 128


def test_what_is_not_exact_is_not_timed(monkeypatch):
    def wrong(case):
        late = make_case(HEADS, SIZES, torch.float32, "cpu")
        late.tensors[0].mul_(1.01)
        return attention_peers.ours(late)

    monkeypatch.setitem(METHODS, "wrong", wrong)
    monkeypatch.setitem(METHODS, "broken", lambda case: 1 / 0)
    rows = {row.method: row for row in attention.run_case(tiny_case(torch.float32), 2, 1e11)}
    assert "over the gate of 0.0001" in rows["wrong"].note and rows["wrong"].grad_error > 1e-3
    assert rows["broken"].note == "ZeroDivisionError: division by zero"
    assert rows["flex"].note == "needs a GPU"
    assert all(rows[name].ms_50 is None for name in ("wrong", "broken", "flex"))
    ours, base = rows["ours"], rows["one_by_one"]
    assert ours.note == "" and ours.ms_20 <= ours.ms_50 <= ours.ms_80
    assert ours.tflop == pytest.approx(14 * 4 * 16 * attention_peers.ours(tiny_case()).pairs / 1e12)
    assert ours.peak_share == pytest.approx(ours.tflop / (ours.ms_50 / 1e3) / 0.1)
    assert ours.ratio == pytest.approx(base.ms_50 / ours.ms_50) and base.ratio == 1


def test_the_command_writes_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "CPU_CASES", [(HEADS, SIZES)])
    monkeypatch.setattr("sys.argv", ["attention", "--out", str(tmp_path / "a.csv"), "--rounds=1"])
    attention.main()
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(METHODS)
    assert {(row["prompt"], row["responses"], row["length"]) for row in rows} == {("7", "3", "5")}
    assert "needs a GPU" in capsys.readouterr().out
