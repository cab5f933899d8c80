"""Dynamic sampling with a scripted engine and scripted rewards, against results by hand."""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections import Counter

import pytest
from PIL import Image
from support import tiny

from tercet.core.data.stream import TripletStream
from tercet.core.data.vision import PromptEncoder
from tercet.core.rewards import fine_r1
from tercet.core.rollout_config import RolloutConfig
from tercet.core.types import Anchor, Completion
from tercet.rollout.engine import Sampling
from tercet.rollout.sampler import GroupSampler, NotEnoughGroups

pytestmark = pytest.mark.core

START = {"epoch": 0, "cursor": 0, "returned": []}
NAMES = {"bird": ("least auklet", "crested auklet")}


@pytest.fixture(scope="module")
def parts():
    return tiny()


@pytest.fixture(scope="module")
def encoder(parts):
    return PromptEncoder(parts)


@pytest.fixture(scope="module")
def anchors(tmp_path_factory) -> list[Anchor]:
    """Seven anchors, a0 to a6, each with two positives and two negatives."""
    folder = tmp_path_factory.mktemp("photos")

    def photo(name: str) -> str:
        Image.new("RGB", (40, 40), (len(name), 80, 120)).save(folder / name)
        return str(folder / name)

    return [
        Anchor(
            id=f"a{i}",
            image=photo(f"a{i}.png"),
            positives=(photo(f"p{i}.png"), photo(f"q{i}.png")),
            negatives=(photo(f"n{i}.png"), photo(f"m{i}.png")),
            question="Which bird can be seen in this photo?" if i % 2 else "What is it?",
            super_category="bird",
            sub_category="least auklet",
        )
        for i in range(7)
    ]


class ScriptedEngine:
    """Answers "<rank of the group in the step>.<role>.<index>" in an order drawn from `shuffle`
    (None: as asked).

    Responses of odd index are one token longer; those in `cut` say that they hit the limit.
    """

    def __init__(self, tokenizer, shuffle: int | None = 0):
        self.weight_version = 0
        self.tokenizer = tokenizer
        self.shuffle = shuffle
        self.batches: list[list] = []
        self.samplings: list[Sampling] = []
        self.cut: set[str] = set()
        self.lose: set[str] = set()

    async def generate(self, requests, sampling):
        self.batches.append(list(requests))
        self.samplings.append(sampling)
        places = [(request, j) for request in requests for j in range(request.n)]
        if self.shuffle is not None:
            random.Random(self.shuffle).shuffle(places)
        for request, j in places:
            await asyncio.sleep(0)
            rank, role = request.id.split(".")[1], request.id.split(".")[-1]
            text = f"{rank}.{role}.{j}"
            if text in self.lose:
                continue
            tokens = (*self.tokenizer.encode(text), *[self.tokenizer.eos_token_id] * (1 + j % 2))
            logprobs = tuple(-0.5 * (j + 1) for _ in tokens)
            reason = "length" if text in self.cut else "stop"
            yield Completion(request.id, j, tokens, logprobs, reason, self.weight_version)


class Script:
    """A reward with which the groups of these ranks in a step pass, by one correct answer.

    It is asynchronous, so that no thread decides in which order groups finish.
    """

    def __init__(self, *passing: set[int]):
        self.passing = passing
        self.rows: list[list[dict]] = []

    async def __call__(self, rows):
        self.rows.append(rows)
        step, rank = map(int, rows[0]["group_id"].split(".")[:2])
        good = self.passing[step] if step < len(self.passing) else set()
        right = [float(i == 0 and rank in good) for i in range(len(rows))]
        return [{"overall": 0.1 + 0.9 * r, "accuracy": r, "format": 1.0} for r in right]


def build(
    parts,
    encoder,
    anchors,
    reward,
    *,
    engine=None,
    seed=0,
    system_prompt=None,
    nearest=None,
    is_reserved=lambda name: False,
    **options,
):
    defaults = {"groups_per_step": 4, "n_anchor": 3, "n_positive": 2, "max_response_tokens": 9}
    return GroupSampler(
        engine or ScriptedEngine(parts.tokenizer),
        TripletStream(anchors, positive="redraw", seed=seed),
        parts.tokenizer,
        encoder,
        RolloutConfig(**(defaults | options)),
        reward=reward,
        names=NAMES,
        nearest=nearest or {},
        system_prompt=system_prompt,
        seed=seed,
        is_reserved=is_reserved,
    )


def collect(sampler: GroupSampler, step: int = 0, **options):
    return asyncio.run(sampler.collect(step, **options))


def ranks(groups) -> list[str]:
    """`step.rank` of each group."""
    return [group.id.rpartition(".")[0] for group in groups]


@pytest.fixture
def make(parts, encoder, anchors):
    def make_sampler(reward, **options):
        return build(parts, encoder, anchors, reward, **options)

    return make_sampler


# Triplets -----------------------------------------------------------------------------------------


