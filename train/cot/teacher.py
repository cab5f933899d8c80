"""A teacher at work: descriptions of photos, concepts chosen from them, chains of thought.

Whatever the teacher said is in the client's cache, so a run that is started again asks for nothing
twice. What is wrong with a single photo or answer costs that sample alone; a teacher that answers
nothing at all ends the run.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tercet.core.concepts import concept_scores, select_concepts
from tercet.core.data.vision import data_uri
from tercet.core.tool_config import CotConfig
from tercet.core.types import Photo
from tercet.rollout.chat import ANSWERED, Answer, ChatClient
from tercet.rollout.server import ServerError
from tercet.train.cot.answers import fault_of, read_bullets, read_parts
from tercet.train.cot.prompts import INSTRUCTIONS, OF_LABEL, OF_PHOTO, cot_prompt
from tercet.train.cot.samples import CotSample, Tally

Item = TypeVar("Item")
Result = TypeVar("Result")
Embed = Callable[[Sequence[str]], Awaitable[Tensor]]
"""Texts to [N, D] embeddings of unit length."""
ONE_ITEM = (None, ANSWERED, 400, 413, 422)
"""Statuses of errors that may be about one request alone; None: no answer in time."""
TEXTS_A_CALL = 64


async def each(
    items: Iterable[Item], work: Callable[[Item], Awaitable[Result]], at_once: int
) -> list[Result]:
    """`work` of every item, `at_once` of them at a time; the first error ends all."""
    places = asyncio.Semaphore(at_once)

    async def one(item: Item) -> Result:
        async with places:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def endpoint_embedder(client: ChatClient) -> Embed:
    """Embed at the endpoint's /embeddings; of unit length here, whatever it gives."""

    async def embed(texts: Sequence[str]) -> Tensor:
        rows: list[list[float]] = []
        for start in range(0, len(texts), TEXTS_A_CALL):
            rows += await client.embed(texts[start : start + TEXTS_A_CALL])
        if len({len(row) for row in rows}) > 1:
            raise ServerError("teacher: its embeddings have several sizes")
        if not rows:
            return torch.zeros(0, 1)
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1)

    return embed


