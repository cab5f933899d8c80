"""The in-process engine against brute force, transformers' generate and the trainer's log-probs."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny

from tercet.core.data.vision import PromptEncoder
from tercet.core.models import FAMILIES
from tercet.core.packing import pack, plain_batch
from tercet.core.prompts import chat_ids
from tercet.core.types import Completion, PolicyParts, Request
from tercet.rollout import local
from tercet.rollout.engine import Sampling, sample_seed
from tercet.rollout.local import LocalEngine, sample_tokens
from tercet.train.learner.policy import Policy

QUESTIONS = ("What is it?", "Which bird is shown? You first think, then answer.")
COLOURS = {  # name: RGB, width and height of its photo
    "red": ((220, 30, 30), (112, 100)),
    "deep green": ((20, 150, 40), (60, 140)),
    "a long blue bill": ((40, 60, 220), (150, 64)),
    "yellow": ((230, 210, 40), (64, 64)),
}


def prompt_ids(parts: PolicyParts, question: str = QUESTIONS[0], images: int = 1):
    messages = [{"role": "user", "content": "<image>" * images + question}]
    return tuple(chat_ids(parts.tokenizer, messages, images))


def request_of(parts, photo: str | None, n: int = 1, name: str = "r", question=QUESTIONS[0], **kw):
    images = () if photo is None else (photo,)
    ids = prompt_ids(parts, question, len(images))
    return Request(name, name, ids, images, n, **({"seed": 0, "step": 0} | kw))


def run(engine: LocalEngine, requests, sampling: Sampling) -> dict[tuple[str, int], Completion]:
    """Completions by (request, sample); each must be yielded once."""

    async def collect():
        return [completion async for completion in engine.generate(requests, sampling)]

    completions = asyncio.run(collect())
    by_place = {(c.request_id, c.index): c for c in completions}
    assert len(by_place) == len(completions)
    return by_place


def tokens_of(completions: dict) -> dict[tuple[str, int], tuple[int, ...]]:
    return {place: completion.token_ids for place, completion in completions.items()}


def endless(parts: PolicyParts, **options) -> LocalEngine:
    """An engine for which no token ends a response."""
    engine = LocalEngine(parts, PromptEncoder(parts), **options)
    engine._stop_ids = frozenset()
    return engine


def watch_rows(parts: PolicyParts) -> list[tuple[int, int]]:
    """(rows, new tokens) of every forward pass of the language model from now on."""
    seen: list[tuple[int, int]] = []

    def note(module, args, kwargs):
        seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    parts.model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


# sample_tokens ------------------------------------------------------------------------------------


def exact_distribution(logits, temperature: float, top_p: float, top_k: int, banned) -> np.ndarray:
    """Filtered probabilities of one row of distinct logits, in float64."""
    scaled = np.array(logits, dtype=np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    probs[list(banned)] = 0
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept = order[: top_k or len(order)]
    nucleus, reached = [], 0.0
    for token in kept:
        nucleus.append(token)
        reached += probs[token] / probs[kept].sum()
        if reached >= top_p:
            break
    filtered = np.zeros_like(probs)
    filtered[nucleus] = probs[nucleus] / probs[nucleus].sum()
    return filtered


GRID = 20_000


@pytest.mark.core
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    "top_p, top_k, banned",
    [
        (1.0, 0, ()),
        (1.0, 0, (0, 12)),
        (0.99, 0, ()),
        (0.9, 0, (3,)),
        (0.5, 0, ()),
        (1e-6, 0, ()),
        (1.0, 1, ()),
        (1.0, 4, (5, 6)),
        (0.8, 5, (2,)),
        (0.95, 1000, ()),
    ],
)
def test_frequencies_over_a_grid_are_the_filtered_probabilities(temperature, top_p, top_k, banned):
    logits = 2.5 * np.random.default_rng(4).standard_normal(13)
    expected = exact_distribution(logits, temperature, top_p, top_k, banned)
    assert 0 < (expected > 0).sum() <= 13 - len(banned)
    rows = torch.tensor(logits, dtype=torch.float32).expand(GRID, -1)
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    sampling = Sampling(temperature, top_p, top_k)
    tokens, logprobs = sample_tokens(rows, sampling, torch.tensor(banned).long(), uniform)
    frequencies = tokens.bincount(minlength=13).numpy() / GRID
    assert np.abs(frequencies - expected).max() <= 1.01 / GRID
    assert not frequencies[expected == 0].any()
    unfiltered = torch.tensor(logits / temperature).log_softmax(-1)[tokens]
    assert (logprobs.double() - unfiltered).abs().max() < 2e-6


@pytest.mark.core
def test_ties_stay_together():
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0]).expand(1000, -1)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    none = torch.empty(0, dtype=torch.int64)
    for sampling in (Sampling(1.0, 1.0, 1), Sampling(1.0, 0.3)):
        tokens, _ = sample_tokens(logits, sampling, none, uniform)
        assert tokens.bincount(minlength=4).tolist() == [0, 500, 500, 0]


@pytest.mark.core
def test_greedy_takes_the_best_allowed_token_with_its_logprob_at_temperature_one():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = 9.0
    banned = torch.tensor([7, 3])
    tokens, logprobs = sample_tokens(logits, Sampling(0), banned, torch.zeros(50).double())
    values = logits.double().numpy()
    allowed = [[v if token not in (3, 7) else -np.inf for token, v in enumerate(r)] for r in values]
    assert tokens.tolist() == np.argmax(allowed, -1).tolist()
    expected = values[range(50), tokens] - np.log(np.exp(values).sum(-1))
    assert np.abs(logprobs.double().numpy() - expected).max() < 2e-6


@pytest.mark.core
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.999), Sampling(top_k=9)])
def test_extreme_uniforms_never_draw_what_has_no_probability(sampling):
    logits = torch.linspace(0, 5, 10).expand(2, -1)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = sample_tokens(logits, sampling, torch.tensor([0, 1, 9]), uniform)
    assert tokens.tolist() == [2, 8]


@pytest.mark.core
def test_rows_are_drawn_alike_alone_and_together_where_logits_tie():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, 3000, generator=generator)).bfloat16()
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    banned = torch.tensor([1])
    for sampling in (Sampling(), Sampling(top_p=0.9), Sampling(top_k=40)):
        together, _ = sample_tokens(logits, sampling, banned, uniform)
        alone = [
            sample_tokens(logits[i : i + 1], sampling, banned, uniform[i : i + 1])[0]
            for i in range(40)
        ]
        assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.core
@pytest.mark.parametrize(
    "field, value", [("temperature", -1.0), ("top_p", 0.0), ("top_k", -1), ("max_tokens", 0)]
)
def test_sampling_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}.*got {value}"):
        Sampling(**{field: value})


@pytest.mark.core
def test_sample_seed_is_a_known_number():
    # int(hashlib.blake2b(b"7/3/3.0.bird/1.jpg.anchor/4", digest_size=8).hexdigest(), 16) // 2
    assert sample_seed(7, 3, "3.0.bird/1.jpg.anchor", 4) == 5541397998581606246
    others = {sample_seed(s, t, r, j) for s in (0, 1) for t in (0, 1) for r in "ab" for j in (0, 1)}
    assert len(others) == 16 and all(0 <= seed < 2**63 for seed in others)


# A policy for which the photo matters -------------------------------------------------------------


@pytest.fixture(scope="module")
def colour_photos(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("colours")
    for name, (colour, size) in COLOURS.items():
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in COLOURS}


@pytest.fixture(scope="module", params=FAMILIES)
def namer(request, colour_photos) -> PolicyParts:
    """A policy trained until it names the colour of each photo."""
    parts = tiny(request.param)
    encoder, policy = PromptEncoder(parts), Policy(parts)
    answers = {name: [*parts.tokenizer.encode(name), parts.stop_ids[0]] for name in COLOURS}
    prompts = [
        (encoder(prompt_ids(parts, question), (photo,)), [answers[name]])
        for name, photo in colour_photos.items()
        for question in QUESTIONS
    ]
    batch = plain_batch(prompts, float(sum(len(of) for _, answer in prompts for of in answer)))
    optimizer = torch.optim.AdamW(parts.model.parameters(), lr=3e-3)
    for _ in range(200):
        loss, _ = policy(batch, "cross_entropy")
        if loss.item() < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    return parts


def naming_requests(parts, colour_photos, n: int = 1) -> list[Request]:
    return [
        request_of(parts, photo, n, f"{name}/{place}", question)
        for place, question in enumerate(QUESTIONS)
        for name, photo in colour_photos.items()
    ]


def reference_generate(model, encoder, request: Request, max_tokens: int):
    """Greedy tokens of one request through transformers' generate, and their log-probs."""
    prompt = encoder(request.prompt_ids, request.images)
    ids = prompt.input_ids[None]
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=prompt.images[0].pixel_values,
        image_grid_thw=prompt.images[0].grid_thw,
        do_sample=False,
        max_new_tokens=max_tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, ids.shape[1] :]
    logprobs = torch.cat(output.logits).double().log_softmax(-1)
    return tuple(tokens.tolist()), logprobs.gather(-1, tokens[:, None])[:, 0]