def test_every_anchor_comes_once_an_epoch_in_an_order_of_its_own(anchors):
    stream = TripletStream(anchors, positive="redraw", seed=3)
    epochs = [[next(stream) for _ in anchors] for _ in range(12)]
    orders = [[triplet.id for triplet in epoch] for epoch in epochs]
    assert all(sorted(order) == [f"a{i}" for i in range(7)] for order in orders)
    assert len(set(map(tuple, orders))) == 12
    for i, anchor in enumerate(anchors):
        drawn = [t for epoch in epochs for t in epoch if t.id == f"a{i}"]
        assert {t.anchor for t in drawn} == {anchor.image}
        assert {t.positive for t in drawn} == set(anchor.positives)
        assert {t.negative for t in drawn} == set(anchor.negatives)
        assert {t.question for t in drawn} == {anchor.question}


def test_fixed_positives_are_the_first(anchors):
    stream = TripletStream(anchors, positive="fixed", seed=3)
    for _ in range(14):
        triplet = next(stream)
        anchor = anchors[int(triplet.id[1:])]
        assert (triplet.positive, triplet.negative) == (anchor.positives[0], anchor.negatives[0])


def test_stream_goes_on_exactly_from_its_state(anchors):
    stream = TripletStream(anchors, positive="redraw", seed=3)
    expected = [next(stream) for _ in range(25)]
    other_seed = TripletStream(anchors, positive="redraw", seed=4)
    assert [next(other_seed) for _ in range(25)] != expected
    for done in (0, 5, 7, 8, 14, 20):
        first = TripletStream(anchors, positive="redraw", seed=3)
        for _ in range(done):
            next(first)
        second = TripletStream(anchors, positive="redraw", seed=3)
        second.restore(first.state())
        assert [next(second) for _ in range(25 - done)] == expected[done:]


def test_no_anchors_is_an_error():
    with pytest.raises(ValueError, match="no anchors"):
        TripletStream([], positive="redraw", seed=0)


# Groups -------------------------------------------------------------------------------------------


def test_groups_stand_in_request_order_whatever_the_order_of_completion(make, parts):
    tables = []
    for shuffle in range(4):
        script = Script({0, 2, 3, 5, 6})
        sampler = make(script, engine=ScriptedEngine(parts.tokenizer, shuffle), prompts_per_batch=7)
        result = collect(sampler)
        assert ranks(result.groups) == ["0.0", "0.2", "0.3", "0.5"]
        assert ranks(sampler.carried) == ["0.6"]
        if shuffle:
            assert [r[0]["group_id"] for r in script.rows] != sorted(
                r[0]["group_id"] for r in script.rows
            )
        tables.append((result.groups, sampler.carried, result.sampled))
    assert all(table == tables[0] for table in tables[1:])


def test_a_group_holds_the_anchors_responses_then_the_positives(make):
    sampler = make(Script({0, 1, 2, 3}), n_anchor=12)
    result = collect(sampler)
    expected = [("anchor", j) for j in range(12)] + [("positive", j) for j in range(2)]
    for rank, group in enumerate(result.groups):
        assert [r.role for r in group.responses] == [role for role, _ in expected]
        assert [r.text for r in group.responses] == [f"{rank}.{role}.{j}" for role, j in expected]
        for (_, j), response in zip(expected, group.responses, strict=True):
            assert response.rollout_logprobs == (-0.5 * (j + 1),) * len(response.token_ids)
            assert response.finish_reason == "stop" and response.weight_version == 0


def test_what_the_engine_is_asked(make, parts, anchors):
    engine = ScriptedEngine(parts.tokenizer)
    options = {"temperature": 0.7, "top_p": 0.8, "top_k": 11, "max_response_tokens": 33}
    sampler = make(
        Script(*[{0, 1, 2, 3}] * 4), engine=engine, seed=5, system_prompt="Be brief.", **options
    )
    result = collect(sampler, step=3)
    assert engine.samplings == [Sampling(0.7, 0.8, 11, 33)]
    expected_stream = TripletStream(anchors, positive="redraw", seed=5)
    pad = parts.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for rank, group in enumerate(result.groups):
        triplet = next(expected_stream)
        assert group.triplet == triplet and group.id == f"3.{rank}.{triplet.id}"
        one, two = engine.batches[0][2 * rank : 2 * rank + 2]
        assert (one.images, one.n) == ((triplet.anchor,), 3)
        assert (two.images, two.n) == ((triplet.positive,), 2)
        for request in (one, two):
            assert request.prompt_ids == group.prompt_ids and group.prompt_ids.count(pad) == 1
            assert (request.seed, request.step, request.group_id) == (5, 3, group.id)
        text = parts.tokenizer.decode(group.prompt_ids)
        assert "Be brief." in text and f"{triplet.question}\n\nYou first think through" in text
    ids = [request.id for request in engine.batches[0]]
    assert len(set(ids)) == 8


def test_rewards_see_the_beginning_that_the_template_gives_an_answer(encoder, anchors):
    """`<think>` of a thinking model stands in the prompt: the format is whole with it alone."""
    parts = tiny()
    parts.tokenizer.chat_template = parts.tokenizer.chat_template.replace(
        "<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n"
    )

    class Thinking(ScriptedEngine):
        async def generate(self, requests, sampling):
            ids = tuple(self.tokenizer.encode("red</think><answer>least auklet</answer>"))
            for request in requests:
                for j in range(request.n):
                    yield Completion(request.id, j, ids, (-1.0,) * len(ids), "stop", 0)

    engine = Thinking(parts.tokenizer)
    options = {"max_rounds": 1, "on_exhausted": "keep_last_round", "engine": engine}
    groups = collect(build(parts, encoder, anchors, fine_r1, **options)).groups
    assert len(groups) == 4
    for response in (r for group in groups for r in group.responses):
        assert response.text == "<think>\nred</think><answer>least auklet</answer>"
        assert (response.reward, response.metrics["format"]) == (1.0, 1.0)
        assert parts.tokenizer.decode(response.token_ids) == response.text[len("<think>\n") :]


