"""The interface of a rollout engine: prompts in, completions out one by one, weights in.

The in-process engine (rollout/local.py) and the SGLang servers (rollout/sglang.py) implement it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tercet.core.draws import digest_int
from tercet.core.types import Completion, Request


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy (its log-probs are those at temperature 1)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        """Raises ValueError for a field out of its range."""
        allowed = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
        }
        for name, (holds, what) in allowed.items():
            if not holds:
                raise ValueError(f"Sampling.{name} must be {what}, got {getattr(self, name)}")


class Engine(Protocol):
    """What samples responses.

    The log-probs of an engine are those of the full vocabulary at the sampling temperature: they
    are taken before the ban on image tokens, top_p and top_k act.
    """

    weight_version: int
    full_vocabulary: bool
    """Whether this holds; some servers give log-probs taken after the filters."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> AsyncIterator[Completion]:
        """Yield each sample as soon as it is finished, in any order."""
        ...

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop these requests; their unfinished samples are not yielded."""
        ...

    def update_weights(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Take over the policy's weights; the iterator is read to its end, even on an error."""
        ...

    def sleep(self) -> None:
        """Release memory that the update phase needs (KV cache, weights on a shared GPU)."""
        ...

    def wake(self) -> None:
        """Take the memory back; weights must be updated before the next generation."""
        ...

    def close(self) -> None:
        """Stop what the engine started."""
        ...


class IdleEngine:
    """The engine of all ranks but the first: nothing is sampled there."""

    weight_version = 0
    full_vocabulary = True

    def close(self) -> None: ...


def sample_seed(seed: int, step: int, request_id: str, index: int) -> int:
    """63-bit seed of a request's sample `index`: the same in every process and on every machine."""
    return digest_int(f"{seed}/{step}/{request_id}/{index}".encode())


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error cancels the rest and is raised itself, not in a group."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