def test_greedy_equals_generate_where_the_photo_matters(namer, colour_photos):
    requests = naming_requests(namer, colour_photos)
    rows = watch_rows(namer)
    completions = run(
        LocalEngine(namer, PromptEncoder(namer)), requests, Sampling(0, max_tokens=40)
    )
    decoding = [count for count, new in rows if new == 1]
    assert decoding[0] == 8 and decoding[-1] == 2  # finished rows are removed
    plain, encoder = copy.deepcopy(namer.model), PromptEncoder(namer)
    plain.set_attn_implementation("sdpa")
    for request in requests:
        completion = completions[request.id, 0]
        tokens, logprobs = reference_generate(plain, encoder, request, 40)
        assert completion.token_ids == tokens
        ours = torch.tensor(completion.rollout_logprobs, dtype=torch.float64)
        assert (ours - logprobs).abs().max() < 1e-5
        assert completion.finish_reason == "stop" and tokens[-1] == namer.stop_ids[0]
        name = namer.tokenizer.decode(tokens, skip_special_tokens=True)
        assert name == request.id.partition("/")[0]
    assert len({len(encoder(r.prompt_ids, r.images)) for r in requests}) > 4


@pytest.mark.core
def test_untrained_greedy_equals_generate(parts, photos):
    requests = [
        request_of(parts, photo, 1, str(i), QUESTIONS[i % 2]) for i, photo in enumerate(photos)
    ]
    completions = run(
        LocalEngine(parts, PromptEncoder(parts)), requests, Sampling(0, max_tokens=30)
    )
    for request in requests:
        tokens, logprobs = reference_generate(parts.model, PromptEncoder(parts), request, 30)
        assert completions[request.id, 0].token_ids == tokens
        ours = torch.tensor(completions[request.id, 0].rollout_logprobs).double()
        assert (ours - logprobs).abs().max() < 1e-4