def test_what_the_reward_sees(make, parts):
    engine = ScriptedEngine(parts.tokenizer)
    engine.cut = {"1.anchor.2"}
    script = Script({0, 1, 2, 3})
    result = collect(make(script, engine=engine))
    by_id = {rows[0]["group_id"]: rows for rows in script.rows}
    assert len(by_id) == 4
    for group in result.groups:
        for row, response in zip(by_id[group.id], group.responses, strict=True):
            image = getattr(group.triplet, response.role)
            assert row == {
                "response": response.text,
                "response_length": len(response.token_ids),
                "ground_truth": "least auklet",
                "question": group.triplet.question,
                "images": [image],
                "role": response.role,
                "group_id": group.id,
                "finish_reason": "length" if response.text == "1.anchor.2" else "stop",
                "super_category": "bird",
                "names": NAMES["bird"],
                "options": (),
                "letter": None,
            }
    first = result.groups[0].responses
    assert [r.reward for r in first] == [1.0, 0.1, 0.1, 0.1, 0.1]
    assert first[0].metrics == {"accuracy": 1.0, "format": 1.0}


@pytest.mark.parametrize("n_anchor, n_positive", [(5, 0), (3, 2), (1, 4)])
def test_only_groups_with_right_and_wrong_answers_are_kept(make, parts, n_anchor, n_positive):
    """Group k has k correct answers of five, for k = 0 to 5."""

    def reward(rows):
        right = int(rows[0]["group_id"].split(".")[1])
        return [{"overall": 0.0, "accuracy": float(i >= 5 - right)} for i in range(5)]

    engine = ScriptedEngine(parts.tokenizer)
    options = {"n_anchor": n_anchor, "n_positive": n_positive, "prompts_per_batch": 6}
    result = collect(make(reward, engine=engine, **options))
    wanted = [n for n in (n_anchor, n_positive) if n]
    assert [request.n for request in engine.batches[0]] == wanted * 6
    assert ranks(result.groups) == ["0.1", "0.2", "0.3", "0.4"]
    roles = ["anchor"] * n_anchor + ["positive"] * n_positive
    assert all([r.role for r in group.responses] == roles for group in result.groups)
    assert (result.groups_done, result.groups_kept, result.prompts_sent) == (6, 4, 6)
    assert result.acceptance == 4 / 6


def test_without_accuracy_groups_are_kept_where_the_reward_varies(make):
    def reward(rows):
        varies = int(rows[0]["group_id"].split(".")[1]) % 2
        return [{"overall": 0.3 + 0.1 * varies * (i == 4)} for i in range(5)]

    assert ranks(collect(make(reward, prompts_per_batch=8)).groups) == ["0.1", "0.3", "0.5", "0.7"]


def test_figures_count_every_response(make, parts):
    script = Script({1, 4, 6, 8, 9})
    progressed = []
    sampler = make(script, prompts_per_batch=3)
    result = collect(sampler, progress=lambda n, so_far: progressed.append((n, so_far.kept)))
    assert ranks(result.groups) == ["0.1", "0.4", "0.6", "0.8"]
    assert (result.prompts_sent, result.groups_done, result.groups_kept) == (9, 9, 4)
    assert result.acceptance == 4 / 9 and result.filled_up == 0
    assert len(result.sampled) == 45 and [n for n, _ in progressed if n] == [1] * 45
    assert progressed[0][1] == "0 of 0 groups kept" and progressed[-1][1] == "4 of 9 groups kept"
    assert (0, "1 of 3 groups kept") in progressed  # after the first batch
    texts = [f"{k}.{role}.{j}" for k in range(9) for role, n in (("anchor", 3), ("positive", 2))
             for j in range(n)]  # fmt: skip
    assert [response.text for response in result.sampled] == texts
    lengths = [len(parts.tokenizer.encode(text)) + 1 + int(text[-1]) % 2 for text in texts]
    assert result.tokens == sum(lengths)


def test_reward_seconds_are_those_waited_after_the_last_response(make):
    running = []

    async def slow(rows):
        """All eight wait for each other: run one after the other, they never would end."""
        running.append(rows[0]["group_id"])
        while len(running) < 8:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        return [{"overall": float(i)} for i in range(len(rows))]

    started = time.perf_counter()
    result = collect(make(slow, groups_per_step=8))
    assert 0.25 < result.reward_seconds < time.perf_counter() - started


# Rounds -------------------------------------------------------------------------------------------


def test_surplus_is_carried_to_the_next_step(make, parts):
    engine = ScriptedEngine(parts.tokenizer)
    sampler = make(
        Script({0, 1, 2, 3, 4, 5}, {1, 3}), engine=engine, prompts_per_batch=6, surplus="carry"
    )
    assert ranks(collect(sampler).groups) == ["0.0", "0.1", "0.2", "0.3"]
    assert ranks(sampler.carried) == ["0.4", "0.5"]
    engine.weight_version = 1
    second = collect(sampler, step=1)
    assert ranks(second.groups) == ["0.4", "0.5", "1.1", "1.3"]
    assert [r.weight_version for group in second.groups for r in group.responses] == [0] * 10 + [
        1
    ] * 10
    assert (second.prompts_sent, second.groups_kept, len(second.sampled)) == (6, 2, 30)
    assert second.filled_up == 0
    assert sampler.carried == []


