"""The reference TAPO loss against closed forms, hand-computed numbers and gradcheck."""

import itertools
import math
import warnings

import pytest
import torch
from head_cases import with_loss

from tercet.core.config import LossConfig
from tercet.kernels.reference import tapo_loss_reference

pytestmark = pytest.mark.core

METRICS = set("pg_loss kl entropy neg_entropy approx_kl".split())
METRICS |= {"clip_frac_high", "clip_frac_low", "clip_frac_dual"}
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 3.0, "log_ratio_clamp": 20.0}
K3 = {"kl_ratio": "neg_over_policy", "kl_log_clamp": 20.0, "kl_clamp": 10.0, "neg_grad": "flow"}
COEFS = {"kl_coef": 0.01, "entropy_coef": 0.03, "neg_entropy_coef": 0.03, "ref_kl_coef": 0.0}
DEFAULTS = CLIPS | K3 | COEFS
NO_CLAMPS = {"clip_dual": None, "log_ratio_clamp": None, "kl_log_clamp": None, "kl_clamp": None}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def make_rows(seed=0, spread=1.0):
    """Rows that reach every clamp: all pairs of chosen log-ratios, both signs of A, and zero."""
    old_gaps = [-25.0, -0.6, -0.1, 0.0, 0.1, 0.4, 1.0, 1.3, 25.0]
    neg_gaps = [-25.0, -4.0, -0.3, 0.2, 2.0, 3.5, 25.0]
    grid = list(itertools.product(old_gaps, neg_gaps, [-1.0, 0.0, 1.0]))
    x, d, sign = double(*grid).T
    noise = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return low + (high - low) * torch.rand(len(grid), generator=noise, dtype=torch.float64)

    a = draw(-30, -26)
    return {
        "logprobs": a,
        "old_logprobs": a - spread * x,
        "neg_logprobs": a + spread * d,
        "advantages": sign * draw(0.3, 2.0),
        "loss_mask": draw(0.0, 1.0) * (draw(0, 1) > 0.2),
        "is_weights": draw(0.2, 2.0),
        "ref_logprobs": a + draw(-3, 3),
    }


def closed_form(rows, num_loss_tokens, **options):
    """Loss, both gradients and metrics, row by row in Python floats."""
    o = DEFAULTS | options
    loss, grads, metrics = 0.0, {"logprobs": [], "neg_logprobs": []}, dict.fromkeys(METRICS, 0.0)
    size = len(rows["logprobs"])
    columns = {"loss_mask": [1.0] * size, "is_weights": [1.0] * size, "neg_logprobs": [None] * size}
    columns |= {name: values.tolist() for name, values in rows.items()}
    columns.setdefault("old_logprobs", columns["logprobs"])
    for values in zip(*columns.values(), strict=True):
        row_of = dict(zip(columns, values, strict=True))
        a, n, scale = row_of["logprobs"], row_of["neg_logprobs"], row_of["is_weights"]
        w, advantage = row_of["loss_mask"] / num_loss_tokens, row_of["advantages"]
        r, pg, slope = policy_and_slope(a - row_of["old_logprobs"], advantage, o)
        c_anchor = scale * slope - o["entropy_coef"]
        row = scale * pg - o["entropy_coef"] * a
        metrics["pg_loss"] += w * scale * pg
        metrics["entropy"] -= w * a
        metrics["clip_frac_high"] += w * (advantage > 0 and r > 1 + o["clip_high"])
        metrics["clip_frac_low"] += w * (advantage < 0 and r < 1 - o["clip_low"])
        metrics["clip_frac_dual"] += w * (advantage < 0 and r > (o["clip_dual"] or math.inf))
        metrics["approx_kl"] += w * (r - 1 - math.log(r))
        c_negative = 0.0
        if n is not None:
            flip = -1 if o["kl_ratio"] == "policy_over_neg" else 1
            k3, slope = k3_and_slope(flip * (n - a), o)
            c_anchor += flip * o["kl_coef"] * slope
            c_negative = -flip * o["kl_coef"] * slope - o["neg_entropy_coef"]
            row += -o["kl_coef"] * k3 - o["neg_entropy_coef"] * n
            metrics["kl"] += w * k3
            metrics["neg_entropy"] -= w * n
        if "ref_logprobs" in rows:
            k3, slope = k3_and_slope(row_of["ref_logprobs"] - a, o)
            c_anchor -= o["ref_kl_coef"] * slope
            row += o["ref_kl_coef"] * k3
            metrics["ref_kl"] = metrics.get("ref_kl", 0.0) + w * k3
        loss += w * row
        grads["logprobs"].append(w * c_anchor)
        grads["neg_logprobs"].append(w * c_negative * (o["neg_grad"] == "flow"))
    return loss, list(grads.values()), metrics