def test_length_limit_is_exact(namer, colour_photos):
    engine = LocalEngine(namer, PromptEncoder(namer))
    request = request_of(namer, colour_photos["yellow"])
    (whole,) = run(engine, [request], Sampling(0)).values()
    length = len(whole.token_ids)
    for limit in range(1, length + 1):
        (cut,) = run(engine, [request], Sampling(0, max_tokens=limit)).values()
        assert cut.token_ids == whole.token_ids[:limit]
        assert cut.rollout_logprobs == pytest.approx(whole.rollout_logprobs[:limit], abs=1e-6)
        assert cut.finish_reason == ("length" if limit < length else "stop")


def test_leaving_rows_change_nothing(namer, colour_photos, monkeypatch):
    engine = LocalEngine(namer, PromptEncoder(namer))
    requests = naming_requests(namer, colour_photos, n=3)
    sampling = Sampling(temperature=2.0, max_tokens=30)
    results = []
    for share in (0.0, 0.5, 0.875, 1.0):
        monkeypatch.setattr(local, "KEPT_SHARE", share)
        results.append(run(engine, requests, sampling))
    lengths = {len(c.token_ids) for c in results[0].values()}
    assert len(lengths) > 4 and len(results[0]) == 24
    for other in results[1:]:
        assert tokens_of(other) == tokens_of(results[0])
        for place, completion in other.items():
            expected = results[0][place].rollout_logprobs
            assert completion.rollout_logprobs == pytest.approx(expected, abs=1e-5)


# Sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_rollout_logprobs_are_the_trainers(parts, photos, temperature):
    sampling = Sampling(temperature, top_p=0.9, top_k=60, max_tokens=20)
    encoder = PromptEncoder(parts)
    engine = LocalEngine(parts, encoder)
    requests = [
        request_of(parts, photo, 3, str(i), QUESTIONS[i % 2]) for i, photo in enumerate(photos)
    ]
    before = run(engine, requests, sampling)
    policy = Policy(parts, temperature=temperature)  # switches the text part's attention
    assert tokens_of(run(engine, requests, sampling)) == tokens_of(before)
    for request in requests:
        responses = [before[request.id, j] for j in range(3)]
        prompt = encoder(request.prompt_ids, request.images)
        labels = torch.tensor([t for r in responses for t in r.token_ids])
        expected = policy(
            pack([(prompt, [r.token_ids for r in responses])]), "logprobs", labels=labels
        )
        ours = torch.tensor([value for r in responses for value in r.rollout_logprobs])
        assert (ours - expected).abs().max() < 1e-4
        assert ours.std() > 0.1


