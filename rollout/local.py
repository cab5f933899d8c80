"""The in-process engine: samples from the policy's own weights, for a CPU or a single GPU.

Up to `max_rows` samples are decoded together. Each distinct prompt, photo included, is prefilled
once, and its keys and values are copied to the rows of its samples. Prompts are padded on the left,
so that all rows write at one position. Finished rows leave the batch. A sample's random numbers are
drawn beforehand from its own seed, so they do not depend on the other rows.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tercet.core.data.vision import PromptEncoder
from tercet.core.models import family_of
from tercet.core.types import Completion, EncodedPrompt, PolicyParts, Request
from tercet.rollout.engine import Sampling, sample_seed

GROWTH = 64
"""Tokens by which the key-value buffers grow."""
KEPT_SHARE = 0.875
"""Finished rows are removed once at most this share of the rows is unfinished."""


@torch.no_grad()
def sample_tokens(
    logits: Tensor, sampling: Sampling, banned: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the filtered distribution's cumulative sum.

    Args:
        logits: [B, V] of the last position.
        sampling: temperature, top_p, top_k.
        banned: [k] int64 token ids of probability 0.
        uniform: [B] float64 in [0, 1), one a row.

    Returns:
        (tokens [B] int64, logprobs [B] float32): the log-probs are those of the full vocabulary
        at the sampling temperature, before ban and filters.
    """
    scaled = logits.float() / (sampling.temperature or 1.0)
    logprobs = scaled.log_softmax(-1)
    allowed = logprobs.index_fill(-1, banned, float("-inf"))
    if sampling.temperature == 0:
        tokens = allowed.argmax(-1, keepdim=True)
        return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]
    probs = allowed.softmax(-1)
    if sampling.top_k or sampling.top_p < 1:
        probs = probs.where(probs >= _least_kept(probs, sampling), 0)
    # Integer sums are exact on every device, so that a token of weight 0 is never drawn.
    cumulative = (probs.double() * 2**52).long().cumsum(-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum((uniform[:, None] * total).long(), total - 1)
    tokens = torch.searchsorted(cumulative, threshold, right=True)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


def _least_kept(probs: Tensor, sampling: Sampling) -> Tensor:
    """[B, 1]: probability of the least likely token that top_k and then top_p keep.

    The nucleus ends with the token at which its probability reaches top_p; tokens that are as
    likely as this one are kept too.
    """
    if probs.device.type == "cpu":
        ascending = torch.from_numpy(np.sort(probs.numpy(), -1))  # much faster than torch.sort
    else:
        ascending = probs.sort(-1).values
    top = ascending.flip(-1)[:, : sampling.top_k or None]
    reached = top.cumsum(-1, dtype=torch.float64)
    last = (reached < sampling.top_p * reached[:, -1:]).sum(-1, keepdim=True)
    return top.gather(-1, last)


class _KeyValues:
    """Keys and values of the batch, in buffers that grow by GROWTH tokens.

    Has the one method of transformers' Cache that the models call, `update`.
    """

    def __init__(self, layers: int):
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.length = 0

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Append one layer's keys and values, [B, heads, new, d]; returns all of them so far."""
        end = self.length + key.shape[2]
        for buffers, new in ((self.keys, key), (self.values, value)):
            if buffers[layer] is None or buffers[layer].shape[2] < end:
                buffers[layer] = self._grown(buffers[layer], new, end)
            buffers[layer][:, :, self.length : end] = new
        if layer == len(self.keys) - 1:
            self.length = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def _grown(self, buffer: Tensor | None, new: Tensor, end: int) -> Tensor:
        batch, heads, _, width = new.shape
        grown = new.new_zeros(batch, heads, end + GROWTH, width)
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


@dataclass
class _Sample:
    """A sample while it is decoded."""

    request: Request
    index: int
    uniform: Tensor
    """[max_tokens] float64 in [0, 1), one random number a token."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    """Empty while it is decoded."""

    def completion(self, version: int) -> Completion:
        return Completion(
            request_id=self.request.id,
            index=self.index,
            token_ids=tuple(self.tokens),
            rollout_logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            weight_version=version,
        )


class LocalEngine:
    """Engine on the policy's own transformers model; see the module's docstring.

    Args:
        parts: the policy; every call uses its current weights.
        encoder: shared with the trainer, so that each photo is processed once.
        max_rows: most samples decoded at once.
        check_stop: called before every token; what it raises ends the sampling.
    """

    def __init__(
        self,
        parts: PolicyParts,
        encoder: PromptEncoder,
        *,
        max_rows: int = 256,
        check_stop: Callable[[], None] = lambda: None,
    ):
        self.weight_version = 0
        self.full_vocabulary = True
        self._model = parts.model
        self._family = family_of(parts.model.config)
        self._encoder = encoder
        self._max_rows = max_rows
        self._check_stop = check_stop
        self._stop_ids = frozenset(parts.stop_ids)
        self._banned = torch.tensor(parts.banned_ids, device=parts.model.device)
        self._aborted: set[str] = set()

    async def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> AsyncIterator[Completion]:
        self._model.eval()
        self._aborted.difference_update(request.id for request in requests)
        waiting = [s for request in requests for s in self._samples(request, sampling)]
        while waiting := [s for s in waiting if s.request.id not in self._aborted]:
            batch, waiting = waiting[: self._max_rows], waiting[self._max_rows :]
            for finished in self._decode(batch, sampling):
                for sample in finished:
                    yield sample.completion(self.weight_version)
                await asyncio.sleep(0)  # let other tasks run between two tokens

    def abort(self, request_ids: Iterable[str]) -> None:
        self._aborted.update(request_ids)

    def update_weights(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Copy weights into the model; nothing is copied where both share their memory."""
        own = dict(self._model.named_parameters())
        for name, weight in named_weights:
            if own[name].data_ptr() != weight.data_ptr():
                own[name].data.copy_(weight)
        self.weight_version = version

    def sleep(self) -> None:
        """Nothing to release: no memory is kept between calls."""

    def wake(self) -> None:
        """Nothing to take back."""

    def close(self) -> None:
        """Nothing to stop."""

    def _samples(self, request: Request, sampling: Sampling) -> Iterator[_Sample]:
        for j in range(request.n):
            seed = sample_seed(request.seed, request.step, request.id, j)
            uniform = np.random.Generator(np.random.Philox(seed)).random(sampling.max_tokens)
            yield _Sample(request, j, torch.from_numpy(uniform))

    @torch.no_grad()
    def _decode(self, samples: list[_Sample], sampling: Sampling) -> Iterator[list[_Sample]]:
        """Decode samples; after every token yields those that it finished."""
        prompts, owner = self._distinct_prompts(samples)
        logits, cache, valid, positions = self._prefill(prompts)
        device = logits.device
        rows = torch.tensor(owner, device=device)
        logits, valid, positions = logits[rows], valid[rows], positions[rows]
        cache.select(rows)
        uniform = torch.stack([s.uniform for s in samples]).to(device)
        for step in range(sampling.max_tokens):
            self._check_stop()
            tokens, logprobs = sample_tokens(logits, sampling, self._banned, uniform[:, step])
            last = step == sampling.max_tokens - 1
            yield self._append(samples, tokens.tolist(), logprobs.tolist(), last)
            going = [i for i, s in enumerate(samples) if self._unfinished(s)]
            if not going:
                return
            if len(going) <= KEPT_SHARE * len(samples):
                samples = [samples[i] for i in going]
                kept = torch.tensor(going, device=device)
                cache.select(kept)
                tokens, valid, positions, uniform = (
                    x[kept] for x in (tokens, valid, positions, uniform)
                )
            valid = torch.cat([valid, valid.new_ones(len(valid), 1)], dim=1)
            logits = self._step(tokens, cache, valid, positions)
            positions = positions + 1

    def _unfinished(self, sample: _Sample) -> bool:
        return not sample.finish_reason and sample.request.id not in self._aborted

    def _append(
        self, samples: list[_Sample], tokens: list[int], logprobs: list[float], last: bool
    ) -> list[_Sample]:
        """Append a token to each unfinished sample; returns those that it finishes."""
        finished = []
        for sample, token, logprob in zip(samples, tokens, logprobs, strict=True):
            if not self._unfinished(sample):
                continue
            if math.isnan(logprob):
                raise ValueError(f"request {sample.request.id!r}: the model's logits are NaN")
            sample.tokens.append(token)
            sample.logprobs.append(logprob)
            if token in self._stop_ids or last:
                sample.finish_reason = "stop" if token in self._stop_ids else "length"
                finished.append(sample)
        return finished

    def _distinct_prompts(self, samples: list[_Sample]) -> tuple[list[EncodedPrompt], list[int]]:
        """The distinct prompts, and for each sample the index of its prompt."""
        place: dict[tuple, int] = {}
        prompts: list[EncodedPrompt] = []
        for sample in samples:
            request = sample.request
            if (request.prompt_ids, request.images) not in place:
                place[request.prompt_ids, request.images] = len(prompts)
                prompts.append(self._encoder(request.prompt_ids, request.images))
        return prompts, [place[s.request.prompt_ids, s.request.images] for s in samples]

    def _prefill(self, prompts: list[EncodedPrompt]) -> tuple[Tensor, _KeyValues, Tensor, Tensor]:
        """Run N prompts, padded on the left to L tokens.

        Returns:
            Logits [N, V] of the token after each prompt; keys and values; [N, L] bool, which keys
            are no padding; [N] int64, M-RoPE position of the token after each prompt.
        """
        device = self._model.device
        longest = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        positions = torch.zeros(3, len(prompts), longest, dtype=torch.int64)
        valid = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = prompt.input_ids
            positions[:, i, longest - len(prompt) :] = prompt.position_ids
            valid[i, longest - len(prompt) :] = True
        images = [image for prompt in prompts for image in prompt.images]
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        # A padding token sees itself: attention over nothing would give NaN.
        mask = (causal & valid[:, None, :]) | torch.eye(longest, dtype=torch.bool)
        pixels = torch.cat([i.pixel_values for i in images]).to(device) if images else None
        grids = torch.cat([i.grid_thw for i in images]).to(device) if images else None
        cache = _KeyValues(self._model.config.text_config.num_hidden_layers)
        output = self._model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=self._family.attention_mask(mask[:, None].to(device)),
            past_key_values=cache,
            pixel_values=pixels,
            image_grid_thw=grids,
            logits_to_keep=1,
            use_cache=True,
        )
        following = torch.tensor([p.next_position for p in prompts], device=device)
        return output.logits[:, -1], cache, valid.to(device), following

    def _step(self, tokens: Tensor, cache: _KeyValues, valid: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, V] after one more token in each row."""
        output = self._model(
            input_ids=tokens[:, None],
            position_ids=positions[None, :, None].expand(3, -1, -1),
            attention_mask=self._family.attention_mask(valid[:, None, None, :]),
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1]
