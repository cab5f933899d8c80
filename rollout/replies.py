"""What servers reply: read by a schema and checked, before anything of it counts.

Replies come from outside. Whatever is wrong with one is a `BadReply` that says what: the request is
sent again, and an error names the fault where that does not help.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tercet.rollout.exchange import BadReply

HIGHEST_LOGPROB = 1e-3
"""Rounding may take a log-prob above 0 by this much."""
LOWEST_LOGPROB = -1000.0
"""A sampled token has a probability that float32 holds: its log is above -104."""

Logprob = Annotated[float, Field(ge=LOWEST_LOGPROB, le=HIGHEST_LOGPROB, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Version = str | Count | None


class Unfit(BadReply):
    """A sample with a token that must not be drawn: it is drawn anew at once."""


class _Part(BaseModel):
    """A JSON object: its fields have exactly these types, and others are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


Kind = TypeVar("Kind", bound=_Part)


class Finish(_Part):
    type: str
    matched: Any = None
    """The token that ended the response; text where something else did."""


class About(_Part):
    """`meta_info` of SGLang's replies."""

    finish_reason: Finish
    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count = 0
    weight_version: Version = None
    output_token_logprobs: list[tuple[Logprob, Count, str | None]]


class Generated(_Part):
    """Reply of /generate."""

    meta_info: About | None = None
    error: Any = None


class ModelInfo(_Part):
    """Reply of /model_info."""

    weight_version: Version = None


class ServerInfo(_Part):
    """Reply of /server_info."""

    tp_size: Annotated[int, Field(ge=1, le=4096)] = 1


class Done(_Part):
    """Reply to an update of weights."""

    success: bool = True
    message: str | None = None


class ChatMessage(_Part):
    content: str | None = None


class Choice(_Part):
    message: ChatMessage
    finish_reason: str | None = None


class Usage(_Part):
    """Tokens of a request and of its reply."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0


class Chat(_Part):
    """Reply of /chat/completions."""

    choices: Annotated[list[Choice], Field(min_length=1)]
    usage: Usage | None = None


Number = Annotated[float, Field(allow_inf_nan=False)]


class Embedding(_Part):
    index: Count
    embedding: Annotated[list[Number], Field(min_length=1)]


class Embeddings(_Part):
    """Reply of /embeddings."""

    data: list[Embedding]


def read(kind: type[Kind], content: bytes) -> Kind:
    """A reply's JSON as this kind of object; raises BadReply, naming the first field at fault."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        said = f"the reply cannot be read: {place + ': ' if place else ''}{fault['msg']}"
        raise BadReply(said[:300]) from None


@dataclass(frozen=True)
class Expected:
    """What every sample must keep to."""

    vocabulary: int
    """Number of token ids."""
    stop_ids: Collection[int]
    banned_ids: Collection[int]


def checked_sample(
    content: bytes, expected: Expected, *, prompt_tokens: int, most_tokens: int, version: str
) -> About:
    """A reply of /generate, once everything in it is as it must be.

    Args:
        content: the reply.
        expected: what holds for every sample.
        prompt_tokens: the trainer's count.
        most_tokens: as many were asked for.
        version: name of the weights that are to answer.

    Raises:
        BadReply: saying what is wrong.
    """
    reply = read(Generated, content)
    if reply.error is not None:
        raise BadReply(f"an error: {content[:300].decode(errors='replace')}")
    about = reply.meta_info
    if about is None:
        raise BadReply("the reply is empty")
    tokens = [token for _, token, _ in about.output_token_logprobs]
    reason, stops = about.finish_reason, set(expected.stop_ids)
    faults = {
        f"it ended with {reason.type[:40]!r}": reason.type not in ("stop", "length"),
        f"it was stopped by {str(reason.matched)[:40]!r}": isinstance(reason.matched, str),
        f"the server counts {about.prompt_tokens} prompt tokens, the trainer {prompt_tokens}: "
        "image settings differ": about.prompt_tokens != prompt_tokens,
        f"weights of version {str(about.weight_version)[:40]}": (
            str(about.weight_version) != version
        ),
        f"{len(tokens)} log-probs for {about.completion_tokens} tokens": (
            len(tokens) != about.completion_tokens or not tokens
        ),
        f"{len(tokens)} tokens where {most_tokens} were asked for": len(tokens) > most_tokens,
        f"a token id is not below {expected.vocabulary}": (
            max(tokens, default=0) >= expected.vocabulary
        ),
        "it goes on after a stop token": not stops.isdisjoint(tokens[:-1]),
        "it stopped without a stop token": (
            reason.type == "stop" and stops.isdisjoint(tokens[-1:])
        ),
    }
    for fault, holds in faults.items():
        if holds:
            raise BadReply(fault)
    if banned := set(expected.banned_ids) & set(tokens):
        raise Unfit(f"it holds image token(s) {sorted(banned)}")
    return about
