"""The fused head + TAPO loss against the references in float64: loss, metrics, every gradient.

On a CPU the PyTorch operators run, with TRITON_INTERPRET=1 and on a GPU the kernels.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from head_cases import (
    DEVICES,
    INTERPRETED,
    assert_accurate,
    error,
    gpu,
    in_double,
    make_case,
    reference,
    run,
)

from tercet.core.config import LossConfig
from tercet.kernels.reference import linear_logprobs_reference
from tercet.kernels.tapo_loss import fused_linear_cross_entropy, fused_linear_tapo_loss

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:kl_ratio")]

ROWS = [1, 63, 127] if INTERPRETED else [1, 63, 127, 507, 5000]
NO_CLAMPS = {"clip_dual": None, "log_ratio_clamp": None, "kl_log_clamp": None, "kl_clamp": None}
TIGHT = {"clip_dual": 1.35, "log_ratio_clamp": 0.4, "kl_log_clamp": 1.0, "kl_clamp": 0.3}
PLAIN = {"kl_coef": 0.0, "neg_entropy_coef": 0.0}
STRONG = {"kl_coef": 0.3, "entropy_coef": 0.1, "neg_entropy_coef": 0.2}


def compare(case, tolerance=None, chunk_rows=None, **options):
    """Fused beside float64 and plain PyTorch; with a tolerance also by the norm of the error."""
    options = {"num_loss_tokens": 1.0, **STRONG, **options}
    loss, metrics, grads = run(fused_linear_tapo_loss, case, chunk_rows=chunk_rows, **options)
    want_loss, want_metrics, want_grads = run(reference, case, **options)
    plain_loss, _, plain_grads = run(reference, case, dtype=torch.float32, plain=True, **options)
    assert loss.dtype == torch.promote_types(case["weight"].dtype, torch.float32)
    assert_accurate("loss", loss, plain_loss, want_loss)
    exact = {"exact_entropy", "exact_neg_entropy"}
    assert metrics.keys() - exact == want_metrics.keys() - exact and "exact_entropy" in metrics
    for name, want in want_metrics.items():
        assert metrics[name].item() == pytest.approx(want.item(), rel=2e-3, abs=2e-3), name
    for name, want in want_grads.items():
        if want is None:
            assert grads[name] is None, name
            continue
        assert grads[name].dtype == case[name].dtype
        assert_accurate(f"d {name}", grads[name], plain_grads[name], want)
        if tolerance is not None:
            distance = (grads[name].double() - want).norm()
            assert distance <= tolerance * want.norm() + 1e-30, (name, float(distance))
    return metrics


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [257, 1000, 4099])
@pytest.mark.parametrize("rows", ROWS)
def test_every_ragged_shape(rows, vocabulary, device):
    case = make_case(rows, vocabulary, torch.float32, device)
    compare(case, 2e-5, temperature=0.7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype, temperature, device):
    case = make_case(63, 1000, dtype, device)
    compare(case, 1e-12 if dtype == torch.float64 else None, temperature=temperature)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [151_936, 152_064])
def test_true_vocabularies(vocabulary, device):
    compare(make_case(16 if INTERPRETED else 127, vocabulary, torch.float32, device), 2e-5)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [507, 5000])
def test_true_shapes_on_a_gpu(rows, dtype):
    compare(make_case(rows, 151_936, dtype, "cuda", dim=256))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kl_ratio", ["neg_over_policy", "policy_over_neg"])
@pytest.mark.parametrize("neg_grad", ["flow", "detach"])
@pytest.mark.parametrize("clamps", [{}, NO_CLAMPS, TIGHT])
def test_every_form_and_clamp(clamps, neg_grad, kl_ratio, device):
    """With every optional row there and absent."""
    full = make_case(63, 257, torch.float32, device, spread=1.0)
    full["is_weights"] = full["loss_mask"].flip(0) * 2
    full["ref_logprobs"] = full["old_logprobs"].flip(0)
    optional = ("old_logprobs", "loss_mask", "is_weights", "ref_logprobs")
    for kept in ((), optional, optional[:1], optional[1:2], optional[2:]):
        case = {n: x for n, x in full.items() if n not in optional or n in kept}
        case.setdefault("old_logprobs", None)
        options = clamps | {"neg_grad": neg_grad, "kl_ratio": kl_ratio}
        options["ref_kl_coef"] = 0.2 if "ref_logprobs" in kept else 0.0
        metrics = compare(case, 5e-5, **options)
        if kept == optional and clamps is not NO_CLAMPS:
            assert all(metrics[f"clip_frac_{side}"] > 0 for side in ("high", "low", "dual"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("neg_grad", ["flow", "detach"])
@pytest.mark.parametrize("form", [{"entropy_form": "exact"}, {"policy_term": "cispo"}])
def test_exact_entropies_and_cispo(form, neg_grad, device):
    """Loss, metrics and gradients; in float64 to 1e-12."""
    options = form | {"neg_grad": neg_grad, "temperature": 0.7, "entropy_coef": 0.5}
    compare(make_case(63, 257, torch.float64), 1e-12, **options)
    compare(make_case(63, 257, torch.float64), 1e-12, chunk_rows=10, **options)
    case = make_case(63, 1000, torch.float32, device)
    compare(case, 2e-5, **options)
    compare(case | {"old_logprobs": None, "neg_hidden": None}, 2e-5, **options | PLAIN)


def test_exact_entropy_of_a_constant_negative():
    case = make_case(63, 257, torch.float64)
    with torch.no_grad():
        found = linear_logprobs_reference(case["neg_hidden"], case["weight"], case["labels"])
    case |= {"neg_hidden": None, "neg_logprobs": found[0], "neg_entropy": found[1]}
    compare(case, 1e-12, entropy_form="exact")
    del case["neg_entropy"]
    with pytest.raises(ValueError, match="neg_entropy_coef is 0.2, but neg_entropy is None"):
        compare(case, entropy_form="exact")


@pytest.mark.parametrize("device", DEVICES)
def test_given_and_absent_negative(device):
    case = make_case(63, 257, torch.float32, device)
    given = in_double(case, "neg_hidden").float()
    del case["neg_hidden"]
    compare(case | {"neg_hidden": None, "neg_logprobs": given}, 2e-5)
    compare(case | {"neg_hidden": None}, 2e-5, **PLAIN)


@pytest.mark.parametrize("chunk_rows", [1, 7, 125, 126, 1000])
def test_chunks_do_not_matter(chunk_rows):
    case = make_case(63, 257, torch.float64)
    compare(case, 1e-12, chunk_rows=chunk_rows)


@pytest.mark.parametrize("device", DEVICES)
def test_old_logprobs_default_to_the_current_ones(device):
    case = make_case(63, 257, torch.float32, device)
    case["old_logprobs"] = None
    metrics = compare(case, 2e-5)
    assert metrics["approx_kl"] == 0 and metrics["clip_frac_low"] == 0


@pytest.mark.parametrize("device", DEVICES)
def test_exact_entropy_and_logprobs_come_with_it(device):
    case = make_case(63, 257, torch.float32, device)
    _, metrics, _ = run(
        fused_linear_tapo_loss, case, num_loss_tokens=3.0, temperature=0.7, return_logprobs=True
    )
    counts = case["loss_mask"] != 0
    for name, branch in (("logprobs", "hidden"), ("neg_logprobs", "neg_hidden")):
        want = in_double(case, branch, 0.7).where(counts, 0.0)
        assert error(metrics[name], want) < 1e-5
    p = (case["hidden"].double() @ case["weight"].double().T / 0.7).softmax(-1)
    entropy = (case["loss_mask"] * -(p * p.log()).sum(-1)).sum() / 3.0
    assert metrics["exact_entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("neg_grad", ["flow", "detach"])
def test_masked_rows_may_hold_nan(neg_grad, device):
    case = make_case(63, 257, torch.float32, device)
    case["is_weights"] = torch.ones_like(case["advantages"])
    masked = case["loss_mask"] == 0
    assert 5 < masked.sum() < 30
    poisoned = dict(case)
    for name in case.keys() - {"weight", "labels", "loss_mask"}:
        poisoned[name] = case[name].clone()
        poisoned[name][masked] = math.nan
    options = {"num_loss_tokens": 1.0, "neg_grad": neg_grad}
    clean = run(fused_linear_tapo_loss, case, **options)
    found = run(fused_linear_tapo_loss, poisoned, **options)
    torch.testing.assert_close(found[0], clean[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], clean[1], rtol=1e-5, atol=1e-6)
    for name, grad in clean[2].items():
        if grad is not None:
            torch.testing.assert_close(found[2][name], grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[2]["hidden"][masked], torch.zeros_like(case["hidden"][masked]))


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_that_counts_is_not_hidden(device):
    for name in ("hidden", "neg_hidden", "old_logprobs", "advantages"):
        case = make_case(9, 257, torch.float32, device)
        case["loss_mask"] = None
        case[name] = case[name].clone()
        case[name][3] = math.nan
        loss, _, grads = run(fused_linear_tapo_loss, case, num_loss_tokens=1.0)
        assert loss.isnan() and grads["weight"].isnan().any(), name


@pytest.mark.parametrize("device", DEVICES)
def test_all_rows_masked(device):
    case = make_case(63, 257, torch.float32, device)
    case["loss_mask"] = torch.zeros(63, dtype=torch.bool, device=device)
    case["hidden"] = case["hidden"] * math.nan
    loss, metrics, grads = run(fused_linear_tapo_loss, case, num_loss_tokens=1.0)
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads.values())


@pytest.mark.parametrize("device", DEVICES)
def test_zero_advantages(device):
    case = make_case(63, 257, torch.float32, device)
    case["advantages"] = torch.zeros_like(case["advantages"])
    compare(case, 2e-5)
    loss, _, grads = run(
        fused_linear_tapo_loss,
        case | {"neg_hidden": None},
        num_loss_tokens=1.0,
        **PLAIN | {"entropy_coef": 0.0},
    )
    assert loss == 0 and not grads["hidden"].any() and not grads["weight"].any()


@pytest.mark.parametrize("device", DEVICES)
def test_repeated_runs_have_the_same_bits(device):
    case = make_case(127, 4099, torch.float32, device)
    first, second = (run(fused_linear_tapo_loss, case, num_loss_tokens=9.0) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for part in (1, 2):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_output_and_denominator_scale_gradients(dtype, device):
    case = make_case(63, 257, dtype, device)
    grads = run(fused_linear_tapo_loss, case, num_loss_tokens=1.0)[2]
    scaled = run(fused_linear_tapo_loss, case, -2.5, num_loss_tokens=5.0)[2]
    for name, grad in grads.items():
        assert grad.any()
        torch.testing.assert_close(scaled[name], grad * -0.5, rtol=1e-2, atol=0)


def test_small_gradients_survive_16_bit():
    """With 1e6 loss tokens c is 1e-6 and d logits 1e-9: below what float16 can hold."""
    case = make_case(63, 257, torch.float16)
    options = {"num_loss_tokens": 1e6, **STRONG}
    grads = run(fused_linear_tapo_loss, case, 2.0**16, **options)[2]
    exact = run(reference, case, 2.0**16, **options)[2]
    for name, grad in grads.items():
        assert (grad.double() - exact[name]).norm() < 2e-3 * exact[name].norm()


def test_backward_twice():
    case = make_case(9, 257, torch.float32)
    hidden = case["hidden"].requires_grad_()
    loss, _ = fused_linear_tapo_loss(**case, num_loss_tokens=1.0)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss * 3, hidden)[0]
    torch.testing.assert_close(second, 3 * first)


@pytest.mark.parametrize(
    "frozen", [("weight",), ("hidden",), ("neg_hidden",), ("hidden", "weight")]
)
def test_frozen_inputs_get_no_gradient(frozen):
    case = make_case(63, 257, torch.float64)
    options = {"num_loss_tokens": 1.0, **STRONG}
    _, _, grads = run(fused_linear_tapo_loss, case, frozen=frozen, **options)
    _, _, exact = run(reference, case, frozen=frozen, **options)
    for name, want in exact.items():
        assert (grads[name] is None) == (name in frozen)
        if want is not None:
            torch.testing.assert_close(grads[name], want, rtol=1e-10, atol=1e-12)


def test_frozen_weight_skips_its_product():
    case = make_case(63, 257, torch.float32)
    counted = []
    for frozen in ((), ("weight",)):
        with torch.profiler.profile(with_flops=True) as profile:
            run(fused_linear_tapo_loss, case, frozen=frozen, num_loss_tokens=1.0)
        counted.append(sum(event.flops for event in profile.key_averages() if "mm" in event.key))
    product = 2 * 63 * 257 * 32
    assert counted == [2 * 3 * product, 2 * 2 * product]


def test_without_gradient():
    case = make_case(63, 257, torch.float32)
    want = run(fused_linear_tapo_loss, case, num_loss_tokens=1.0)[0]
    with torch.no_grad():
        loss, _ = fused_linear_tapo_loss(**case, num_loss_tokens=1.0)
    assert torch.equal(loss, want) and not loss.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_tied_weights_add_up(device):
    """The head's weight is also the embedding that hidden states come from."""
    case = make_case(63, 257, torch.float32, device)
    del case["hidden"], case["neg_hidden"]
    found = []
    for function, dtype in ((fused_linear_tapo_loss, torch.float32), (reference, torch.float64)):
        weight = case["weight"].detach().to(dtype).requires_grad_()
        hidden = weight[case["labels"].roll(1)] * 0.3
        rest = {n: x for n, x in case.items() if n != "weight"}
        options = {"num_loss_tokens": 1.0, "loss": LossConfig(**STRONG)}
        function(hidden=hidden, neg_hidden=hidden.roll(1, 0), weight=weight, **rest, **options)[
            0
        ].backward()
        found.append(weight.grad)
    assert (found[0] - found[1]).norm() <= 1e-5 * found[1].norm()


