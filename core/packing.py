"""Groups to mini-batches, pieces and packs: shared prefixes, rows in one order for both photos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from tercet.core.advantages import row_weights
from tercet.core.config import LossConfig
from tercet.core.costs import PromptLoad
from tercet.core.mismatch import cap_of, importance_weights
from tercet.core.types import EncodedPrompt, Group, MicroBatch, PackedBatch, Response, Segments

Encode = Callable[[tuple[int, ...], tuple[str, ...]], EncodedPrompt]
Prompts = Sequence[tuple[EncodedPrompt, Sequence[tuple[int, ...]]]]
"""Prompts, each with the token ids of its responses."""


def pack(prompts: Prompts) -> PackedBatch:
    """Lay prompts out with their responses behind them, every image and prompt once.

    Args:
        prompts: (prompt, its responses' token ids) in order; a response may be empty.

    Returns:
        A pack whose rows stand in the order of prompts, responses, tokens.
    """
    ids, positions, bounds, bounds_q, bounds_k = [], [], [0], [0], [0]
    response_index, prompt_index, hidden_index = [], [], []
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
    segments = Segments(
        cu_seqlens=_int32(bounds),
        max_seqlen=_longest(bounds),
        response_index=_cat(response_index),
        cu_seqlens_q=_int32(bounds_q),
        max_seqlen_q=_longest(bounds_q),
        prompt_index=_cat(prompt_index),
        cu_seqlens_k=_int32(bounds_k),
        max_seqlen_k=_longest(bounds_k),
    )
    images = [image for prompt, _ in prompts for image in prompt.images]
    pixels = torch.cat([i.pixel_values for i in images]) if images else None
    grids = torch.cat([i.grid_thw for i in images]) if images else None
    position_ids = torch.cat(positions, dim=1)
    return PackedBatch(torch.cat(ids), position_ids, pixels, grids, segments, _cat(hidden_index))


def _int32(bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def _longest(bounds: list[int]) -> int:
    return max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Piece:
    """Some responses of one group: the unit that mini-batches are made of."""

    group: Group
    responses: tuple[int, ...]
    """Indices into group.responses, ascending, so that the anchor's come first."""

    def chosen(self) -> list[Response]:
        return [self.group.responses[i] for i in self.responses]

    def halves(self) -> list[Piece]:
        """Two pieces of half the responses each; none where there is only one response."""
        half = len(self.responses) // 2
        parts = (self.responses[:half], self.responses[half:])
        return [Piece(self.group, part) for part in parts] if half else []

    def prompts(self, photo: str, encode: Encode) -> Prompts:
        """The prompts of the piece on one photo of its triplet, with the responses on each.

        Args:
            photo: `anchor` (all responses on x), `own` (x's on x, x_pos's on x_pos) or `negative`
                (all on x_neg).
            encode: prompt ids and image keys to an EncodedPrompt.

        Raises:
            ValueError: another photo.
        """
        triplet, responses = self.group.triplet, self.chosen()
        if photo == "own":
            keys = {"anchor": triplet.anchor, "positive": triplet.positive}
            by_role = {role: [r.token_ids for r in responses if r.role == role] for role in keys}
            return [
                (encode(self.group.prompt_ids, (keys[role],)), tokens)
                for role, tokens in by_role.items()
                if tokens
            ]
        key = {"anchor": triplet.anchor, "negative": triplet.negative}.get(photo)
        if key is None:
            raise ValueError(f"photo must be anchor, own or negative, got {photo!r}")
        return [(encode(self.group.prompt_ids, (key,)), [r.token_ids for r in responses])]

    def __str__(self) -> str:
        return f"group {self.group.id!r}: one response and its prompt"


Batches = Sequence[Sequence["Piece"]]
"""The pieces of each mini-batch."""


class Item(Protocol):
    """What micro-batches are made of: pieces, or stage 1's examples."""

    def prompts(self, photo: str, encode: Encode) -> Prompts: ...

    def halves(self) -> Sequence[Item]: ...


def prompts_of(items: Iterable[Item], photo: str, encode: Encode) -> Prompts:
    """The prompts of several items on one photo, in order."""
    return [prompt for item in items for prompt in item.prompts(photo, encode)]


def packed_tokens(prompts: Prompts) -> int:
    """Tokens of a pack of these prompts."""
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


def weigh_rows(pieces: Sequence[Piece], loss: LossConfig, cut_off: str, longest: int = 1) -> float:
    """Set the row weights of a mini-batch's responses.

    Args:
        pieces: the mini-batch, in its order.
        loss: mean_over and mean_over_size are used.
        cut_off: `mask` leaves out responses that hit the length limit.
        longest: most tokens that a response may have, for `mean_over: constant`.

    Returns:
        num_loss_tokens: the sum of the weights of all rows; with `constant` the number of responses
        that have any.
    """
    responses = [r for piece in pieces for r in piece.chosen()]
    weights = row_weights(
        [len(r.token_ids) for r in responses],
        [piece.group.id for piece in pieces for _ in piece.responses],
        [cut_off == "mask" and r.finish_reason == "length" for r in responses],
        loss.mean_over,
        loss.mean_over_size,
        longest,
    )
    for response, weight in zip(responses, weights, strict=True):
        response.row_weight = weight
    if loss.mean_over == "constant":
        return float(sum(weight > 0 for weight in weights))
    return sum(r.row_weight * len(r.token_ids) for r in responses)


def rows(responses: Sequence[Response], value: Callable[[Response], object]) -> Tensor:
    """A response's number or [length] tensor as [R] float32 rows, responses in order."""
    parts = [
        torch.as_tensor(value(r), dtype=torch.float32).expand(len(r.token_ids)) for r in responses
    ]
    return torch.cat(parts) if parts else torch.empty(0)


def response_index(responses: Sequence[Response]) -> Tensor:
    """[R] int64: which of the responses each row belongs to."""
    lengths = torch.tensor([len(r.token_ids) for r in responses], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(responses)), lengths)