def policy_and_slope(x, advantage, options):
    bound, dual = options["log_ratio_clamp"] or math.inf, options["clip_dual"] or math.inf
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    r = math.exp(min(max(x, -bound), bound))
    pg = -min(r * advantage, min(max(r, low), high) * advantage)
    active = r <= high
    if advantage < 0:
        pg, active = min(pg, dual * -advantage), low <= r <= dual
    return r, pg, -advantage * r * (active and abs(x) <= bound)


def k3_and_slope(d, options):
    bound, top = options["kl_log_clamp"] or math.inf, options["kl_clamp"] or math.inf
    held = min(max(d, -bound), bound)
    k3 = math.exp(held) - held - 1
    return min(k3, top), (math.exp(held) - 1) * (abs(d) <= bound and k3 <= top)


def run(rows, num_loss_tokens=7.0, **options):
    """Loss, gradients of logprobs and neg_logprobs, metrics."""
    rows = {name: values.clone() for name, values in rows.items()}
    leaves = [rows[name].requires_grad_() for name in ("logprobs", "neg_logprobs") if name in rows]
    positional = [rows.pop(name, None) for name in ("logprobs", "old_logprobs", "neg_logprobs")]
    loss, metrics = tapo_loss_reference(
        *positional,
        rows.pop("advantages"),
        num_loss_tokens=num_loss_tokens,
        **rows,
        **with_loss(options),
    )
    loss.backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return loss.detach(), grads, metrics


OPTIONALS = ["old_logprobs", "neg_logprobs", "loss_mask", "is_weights", "ref_logprobs"]
CLAMPS = [{}, NO_CLAMPS, {"clip_dual": 2.0, "log_ratio_clamp": 1.1, "kl_log_clamp": 3.0}]


@pytest.mark.filterwarnings("ignore:kl_ratio")
@pytest.mark.parametrize("kl_ratio", ["neg_over_policy", "policy_over_neg"])
@pytest.mark.parametrize("neg_grad", ["flow", "detach"])
@pytest.mark.parametrize("clamps", CLAMPS)
def test_loss_gradients_and_metrics_equal_the_closed_form(kl_ratio, neg_grad, clamps):
    for present in itertools.product([True, False], repeat=len(OPTIONALS)):
        absent = {name for name, is_there in zip(OPTIONALS, present, strict=True) if not is_there}
        rows = {name: values for name, values in make_rows().items() if name not in absent}
        options = {"kl_ratio": kl_ratio, "neg_grad": neg_grad, "kl_coef": 0.7, **clamps}
        options["ref_kl_coef"] = 0.0 if "ref_logprobs" in absent else 0.4
        options |= {"kl_coef": 0.0, "neg_entropy_coef": 0.0} if "neg_logprobs" in absent else {}
        loss, grads, metrics = run(rows, **options)
        want_loss, want_grads, want_metrics = closed_form(rows, 7.0, **options)
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(want_loss, rel=1e-12)
        for grad, want in zip(grads, want_grads[: len(grads)], strict=True):
            torch.testing.assert_close(grad, double(*want), rtol=1e-12, atol=1e-15)
        assert {k: v.item() for k, v in metrics.items()} == pytest.approx(want_metrics, rel=1e-12)
        assert not any(value.requires_grad for value in metrics.values())


def test_the_rows_of_that_test_reach_every_clamp():
    rows = make_rows()
    metrics = run(rows)[2]
    assert all(metrics[f"clip_frac_{side}"] > 0.1 for side in ("high", "low", "dual"))
    assert ((rows["logprobs"] - rows["old_logprobs"]).abs() > 20).any()
    assert ((rows["logprobs"] - rows["neg_logprobs"]).abs() > 20).any()