def test_a_step_of_carried_groups_alone_asks_for_nothing(make, parts):
    engine = ScriptedEngine(parts.tokenizer)
    sampler = make(Script(set(range(9))), engine=engine, prompts_per_batch=9)
    collect(sampler)
    position = sampler._stream.state()
    second = collect(sampler, step=1)
    assert ranks(second.groups) == ["0.4", "0.5", "0.6", "0.7"]
    assert ranks(sampler.carried) == ["0.8"]
    assert len(engine.batches) == 1 and sampler._stream.state() == position
    assert (second.prompts_sent, second.groups_done, second.sampled) == (0, 0, [])


def test_surplus_is_dropped(make):
    sampler = make(Script({0, 1, 2, 3, 4, 5}, {0, 1, 2, 3}), prompts_per_batch=6, surplus="drop")
    assert ranks(collect(sampler).groups) == ["0.0", "0.1", "0.2", "0.3"]
    assert sampler.carried == []
    assert ranks(collect(sampler, step=1).groups) == ["1.0", "1.1", "1.2", "1.3"]


@pytest.mark.parametrize("max_staleness, expected", [(0, 0), (1, 0), (2, 2), (3, 2)])
def test_groups_of_old_weights_are_dropped(make, parts, max_staleness, expected):
    engine = ScriptedEngine(parts.tokenizer)
    sampler = make(
        Script(set(range(6)), {0, 1, 2, 3}), engine=engine, prompts_per_batch=6,
        max_staleness=max_staleness,
    )  # fmt: skip
    collect(sampler)
    engine.weight_version = 2
    groups = collect(sampler, step=1).groups
    assert len(groups) == 4 and sum(group.id.startswith("0.") for group in groups) == expected


def test_the_oldest_response_tells_a_groups_age(make, parts):
    engine = ScriptedEngine(parts.tokenizer)
    sampler = make(Script(set(range(6)), {0, 1, 2}), engine=engine, prompts_per_batch=6)
    collect(sampler)
    engine.weight_version = 1
    sampler.carried[0].responses[2].weight_version = -1
    assert ranks(collect(sampler, step=1).groups) == ["0.5", "1.0", "1.1", "1.2"]