def test_growth_of_the_buffers(photos):
    parts = tiny()
    engine = endless(parts)
    requests = [request_of(parts, photo, 2, str(i)) for i, photo in enumerate(photos[:2])]
    steps = 2 * local.GROWTH + 10
    completions = run(engine, requests, Sampling(top_p=0.95, max_tokens=steps))
    encoder, policy = PromptEncoder(parts), Policy(parts)
    for request in requests:
        responses = [completions[request.id, j] for j in range(2)]
        assert all(len(r.token_ids) == steps and r.finish_reason == "length" for r in responses)
        labels = torch.tensor([t for r in responses for t in r.token_ids])
        packed = pack(
            [(encoder(request.prompt_ids, request.images), [r.token_ids for r in responses])]
        )
        ours = torch.tensor([value for r in responses for value in r.rollout_logprobs])
        assert (ours - policy(packed, "logprobs", labels=labels)).abs().max() < 1e-4


def test_a_sample_does_not_depend_on_what_is_beside_it(parts, photos):
    sampling = Sampling(top_p=0.95, max_tokens=16)
    encoder = PromptEncoder(parts)
    requests = [
        request_of(parts, photo, 3, str(i), QUESTIONS[i % 2]) for i, photo in enumerate(photos)
    ]
    requests.append(request_of(parts, None, 2, "no photo"))
    together = run(LocalEngine(parts, encoder), requests, sampling)
    assert len(together) == 11 and len(set(tokens_of(together).values())) == 11
    for rows in (1, 4):
        few = run(LocalEngine(parts, encoder, max_rows=rows), requests[::-1], sampling)
        assert tokens_of(few) == tokens_of(together)
    for request in requests:
        alone = run(LocalEngine(parts, encoder), [replace(request, n=1)], sampling)
        assert alone[request.id, 0].token_ids == together[request.id, 0].token_ids
    longer = run(LocalEngine(parts, encoder), requests[:1], replace(sampling, max_tokens=24))
    for place, completion in longer.items():
        assert completion.token_ids[:16] == together[place].token_ids


def test_each_token_takes_the_next_number_of_the_samples_own_stream(photos):
    """With equal logits the random number is the token's relative place among the allowed ones."""
    parts = tiny()
    engine = endless(parts)
    parts.model.lm_head.register_forward_hook(lambda module, args, output: output * 0)
    completions = run(engine, [request_of(parts, photos[0], 3)], Sampling(max_tokens=20))
    vocabulary = range(parts.model.config.text_config.vocab_size)
    allowed = [token for token in vocabulary if token not in parts.banned_ids]
    for (_, j), completion in completions.items():
        stream = np.random.Generator(np.random.Philox(sample_seed(0, 0, "r", j)))
        expected = tuple(allowed[int(u * len(allowed))] for u in stream.random(20))
        assert completion.token_ids == expected
        assert completion.rollout_logprobs == pytest.approx([-np.log(len(vocabulary))] * 20)


def test_every_stop_token_ends_a_response(photos):
    parts = tiny()
    engine = LocalEngine(parts, PromptEncoder(parts))
    assert len(parts.stop_ids) == 2
    for stop in parts.stop_ids:

        def favour(module, args, output, stop=stop):
            output[..., stop] += 60.0

        handle = parts.model.lm_head.register_forward_hook(favour)
        completions = run(engine, [request_of(parts, photos[0], 2)], Sampling(max_tokens=9))
        handle.remove()
        for completion in completions.values():
            assert (completion.token_ids, completion.finish_reason) == ((stop,), "stop")
            assert completion.rollout_logprobs == pytest.approx((0.0,), abs=1e-3)


def test_samples_differ_by_seed_step_request_and_index(photos):
    parts = tiny()
    engine = LocalEngine(parts, PromptEncoder(parts))
    sampling = Sampling(max_tokens=8)
    answers = set()
    for seed, step, name in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]:
        request = request_of(parts, photos[0], 6, name, seed=seed, step=step)
        found = set(tokens_of(run(engine, [request], sampling)).values())
        assert len(found) == 6
        answers |= found
        assert found == set(tokens_of(run(engine, [request], sampling)).values())
    assert len(answers) == 24


def test_image_tokens_are_never_sampled(photos):
    parts = tiny()
    engine = endless(parts)

    def favour(module, args, output):
        output[..., list(parts.banned_ids)] += 60.0

    parts.model.lm_head.register_forward_hook(favour)
    for sampling in (Sampling(0, max_tokens=12), Sampling(top_p=0.9, max_tokens=12)):
        completions = run(engine, [request_of(parts, photos[0], 8)], sampling).values()
        tokens = {token for c in completions for token in c.token_ids}
        assert tokens and not tokens & set(parts.banned_ids)
        # Log-probs are those of the full vocabulary, where image tokens have all the probability.
        assert max(value for c in completions for value in c.rollout_logprobs) < -40