def test_hand_computed_rows():
    """Two rows: r = 1.25 with A = 2 (free) and r = 0.5 with A = -1 (held at 0.8)."""
    loss, (grad, neg_grad), metrics = run(
        {
            "logprobs": double(math.log(0.5), math.log(0.25)),
            "old_logprobs": double(math.log(0.4), math.log(0.5)),
            "neg_logprobs": double(math.log(0.25), math.log(0.5)),
            "advantages": double(2.0, -1.0),
        },
        2.0,
        **{"kl_coef": 0.1, "entropy_coef": 0.2, "neg_entropy_coef": 0.3},
    )
    ln2 = 0.6931471805599453
    # pg: -2.5 and 0.8. k3: 0.5 + ln2 - 1 and 2 - ln2 - 1. -a: ln2 and 2 ln2. -n: 2 ln2 and ln2.
    assert metrics["pg_loss"].item() == pytest.approx((-2.5 + 0.8) / 2, rel=1e-14)
    assert metrics["kl"].item() == pytest.approx(0.25, rel=1e-14)
    assert metrics["entropy"].item() == pytest.approx(1.5 * ln2, rel=1e-14)
    assert metrics["neg_entropy"].item() == pytest.approx(1.5 * ln2, rel=1e-14)
    assert (metrics["clip_frac_low"], metrics["clip_frac_high"]) == (0.5, 0.0)
    # r - 1 - ln r: 0.25 - ln 1.25 and -0.5 + ln2.
    assert metrics["approx_kl"].item() == pytest.approx(0.22000362924573554 / 2, rel=1e-13)
    assert loss.item() == pytest.approx(-0.85 - 0.1 * 0.25 + 0.5 * 1.5 * ln2, rel=1e-14)
    # e^d - 1 is -0.5 and 1.
    torch.testing.assert_close(grad, double(-2.5 - 0.05 - 0.2, 0.1 - 0.2) / 2)
    torch.testing.assert_close(neg_grad, double(0.05 - 0.3, -0.1 - 0.3) / 2)


ALONE = {"kl_coef": 0.0, "entropy_coef": 0.0, "neg_entropy_coef": 0.0}


@pytest.mark.parametrize(
    "x, advantage, options, want_loss, want_grad",
    [
        (0.5, 1.0, {}, -1.28, 0.0),
        (-2.0, 1.0, {}, -math.exp(-2), -math.exp(-2)),
        (-0.5, -1.0, {}, 0.8, 0.0),
        (0.5, -1.0, {}, math.exp(0.5), math.exp(0.5)),
        (1.2, -1.0, {}, 3.0, 0.0),
        (1.2, -1.0, {"clip_dual": None}, math.exp(1.2), math.exp(1.2)),
        (21.0, -1.0, {"clip_dual": None}, math.exp(20), 0.0),
        (21.0, -1.0, {"clip_dual": None, "log_ratio_clamp": None}, math.exp(21), math.exp(21)),
        (-21.0, 1.0, {}, -math.exp(-20), 0.0),
        (0.0, -1.0, {"clip_low": 0.0}, 1.0, 1.0),
        (0.0, 1.0, {"clip_high": 0.0}, -1.0, -1.0),
        (0.0, -1.0, {"clip_dual": 1.0}, 1.0, 1.0),
    ],
)
def test_policy_clamps(x, advantage, options, want_loss, want_grad):
    """The last three stand exactly on a bound, where the gradient still passes."""
    rows = {
        "logprobs": double(x),
        "old_logprobs": double(0.0),
        "neg_logprobs": double(0.0),
        "advantages": double(advantage),
    }
    loss, (grad, _), _ = run(rows, 1.0, **ALONE, **options)
    assert loss.item() == pytest.approx(want_loss, rel=1e-14)
    assert grad.item() == pytest.approx(want_grad, rel=1e-14)


@pytest.mark.filterwarnings("ignore:kl_ratio")
@pytest.mark.parametrize(
    "d, options, want_k3, want_slope",
    [
        (1.0, {}, math.e - 2, math.e - 1),
        (-21.0, {}, 19 + math.exp(-20), 0.0),
        (-21.0, {"kl_log_clamp": None}, 20 + math.exp(-21), math.exp(-21) - 1),
        (3.0, {"kl_clamp": 10.0}, 10.0, 0.0),
        (3.0, {}, math.exp(3) - 4, math.exp(3) - 1),
    ],
)
@pytest.mark.parametrize("kl_ratio, flip", [("neg_over_policy", 1), ("policy_over_neg", -1)])
def test_kl_clamps(d, options, want_k3, want_slope, kl_ratio, flip):
    zero = double(0.0)
    rows = {"logprobs": zero, "neg_logprobs": double(flip * d), "advantages": zero}
    options = {"kl_clamp": None, **options, **ALONE, "kl_coef": 1.0, "kl_ratio": kl_ratio}
    loss, (grad, neg_grad), metrics = run(rows, 1.0, **options)
    assert metrics["kl"].item() == pytest.approx(want_k3, rel=1e-13)
    assert loss.item() == pytest.approx(-want_k3, rel=1e-13)
    assert grad.item() == pytest.approx(flip * want_slope, rel=1e-13)
    assert neg_grad.item() == pytest.approx(-flip * want_slope, rel=1e-13)