def test_rounds_are_counted_in_prompts(make, parts):
    engine = ScriptedEngine(parts.tokenizer)
    sampler = make(
        Script(set()), engine=engine, prompts_per_batch=3, max_rounds=2, on_exhausted="train_kept"
    )
    result = collect(sampler)
    assert [len(batch) // 2 for batch in engine.batches] == [3, 3, 2]
    assert (result.groups, result.prompts_sent, result.acceptance) == ([], 8, 0)


def test_exhausted_error_says_what_was_found_and_loses_nothing(make, parts):
    engine = ScriptedEngine(parts.tokenizer)
    script = Script({0, 1, 2, 3, 4}, {5}, set(range(8)))
    sampler = make(script, engine=engine, prompts_per_batch=5, max_rounds=2, on_exhausted="error")
    collect(sampler)
    carried, position = sampler.carried, sampler._stream.state()
    assert ranks(carried) == ["0.4"]
    message = r"step 1: 2 of 4 groups .*max_rounds = 2 rounds \(8 prompts\).*on_exhausted"
    with pytest.raises(NotEnoughGroups, match=message):
        collect(sampler, step=1)
    assert sampler.carried is carried and sampler._stream.state() == position
    assert ranks(collect(sampler, step=2).groups) == ["0.4", "2.0", "2.1", "2.2"]


def test_exhausted_train_kept_gives_what_passed(make):
    sampler = make(Script({1, 6}), max_rounds=2, on_exhausted="train_kept")
    result = collect(sampler)
    assert ranks(result.groups) == ["0.1", "0.6"] and sampler.carried == []
    assert (result.prompts_sent, result.groups_kept, result.filled_up) == (8, 2, 0)


def test_no_limit_goes_on_until_the_step_is_full(make):
    result = collect(make(Script({3, 50, 90, 91}), max_rounds=None, on_exhausted="error"))
    assert ranks(result.groups) == ["0.3", "0.50", "0.90", "0.91"]
    assert (result.prompts_sent, result.acceptance) == (92, 4 / 92)


@pytest.mark.parametrize(
    "passing, batch, rounds, expected, filled_up, carried",
    [
        # The rounds are used up: groups of the last batch fill the step up, in request order.
        ({1, 6}, 4, 2, [1, 4, 5, 6], 2, []),
        ({1, 4, 7}, 4, 2, [1, 4, 5, 7], 1, []),
        # Only the last batch can fill the step up; if it is too small, the step stays short.
        ({0, 7}, 3, 2, [0, 3, 4, 5], 3, []),
        ({0, 3, 7}, 3, 2, [0, 3, 6, 7], 1, []),
        ({0, 3, 7}, 3, None, [0, 3, 7, 9], 1, []),
        # A batch in which no group passes is kept whole, even if rounds are left ...
        (set(), 4, 5, [0, 1, 2, 3], 4, []),
        (set(), 2, None, [0, 1, 2, 3], 4, []),
        # ... as far as the step has room; groups that did not pass are never carried.
        ({0, 2}, 3, 5, [0, 2, 3, 4], 2, []),
        (set(), 7, 5, [0, 1, 2, 3], 4, []),
        # Enough groups passed: none fill the step up, and the surplus is carried.
        ({0, 1, 4, 5, 6}, 4, 2, [0, 1, 4, 5], 0, [6]),
        ({0, 1, 2, 3}, 4, 1, [0, 1, 2, 3], 0, []),
    ],
)
def test_exhausted_keep_last_round(make, passing, batch, rounds, expected, filled_up, carried):
    sampler = make(
        Script(passing), prompts_per_batch=batch, max_rounds=rounds, on_exhausted="keep_last_round"
    )
    result = collect(sampler)
    assert ranks(result.groups) == [f"0.{k}" for k in expected]
    assert result.filled_up == filled_up
    assert ranks(sampler.carried) == [f"0.{k}" for k in carried]
    assert all(len(group.responses) == 5 for group in result.groups)


def test_keep_last_round_stays_short_where_the_last_batch_is_too_small(make):
    sampler = make(
        Script({0, 3, 6}),
        groups_per_step=9,
        prompts_per_batch=4,
        max_rounds=1,
        on_exhausted="keep_last_round",
    )
    result = collect(sampler)  # batches of 4, 4 and 1
    assert ranks(result.groups) == ["0.0", "0.3", "0.6", "0.8"]
    assert result.filled_up == 1


# Cut-off responses --------------------------------------------------------------------------------


@pytest.mark.parametrize("cut_off, penalty", [("keep", 0), ("mask", 0), ("penalise", 0.25)])
def test_cut_off_responses(make, parts, cut_off, penalty):
    engine = ScriptedEngine(parts.tokenizer)
    engine.cut = {"0.anchor.0", "0.positive.1", "2.anchor.1"}
    sampler = make(Script({0, 1, 2, 3}), engine=engine, cut_off=cut_off, cut_off_penalty=0.25)
    groups = collect(sampler).groups
    for group in groups:
        for place, response in enumerate(group.responses):
            plain = 1.0 if place == 0 else 0.1
            cut = response.text in engine.cut
            assert response.finish_reason == ("length" if cut else "stop")
            assert response.reward == pytest.approx(plain - penalty * cut, abs=1e-12)
            assert response.metrics["accuracy"] == (place == 0)


# Nothing is lost ----------------------------------------------------------------------------------


def with_carried(make, parts, reward):
    """A sampler after a step that carried two groups; its engine, these groups, and the stream's
    state."""
    engine = ScriptedEngine(parts.tokenizer)

    def first_then(rows):
        return Script(set(range(6)))(rows) if rows[0]["group_id"][0] == "0" else reward(rows)

    sampler = make(first_then, engine=engine, prompts_per_batch=6)
    collect(sampler)
    assert ranks(sampler.carried) == ["0.4", "0.5"]
    return sampler, engine, sampler.carried, sampler._stream.state()


def fails(rows):
    if rows[0]["group_id"].startswith("1.3."):
        raise KeyError("no such column")
    return [{"overall": 0.0} for _ in rows]


def not_a_number(rows):
    bad = rows[0]["group_id"].startswith("1.3.")
    return [{"overall": math.nan if bad and i == 4 else 0.0} for i in range(len(rows))]


@pytest.mark.parametrize(
    "reward, what", [(fails, "KeyError.*no such column"), (not_a_number, "response 4.*finite")]
)
def test_a_failing_reward_names_the_group_and_loses_nothing(make, parts, reward, what):
    sampler, _, carried, position = with_carried(make, parts, reward)
    before = [(r.reward, dict(r.metrics)) for group in carried for r in group.responses]
    with pytest.raises(ValueError, match=rf"group 1\.3\.a\d.*{what}"):
        collect(sampler, step=1)
    assert sampler.carried is carried and sampler._stream.state() == position
    assert [(r.reward, r.metrics) for group in carried for r in group.responses] == before


def test_a_metric_of_the_trainers_is_refused_and_loses_nothing(make):
    async def kept(rows):
        return [{**result, "kept": 1.0} for result in await Script({0, 1, 2, 3})(rows)]

    sampler = make(kept, is_reserved=lambda name: name == "kept")
    with pytest.raises(ValueError, match=r"group 0\.\d.a\d: the trainer has a metric .*'kept'"):
        collect(sampler)
    assert sampler._stream.state() == START


def test_a_reward_that_takes_too_long_is_named_and_loses_nothing(make):
    async def endless(rows):
        await asyncio.sleep(60)

    sampler = make(endless, reward_timeout_s=0.05)
    with pytest.raises(ValueError, match=r"group 0\.\d.a\d: no result within 0.05 s"):
        collect(sampler)
    assert sampler._stream.state() == START


def test_only_so_many_rewards_are_computed_at_once(make, monkeypatch):
    """The time of a group that waits for its turn does not count."""
    running = [0, 0]

    async def slow(rows):
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0.2)
        running[0] -= 1
        return [{"overall": float(i)} for i in range(len(rows))]

    monkeypatch.setattr("tercet.rollout.sampler.REWARDS_AT_ONCE", 2)
    result = collect(make(slow, groups_per_step=40, reward_timeout_s=3.5))
    assert len(result.groups) == 40 and running == [0, 2]