@pytest.mark.parametrize("device", DEVICES)
def test_given_coefficients(device):
    """A pair, and one branch at a time, give the gradients of sum(c log p)."""
    case = make_case(63, 257, torch.float32, device)
    case["loss_mask"] = None
    c, neg_c = case.pop("advantages"), case.pop("old_logprobs")
    empty = {"advantages": None, "old_logprobs": None, "num_loss_tokens": 7.0}

    def exact(hidden, neg_hidden, weight, labels, loss_mask):
        doubles = {"weight": weight.double(), "labels": labels}
        loss = (c * in_double(doubles | {"h": hidden.double()}, "h")).sum()
        if neg_hidden is not None:
            loss = loss + (neg_c * in_double(doubles | {"h": neg_hidden.double()}, "h")).sum()
        return loss, {}

    for branches in (2, 1):
        case["neg_hidden"] = case["neg_hidden"] if branches == 2 else None
        given = (c, neg_c) if branches == 2 else c
        loss, metrics, grads = run(fused_linear_tapo_loss, case, coefficients=given, **empty)
        want_loss, _, want = run(exact, case)
        assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
        assert metrics.keys() == {"exact_entropy"}
        for name, grad in want.items():
            assert (grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cross_entropy(dtype, device):
    case = make_case(127, 1000, dtype, device)
    case = {name: case[name] for name in ("hidden", "weight", "labels", "loss_mask")}

    def exact(hidden, weight, labels, loss_mask, num_loss_tokens):
        rows = {"weight": weight.double(), "h": hidden.double(), "labels": labels}
        return -(loss_mask * in_double(rows, "h")).sum() / num_loss_tokens, {}

    loss, metrics, grads = run(fused_linear_cross_entropy, case, num_loss_tokens=50.0)
    want, _, want_grads = run(exact, case, num_loss_tokens=50.0)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert metrics["cross_entropy"].item() == loss.item()
    assert loss.item() == pytest.approx(want.item(), rel=min(tolerance, 1e-5))
    for name, grad in want_grads.items():
        assert (grads[name].double() - grad.double()).norm() <= tolerance * grad.double().norm()


@pytest.mark.parametrize("kl_ratio", ["neg_over_policy", "policy_over_neg"])
def test_gradcheck(kl_ratio):
    case = make_case(7, 19, torch.float64, dim=5, spread=0.05)
    case["loss_mask"] = None
    leaves = [case[name].requires_grad_() for name in ("hidden", "neg_hidden", "weight")]
    config = LossConfig(kl_ratio=kl_ratio, **STRONG)

    def loss(hidden, neg_hidden, weight):
        given = case | {"hidden": hidden, "neg_hidden": neg_hidden, "weight": weight}
        options = {"num_loss_tokens": 3.0, "chunk_rows": 4, "loss": config}
        return fused_linear_tapo_loss(**given, temperature=0.7, **options)[0]

    assert torch.autograd.gradcheck(loss, leaves)


def test_no_rows():
    case = {name: value[:0] for name, value in make_case(9, 257, torch.float32).items()}
    case["weight"] = torch.randn(257, 32)
    loss, metrics, grads = run(fused_linear_tapo_loss, case, num_loss_tokens=1.0)
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert grads["hidden"].shape == (0, 32) and not grads["weight"].any()


def test_strided_inputs():
    case = make_case(30, 257, torch.float32)
    strided = {n: x.T.contiguous().T if x.dim() == 2 else x for n, x in case.items()}
    for name in ("labels", "advantages", "old_logprobs", "loss_mask"):
        strided[name] = case[name].repeat_interleave(2)[::2]
        assert not strided[name].is_contiguous()
    one = run(fused_linear_tapo_loss, case, num_loss_tokens=1.0)
    other = run(fused_linear_tapo_loss, strided, num_loss_tokens=1.0)
    torch.testing.assert_close(other[0], one[0], rtol=1e-5, atol=1e-5)
    for name, grad in one[2].items():
        torch.testing.assert_close(other[2][name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"neg_hidden": torch.zeros(3, 5)}, "hidden must be"),
        ({"neg_hidden": torch.zeros(2, 4)}, "labels must be"),
        ({"neg_logprobs": torch.zeros(3)}, "not both"),
        ({"advantages": torch.zeros(2)}, "advantages must be"),
        ({"advantages": None}, "advantages must be"),
        ({"old_logprobs": torch.zeros(3, dtype=torch.int64)}, "old_logprobs must be"),
        ({"loss_mask": torch.zeros(4)}, "loss_mask must be"),
        ({"num_loss_tokens": 0.0}, "num_loss_tokens must be positive"),
        ({"num_loss_tokens": math.nan}, "num_loss_tokens must be positive"),
        ({"labels": torch.tensor([0, 9, 0])}, "got 9 in row 1"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
        ({"neg_hidden": None}, "kl_coef is 0.01"),
        ({"loss": LossConfig(ref_kl_coef=0.1)}, "ref_kl_coef is 0.1"),
        ({"coefficients": torch.zeros(3)}, "one .R. a branch: 2, got 1"),
        ({"coefficients": (torch.zeros(3), torch.zeros(2))}, "coefficients must be floats of"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "neg_hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "labels": torch.zeros(3, dtype=torch.int64),
        "old_logprobs": None,
        "advantages": torch.zeros(3),
        "num_loss_tokens": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_tapo_loss(**(arguments | change))


def test_memory_on_a_cpu():
    """No [R, V] is kept: extra memory is at most a quarter of plain PyTorch's (here a fifth)."""
    if INTERPRETED:
        pytest.skip("the interpreter copies what kernels work on")
    case = make_case(512, 32_768, torch.float32, dim=16) | {"neg_hidden": None, "loss_mask": None}
    returned = 4 * 16 * (512 + 32_768)
    extra = []
    for function, options in ((fused_linear_tapo_loss, {}), (reference, {"plain": True})):
        options = options | {"num_loss_tokens": 1.0, **PLAIN}
        if function is reference:
            options["dtype"] = torch.float32
        extra.append(_peak_memory(lambda f=function, o=options: run(f, case, **o)) - 2 * returned)
    assert extra[0] <= 0.25 * extra[1]


def _peak_memory(function) -> int:
    """Most bytes allocated at once while a function runs."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.gpu
@gpu
def test_nothing_waits_for_the_gpu():
    case = make_case(5000, 4099, torch.bfloat16, "cuda")
    run(fused_linear_tapo_loss, case, num_loss_tokens=1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(fused_linear_tapo_loss, case, num_loss_tokens=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu
def test_memory_on_a_gpu():
    """8,192 rows at V = 151,936, D = 2,048: under 3 GB above inputs and returned gradients."""
    case = make_case(8192, 1000, torch.bfloat16, "cuda", dim=2048) | {"neg_hidden": None}
    case["weight"] = torch.randn(151_936, 2048, device="cuda", dtype=torch.bfloat16) / 45
    for name in ("hidden", "weight"):
        case[name].requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = LossConfig(**PLAIN)
    fused_linear_tapo_loss(**case, loss=loss, num_loss_tokens=1.0)[0].backward()
    returned = sum(case[name].grad.nbytes for name in ("hidden", "weight"))
    assert torch.cuda.max_memory_allocated() - before - returned < 3e9