def test_overflow_behind_a_clamp_is_harmless():
    """e^1000 overflows: without the log clamps the clip and the k3 clamp must still hold it."""
    rows = {
        "logprobs": double(1000.0, 0.0),
        "old_logprobs": double(0.0, 0.0),
        "neg_logprobs": double(1000.0, 1000.0),
        "advantages": double(1.0, 1.0),
    }
    loss, (grad, neg_grad), _ = run(
        rows, 1.0, **(ALONE | {"kl_coef": 1.0}), log_ratio_clamp=None, kl_log_clamp=None
    )
    assert loss.item() == -1.28 - 1.0 - 10.0
    assert grad.tolist() == [0.0, -1.0]
    assert neg_grad.tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("ignore:kl_ratio")
@pytest.mark.parametrize("kl_ratio", ["neg_over_policy", "policy_over_neg"])
def test_gradcheck(kl_ratio):
    """Rows away from every kink, and the reference KL with them."""
    noise = torch.Generator().manual_seed(1)
    a = -3 * torch.rand(6, generator=noise, dtype=torch.float64)
    old = a - double(-0.5, -0.1, 0.1, 0.5, 1.3, 0.05)
    neg = a + double(-1.0, 0.5, 1.5, -2.0, 0.3, 3.0)
    advantages = double(1.0, 1.0, -1.0, 1.0, -1.0, -0.5)

    config = LossConfig(kl_coef=0.5, kl_ratio=kl_ratio, ref_kl_coef=0.3)

    def loss(a, neg):
        options = {"loss": config, "num_loss_tokens": 3.0, "ref_logprobs": old - 0.7}
        return tapo_loss_reference(a, old, neg, advantages, **options)[0]

    assert torch.autograd.gradcheck(loss, (a.requires_grad_(), neg.requires_grad_()))


def test_masked_rows_may_hold_nan():
    rows = make_rows()
    keep = rows["loss_mask"] > 0
    assert 10 < keep.sum() < len(keep) - 10
    kept = {name: values[keep] for name, values in rows.items()}
    for poison in (math.nan, math.inf, -math.inf):
        poisoned = {k: v if k == "loss_mask" else v.where(keep, poison) for k, v in rows.items()}
        loss, grads, metrics = run(poisoned, ref_kl_coef=0.2)
        want_loss, want_grads, want_metrics = run(kept, ref_kl_coef=0.2)
        torch.testing.assert_close(loss, want_loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(metrics, want_metrics, rtol=1e-13, atol=0)
        for grad, want in zip(grads, want_grads, strict=True):
            assert torch.equal(grad[~keep], torch.zeros_like(grad[~keep]))
            torch.testing.assert_close(grad[keep], want, rtol=1e-13, atol=0)


def test_all_rows_masked_give_zero():
    rows = make_rows() | {"loss_mask": torch.zeros(len(make_rows()["logprobs"]), dtype=torch.bool)}
    rows["logprobs"] = rows["logprobs"] * math.nan
    loss, grads, metrics = run(rows)
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_nan_in_a_row_that_counts_is_not_hidden():
    for name in ("logprobs", "old_logprobs", "neg_logprobs", "advantages", "is_weights"):
        rows = make_rows()
        rows["loss_mask"] = torch.ones_like(rows["loss_mask"])
        rows[name][3] = math.nan
        assert run(rows)[0].isnan(), name


def test_all_but_the_two_policies_are_constants():
    rows = {name: values.requires_grad_() for name, values in make_rows().items()}
    first = [rows.pop(name) for name in ("logprobs", "old_logprobs", "neg_logprobs")]
    advantages = rows.pop("advantages")
    config = LossConfig(ref_kl_coef=0.1)
    loss, _ = tapo_loss_reference(*first, advantages, loss=config, num_loss_tokens=7, **rows)
    loss.backward()
    assert first[0].grad.abs().sum() > 0 and first[2].grad.abs().sum() > 0
    assert all(x.grad is None for x in (first[1], advantages, *rows.values()))


def test_bool_mask_equals_float_mask():
    rows = make_rows()
    mask = rows["loss_mask"] > 0
    loss, grads, _ = run(rows | {"loss_mask": mask})
    want_loss, want_grads, _ = run(rows | {"loss_mask": mask.double()})
    assert torch.equal(loss, want_loss) and torch.equal(grads[0], want_grads[0])


def test_micro_batches_add_up_in_any_order():
    rows = make_rows()
    loss, (grad, _), metrics = run(rows)
    order = torch.randperm(len(grad), generator=torch.Generator().manual_seed(3))
    parts = [run({k: v[part] for k, v in rows.items()}) for part in order.split([1, 0, 63, 125])]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([part[1][0] for part in parts]), grad[order])
    for name, value in metrics.items():
        total = sum(part[2][name] for part in parts)
        torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_sums_in_float32(dtype):
    rows = {name: values[:63].to(dtype) for name, values in make_rows(spread=0.05).items()}
    loss, grads, metrics = run(rows, ref_kl_coef=0.1)
    exact = {name: values.double() for name, values in rows.items()}
    want_loss, want_grads, _ = run(exact, ref_kl_coef=0.1)
    assert loss.dtype == torch.float32 and metrics["kl"].dtype == torch.float32
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    for grad, want in zip(grads, want_grads, strict=True):
        assert grad.dtype == dtype
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), want, rtol=tolerance, atol=tolerance * 1e-2)


