"""Packed, prefix-shared forward against one-by-one sequences through plain transformers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support import tiny

from tercet.core.config import LossConfig
from tercet.core.data.vision import PromptEncoder
from tercet.core.packing import Piece, micro_batch, pack
from tercet.core.prompts import chat_ids
from tercet.core.types import Group, PolicyParts, Response, Triplet
from tercet.kernels.reference import tapo_loss_reference
from tercet.train.learner.policy import Policy

LENGTHS = [5, 1, 0, 9, 3]  # an empty response, one of a single token
ROLES = ["anchor", "anchor", "anchor", "positive", "positive"]


def make_group(parts: PolicyParts, photos: list[str], seed: int = 0, scored: bool = True) -> Group:
    question = [{"role": "user", "content": f"<image>What bird is this?{'!' * seed}"}]
    ids = tuple(chat_ids(parts.tokenizer, question, 1))
    generator = torch.Generator().manual_seed(seed)
    responses = []
    for length, role in zip(LENGTHS, ROLES, strict=True):
        tokens = torch.randint(7, len(parts.tokenizer), (length,), generator=generator)
        response = Response(role, tuple(tokens.tolist()), (0.0,) * length, "stop", 0)
        response.advantage = float(torch.randn((), generator=generator))
        if scored:
            response.old_logprobs = -5 - torch.rand(length, generator=generator)
        responses.append(response)
    order = [photos[(seed + i) % 3] for i in range(3)]
    triplet = Triplet(f"t{seed}", *order, "What bird is this?", "bird", "least auklet")
    return Group(f"g{seed}", triplet, ids, responses)


def without_float32_islands(monkeypatch, model) -> None:
    """Let transformers' RMSNorm and vision rotation compute in float64.

    They round to float32 inside, where a difference of 1e-16 becomes 6e-8 or nothing.
    """
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as modeling_25
    import transformers.models.qwen2_vl.modeling_qwen2_vl as modeling_2
    import transformers.models.qwen3_vl.modeling_qwen3_vl as modeling_3

    def rms_norm(self, x):
        return self.weight * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    def rotate(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
        half = modeling_25.rotate_half
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    norms = (modeling_25, "Qwen2_5_VLRMSNorm"), (modeling_2, "Qwen2VLRMSNorm")
    for modeling, norm in (*norms, (modeling_3, "Qwen3VLTextRMSNorm")):
        if hasattr(modeling, norm):
            monkeypatch.setattr(getattr(modeling, norm), "forward", rms_norm)
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb_vision", rotate)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            monkeypatch.setattr(type(module), "forward", rms_norm)


def plain_logprobs(model, encoder, group: Group, image: str, tokens, temperature: float):
    """Log-probs of one response behind its prompt, as transformers alone computes them."""
    prompt = encoder(group.prompt_ids, (image,))
    ids = torch.cat([prompt.input_ids, torch.tensor(tokens, dtype=torch.int64)])[None]
    photo = prompt.images[0]
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=photo.pixel_values,
        image_grid_thw=photo.grid_thw,
        use_cache=False,
    )
    logits = output.logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def compare(monkeypatch, parts, photos, update_on: str, dtype: torch.dtype, tolerance: float):
    """Loss, log-probs and every gradient of two groups, packed and one by one."""
    plain = copy.deepcopy(parts.model).to(dtype)
    parts.model.to(dtype)
    if dtype == torch.float64:
        without_float32_islands(monkeypatch, plain)
    encoder = PromptEncoder(parts)
    groups = [make_group(parts, photos, seed) for seed in range(2)]
    config = LossConfig(update_on=update_on, kl_coef=0.3, entropy_coef=0.1, neg_entropy_coef=0.2)
    policy = Policy(parts, config, temperature=0.7, chunk_rows=7)
    pieces = [Piece(group, tuple(range(len(LENGTHS)))) for group in groups]
    for i, response in enumerate(r for g in groups for r in g.responses):
        response.row_weight = 1.0 + i
    batch = micro_batch(pieces, encoder, config, 3.0)
    loss, _ = policy(batch, "update")
    loss.backward()

    rows, negative_rows = [], []
    for group in groups:
        for response in group.responses:
            if not response.token_ids:
                continue
            own = group.triplet.anchor
            if update_on == "own" and response.role == "positive":
                own = group.triplet.positive
            arguments = (response.token_ids, 0.7)
            rows.append(plain_logprobs(plain, encoder, group, own, *arguments))
            negative_rows.append(
                plain_logprobs(plain, encoder, group, group.triplet.negative, *arguments)
            )
    logprobs, neg_logprobs = torch.cat(rows), torch.cat(negative_rows)
    packed_logprobs = policy(batch.update, "logprobs", labels=batch.labels)
    assert (packed_logprobs - logprobs).abs().max() <= 100 * tolerance * logprobs.abs().max()
    expected, _ = tapo_loss_reference(
        logprobs,
        batch.old_logprobs.to(dtype),
        neg_logprobs,
        batch.advantages.to(dtype),
        loss=config,
        num_loss_tokens=3.0,
        loss_mask=batch.loss_mask.to(dtype),
    )
    expected.backward()
    assert torch.allclose(loss, expected, rtol=100 * tolerance, atol=0)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert total > 1
    for name, parameter in parts.model.named_parameters():
        error = (parameter.grad - gradients[name]).norm()
        floor = 1e-7 * total if dtype == torch.float32 else 1e-16 * total
        assert error <= tolerance * gradients[name].norm() + floor, (name, float(error))


@pytest.mark.parametrize("update_on", ["anchor", "own"])
def test_float64_equals_plain_transformers(monkeypatch, parts, photos, update_on):
    compare(monkeypatch, parts, photos, update_on, torch.float64, 1e-9)


@pytest.mark.parametrize("update_on", ["anchor", "own"])
def test_float32_equals_plain_transformers(monkeypatch, parts, photos, update_on):
    compare(monkeypatch, parts, photos, update_on, torch.float32, 1e-5)


def test_order_of_groups_and_responses_does_not_matter(photos):
    parts = tiny()
    encoder, policy = PromptEncoder(parts), Policy(parts)
    first, second = (make_group(parts, photos, seed) for seed in range(2))
    prompts = [
        (encoder(g.prompt_ids, (g.triplet.anchor,)), [r.token_ids for r in g.responses])
        for g in (first, second)
    ]
    turned = [(prompt, tokens[::-1]) for prompt, tokens in prompts[::-1]]
    results = []
    for order in (prompts, turned):
        labels = torch.tensor([t for _, tokens in order for r in tokens for t in r])
        lengths = [len(r) for _, tokens in order for r in tokens]
        results.append(policy(pack(order), "logprobs", labels=labels).split(lengths))
    for one, other in zip(results[0], results[1][::-1], strict=True):
        assert torch.allclose(one, other, rtol=0, atol=2e-6)


def test_tied_and_untied_heads_name_their_weights(photos):
    tied, untied = tiny(), tiny(tie_word_embeddings=False)
    names = [name for name, _ in Policy(tied).named_weights()]
    assert "lm_head.weight" not in names and len(set(names)) == len(names)
    both = [name for name, _ in Policy(untied).named_weights()]
    assert set(both) - set(names) == {"lm_head.weight"}


def test_update_branch_takes_given_negative_logprobs(photos):
    parts = tiny()
    encoder = PromptEncoder(parts)
    group = make_group(parts, photos)
    piece = Piece(group, tuple(range(len(LENGTHS))))
    for response in group.responses:
        response.row_weight = 1.0
    policy = Policy(parts, LossConfig(neg_grad="detach", neg_at="step_start"))
    joint = micro_batch([piece], encoder, LossConfig(neg_grad="detach"), 18.0)
    neg_logprobs = policy(joint.negative, "logprobs", labels=joint.labels).detach()
    for response, part in zip(group.responses, neg_logprobs.split(LENGTHS), strict=True):
        response.neg_logprobs = part
    given = micro_batch([piece], encoder, policy.loss, 18.0)
    assert torch.equal(given.neg_logprobs, neg_logprobs) and given.negative is None
    assert policy(joint, "update")[0].item() == pytest.approx(
        policy(given, "update")[0].item(), rel=1e-6
    )


@pytest.mark.parametrize("neg_grad", ["flow", "detach"])
@pytest.mark.parametrize("form", ["neg_over_policy", "policy_over_neg", "exact"])
def test_branches_one_at_a_time_have_the_gradient_of_both(photos, neg_grad, form):
    """In float64, row weights of 0 among them; loss and metrics are the same as well."""
    parts = tiny()
    parts.model.double()
    encoder, group = PromptEncoder(parts), make_group(parts, photos)
    for n, response in enumerate(group.responses):
        response.row_weight = float(n != 3)
    piece = Piece(group, tuple(range(len(LENGTHS))))
    name = "entropy_form" if form == "exact" else "kl_ratio"
    strong = {"kl_coef": 0.3, "entropy_coef": 0.1, "neg_entropy_coef": 0.2}
    config = LossConfig(neg_grad=neg_grad, **{name: form}, **strong)
    policy = Policy(parts, config)
    batch = micro_batch([piece], encoder, config, 9.0)
    found = []
    for branches in ("joint", "one_at_a_time"):
        policy.zero_grad(set_to_none=True)
        value, metrics = policy.accumulate(batch, branches)
        grads = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        found.append((value, metrics, grads))
    (value, metrics, grads), (other_value, other_metrics, other_grads) = found
    assert value.item() == pytest.approx(other_value.item(), rel=1e-9)
    for name in metrics:
        torch.testing.assert_close(metrics[name], other_metrics[name], rtol=1e-7, atol=1e-9)
    assert len(grads) == len(other_grads) > 20
    for one, other in zip(grads, other_grads, strict=True):
        assert (one - other).abs().max() <= 1e-6 * one.abs().max() + 1e-12


def test_branches_one_at_a_time_halve_the_activations(photos):
    """Peak memory of a micro-batch above parameters and gradients, as the profiler counts it."""
    parts = tiny(hidden_size=128, layers=4)
    encoder, policy = PromptEncoder(parts), Policy(parts, LossConfig())
    groups = [make_group(parts, photos, seed) for seed in range(4)]
    pieces = [Piece(group, tuple(range(len(LENGTHS)))) for group in groups]
    for response in (r for group in groups for r in group.responses):
        response.row_weight = 1.0
    batch = micro_batch(pieces, encoder, LossConfig(), 72.0)
    peaks = []
    for branches in ("joint", "one_at_a_time"):
        policy.accumulate(batch, branches)  # the gradients are there
        with torch.profiler.profile(profile_memory=True) as profile:
            policy.accumulate(batch, branches)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
        peaks.append(max(itertools.accumulate(sizes)))
    assert 0.4 < peaks[1] / peaks[0] < 0.65, peaks


def test_unknown_task_is_named(photos):
    parts = tiny()
    with pytest.raises(ValueError, match="sideways"):
        Policy(parts)(pack([(PromptEncoder(parts)((7, 8), ()), [[9]])]), "sideways")