class Teacher:
    """A teacher and what it is asked.

    Args:
        client: of its endpoint.
        embed: of texts.
        config: how much is asked.
        out: folder of outputs.
        step: called after each photo of each phase.
    """

    def __init__(
        self,
        client: ChatClient,
        embed: Embed,
        config: CotConfig,
        out: Path,
        step: Callable[[], None] = lambda: None,
    ):
        self._client, self._embed, self._config, self._out = client, embed, config, out
        self._step = step
        self.tally = Tally()

    async def samples(self, photos: Sequence[Photo]) -> list[CotSample]:
        """Every sample, kept or rejected, of every photo.

        Raises:
            ServerError: the teacher answers nothing, or refuses the key or the model.
        """
        at_once = self._config.concurrency
        described = await each(photos, self._describe, at_once)
        pairs = list(zip(photos, described, strict=True))
        reason = "description: the teacher gave none"
        samples = [
            CotSample.of(photo, self._out, 0, (), "", reason) for photo, texts in pairs if not texts
        ]
        pairs = [(photo, texts) for photo, texts in pairs if texts]
        of_label: dict[tuple[str, str], list[tuple[Photo, list[str]]]] = defaultdict(list)
        for (photo, _), concepts in zip(pairs, await self._choose(pairs), strict=True):
            of_label[photo.super_category, photo.sub_category].append((photo, concepts))
        for found in await each(of_label.values(), self._chains, at_once):
            samples += found
        for sample in samples:
            self.tally.add(sample)
        return samples

    async def _describe(self, photo: Photo) -> list[str]:
        uri = await asyncio.to_thread(data_uri, photo.image)
        texts = []
        for instruction in INSTRUCTIONS:
            question = instruction.format(super_category=photo.super_category or "object")
            for index in range(self._config.descriptions):
                answer = await self._ask(question, [uri], index, self._config.description_tokens)
                if isinstance(answer, Answer) and answer.text.strip():
                    texts.append(answer.text.strip())
        self._step()
        return texts

    async def _choose(self, pairs: Sequence[tuple[Photo, list[str]]]) -> list[list[str]]:
        """The concepts of each photo with its descriptions, best first."""
        if not pairs:
            return []
        if self._config.concepts == "label":
            names = sorted({photo.sub_category for photo, _ in pairs})
            found = await each(names, self._of_label, self._config.concurrency)
            by_name = dict(zip(names, found, strict=True))
            candidates = [by_name[photo.sub_category] for photo, _ in pairs]
        else:
            candidates = await each(pairs, self._of_photo, self._config.concurrency)
        texts = [text for _, of_photo in pairs for text in of_photo]
        rows = await self._embed(texts)  # [texts, D]
        wanted = list(dict.fromkeys(c for found in candidates for c in found))
        of_text = dict(zip(wanted, await self._embed(wanted), strict=True))
        chosen, start = [], 0
        for (_, own), found in zip(pairs, candidates, strict=True):
            end = start + len(own)
            if found:
                others = torch.cat([rows[:start], rows[end:]])
                scores = concept_scores(
                    rows[start:end], torch.stack([of_text[c] for c in found]), others
                )
            chosen.append(select_concepts(found, scores) if found else [])
            start = end
        return chosen

    async def _of_label(self, name: str) -> list[str]:
        answer = await self._ask(OF_LABEL.format(label=name), [], 0, self._config.concept_tokens)
        return read_bullets(answer.text) if isinstance(answer, Answer) else []

    async def _of_photo(self, described: tuple[Photo, list[str]]) -> list[str]:
        photo, texts = described
        question = OF_PHOTO.format(
            super_category=photo.super_category or "object", descriptions="\n\n".join(texts)
        )
        answer = await self._ask(question, [], 0, self._config.concept_tokens)
        return read_bullets(answer.text) if isinstance(answer, Answer) else []

    async def _chains(self, photos: Sequence[tuple[Photo, list[str]]]) -> list[CotSample]:
        """Samples of one sub-category until enough are kept, its photos in turn."""
        samples: list[CotSample] = []
        said: set[str] = set()
        for chain in range(self._config.cots_per_class):
            photo, concepts = photos[chain % len(photos)]
            first = chain // len(photos) * self._config.tries
            uri = await asyncio.to_thread(data_uri, photo.image)
            question = cot_prompt(photo.sub_category, concepts, photo.question)
            for number in range(first, first + self._config.tries):
                answer = await self._ask(question, [uri], number, self._config.cot_tokens)
                text = answer.text if isinstance(answer, Answer) else ""
                reason = _fault(answer, photo.sub_category)
                if reason is None and text in said:
                    reason = "twice: an earlier sample is the same"
                said.add(text)
                samples.append(CotSample.of(photo, self._out, number, concepts, text, reason))
                if reason is None:
                    break
        self._step()
        return samples

    async def _ask(self, question: str, photos: list[str], index: int, tokens: int) -> Answer | str:
        """An answer, or why there is none for this question alone."""
        started = time.monotonic()
        try:
            answer, is_new = await self._client.sample(
                question, photos, index=index, max_tokens=tokens
            )
        except ServerError as error:
            answered = self._client.answered_at
            down = error.status is None and answered < started
            if down or not answered or error.status not in ONE_ITEM:
                raise
            return str(error)
        if is_new:
            self.tally.calls += 1
            self.tally.prompt_tokens += answer.prompt_tokens
            self.tally.completion_tokens += answer.completion_tokens
        return answer


def _fault(answer: Answer | str, label: str) -> str | None:
    if isinstance(answer, str):
        return f"no answer: {answer}"
    if not answer.text.strip():
        return "empty: an answer without text"
    if not answer.is_whole:
        return f"cut off: it ended by {answer.reason}"
    return fault_of(read_parts(answer.text), label)
