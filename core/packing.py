"""Groups to PackedBatches: shared prefixes, a token budget, rows in one order for both branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from tercet.core.costs import PromptLoad
from tercet.core.mismatch import importance_weights
from tercet.core.types import EncodedPrompt, Group, MicroBatch, PackedBatch, Response, Segments

Encode = Callable[[tuple[int, ...], tuple[str, ...]], EncodedPrompt]
Prompts = Sequence[tuple[EncodedPrompt, Sequence[tuple[int, ...]]]]
"""Prompts, and the responses that hang on each."""


def pack(prompts: Prompts) -> PackedBatch:
    """Lay prompts out with their responses behind them, every image and prompt once.

    Args:
        prompts: (prompt, its responses' token ids) in order; a response may be empty.

    Returns:
        A pack whose rows stand in the order of prompts, responses, tokens.
    """
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    bounds, bounds_q, bounds_k = [0], [0], [0]
    response_index: list[Tensor] = []
    prompt_index: list[Tensor] = []
    hidden_index: list[Tensor] = []
    for prompt, responses in prompts:
        start = bounds[-1]
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        bounds.append(start + len(prompt))
        prompt_index.append(torch.arange(start, bounds[-1]))
        last = bounds[-1] - 1
        for tokens in responses:
            if not tokens:
                continue
            fed = len(tokens) - 1  # the last token predicts nothing
            begin = bounds[-1]
            span = torch.arange(begin, begin + fed)
            hidden_index.append(torch.cat([torch.tensor([last]), span]))
            if fed:
                ids.append(torch.tensor(tokens[:-1], dtype=torch.int64))
                positions.append((prompt.next_position + torch.arange(fed)).expand(3, -1))
                response_index.append(span)
                bounds.append(begin + fed)
        bounds_q.append(bounds_q[-1] + bounds[-1] - last - 1)
        bounds_k.append(bounds_k[-1] + len(prompt))
    images = [image for prompt, _ in prompts for image in prompt.images]
    return PackedBatch(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions, dim=1),
        pixel_values=torch.cat([i.pixel_values for i in images]) if images else None,
        image_grid_thw=torch.cat([i.grid_thw for i in images]) if images else None,
        segments=Segments(
            cu_seqlens=_int32(bounds),
            max_seqlen=_longest(bounds),
            response_index=_cat(response_index),
            cu_seqlens_q=_int32(bounds_q),
            max_seqlen_q=_longest(bounds_q),
            prompt_index=_cat(prompt_index),
            cu_seqlens_k=_int32(bounds_k),
            max_seqlen_k=_longest(bounds_k),
        ),
        hidden_index=_cat(hidden_index),
    )


def _int32(bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def _longest(bounds: list[int]) -> int:
    return max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Piece:
    """Some responses of one group, scored together: the unit that mini-batches are made of."""

    group: Group
    responses: tuple[int, ...]
    """Indices into group.responses, ascending, so that the anchor's come first."""

    def chosen(self) -> list[Response]:
        return [self.group.responses[i] for i in self.responses]


def branch_prompts(piece: Piece, branch: str, encode: Encode) -> Prompts:
    """The prompts of a piece in one branch, with the responses that hang on each.

    Args:
        piece: responses of a group.
        branch: `anchor` (all on x), `own` (x's on x, x_pos's on x_pos) or `negative` (all on
            x_neg).
        encode: prompt ids and image keys to an EncodedPrompt.

    Raises:
        ValueError: another branch.
    """
    triplet, responses = piece.group.triplet, piece.chosen()
    if branch == "own":
        images = {"anchor": triplet.anchor, "positive": triplet.positive}
        hung = {role: [r.token_ids for r in responses if r.role == role] for role in images}
        return [
            (encode(piece.group.prompt_ids, (images[role],)), tokens)
            for role, tokens in hung.items()
            if tokens
        ]
    image = {"anchor": triplet.anchor, "negative": triplet.negative}.get(branch)
    if image is None:
        raise ValueError(f"branch must be anchor, own or negative, got {branch!r}")
    return [(encode(piece.group.prompt_ids, (image,)), [r.token_ids for r in responses])]


def pack_branch(pieces: Sequence[Piece], branch: str, encode: Encode) -> PackedBatch:
    """One branch of several pieces as a pack; see branch_prompts."""
    return pack([prompt for piece in pieces for prompt in branch_prompts(piece, branch, encode)])


def _tokens(prompts: Prompts) -> int:
    return sum(len(p) + sum(max(0, len(t) - 1) for t in tokens) for p, tokens in prompts)


def prompt_loads(prompts: Prompts) -> list[PromptLoad]:
    """Prompts and their responses as core.costs counts them."""
    return [
        PromptLoad(
            len(prompt),
            [tuple(image.grid_thw[0].tolist()) for image in prompt.images],
            [len(tokens) for tokens in responses],
        )
        for prompt, responses in prompts
    ]


def split_by_budget(
    pieces: Sequence[Piece], branches: Sequence[str], encode: Encode, budget: int
) -> Iterator[list[Piece]]:
    """Cut pieces into micro-batches of at most `budget` packed tokens in every branch.

    A piece that is too long by itself is halved by responses, its prompt repeated.

    Raises:
        ValueError: naming the group, when one response and its prompt exceed the budget.
    """
    batch: list[Piece] = []
    used = dict.fromkeys(branches, 0)
    queue = list(pieces)[::-1]
    while queue:
        piece = queue.pop()
        cost = {b: _tokens(branch_prompts(piece, b, encode)) for b in branches}
        if max(cost.values()) > budget:
            half = len(piece.responses) // 2
            if not half:
                raise ValueError(
                    f"group {piece.group.id!r}: one response and its prompt take "
                    f"{max(cost.values())} tokens; parallel.micro_batch_tokens is {budget}"
                )
            queue.append(Piece(piece.group, piece.responses[half:]))
            queue.append(Piece(piece.group, piece.responses[:half]))
            continue
        if batch and any(used[b] + cost[b] > budget for b in branches):
            yield batch
            batch, used = [], dict.fromkeys(branches, 0)
        batch.append(piece)
        used = {b: used[b] + cost[b] for b in branches}
    if batch:
        yield batch


def rows(responses: Sequence[Response], value: Callable[[Response], object]) -> Tensor:
    """A response's number or [length] tensor as [R] float32 rows, responses in order."""
    parts = [
        torch.as_tensor(value(r), dtype=torch.float32).expand(len(r.token_ids)) for r in responses
    ]
    return torch.cat(parts) if parts else torch.empty(0)


def labels_of(responses: Sequence[Response]) -> Tensor:
    """[R] int64: the responses' tokens, in order."""
    return torch.tensor([t for r in responses for t in r.token_ids], dtype=torch.int64)


def micro_batch(
    pieces: Sequence[Piece],
    encode: Encode,
    weights: dict[int, float],
    *,
    update_on: str,
    negative: bool,
    num_loss_tokens: float,
    is_cap: float | None = None,
) -> MicroBatch:
    """Pack pieces for one forward and backward pass.

    Args:
        pieces: what the micro-batch holds.
        encode: prompt ids and image keys to an EncodedPrompt.
        weights: loss weight of a token of each response, by id(response) (see
            core.advantages.row_weights).
        update_on: `anchor` or `own`.
        negative: whether the negative branch is computed.
        num_loss_tokens: sum of the weights of all rows of the mini-batch, over all ranks.
        is_cap: bound of the importance weights against the sampler; None: no such weights. Under
            `anchor` they are 1 for responses sampled on the positive: another image is scored.

    Returns:
        A MicroBatch on the CPU; old_logprobs and neg_logprobs are None where no response has them.
    """
    responses = [r for piece in pieces for r in piece.chosen()]

    def scored(name: str) -> Tensor | None:
        unscored = [getattr(r, name) is None for r in responses]
        assert all(unscored) or not any(unscored), f"{name} of some responses, not of all"
        return None if any(unscored) else rows(responses, lambda r: getattr(r, name))

    def importance(response: Response) -> Tensor | float:
        if update_on == "anchor" and response.role == "positive":
            return 1.0
        return importance_weights(response, is_cap)

    return MicroBatch(
        update=pack_branch(pieces, update_on, encode),
        negative=pack_branch(pieces, "negative", encode) if negative else None,
        labels=labels_of(responses),
        advantages=rows(responses, lambda r: r.advantage),
        loss_mask=rows(responses, lambda r: weights[id(r)]),
        num_loss_tokens=num_loss_tokens,
        old_logprobs=scored("old_logprobs"),
        neg_logprobs=scored("neg_logprobs"),
        is_weights=None if is_cap is None else rows(responses, importance),
    )


def mini_batches(groups: Sequence[Group], size: int, by: str) -> list[list[Piece]]:
    """Cut a step's groups into the responses of each optimiser step.

    Args:
        groups: the step's groups.
        size: groups of a mini-batch (the last may be smaller).
        by: `group`: whole groups in order; `response`: as many mini-batches, the responses dealt
            out longest first, each to the one with the fewest tokens so far, cutting through
            groups; their counts differ by at most one.
    """
    if by == "group":
        pieces = [Piece(group, tuple(range(len(group.responses)))) for group in groups]
        return [pieces[i : i + size] for i in range(0, len(pieces), size)]
    count = -(-len(groups) // size)
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.responses))]
    places.sort(key=lambda p: -len(groups[p[0]].responses[p[1]].token_ids))
    room = [len(places) // count + (b < len(places) % count) for b in range(count)]
    dealt: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    tokens = [0] * count
    for g, i in places:
        open_ones = [b for b in range(count) if len(dealt[b]) < room[b]]
        lightest = min(open_ones, key=lambda b: tokens[b])
        dealt[lightest].append((g, i))
        tokens[lightest] += len(groups[g].responses[i].token_ids)
    return [
        [
            Piece(groups[g], tuple(i for _, i in members))
            for g, members in groupby(sorted(batch), key=lambda place: place[0])
        ]
        for batch in dealt
    ]