def test_too_few_groups_end_a_command_with_one_line():
    assert issubclass(NotEnoughGroups, ValueError)


def test_a_failing_reward_ends_the_sampling_at_once(make, parts):
    engine = ScriptedEngine(parts.tokenizer, shuffle=None)
    sampler = make(fails, engine=engine, prompts_per_batch=40)
    collected = []

    def progress(responses: int, so_far) -> None:
        collected.append(responses)
        time.sleep(0.01)

    with pytest.raises(ValueError, match="1.3") as failure:
        collect(sampler, step=1, progress=progress)
    assert isinstance(failure.value.__cause__, KeyError)
    assert 20 <= sum(collected) < 150  # of 200; the group that fails has number 16 to 20


def test_an_interruption_loses_nothing(make, parts):
    sampler, _, carried, position = with_carried(make, parts, fails)
    count = Counter()

    def stop(responses: int, so_far) -> None:
        count["responses"] += responses
        if count["responses"] == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(sampler, step=1, progress=stop)
    assert count["responses"] == 13
    assert sampler.carried is carried and sampler._stream.state() == position


def test_progress_is_called_while_nothing_comes(make, monkeypatch):
    """A signal is then noticed within a second, whatever engine and reward are waiting for."""

    async def endless(rows):
        await asyncio.sleep(300)

    class Stop(Exception):
        pass

    def stop(responses: int, so_far) -> None:
        if responses == 0:
            raise Stop

    sampler = make(endless)
    started = time.perf_counter()
    with pytest.raises(Stop):
        collect(sampler, progress=stop)
    assert time.perf_counter() - started < 300  # it did not wait for the reward
    assert sampler._stream.state() == START


def test_responses_that_never_come_are_an_error(make, parts):
    sampler, engine, carried, position = with_carried(make, parts, lambda rows: Script()(rows))
    engine.lose = {"2.anchor.1"}
    with pytest.raises(RuntimeError, match=r"step 1.*\['1\.2\.a\d'\]"):
        collect(sampler, step=1)
    assert sampler.carried is carried and sampler._stream.state() == position


def test_an_over_long_prompt_names_triplet_and_photo(make, anchors, encoder):
    groups = collect(make(Script(set(range(7))), groups_per_step=7)).groups
    limits = {len(encoder(group.prompt_ids, (group.triplet.anchor,))) for group in groups}
    assert len(limits) == 2  # two questions of different length
    collect(make(Script(set(range(7))), groups_per_step=7, max_prompt_tokens=max(limits)))
    too_tight = make(Script(), groups_per_step=7, max_prompt_tokens=max(limits) - 1)
    message = rf"triplet 'a[135]'.*a\d\.png'.* {max(limits)} tokens.*max_prompt_tokens is"
    with pytest.raises(ValueError, match=message):
        collect(too_tight)
    assert too_tight._stream.state() == START
    with pytest.raises(ValueError, match=message):
        too_tight.check_prompts(anchors)  # before the first step
    make(Script(), max_prompt_tokens=max(limits)).check_prompts(anchors)


@pytest.mark.parametrize("role", ["positive", "negative"])
def test_a_photo_that_makes_a_prompt_too_long_is_named_whatever_its_role(
    make, parts, encoder, anchors, tmp_path, role
):
    wide = str(tmp_path / "wide.png")
    Image.new("RGB", (1400, 10)).save(wide)
    changed = {f"{role}s": (wide,)}
    plain = anchors[0]
    anchor = Anchor(**({k: getattr(plain, k) for k in plain.__dataclass_fields__} | changed))
    group = collect(make(Script({0, 1, 2, 3}))).groups[0]
    limit = max(
        len(encoder(group.prompt_ids, (plain.image,))), len(encoder(group.prompt_ids, (wide,))) - 1
    )
    sampler = build(parts, encoder, [anchor], Script(), max_prompt_tokens=limit)
    message = rf"triplet 'a0', image {re.escape(repr(wide))}"
    with pytest.raises(ValueError, match=message):
        sampler.check_prompts([anchor])
    with pytest.raises(ValueError, match=message):
        collect(sampler)


def test_a_bad_photo_is_named_and_loses_nothing(make, parts, encoder, anchors):
    missing = Anchor("x", "gone.png", anchors[0].positives, anchors[0].negatives, "Q?", "bird", "b")
    sampler = build(parts, encoder, [*anchors[:2], missing], Script(), prompts_per_batch=3)
    with pytest.raises(ValueError, match="gone.png"):
        collect(sampler)
    assert sampler._stream.state() == START
    with pytest.raises(ValueError, match=r"gone\.png': no such file"):
        sampler.check_prompts([missing])


