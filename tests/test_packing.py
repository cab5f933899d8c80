"""Packs, budgets and mini-batches against layouts worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from tercet.core.config import LossConfig
from tercet.core.costs import PromptLoad
from tercet.core.packing import (
    Piece,
    by_response,
    micro_batch,
    mini_batches,
    pack,
    packed_tokens,
    plain_batch,
    prompt_loads,
    prompts_of,
    rows,
    weigh_rows,
)
from tercet.core.types import EncodedImage, EncodedPrompt, Group, PackedBatch, Response, Triplet

pytestmark = pytest.mark.core

PROMPT_LENGTHS = {"x": 5, "p": 8, "n": 3}  # by the first letter of the image key


def encoded(length: int, first: int, following: int, images=()) -> EncodedPrompt:
    """A prompt of ids first, first + 1, ... whose positions on the three axes differ."""
    ids = torch.arange(first, first + length)
    positions = torch.stack([torch.arange(length) * axis for axis in (1, 2, 3)])
    return EncodedPrompt(ids, positions, following, tuple(images))


def encode(prompt_ids: tuple[int, ...], images: tuple[str, ...]) -> EncodedPrompt:
    """Stands for PromptEncoder: length, ids and pixels tell which image it was given."""
    (key,) = images
    length, number = PROMPT_LENGTHS[key[0]], int(key[1:] or 0)
    mark = 1000 * (1 + "xpn".index(key[0])) + 20 * number
    pixels = torch.full((4, 2), float(mark))
    photo = EncodedImage(lambda: pixels, torch.tensor([[1, 2, 2 + 2 * number]]))
    return encoded(length, mark, following=length + 10, images=[photo])


def make_group(lengths: list[int], positives: int = 0, number: int = 0) -> Group:
    """Responses of distinct tokens, the last `positives` of them sampled on the positive."""
    responses, token = [], 10_000 * (number + 1)
    for index, length in enumerate(lengths):
        role = "anchor" if index < len(lengths) - positives else "positive"
        ids = tuple(range(token, token + length))
        responses.append(Response(role, ids, (0.0,) * length, "stop", 0))
        token += length
    keys = (f"x{number}", f"p{number}", f"n{number}")
    triplet = Triplet(f"t{number}", *keys, "What bird is this?", "bird", "least auklet")
    return Group(f"g{number}", triplet, (1, 2, 3), responses)


def whole(group: Group) -> Piece:
    return Piece(group, tuple(range(len(group.responses))))


def attention_mask(packed: PackedBatch) -> Tensor:
    """[T, T] bool: what the two attention passes that Segments describes let each token see."""
    segments, length = packed.segments, packed.num_tokens
    mask = torch.zeros(length, length, dtype=torch.bool)
    bounds = segments.cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    q, k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    for number in range(len(q) - 1):
        queries = segments.response_index[q[number] : q[number + 1]]
        keys = segments.prompt_index[k[number] : k[number + 1]]
        mask[queries[:, None], keys] = True
    return mask


# pack


def test_example_of_segments():
    """The example in the docstring of core.types.Segments, in full."""
    prompts = [
        (encoded(3, 100, following=3), [(11, 12, 13), (21, 22)]),
        (encoded(2, 200, following=7), [(31, 32, 33, 34, 35)]),
    ]
    packed = pack(prompts)
    assert packed.input_ids.tolist() == [100, 101, 102, 11, 12, 21, 200, 201, 31, 32, 33, 34]
    assert packed.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 3, 0, 1, 7, 8, 9, 10],
        [0, 2, 4, 3, 4, 3, 0, 2, 7, 8, 9, 10],
        [0, 3, 6, 3, 4, 3, 0, 3, 7, 8, 9, 10],
    ]
    segments = packed.segments
    assert segments.cu_seqlens.tolist() == [0, 3, 5, 6, 8, 12]
    assert segments.response_index.tolist() == [3, 4, 5, 8, 9, 10, 11]
    assert segments.prompt_index.tolist() == [0, 1, 2, 6, 7]
    assert segments.cu_seqlens_q.tolist() == [0, 3, 7]
    assert segments.cu_seqlens_k.tolist() == [0, 3, 5]
    assert (segments.max_seqlen, segments.max_seqlen_q, segments.max_seqlen_k) == (4, 4, 3)
    for name in ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"):
        assert getattr(segments, name).dtype == torch.int32
    assert packed.hidden_index.tolist() == [2, 3, 4, 2, 5, 7, 8, 9, 10, 11]
    assert packed.pixel_values is None and packed.image_grid_thw is None
    assert packed.num_tokens == 12


def test_empty_and_one_token_responses():
    responses = [(), (11,), (), (21, 22), (31,)]
    packed = pack([(encoded(3, 100, following=3), responses), (encoded(2, 200, following=2), [()])])
    assert packed.input_ids.tolist() == [100, 101, 102, 21, 200, 201]
    assert packed.segments.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert packed.segments.cu_seqlens_q.tolist() == [0, 1, 1]
    assert packed.segments.cu_seqlens_k.tolist() == [0, 3, 5]
    assert packed.hidden_index.tolist() == [2, 2, 3, 2]  # 11 | 21, 22 | 31


@pytest.mark.parametrize("responses", [[], [()], [(), ()], [(11,)], [(11,), (), (12,)]])
def test_pack_of_a_prompt_alone(responses):
    packed = pack([(encoded(4, 100, following=4), responses)])
    assert packed.input_ids.tolist() == [100, 101, 102, 103]
    assert packed.segments.cu_seqlens.tolist() == [0, 4]
    assert packed.segments.response_index.tolist() == []
    assert packed.segments.response_index.dtype == packed.hidden_index.dtype == torch.int64
    assert packed.segments.cu_seqlens_q.tolist() == [0, 0] and packed.segments.max_seqlen_q == 0
    assert packed.hidden_index.tolist() == [3] * sum(map(len, responses))


@pytest.mark.parametrize("seed", range(5))
def test_every_row_sees_its_prompt_and_its_own_response_only(seed):
    """Follow each row's attention back: it must read prompt, then the response up to the label."""
    generator = random.Random(seed)
    prompts, token = [], 10_000
    for number in range(4):
        tokens = []
        for _ in range(generator.randrange(5)):
            length = generator.choice([0, 1, 2, 7])
            tokens.append(tuple(range(token, token + length)))
            token += length
        length = generator.choice([1, 2, 6])
        prompts.append((encoded(length, 100 * (number + 1), following=50), tokens))
    packed = pack(prompts)
    mask = attention_mask(packed)
    visible = [packed.input_ids[mask[i]].tolist() for i in packed.hidden_index.tolist()]
    positions = [packed.position_ids[:, mask[i]].tolist() for i in packed.hidden_index.tolist()]
    expected, expected_positions = [], []
    for prompt, responses in prompts:
        for tokens in responses:
            for row in range(len(tokens)):
                expected.append(prompt.input_ids.tolist() + list(tokens[:row]))
                after = list(range(50, 50 + row))
                expected_positions.append([axis + after for axis in prompt.position_ids.tolist()])
    assert visible == expected and positions == expected_positions and len(visible) > 5
    tokens = sum(len(p) + sum(max(0, len(r) - 1) for r in responses) for p, responses in prompts)
    assert packed.num_tokens == tokens