def by_response(
    pieces: Sequence[Piece], values: Tensor, *, weighted: bool = False
) -> dict[tuple[str, int], Tensor]:
    """[R] rows as one tensor a response, by group id and index in the group.

    Args:
        pieces: whose rows they are; none: no rows are taken.
        values: [R], on any device.
        weighted: leave out responses of row weight 0.
    """
    places = [(piece.group, i) for piece in pieces for i in piece.responses]
    if not places:
        return {}
    parts = values.cpu().split([len(group.responses[i].token_ids) for group, i in places])
    return {
        (group.id, i): part.clone()
        for (group, i), part in zip(places, parts, strict=True)
        if group.responses[i].row_weight or not weighted
    }


def scored_batch(pieces: Sequence[Piece], photo: str, encode: Encode) -> MicroBatch:
    """Pieces on one photo as a MicroBatch whose log-probs are wanted."""
    return plain_batch(prompts_of(pieces, photo, encode), 1.0)


def plain_batch(prompts: Prompts, num_loss_tokens: float) -> MicroBatch:
    """Prompts with their responses as a MicroBatch without advantages; every row has weight 1."""
    tokens = [token for _, responses in prompts for ids in responses for token in ids]
    labels = torch.tensor(tokens, dtype=torch.int64)
    ones = torch.ones(len(labels))
    return MicroBatch(pack(prompts), None, labels, torch.zeros_like(ones), ones, num_loss_tokens)


def are_weighed(pieces: Iterable[Piece], loss: LossConfig, version: int) -> bool:
    """Whether any of the pieces' responses has importance weights (see `cap_of`)."""
    return any(cap_of(r, loss, version) is not None for piece in pieces for r in piece.chosen())


def micro_batch(
    pieces: Sequence[Piece],
    encode: Encode,
    loss: LossConfig,
    num_loss_tokens: float,
    version: int = 0,
) -> MicroBatch:
    """Pack pieces for one forward and backward pass.

    Args:
        pieces: their responses have row weights (see `weigh_rows`).
        encode: prompt ids and image keys to an EncodedPrompt.
        loss: update_on, whether the negative is computed now, and the bounds of the importance
            weights against the sampler (see `cap_of`).
        num_loss_tokens: sum of the weights of all rows of the mini-batch, over all ranks.
        version: of the weights at the start of the step.

    Returns:
        A MicroBatch on the CPU; old_logprobs and neg_logprobs are None where no response has them,
        is_weights where all would be 1.
    """
    responses = [r for piece in pieces for r in piece.chosen()]

    def known(name: str) -> Tensor | None:
        missing = [getattr(r, name) is None for r in responses]
        assert all(missing) or not any(missing), f"{name} of some responses, not of all"
        return None if any(missing) else rows(responses, lambda r: getattr(r, name))

    def importance(response: Response) -> Tensor | float:
        return importance_weights(response, cap_of(response, loss, version))

    batch = plain_batch(prompts_of(pieces, loss.update_on, encode), num_loss_tokens)
    negative = pack(prompts_of(pieces, "negative", encode)) if loss.negative_now else None
    return replace(
        batch,
        negative=negative,
        advantages=rows(responses, lambda r: r.advantage),
        loss_mask=rows(responses, lambda r: r.row_weight),
        old_logprobs=known("old_logprobs"),
        ref_logprobs=known("ref_logprobs"),
        neg_logprobs=known("neg_logprobs"),
        is_weights=rows(responses, importance) if are_weighed(pieces, loss, version) else None,
        response_index=response_index(responses) if loss.ratio_of == "sequence" else None,
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