# Repeatable ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_steps(make, parts):
    def play(seed: int, resume_at: int | None = None):
        options = {"seed": seed, "prompts_per_batch": 5}
        script = [{0, 1, 2, 3, 4}, {1, 3, 6, 7, 8}, {0, 4, 5, 9}]
        sampler, steps = make(Script(*script), **options), []
        for step in range(3):
            if step == resume_at:
                state, carried = sampler._stream.state(), sampler.carried
                sampler = make(Script(*script), **options)
                sampler._stream.restore(state)
                sampler.carried = carried
            steps.append(collect(sampler, step).groups)
        return steps

    assert play(1) == play(1) == play(1, resume_at=1) == play(1, resume_at=2)
    assert play(1) != play(2)


class TimedEngine(ScriptedEngine):
    """Each group takes `turns[rank]` turns of the event loop; None: it never ends."""

    def __init__(self, tokenizer, turns=lambda rank: 1):
        super().__init__(tokenizer, shuffle=None)
        self.turns = turns
        self.running = self.most = 0
        self.aborted: list[int] = []

    async def generate(self, requests, sampling):
        rank = int(requests[0].id.split(".")[1])
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            turns = self.turns(rank)
            for _ in range(turns or 10**9):
                await asyncio.sleep(0 if turns else 0.01)
            async for completion in super().generate(requests, sampling):
                yield completion
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(rank)
            raise
        finally:
            self.running -= 1


def test_a_stream_does_not_wait_for_slow_responses(make, parts):
    """Ranks 0 and 2 never finish: the step fills without them, they are aborted, and their
    triplets come first in the next step."""
    engine = TimedEngine(parts.tokenizer, lambda rank: None if rank in (0, 2) else 1 + 20 * rank)
    everyone = set(range(100))
    sampler = make(Script(everyone, everyone), engine=engine, dispatch="stream")
    result = collect(sampler)
    assert ranks(result.groups) == ["0.1", "0.3", "0.4", "0.5"]
    assert {0, 2} <= set(engine.aborted) and engine.running == 0
    # Of those that were sent, some may not have begun.
    left = [rank for rank in range(result.prompts_sent) if rank not in (1, 3, 4, 5)]
    assert set(engine.aborted) <= set(left) and result.groups_done == 4
    returned = [t.id for t in sampler._stream.state()["returned"]]
    assert returned == [triplet_of(sampler, rank) for rank in left]
    engine.turns = lambda rank: 1 + 20 * rank
    again = collect(sampler, step=1)
    assert [g.triplet.id for g in again.groups] == returned[:4]


def test_an_ordered_stream_takes_groups_as_they_were_asked_for(make, parts):
    """However long each takes: later ones that have finished come again in the next step."""
    engine = TimedEngine(parts.tokenizer, lambda rank: 200 - 20 * rank)
    everyone = set(range(100))
    sampler = make(Script(everyone - {1}, everyone), engine=engine, dispatch="ordered")
    result = collect(sampler)
    assert ranks(result.groups) == ["0.0", "0.2", "0.3", "0.4"]
    assert result.prompts_sent > 5 and result.groups_done == result.prompts_sent
    assert sampler.carried == [] and engine.running == 0
    returned = [t.id for t in sampler._stream.state()["returned"]]
    assert returned == [triplet_of(sampler, rank) for rank in range(5, result.prompts_sent)]


@pytest.mark.parametrize(("dispatch", "long_ones"), [("stream", 8), ("ordered", 18)])
def test_which_lengths_a_stream_keeps(make, parts, dispatch, long_ones):
    """Every second group takes long; the others are the first to finish."""
    engine = TimedEngine(parts.tokenizer, lambda rank: 100 if rank % 2 else 1)
    everyone = set(range(100))
    sampler = make(Script(*[everyone] * 9), engine=engine, dispatch=dispatch, surplus="drop")
    steps = [ranks(collect(sampler, step).groups) for step in range(9)]
    kept = [int(rank.split(".")[1]) % 2 for step in steps for rank in step]
    assert len(kept) == 9 * 4 and sum(kept) == long_ones


def triplet_of(sampler: GroupSampler, rank: int) -> str:
    """Id of the triplet at a rank of a new stream with the same seed."""
    fresh = TripletStream(sampler._stream._anchors, positive="redraw", seed=0)
    return [next(fresh).id for _ in range(rank + 1)][-1]


def test_a_stream_sends_by_the_share_that_passes(make, parts):
    """One of two groups is expected to pass at first: ceil(1.25 * 4 * 2) = 10 are in flight, later
    fewer, and never more than the servers hold."""
    engine = TimedEngine(parts.tokenizer)
    everyone = set(range(100))
    sampler = make(Script(*[everyone] * 3), engine=engine, dispatch="stream", surplus="drop")
    collect(sampler)
    assert engine.most == 10
    engine.most = 0
    collect(sampler, step=1)
    assert engine.most == 6
    narrow = TimedEngine(parts.tokenizer)
    collect(make(Script(everyone), engine=narrow, dispatch="stream", max_in_flight=9))
    assert narrow.most == 3  # of 5 responses each: 2 fill 9 places, 1 stands ready


def test_a_stream_replaces_groups_that_do_not_pass(make, parts):
    engine = TimedEngine(parts.tokenizer, lambda rank: 1)
    sampler = make(Script({11, 12, 13, 14, 15, 16}), engine=engine, dispatch="stream")
    result = collect(sampler)
    assert ranks(result.groups) == ["0.11", "0.12", "0.13", "0.14"]
    assert result.filled_up == 0 and result.groups_kept >= 4
    assert len(result.sampled) == 5 * result.groups_done >= 5 * 15