def test_images_stand_in_the_order_of_prompts_once_each():
    group, other = make_group([3, 2, 2], positives=1, number=1), make_group([1], number=2)
    packed = pack(prompts_of([whole(group), whole(other)], "own", encode))
    assert packed.pixel_values[:, 0].tolist() == [1020.0] * 4 + [2020.0] * 4 + [1040.0] * 4
    assert packed.image_grid_thw.tolist() == [[1, 2, 4], [1, 2, 4], [1, 2, 6]]


# branches


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        ("anchor", [("x", [0, 1, 2, 3])]),
        ("own", [("x", [0, 1]), ("p", [2, 3])]),
        ("negative", [("n", [0, 1, 2, 3])]),
    ],
)
def test_branch_prompts(branch, expected):
    group = make_group([3, 0, 1, 4], positives=2)
    tokens = [r.token_ids for r in group.responses]
    prompts = whole(group).prompts(branch, encode)
    assert [(len(p), hung) for p, hung in prompts] == [
        (PROMPT_LENGTHS[letter], [tokens[i] for i in chosen]) for letter, chosen in expected
    ]


@pytest.mark.parametrize(("chosen", "letters"), [((0, 1), "x"), ((2,), "p"), ((1, 3), "xp")])
def test_own_branch_leaves_out_an_image_without_responses(chosen, letters):
    piece = Piece(make_group([3, 2, 1, 4], positives=2), chosen)
    prompts = piece.prompts("own", encode)
    assert [len(p) for p, _ in prompts] == [PROMPT_LENGTHS[letter] for letter in letters]
    assert [t for _, hung in prompts for t in hung] == [r.token_ids for r in piece.chosen()]