def test_no_rows():
    empty = torch.zeros(0, dtype=torch.float64)
    rows = dict.fromkeys(["logprobs", "old_logprobs", "neg_logprobs", "advantages"], empty)
    loss, grads, metrics = run(rows)
    assert loss == 0 and set(metrics) == METRICS and not any(metrics.values())
    assert [grad.shape for grad in grads] == [(0,), (0,)]


def test_policy_over_neg_warns_when_it_is_chosen_and_not_when_it_is_used():
    rows = [double(-1.0) for _ in range(4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = LossConfig(kl_ratio="policy_over_neg")
        for _ in range(3):
            tapo_loss_reference(*rows, loss=config, num_loss_tokens=1.0)
    assert len(caught) == 1 and "unbounded" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_loss_tokens": 0.0}, "num_loss_tokens"),
        ({"num_loss_tokens": -1.0}, "num_loss_tokens"),
        ({"num_loss_tokens": math.nan}, "num_loss_tokens"),
        ({"neg_logprobs": None}, "kl_coef is 0.01, but neg_logprobs is None"),
        ({"neg_logprobs": None, "loss": LossConfig(kl_coef=0.0)}, "neg_entropy_coef is 0.03"),
        ({"loss": LossConfig(ref_kl_coef=0.1)}, "ref_logprobs is None"),
        ({"advantages": None}, "advantages"),
        ({"advantages": torch.zeros(3)}, "advantages"),
        ({"advantages": torch.zeros(2, dtype=torch.int64)}, "advantages"),
        ({"old_logprobs": torch.zeros(2, 1)}, "old_logprobs"),
        ({"is_weights": torch.ones(2, dtype=torch.bool)}, "is_weights"),
        ({"loss_mask": torch.ones(2, device="meta")}, "loss_mask"),
        ({"logprobs": torch.zeros(2, 2)}, "logprobs"),
        ({"logprobs": torch.zeros(2, dtype=torch.int64)}, "logprobs"),
    ],
)
def test_bad_arguments_of_the_loss(change, message):
    rows = torch.zeros(2)
    arguments = dict.fromkeys(["logprobs", "old_logprobs", "neg_logprobs", "advantages"], rows)
    with pytest.raises(ValueError, match=message):
        tapo_loss_reference(**({"num_loss_tokens": 2.0} | arguments | change))


def branches(seed=3, rows=9, vocabulary=11):
    """Logits of both images as leaves, labels, and the log-probs and entropies that follow."""
    noise = torch.Generator().manual_seed(seed)

    def leaf():
        logits = 0.7 * torch.randn(rows, vocabulary, generator=noise, dtype=torch.float64)
        return logits.requires_grad_()

    logits, labels = (leaf(), leaf()), torch.randint(0, vocabulary, (rows,), generator=noise)
    found = []
    for of in logits:
        log_p = of.log_softmax(-1)
        found.append((log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)))
    return logits, labels, found