@pytest.mark.parametrize("on_exhausted", ["error", "train_kept", "keep_last_round"])
def test_a_stream_that_is_spent(make, parts, on_exhausted):
    engine = TimedEngine(parts.tokenizer)
    sampler = make(
        Script({1}), engine=engine, dispatch="stream", max_rounds=2, on_exhausted=on_exhausted
    )
    if on_exhausted == "error":
        with pytest.raises(NotEnoughGroups, match=r"1 of 4 groups passed .*8 prompts"):
            collect(sampler)
        assert sampler._stream.state() == START
        return
    result = collect(sampler)
    kept = ["0.1"] if on_exhausted == "train_kept" else ["0.1", "0.5", "0.6", "0.7"]
    assert ranks(result.groups) == kept
    assert result.prompts_sent == 8 and result.filled_up == len(kept) - 1


@pytest.mark.parametrize("passing, kept, filled", [(set(), 4, 4), ({1, 3}, 4, 2), ({1}, 4, 3)])
def test_a_stream_without_limit_ends_when_no_group_passes(make, parts, passing, kept, filled):
    """`keep_last_round` keeps four groups in a row of which none passed, as batches do."""
    engine = TimedEngine(parts.tokenizer)
    options = {"dispatch": "stream", "max_rounds": None, "on_exhausted": "keep_last_round"}
    sampler = make(Script(passing), engine=engine, **options)
    result = asyncio.run(asyncio.wait_for(sampler.collect(0), 60))
    assert (len(result.groups), result.filled_up) == (kept, filled)
    assert {int(g.id.split(".")[1]) for g in result.groups} >= passing
    assert engine.running == 0 and sampler.carried == []


def test_a_stream_without_limit_keeps_small_rounds_until_the_step_is_full(make, parts):
    options = {"dispatch": "stream", "max_rounds": None, "on_exhausted": "keep_last_round"}
    engine = TimedEngine(parts.tokenizer, lambda rank: 1 + 5 * rank)  # one after the other
    sampler = make(Script({2}), engine=engine, prompts_per_batch=2, **options)
    result = asyncio.run(asyncio.wait_for(sampler.collect(0), 60))
    assert ranks(result.groups) == ["0.0", "0.1", "0.2", "0.3"] and result.filled_up == 3


class RedrawingEngine(ScriptedEngine):
    """Says that it has drawn so many samples of each call again."""

    def __init__(self, tokenizer, *times: int):
        super().__init__(tokenizer)
        self.redrawn = Counter({"an image token": 7})  # before the step
        self.times = list(times)

    async def generate(self, requests, sampling):
        self.redrawn["a time-out"] += self.times.pop(0)
        async for completion in super().generate(requests, sampling):
            yield completion


def test_responses_that_are_drawn_again_are_counted_and_must_be_rare(make, parts):
    engine = RedrawingEngine(parts.tokenizer, 2, 3)
    sampler = make(Script({0, 1, 2, 3}, {0, 1, 2, 3}), engine=engine)
    result = collect(sampler)
    assert result.redrawn == {"a time-out": 2} and result.figures()["redrawn"] == 2 / 20
    position = sampler._stream.state()
    with pytest.raises(ValueError, match=r"step 1: for 20 responses 3 were .*3 for a time-out"):
        collect(sampler, step=1)
    assert sampler._stream.state() == position
    assert "redrawn" not in collect(make(Script({0, 1, 2, 3}))).figures()


def test_a_step_that_is_sampled_again_gets_other_ids_and_seeds(make, parts):
    everyone = [set(range(100))] * 3
    sampler = make(Script(*everyone))
    assert ranks(collect(sampler, step=1).groups) == ["1.0", "1.1", "1.2", "1.3"]
    resumed = make(Script(*everyone))
    resumed.restore(sampler.state())
    assert ranks(collect(resumed, step=1).groups) == ["1.4", "1.5", "1.6", "1.7"]
    assert ranks(collect(resumed, step=1).groups) == ["1.8", "1.9", "1.10", "1.11"]
    assert collect(resumed, step=2).groups[0].id.startswith("2.0.")
    resumed.restore({"carried": []})  # a checkpoint of an earlier version
    assert ranks(collect(resumed, step=1).groups)[0] == "1.0"


def test_a_reward_that_fails_ends_a_stream_and_loses_nothing(make, parts):
    def fails(rows):
        if ".5." in rows[0]["group_id"]:
            raise RuntimeError("the judge is gone")
        return Script()(rows)

    engine = TimedEngine(parts.tokenizer)
    sampler = make(fails, engine=engine, dispatch="stream")
    with pytest.raises(ValueError, match="judge is gone"):
        collect(sampler)
    assert sampler._stream.state() == START and engine.running == 0


def test_streams_are_for_servers_and_batches_for_this_process():
    """An ordered stream, unless the other kind is asked for."""
    assert RolloutConfig(engine="sglang").ordered and not RolloutConfig().streaming
    assert not RolloutConfig(engine="sglang", dispatch="batch").streaming
    for dispatch in ("stream", "ordered"):
        assert RolloutConfig(dispatch=dispatch).streaming
        assert RolloutConfig(dispatch=dispatch).ordered == (dispatch == "ordered")