def test_what_is_counted_of_a_branch():
    """A group's own branch: each photo once, of the size that the encoder gives it."""
    piece = whole(make_group([3, 0, 1, 4], positives=2, number=1))
    anchor, positive = prompt_loads(piece.prompts("own", encode))
    assert anchor == PromptLoad(PROMPT_LENGTHS["x"], [(1, 2, 4)], [3, 0])
    assert positive == PromptLoad(PROMPT_LENGTHS["p"], [(1, 2, 4)], [1, 4])


def test_unknown_branch_is_named():
    with pytest.raises(ValueError, match="got 'Anchor'"):
        whole(make_group([1])).prompts("Anchor", encode)


def test_rows_stand_in_one_order_in_all_branches():
    """A row's hidden state follows the token before its label, in every branch."""
    pieces = [
        whole(make_group([4, 0, 2, 1, 3], positives=2)),
        whole(make_group([2, 5], 1, number=1)),
    ]
    responses = [r for piece in pieces for r in piece.chosen()]
    labels = [token for r in responses for token in r.token_ids]
    assert labels == [*range(10_000, 10_010), *range(20_000, 20_007)]
    lasts = {"anchor": [1004, 1004, 1024, 1024], "own": [1004, 2007, 1024, 2027]}
    lasts["negative"] = [3002, 3002, 3022, 3022]
    for branch, last in lasts.items():
        packed = pack(prompts_of(pieces, branch, encode))
        before = packed.input_ids[packed.hidden_index].tolist()
        starts = {10_000: 0, 10_004: 0, 10_006: 1, 10_007: 1, 20_000: 2, 20_002: 3}
        expected = [last[starts[t]] if t in starts else t - 1 for t in labels]
        assert before == expected


# mini_batches


def places(batches: list[list[Piece]]) -> list[list[tuple[str, int]]]:
    return [[(p.group.id, i) for p in batch for i in p.responses] for batch in batches]


def test_mini_batches_of_groups():
    groups = [make_group([1, 2], number=n) for n in range(5)]
    batches = places(mini_batches(groups, 2, "group"))
    pairs = [[(f"g{n}", 0), (f"g{n}", 1)] for n in range(5)]
    assert batches == [pairs[0] + pairs[1], pairs[2] + pairs[3], pairs[4]]
    assert places(mini_batches(groups, 9, "group")) == [sum(pairs, [])]


def test_mini_batches_of_responses_worked_by_hand():
    """9 to the first, 8 and 7 to the second, 6 and 5 to the first (full now), 4: 20 and 19."""
    groups = [make_group([6, 9, 4]), make_group([8, 5, 7], number=1)]
    first, second = mini_batches(groups, 1, "response")
    assert [(p.group.id, p.responses) for p in first] == [("g0", (0, 1)), ("g1", (1,))]
    assert [(p.group.id, p.responses) for p in second] == [("g0", (2,)), ("g1", (0, 2))]


