"""Replies of servers: what is wrong with one is found, asked for again, and named."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
import time
from contextlib import ExitStack

import pytest
from hostile import Hostile, as_json, endless, plain
from sglang_support import collect, make_engine
from support import tiny

from tercet.core.data.vision import PromptEncoder
from tercet.core.types import Request
from tercet.rollout import endpoint
from tercet.rollout.engine import Sampling
from tercet.rollout.exchange import BadReply
from tercet.rollout.replies import Expected, Unfit, checked_sample
from tercet.rollout.server import ServerError

EXPECTED = Expected(vocabulary=100, stop_ids=(9,), banned_ids=(50,))
MOST = 8


def sample(**about) -> dict:
    """A good reply of three tokens, the last one a stop token, with changes."""
    good = {
        "finish_reason": {"type": "stop", "matched": 9},
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "cached_tokens": 4,
        "weight_version": "default",
        "output_token_logprobs": [[-1.5, 3, None], [0.0, 4, "x"], [-2, 9, None]],
    }
    return {"text": "", "meta_info": good | about}


def tokens(*ids, logprob=-1.0, reason="length", **about) -> dict:
    entries = [[logprob, token, None] for token in ids]
    return sample(
        output_token_logprobs=entries,
        completion_tokens=len(ids),
        finish_reason={"type": reason},
        **about,
    )


def text_of(reply) -> bytes:
    return reply if isinstance(reply, bytes) else json.dumps(reply).encode()


DEEP = b"[" * 100_000 + b"]" * 100_000
LONG = "9" * 5000
SPOILT = {
    "nothing": b"",
    "not JSON": b"{{{",
    "half": text_of(sample())[:80],
    "bad UTF-8": text_of(sample()).replace(b'"x"', b'"\xff\xfe"'),
    "a lone surrogate": text_of(sample()).replace(b'"x"', b'"\\ud800"'),
    "UTF-16": json.dumps(sample()).encode("utf-16"),
    "NUL bytes": b"\0" * 100,
    "deep": DEEP,
    "a deep text": text_of(sample()).replace(b'""', DEEP),
    "a deep reason": text_of(sample(finish_reason=0)).replace(
        b'"finish_reason": 0', b'"x":' + DEEP
    ),
    "a list": [sample()],
    "null": b"null",
    "a number": b"5",
    "text": b'"x"',
    "an empty object": {},
    "meta_info is null": {"meta_info": None},
    "meta_info is a list": {"meta_info": []},
    "meta_info is a number": {"meta_info": 3},
    "an error": {"error": {"message": "out of memory"}},
    "an error beside a sample": sample() | {"error": "x"},
    "an error of 5,000 digits": f'{{"error": {LONG}}}'.encode(),
    "no finish_reason": sample(finish_reason=None),
    "finish_reason is text": sample(finish_reason="stop"),
    "finish_reason is a list": sample(finish_reason=["stop"]),
    "its type is a number": sample(finish_reason={"type": 3}),
    "its type is null": sample(finish_reason={"type": None}),
    "its type is a list": sample(finish_reason={"type": ["stop"]}),
    "aborted": sample(finish_reason={"type": "abort", "message": "x"}),
    "another type": sample(finish_reason={"type": "tool_calls"}),
    "NaN happened": sample(finish_reason={"type": "stop", "matched": "NaN happened"}),
    "prompt tokens of another photo": sample(prompt_tokens=6),
    "prompt_tokens is text": sample(prompt_tokens="5"),
    "prompt_tokens is 5.0": sample(prompt_tokens=5.5),
    "prompt_tokens is true": sample(prompt_tokens=True),
    "prompt_tokens of 5,000 digits": text_of(sample(prompt_tokens=77)).replace(
        b"77", LONG.encode()
    ),
    "old weights": sample(weight_version="3"),
    "no weights": sample(weight_version=None),
    "weight_version is a list": sample(weight_version=["default"]),
    "weight_version of 5,000 digits": text_of(sample(weight_version=77)).replace(
        b"77", LONG.encode()
    ),
    "cached_tokens is null": sample(cached_tokens=None),
    "cached_tokens is text": sample(cached_tokens="4"),
    "cached_tokens below 0": sample(cached_tokens=-1),
    "log-probs are null": sample(output_token_logprobs=None),
    "log-probs are an object": sample(output_token_logprobs={}),
    "no log-probs": sample(output_token_logprobs=[]),
    "no tokens": sample(output_token_logprobs=[], completion_tokens=0),
    "fewer log-probs than tokens": sample(completion_tokens=4),
    "an entry is null": sample(output_token_logprobs=[None] * 3),
    "an entry is a number": sample(output_token_logprobs=[-1.0] * 3),
    "an entry is short": sample(output_token_logprobs=[[-1.0], [-1.0], [-1.0]]),
    "an entry is long": sample(output_token_logprobs=[[-1.0, 3, None, 1]] * 3),
    "an entry is turned round": sample(output_token_logprobs=[[3, -1.0, None]] * 3),
    "a log-prob is null": tokens(3, 4, logprob=None),
    "a log-prob is text": tokens(3, 4, logprob="-1.0"),
    "a log-prob is true": tokens(3, 4, logprob=True),
    "a log-prob is NaN": tokens(3, 4, logprob=float("nan")),
    "a log-prob is inf": tokens(3, 4, logprob=float("inf")),
    "a log-prob is -inf": tokens(3, 4, logprob=float("-inf")),
    "a log-prob that float cannot hold": text_of(tokens(3, 4, logprob=-77)).replace(
        b"-77", b"-1e400"
    ),
    "a log-prob that float32 cannot hold": tokens(3, 4, logprob=-1e300),
    "a log-prob above rounding": tokens(3, 4, logprob=0.002),
    "a probability": tokens(3, 4, logprob=0.5),
    "an id out of the vocabulary": tokens(3, 100),
    "an id of 10^6": tokens(3, 10**6),
    "an id of 5,000 digits": text_of(tokens(3, 77)).replace(b"77", LONG.encode()),
    "an id below 0": tokens(3, -1),
    "an id is 3.5": tokens(3, 3.5),
    "an id is text": tokens(3, "4"),
    "an id is null": tokens(3, None),
    "an id is true": tokens(3, True),
    "more tokens than asked": tokens(*[3] * (MOST + 1)),
    "a stop token in the middle": tokens(3, 9, 4),
    "two stop tokens": tokens(3, 9, 9, reason="stop"),
    "stop without a stop token": tokens(3, 4, reason="stop"),
    "an image token": tokens(3, 50),
}
GOOD = {
    "stopped": sample(),
    "cut off": tokens(*[3] * MOST),
    "stopped by its last token": tokens(*[3] * (MOST - 1), 9),
    "the last id": tokens(99),
    "rounded": tokens(3, logprob=1e-3),
    "unlikely": tokens(3, logprob=-104.0),
    "fields that nobody knows": sample(e2e_latency=[{}]) | {"index": 0},
}


def check(content: bytes):
    return checked_sample(content, EXPECTED, prompt_tokens=5, most_tokens=MOST, version="default")


@pytest.mark.core
@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_reply_does_not_count(name):
    with pytest.raises(BadReply) as caught:
        check(text_of(SPOILT[name]))
    said = str(caught.value)
    assert 0 < len(said) <= 400 and "\n" not in said
    assert isinstance(caught.value, Unfit) == (name == "an image token")


@pytest.mark.core
@pytest.mark.parametrize("name", GOOD)
def test_a_good_reply_counts(name):
    about = check(text_of(GOOD[name]))
    want = GOOD[name]["meta_info"]["output_token_logprobs"]
    assert [list(entry) for entry in about.output_token_logprobs] == want
    assert all(type(logprob) is float for logprob, _, _ in about.output_token_logprobs)


@pytest.fixture(scope="module")
def parts():
    return tiny()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)


class Sampler:
    """Replies as SGLang does: a good sample, but the next `times` to /generate are spoilt."""

    def __init__(self, parts, content=b"", times=0):
        self.content, self.times = content, times
        self.stop, self.parts = parts.stop_ids[0], parts

    def __call__(self, path, body):
        if path == "/model_info":
            return as_json({"weight_version": "default"})
        if path != "/generate":
            return plain("null")
        content = text_of(self.reply(len(body["input_ids"])))
        if self.times and "rid" in body:
            self.times -= 1
            content = self.content
        if callable(content):
            return content()
        if body.get("stream"):
            content = b"data: " + content.replace(b"\n", b" ") + b"\n\ndata: [DONE]\n\n"
        return plain(content, kind="text/event-stream" if body.get("stream") else "text/json")

    def reply(self, length: int) -> dict:
        entries = [[-1.0, self.stop, None]]
        found = sample(prompt_tokens=length, completion_tokens=1, output_token_logprobs=entries)
        found["meta_info"]["finish_reason"] = {"type": "length"}
        return found


def requests_of(parts, n: int) -> list[Request]:
    ids = tuple(parts.tokenizer("Which bird is shown?").input_ids)
    assert len(ids) == len(PromptEncoder(parts)(ids, ()))
    return [Request("g.anchor", "g", ids, (), n, seed=0, step=0)]


def samples_from(parts, folder, samplers, n):
    with ExitStack() as stack:
        servers = [stack.enter_context(Hostile(sampler)) for sampler in samplers]
        engine = make_engine(parts, [s.url for s in servers], folder, timeout_s=5.0)
        found = collect(engine, requests_of(parts, n), Sampling(max_tokens=MOST))
    asked = [sum("rid" in body for body in server.bodies) for server in servers]
    return found, [a - s.asked.count("/abort_request") for a, s in zip(asked, servers, strict=True)]


@pytest.mark.parametrize("n", [1, 2], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_reply_is_asked_for_again(parts, tmp_path, name, n):
    found, asked = samples_from(parts, tmp_path, [Sampler(parts, text_of(SPOILT[name]), 1)], n)
    assert [c.token_ids for c in found] == [(parts.stop_ids[0],)] * n
    assert asked == [n + 1]


def test_a_bad_reply_is_asked_for_elsewhere(parts, tmp_path):
    spoilt = Sampler(parts, text_of(SPOILT["an id of 10^6"]), 1000)
    found, asked = samples_from(parts, tmp_path, [spoilt, Sampler(parts)], 3)
    assert len(found) == 3 and asked == [3, 3]


@pytest.mark.parametrize(
    "content, said",
    [
        (text_of(SPOILT["an id of 10^6"]), "counts 5 prompt tokens, the trainer"),
        (b"\xff", "the reply cannot be read: Invalid JSON"),
        (lambda: endless(), "longer than"),
        (lambda: plain("{}", more="content-encoding: gzip\r\n"), "compressed"),
        (lambda: plain("no", "503 No"), "status 503: no"),
        (lambda: b"", "RemoteProtocolError"),
    ],
)
@pytest.mark.parametrize("n", [1, 2], ids=["whole", "streamed"])
def test_a_reply_that_stays_bad_is_named(parts, tmp_path, content, said, n):
    with pytest.raises(ServerError, match=rf"g.anchor failed 5 times: http://\S+: .*{said}"):
        samples_from(parts, tmp_path, [Sampler(parts, content, 1000)], n)


def open_sockets() -> int:
    names = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum("socket:" in name for name in names)


@pytest.mark.parametrize("content", [b"\xff", b""], ids=["good", "cut"])
def test_streams_leave_no_socket_to_the_garbage_collector(parts, tmp_path, content):
    """A stream is closed when it ends, at its end mark or by an error."""
    times = 0 if content else 2
    with Hostile(Sampler(parts, content, times)) as server:
        engine = make_engine(parts, [server.url], tmp_path, timeout_s=5.0)
        gc.collect()
        gc.disable()
        try:
            before = open_sockets()
            for _ in range(5):
                collect(engine, requests_of(parts, 3), Sampling(max_tokens=MOST))
            deadline = time.monotonic() + 10  # the server's side closes in its threads
            while open_sockets() > before and time.monotonic() < deadline:
                time.sleep(0.02)
            assert open_sockets() <= before
        finally:
            gc.enable()


def test_a_server_that_does_not_begin_well_is_named(parts, tmp_path):
    with Hostile(lambda path, body: as_json({} if path == "/model_info" else [])) as server:
        with pytest.raises(ServerError, match="/generate: the reply cannot be read"):
            make_engine(parts, [server.url], tmp_path)


def test_a_cancelled_call_leaves_no_request(parts, tmp_path):
    started = threading.Event()

    def slow(path, body):
        if path == "/generate" and "rid" in body:
            started.set()
            return endless(b"data: ", b"")
        return Sampler(parts)(path, body)

    async def run(engine):
        async def all_of_it():
            async for _ in engine.generate(requests_of(parts, 2), Sampling(max_tokens=MOST)):
                pass

        task = asyncio.create_task(all_of_it())
        while not started.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with Hostile(slow) as server:
        asyncio.run(run(make_engine(parts, [server.url], tmp_path, timeout_s=30.0)))
        assert "/abort_request" in server.asked
