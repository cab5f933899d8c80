"""Micro-batches: the token budget to the token, fillers, and attempts after memory ran out."""

from __future__ import annotations

import random

import pytest
import torch
from test_packing import encode, make_group, whole

from tercet.core.config import LossConfig, ParallelConfig, TapoConfig, TapoRunConfig
from tercet.core.costs import Shape
from tercet.core.packing import Piece, micro_batch, pack, prompts_of
from tercet.train.learner.micro_batches import TokenBudget, micro_batches, split
from tercet.train.learner.ranks import Ranks

pytestmark = pytest.mark.core

SHAPE = Shape(2, 8, 24, 4, 2, 2, False, 100, 1, 4, 2, 12, 3, 4, 0, 1, 0, 2, 6)


def budget_of(tmp_path, tokens: int, least: int = 8, say=lambda line: None) -> TokenBudget:
    config = TapoConfig(run=TapoRunConfig(out=str(tmp_path)))
    config.parallel.micro_batch_tokens = tokens
    return TokenBudget(config, Ranks(torch.device("cpu"), ParallelConfig()), least, say, False)


class OneOfTwo(Ranks):
    """A rank with half of the items, beside another that has three micro-batches."""

    def __init__(self):
        super().__init__(torch.device("cpu"), ParallelConfig())

    def dealt(self, items, cost):
        self.costs = [cost(item) for item in items]
        return items[: len(items) // 2]

    def most(self, number: int) -> int:
        return 3


def test_micro_batches_of_a_rank_and_a_filler(tmp_path):
    groups = [make_group([3, 4], number=n) for n in range(4)]
    pieces = [whole(group) for group in groups]
    for group in groups:
        for response in group.responses:
            response.row_weight = 1.0
    ranks, loss = OneOfTwo(), LossConfig()
    found = list(
        micro_batches(
            pieces,
            ["anchor", "negative"],
            lambda some: micro_batch(some, encode, loss, 14.0),
            encode=encode,
            shape=SHAPE,
            ranks=ranks,
            budget=budget_of(tmp_path, 10),
        )
    )
    assert [[p.group.id for p in some] for some, _ in found] == [["g0"], ["g1"], []]
    assert [batch.loss_mask.tolist() for _, batch in found] == [[1.0] * 7, [1.0] * 7, [0.0] * 3]
    assert len(ranks.costs) == 4 and ranks.costs == sorted(ranks.costs)  # by their photos' sizes


def test_work_begins_again_with_half_the_budget(tmp_path):
    said, undone, tried = [], [], []
    budget = budget_of(tmp_path, 64, say=said.append)
    for attempt in budget.attempts(lambda: undone.append(True)):
        with attempt:
            tried.append(budget.tokens)
            if budget.tokens > 16:
                raise torch.OutOfMemoryError("no room")
    assert tried == [64, 32, 16] and undone == [True, True] and budget.tokens == 16
    assert said[0] == "out of memory with parallel.micro_batch_tokens = 64: going on with 32"
    assert (tmp_path / "micro_batch_tokens").read_text() == "16"
    for attempt in budget.attempts(lambda: undone.append(True)):
        with attempt:
            tried.append(budget.tokens)
    assert tried == [64, 32, 16, 16] and len(undone) == 2


def test_other_errors_and_too_small_a_budget_end_the_work(tmp_path):
    budget = budget_of(tmp_path, 64, least=40)
    with pytest.raises(KeyError):
        for attempt in budget.attempts(lambda: None):
            with attempt:
                raise KeyError("another")
    with pytest.raises(ValueError, match="half of it does not hold one sequence of 40 tokens"):
        for attempt in budget.attempts(lambda: None):
            with attempt:
                raise torch.OutOfMemoryError("no room")


def tokens_in(pieces: list[Piece], branch: str) -> int:
    return pack(prompts_of(pieces, branch, encode)).num_tokens


@pytest.mark.parametrize("branches", [["anchor", "negative"], ["own", "negative"], ["negative"]])
@pytest.mark.parametrize("budget", [26, 40, 75, 1000])
def test_split_keeps_budget_and_responses(branches, budget):
    generator = random.Random(budget)
    lengths = [[generator.choice([0, 1, 2, 9, 18]) for _ in range(6)] for _ in range(9)]
    pieces = [whole(make_group(of, positives=3, number=n)) for n, of in enumerate(lengths)]
    batches = list(split(pieces, branches, encode, budget))
    placed = [(p.group.id, i) for batch in batches for p in batch for i in p.responses]
    assert placed == [(p.group.id, i) for p in pieces for i in p.responses]
    assert (len(batches) == 1) == (budget == 1000)
    for batch in batches:
        assert all(tokens_in(batch, branch) <= budget for branch in branches)
    for batch, after in zip(batches[:-1], batches[1:], strict=True):  # no cut without need
        assert any(tokens_in([*batch, after[0]], branch) > budget for branch in branches)


def test_split_counts_to_the_token():
    pieces = [whole(make_group([4, 3], number=n)) for n in range(2)]  # 5 + 3 + 2 tokens each
    ids = [[p.group.id for p in b] for b in split(pieces, ["anchor"], encode, 20)]
    assert ids == [["g0", "g1"]]
    ids = [[p.group.id for p in b] for b in split(pieces, ["anchor"], encode, 19)]
    assert ids == [["g0"], ["g1"]]


def test_split_halves_a_long_piece():
    group = make_group([11, 11, 11, 11, 1])  # 5 + 40 tokens on the anchor
    chosen = [
        [piece.responses for piece in batch]
        for batch in split([whole(group)], ["anchor"], encode, 30)
    ]
    assert chosen == [[(0, 1)], [(2, 3, 4)]]  # 25 and 25
    chosen = [
        [piece.responses for piece in batch]
        for batch in split([whole(group)], ["anchor"], encode, 20)
    ]
    assert chosen == [[(0,)], [(1,)], [(2,)], [(3, 4)]]  # 15 each


def test_halves_share_a_micro_batch_with_their_neighbours():
    pieces = [whole(make_group([21, 1])), whole(make_group([3], number=1))]  # 25 and 7 tokens
    chosen = [
        [(piece.group.id, piece.responses) for piece in batch]
        for batch in split(pieces, ["own", "negative"], encode, 25)
    ]
    assert chosen == [[("g0", (0, 1))], [("g1", (0,))]]
    pieces = [whole(make_group([21, 2])), whole(make_group([3], number=1))]  # 26: one too many
    chosen = [
        [(piece.group.id, piece.responses) for piece in batch]
        for batch in split(pieces, ["own", "negative"], encode, 25)
    ]
    assert chosen == [[("g0", (0,))], [("g0", (1,)), ("g1", (0,))]]


def test_response_over_the_budget_names_its_group():
    fits, long = make_group([3], number=1), make_group([2, 30, 2], positives=2, number=7)
    found = split([whole(fits), whole(long)], ["own", "negative"], encode, 36)
    with pytest.raises(ValueError, match="'g7'.* take 37 tokens; .*micro_batch_tokens is 36"):
        list(found)
    batches = split([whole(long)], ["own", "negative"], encode, 37)
    assert [[p.responses for p in batch] for batch in batches] == [[(0,)], [(1,)], [(2,)]]


def test_nothing_to_split():
    assert list(split([], ["anchor"], encode, 10)) == []