@pytest.mark.parametrize("neg_grad", ["flow", "detach"])
def test_exact_entropies_equal_their_definition(neg_grad):
    """Value, and the gradient by every logit of both images, written out by hand."""
    logits, labels, ((a, entropy), (n, neg_entropy)) = branches()
    rows = len(labels)
    advantages = torch.linspace(-1, 1, rows, dtype=torch.float64)
    weight = torch.linspace(0, 1, rows, dtype=torch.float64)
    loss = LossConfig(entropy_form="exact", neg_grad=neg_grad, kl_coef=0.2, entropy_coef=0.3)
    given = {"loss": loss, "num_loss_tokens": 5.0, "loss_mask": weight}
    value, metrics = tapo_loss_reference(
        a, None, n, advantages, entropy=entropy, neg_entropy=neg_entropy, **given
    )
    grads = torch.autograd.grad(value, logits, materialize_grads=True, allow_unused=True)
    p, q = (of.detach().softmax(-1) for of in logits)
    h, h_neg = (-(x * x.log()).sum(-1) for x in (p, q))
    onehot = torch.nn.functional.one_hot(labels, p.shape[1]).double()
    d = ((q * onehot).sum(-1) / (p * onehot).sum(-1)).log()
    terms = -advantages - 0.2 * (d.exp() - d - 1) + 0.3 * h + 0.03 * h_neg
    assert value.item() == pytest.approx(float((weight * terms).sum() / 5), rel=1e-12)
    w, push = (weight / 5)[:, None], (0.2 * (d.exp() - 1))[:, None]
    want = w * (-advantages[:, None] + push) * (onehot - p)
    want -= w * 0.3 * p * (p.log() + h[:, None])
    torch.testing.assert_close(grads[0], want, rtol=1e-12, atol=1e-15)
    want = w * -push * (onehot - q) - w * 0.03 * q * (q.log() + h_neg[:, None])
    want = want if neg_grad == "flow" else torch.zeros_like(want)
    torch.testing.assert_close(grads[1], want, rtol=1e-12, atol=1e-15)
    assert metrics["exact_neg_entropy"].item() == pytest.approx(float((weight * h_neg).sum() / 5))
    for name in ("entropy", "neg_entropy"):
        known = {"entropy": entropy, "neg_entropy": neg_entropy} | {name: None}
        with pytest.raises(ValueError, match=rf"^{name}_coef is 0\.\d+, but {name} is None"):
            tapo_loss_reference(a, None, n, advantages, **known, **given)


def test_which_form_lets_the_kl_grow():
    """Of the sampled form every token's slope pulls the negative towards it; of the exact one only
    the KL's does, and away from it where the negative finds it less likely."""
    d = torch.linspace(-9, 2, 100, dtype=torch.float64)
    n = (d - 2.0).requires_grad_()
    rows = (torch.full_like(d, -2.0), None, n, torch.zeros_like(d))
    slopes = {}
    for form in ("sampled", "exact"):
        known = {"entropy": torch.zeros_like(d), "neg_entropy": torch.zeros_like(d)}
        loss = LossConfig(entropy_form=form)
        value, _ = tapo_loss_reference(*rows, loss=loss, num_loss_tokens=1.0, **known)
        (slopes[form],) = torch.autograd.grad(value, n)
    assert (slopes["sampled"] < 0).all()
    assert torch.equal(slopes["exact"] > 0, d < 0)


def test_cispo_equals_its_formula():
    """-clip(r, 1 - e_low, 1 + e_high) A log pi, the weight a constant (MiniMax-M1, eq. 4)."""
    rows = make_rows()
    options = {"policy_term": "cispo", "kl_coef": 0.0, "entropy_coef": 0.0, "neg_entropy_coef": 0.0}
    loss, (grad, _), metrics = run(rows, **options)
    r = (rows["logprobs"] - rows["old_logprobs"]).clamp(-20, 20).exp().clamp(0.8, 1.28)
    slope = -rows["loss_mask"] * rows["is_weights"] * r * rows["advantages"] / 7.0
    assert loss.item() == pytest.approx(float((slope * rows["logprobs"]).sum()), rel=1e-12)
    torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-15)
    assert metrics["pg_loss"].item() == pytest.approx(loss.item(), rel=1e-12)