def test_each_distinct_prompt_is_prefilled_once(photos):
    parts = tiny()
    engine = endless(parts)
    rows, photos_seen = watch_rows(parts), []

    def note(module, args, kwargs):
        photos_seen.append(len(kwargs["grid_thw"]))

    parts.model.model.visual.register_forward_pre_hook(note, with_kwargs=True)
    requests = [
        request_of(parts, photos[0], 5, "a"),
        request_of(parts, photos[1], 4, "b"),
        request_of(parts, photos[0], 3, "a again"),
    ]
    completions = run(engine, requests, Sampling(max_tokens=4))
    assert photos_seen == [2]
    assert [count for count, _ in rows] == [2, 12, 12, 12] and rows[0][1] > 20
    assert {new for _, new in rows[1:]} == {1}
    assert len(set(tokens_of(completions).values())) == 12


def test_completions_carry_the_weight_version(photos):
    parts = tiny()
    engine = LocalEngine(parts, PromptEncoder(parts))
    engine.update_weights(iter(()), version=5)
    (completion,) = run(engine, [request_of(parts, photos[0])], Sampling(max_tokens=2)).values()
    assert completion.weight_version == 5


def test_new_weights_are_used_at_once(photos):
    parts = tiny()
    engine = LocalEngine(parts, PromptEncoder(parts))
    before = run(engine, [request_of(parts, photos[0], 2)], Sampling(max_tokens=6))
    other = tiny(seed=1)
    parts.model.load_state_dict(other.model.state_dict())
    after = run(engine, [request_of(parts, photos[0], 2)], Sampling(max_tokens=6))
    fresh = LocalEngine(other, PromptEncoder(other))
    assert after == run(fresh, [request_of(other, photos[0], 2)], Sampling(max_tokens=6)) != before


# Abort and errors ---------------------------------------------------------------------------------


def test_abort_stops_a_request_while_others_go_on(photos):
    parts = tiny()
    engine = endless(parts)
    requests = [
        request_of(parts, photo, 3, name) for photo, name in zip(photos, "abc", strict=True)
    ]
    undisturbed = run(engine, requests, Sampling(max_tokens=10))
    rows = watch_rows(parts)
    calls = iter(range(100))

    def abort(module, args, output):
        if next(calls) == 4:
            engine.abort(["a", "c"])

    handle = parts.model.register_forward_hook(abort)
    completions = run(engine, requests, Sampling(max_tokens=10))
    assert set(completions) == {("b", 0), ("b", 1), ("b", 2)}
    assert all(undisturbed[place].token_ids == c.token_ids for place, c in completions.items())
    assert [count for count, _ in rows] == [3, 9, 9, 9, 9, 3, 3, 3, 3, 3]
    handle.remove()
    assert tokens_of(run(engine, requests, Sampling(max_tokens=10))) == tokens_of(undisturbed)


def test_a_stop_is_looked_at_before_every_token(photos):
    parts = tiny()
    looks = []

    def stop():
        looks.append(1)
        if len(looks) == 5:
            raise KeyboardInterrupt

    rows = watch_rows(parts)
    with pytest.raises(KeyboardInterrupt):
        engine = endless(parts, check_stop=stop)
        run(engine, [request_of(parts, photos[0], 2)], Sampling(max_tokens=1000))
    assert [count for count, _ in rows] == [1, 2, 2, 2, 2]


def test_aborted_requests_that_wait_are_never_prefilled(photos):
    parts = tiny()
    engine = endless(parts, max_rows=2)
    requests = [
        request_of(parts, photo, 2, name) for photo, name in zip(photos, "abc", strict=True)
    ]
    rows = watch_rows(parts)

    async def first_only():
        places = []
        async for completion in engine.generate(requests, Sampling(max_tokens=3)):
            engine.abort(["b", "c"])
            places.append((completion.request_id, completion.index))
        return places

    assert asyncio.run(first_only()) == [("a", 0), ("a", 1)]
    assert [count for count, _ in rows] == [1, 2, 2]


def test_logits_that_are_not_numbers_are_an_error(photos):
    parts = tiny()
    torch.nn.init.constant_(parts.model.model.language_model.norm.weight, float("nan"))
    engine = LocalEngine(parts, PromptEncoder(parts))
    for sampling in (Sampling(0), Sampling(top_p=0.9), Sampling()):
        with pytest.raises(ValueError, match="'r'.*NaN"):
            run(engine, [request_of(parts, photos[0])], sampling)