@pytest.mark.parametrize(("number", "of", "size"), [(12, 10, 4), (9, 6, 2), (7, 5, 3), (3, 2, 8)])
def test_mini_batches_of_responses_are_balanced(number, of, size):
    generator = random.Random(number)
    lengths = [
        [round(20 * generator.lognormvariate(1, 1)) for _ in range(of)] for _ in range(number)
    ]
    groups = [make_group(each, positives=of // 2, number=n) for n, each in enumerate(lengths)]
    batches = mini_batches(groups, size, "response")
    assert len(batches) == len(mini_batches(groups, size, "group"))
    everything = [(f"g{n}", i) for n in range(number) for i in range(of)]
    assert sorted(sum(places(batches), []), key=everything.index) == everything
    counts = [len(batch) for batch in places(batches)]
    assert max(counts) - min(counts) <= 1
    tokens = [sum(len(r.token_ids) for p in batch for r in p.chosen()) for batch in batches]
    assert sum(tokens) == sum(map(sum, lengths))
    assert max(tokens) <= 1.02 * sum(tokens) / len(tokens)
    for batch in batches:  # a group's responses together, the anchor's before the positive's
        assert len({p.group.id for p in batch}) == len(batch)
        for piece in batch:
            assert list(piece.responses) == sorted(piece.responses)
            roles = [r.role for r in piece.chosen()]
            assert roles == sorted(roles)


@pytest.mark.parametrize("length", [0, 1])
def test_no_mini_batch_is_left_without_responses(length):
    groups = [make_group([length], number=n) for n in range(4)] + [make_group([], number=4)]
    batches = places(mini_batches(groups, 2, "response"))
    assert sorted(map(len, batches)) == [1, 1, 2]


@pytest.mark.parametrize("by", ["group", "response"])
def test_no_groups_give_no_mini_batches(by):
    assert mini_batches([], 4, by) == []


# rows and micro-batches


def scored_group(number: int = 0) -> Group:
    group = make_group([3, 0, 1, 2], positives=2, number=number)
    for index, response in enumerate(group.responses):
        response.advantage = 10.0 * number + index
        start, length = 100.0 * number + 10 * index, len(response.token_ids)
        response.old_logprobs = -start - torch.arange(length)
        response.neg_logprobs = -0.5 - start - torch.arange(length)
    return group


def test_rows_repeat_numbers_and_lay_out_tensors():
    responses = scored_group().responses
    assert rows(responses, lambda r: r.advantage).tolist() == [0, 0, 0, 2, 3, 3]
    assert rows(responses, lambda r: r.old_logprobs).tolist() == [0, -1, -2, -20, -30, -31]
    empty = rows(responses[1:2], lambda r: r.advantage)
    assert empty.shape == rows([], lambda r: r.advantage).shape == (0,)
    assert empty.dtype == rows([], lambda r: r.advantage).dtype == torch.float32


@pytest.mark.parametrize("update_on", ["anchor", "own"])
def test_micro_batch_rows(update_on):
    first, second = scored_group(), scored_group(1)
    pieces = [Piece(first, (0, 2, 3)), Piece(second, (1, 3))]
    for n, response in enumerate([*first.responses, *second.responses]):
        response.row_weight = 0.25 * n
    batch = micro_batch(pieces, encode, LossConfig(update_on=update_on), 6.5)
    assert batch.labels.tolist() == [10_000, 10_001, 10_002, 10_003, 10_004, 10_005, 20_004, 20_005]
    assert batch.advantages.tolist() == [0, 0, 0, 2, 3, 3, 13, 13]
    assert batch.loss_mask.tolist() == [0, 0, 0, 0.5, 0.75, 0.75, 1.75, 1.75]
    assert batch.old_logprobs.tolist() == [0, -1, -2, -20, -30, -31, -130, -131]
    assert batch.neg_logprobs.tolist() == [-0.5 + old for old in batch.old_logprobs.tolist()]
    assert batch.num_loss_tokens == 6.5
    for name in ("advantages", "loss_mask", "old_logprobs", "neg_logprobs"):
        assert getattr(batch, name).dtype == torch.float32
    prompts = {"anchor": [1000, 1020], "own": [1000, 2000, 1020, 2020]}[update_on]
    # the empty response of the second group still carries its prompt
    assert batch.update.pixel_values[::4, 0].tolist() == prompts
    assert batch.negative.pixel_values[::4, 0].tolist() == [3000, 3020]
    assert batch.update.hidden_index.numel() == batch.negative.hidden_index.numel() == 8


@pytest.mark.parametrize("update_on", ["anchor", "own"])
def test_importance_weights_of_micro_batch_rows(update_on):
    """Capped; responses sampled on the positive have none where the anchor is scored."""
    group = make_group([2, 1], positives=1)
    for n, each in enumerate(group.responses):
        each.rollout_logprobs = (-1.0,) * len(each.token_ids)
        each.old_logprobs = torch.full((len(each.token_ids),), -1.0 + math.log(4 - n))
    loss = LossConfig(update_on=update_on, is_cap=3.5)
    batch = micro_batch([whole(group)], encode, loss, 3.0)
    positive = 3.0 if update_on == "own" else 1.0
    torch.testing.assert_close(batch.is_weights, torch.tensor([3.5, 3.5, positive]))


def test_only_carried_groups_are_weighed_by_default():
    """Those that older weights sampled: capped at 2; responses of this step's weights have 1."""
    old, new = make_group([2, 1], positives=1), make_group([2, 1], positives=1)
    for version, group in ((3, old), (4, new)):
        for each in group.responses:
            each.weight_version = version
            each.rollout_logprobs = (-1.0,) * len(each.token_ids)
            each.old_logprobs = torch.tensor([0.5, -1.25][: len(each.token_ids)])
    pieces, loss = [whole(old), whole(new)], LossConfig(update_on="own")
    batch = micro_batch(pieces, encode, loss, 6.0, version=4)
    expected = [2.0, math.exp(-0.25), 2.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(batch.is_weights, torch.tensor(expected))
    anchor = micro_batch(pieces, encode, LossConfig(), 6.0, version=4)
    torch.testing.assert_close(anchor.is_weights, torch.tensor([*expected[:2], 1, 1, 1, 1]))
    assert micro_batch(pieces, encode, loss, 6.0, version=3).is_weights is None
    for off in ({"carried_cap": None}, {"ratio_of": "sequence", "mean_over": "response"}):
        loss = LossConfig(update_on="own", **off)
        assert micro_batch(pieces, encode, loss, 6.0, version=4).is_weights is None
    everything = micro_batch(
        pieces, encode, LossConfig(update_on="own", is_cap=9.0), 6.0, version=4
    )
    each = [math.exp(1.5), math.exp(-0.25), math.exp(1.5)]
    torch.testing.assert_close(everything.is_weights, torch.tensor(each * 2))


def test_micro_batch_without_scores_or_negative():
    group, loss = make_group([2, 3]), LossConfig(kl_coef=0, neg_entropy_coef=0)
    batch = micro_batch([whole(group)], encode, loss, 5.0)
    assert batch.negative is batch.old_logprobs is batch.neg_logprobs is None
    assert batch.is_weights is None
    group.responses[0].old_logprobs = torch.zeros(2)
    with pytest.raises(AssertionError, match="old_logprobs of some responses, not of all"):
        micro_batch([whole(group)], encode, loss, 5.0)


def test_micro_batch_of_empty_responses():
    group = make_group([0, 0], positives=1)
    batch = micro_batch([whole(group)], encode, LossConfig(update_on="own"), 1.0)
    assert (
        batch.labels.numel() == batch.advantages.numel() == batch.update.hidden_index.numel() == 0
    )
    assert (batch.update.num_tokens, batch.negative.num_tokens) == (5 + 8, 3)


@pytest.mark.parametrize(
    ("mean_over", "cut_off", "weights", "total"),
    [
        ("batch", "keep", [1, 0, 1, 1], 6),
        ("batch", "mask", [1, 0, 0, 1], 5),
        ("response", "keep", [1 / 3, 0, 1, 1 / 2], 3),
        ("group", "mask", [1 / 3, 0, 0, 1 / 2], 2),
    ],
)
def test_row_weights_are_a_field_of_the_response(mean_over, cut_off, weights, total):
    """By hand: responses of 3, 0, 1 (cut off) and 2 tokens, the last one of another group."""
    first, second = make_group([3, 0, 1]), make_group([2], number=1)
    first.responses[2].finish_reason = "length"
    pieces = [whole(first), whole(second)]
    assert weigh_rows(pieces, LossConfig(mean_over=mean_over), cut_off) == pytest.approx(total)
    found = [r.row_weight for r in (*first.responses, *second.responses)]
    assert found == pytest.approx(weights)


def test_rows_go_back_to_their_responses():
    first, second = scored_group(), scored_group(1)
    pieces = [Piece(first, (0, 2)), Piece(second, (1, 3))]  # 3, 1, 0 and 2 tokens
    first.responses[0].row_weight = 1.0
    found = by_response(pieces, torch.arange(6.0))
    assert {place: part.tolist() for place, part in found.items()} == {
        ("g0", 0): [0, 1, 2],
        ("g0", 2): [3],
        ("g1", 1): [],
        ("g1", 3): [4, 5],
    }
    weighted = by_response(pieces, torch.arange(6.0), weighted=True)
    assert {place: part.tolist() for place, part in weighted.items()} == {("g0", 0): [0, 1, 2]}
    assert by_response([], torch.arange(2.0)) == {}


def test_plain_batch_has_every_row_once():
    group = make_group([2, 0, 3], positives=1)
    batch = plain_batch(whole(group).prompts("own", encode), 7.0)
    assert batch.labels.tolist() == [10_000, 10_001, 10_002, 10_003, 10_004]
    assert batch.loss_mask.tolist() == [1.0] * 5 and batch.advantages.tolist() == [0.0] * 5
    assert batch.num_loss_tokens == 7.0 and batch.negative is None
    assert batch.update.num_tokens == packed_tokens(whole(group).prompts("own", encode))
    assert batch.update.num_tokens == 5 + 1 + 8 + 2
