"""The rollout engine over SGLang servers: token-exact requests, checked replies.

Every sample is a request of its own. A prompt's first sample is sent ahead; the others follow once
it has its first token, so that the prefill of prompt and photo is computed once and cached. Both
prompts of a group go to one server. Prompt ids are sent with one image pad a photo and are never
re-tokenised.

A reply counts only once it is checked (rollout/replies.py); otherwise the sample is drawn again, on
another server where there is one. Faults that can pass by themselves (a lost connection, a 5xx, a
time-out) are tried again with growing pauses. A server of ours that has died or hangs is restarted
with the current weights.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from uuid import uuid4

import httpx
import torch
from torch import Tensor

from tercet.core.data.vision import PromptEncoder, data_uri
from tercet.core.models import checkpoint_names, family_of
from tercet.core.types import Completion, PolicyParts, Request
from tercet.rollout.endpoint import TRIES, Endpoint, Session, SharedSession, pause
from tercet.rollout.engine import Sampling, sample_seed, together
from tercet.rollout.exchange import Again, Refused
from tercet.rollout.replies import Expected, Generated, Unfit, checked_sample, read
from tercet.rollout.server import ServerError, stop_all
from tercet.rollout.weights import WeightSync

SETTLE_S = 10.0
"""Longest wait for servers to release GPU memory."""
SETTLE_POLL_S = 0.2


@dataclass
class _Job:
    """A request in flight, and what its samples share."""

    request: Request
    endpoint: Endpoint
    sampling: Sampling
    done: asyncio.Queue[Completion | None]
    """Where finished samples go."""
    body: dict | None = None
    """Body of the HTTP requests; None before the first one is sent."""
    prompt_tokens: int = 0
    """The trainer's count, image tokens included."""
    prefilled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the first sample has a token."""


class SglangEngine:
    """Engine on one or several SGLang servers.

    Args:
        parts: the policy, for its stop and image tokens.
        encoder: the trainer's; it counts the tokens that a prompt must have.
        endpoints: the servers.
        sync: sends weights to them.
        weights: gives the policy's current weights, for a server that has been restarted.
        concurrency: most requests in flight, over all servers.

    Raises:
        ServerError: a server that does not answer.
        ValueError: no server, or two with one address.
    """

    def __init__(
        self,
        parts: PolicyParts,
        encoder: PromptEncoder,
        endpoints: Sequence[Endpoint],
        sync: WeightSync,
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        *,
        concurrency: int = 256,
    ):
        self.weight_version = 0
        self.cached_tokens = 0
        """Prompt tokens that servers had cached, over all replies that counted."""
        self.prompt_tokens = 0
        """Prompt tokens, over all replies that counted."""
        self.redrawn: Counter[str] = Counter()
        """Samples drawn again because of what was drawn, by the reason."""
        self._parts, self._encoder = parts, encoder
        self._endpoints, self._sync, self._weights = endpoints, sync, weights
        addresses = [e.url for e in self._endpoints]
        if not addresses or len(set(addresses)) < len(addresses):
            raise ValueError(f"rollout.urls: no server, or one address twice: {addresses}")
        self._shared = SharedSession(concurrency, endpoints[0].headers)
        self._hashes = family_of(parts.model.config).SERVER_HASHES
        vocabulary = parts.model.get_output_embeddings().weight.shape[0]
        self._expected = Expected(vocabulary, parts.stop_ids, parts.banned_ids)
        self._version_name = "default"  # SGLang's name for the weights that a server starts with
        self._running: dict[str, asyncio.Task] = {}
        """By request id."""
        for endpoint in self._endpoints:
            endpoint.check()
        self.full_vocabulary = self._probe(self._endpoints[0])
        """Whether the servers take log-probs before top_p and top_k act (see Engine)."""

    async def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> AsyncIterator[Completion]:
        """Yield each sample as soon as it is finished; several calls may run at once.

        Raises:
            ServerError: a server refuses a request, or gives no good reply in TRIES attempts.
        """
        finished: asyncio.Queue[Completion | None] = asyncio.Queue()
        async with self._shared.use() as session:
            task = asyncio.create_task(self._run_all(session, requests, sampling, finished))
            task.add_done_callback(lambda _: finished.put_nowait(None))
            try:
                while (completion := await finished.get()) is not None:
                    yield completion
                await task
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop these requests; their unfinished samples are not yielded."""
        for request_id in request_ids:
            if request_id in self._running:
                self._running[request_id].cancel()

    def update_weights(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Send the weights to every server and check that each one has them.

        After a failure, servers of ours that are down are restarted and all weights are sent once
        more.

        Raises:
            ServerError, httpx.HTTPError, RuntimeError: the second attempt failed too.
        """
        try:
            self._load(self._endpoints, named_weights, version)
        except (httpx.HTTPError, RuntimeError):
            for endpoint in self._endpoints:
                if endpoint.server is not None and not endpoint.server.is_healthy():
                    endpoint.restart()
            self._load(self._endpoints, self._weights(), version)
        self._version_name = str(version)
        self.weight_version = version

    def sleep(self) -> None:
        """Wait until the servers are idle and let them release their memory."""
        for endpoint in self._endpoints:
            endpoint.sleep()
        _wait_for_memory()

    def wake(self) -> None:
        """Let the servers take their memory back; they have no weights until the next update."""
        for endpoint in self._endpoints:
            endpoint.wake()

    def close(self) -> None:
        """Stop the servers that are ours, and wake the others if they answer."""
        for endpoint in self._endpoints:
            endpoint.hurry()
        self._sync.close()
        for endpoint in self._endpoints:
            if endpoint.server is None:
                with suppress(ServerError, httpx.HTTPError):
                    endpoint.wake()
        stop_all([e.server for e in self._endpoints if e.server is not None])

    async def _run_all(
        self,
        session: Session,
        requests: Sequence[Request],
        sampling: Sampling,
        done: asyncio.Queue,
    ) -> None:
        """Run all requests; those of a group go to the server with the fewest samples."""
        places: dict[str, Endpoint] = {}
        for request in requests:
            if request.group_id not in places:
                places[request.group_id] = min(self._endpoints, key=lambda e: e.load)
            places[request.group_id].load += request.n
        try:
            async with together() as tasks:
                for request in requests:
                    job = _Job(request, places[request.group_id], sampling, done)
                    self._running[request.id] = tasks.create_task(self._run(session, job))
        finally:
            for request in requests:
                self._running.pop(request.id, None)
                places[request.group_id].load -= request.n

    def _body(self, request: Request, sampling: Sampling) -> dict:
        """The part of the body that is the same for all samples of a request."""
        return {
            "input_ids": list(request.prompt_ids),
            **self._photos(request.images),
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "max_new_tokens": sampling.max_tokens,
                "stop_token_ids": list(self._parts.stop_ids),
                "skip_special_tokens": False,
                "no_stop_trim": True,
                # Only two messages: one at the first token and one at the end.
                "stream_interval": sampling.max_tokens,
            },
            "return_logprob": True,
        }

    def _photos(self, images: Sequence[str]) -> dict:
        """Photos under names of these weights: a server reuses features of photos that it knows."""
        if not self._hashes:
            return {"image_data": [data_uri(i, f"{self.weight_version}") for i in images] or None}
        return {
            "image_data": [data_uri(image) for image in images] or None,
            "mm_hashes": [self._photo_hash(image) for image in images] or None,
        }

    def _photo_hash(self, image: str) -> str:
        """Hash of a photo and the weight version, a key of the server's caches."""
        text = f"{self.weight_version} {data_uri(image)}"
        return blake2b(text.encode(), digest_size=8).hexdigest()

    async def _run(self, session: Session, job: _Job) -> None:
        """Run the samples of a request, the first one ahead of the others."""

        async def sample(j: int) -> None:
            if j:
                await job.prefilled.wait()
            async with session.places:
                if job.body is None:  # made late, since photos are large
                    job.body = self._body(job.request, job.sampling)
                    prompt = self._encoder(job.request.prompt_ids, job.request.images)
                    job.prompt_tokens = len(prompt)
                job.done.put_nowait(await self._sample(session, job, j))

        async with together() as tasks:
            for j in range(job.request.n):
                tasks.create_task(sample(j))

    async def _sample(self, session: Session, job: _Job, j: int) -> Completion:
        """One sample, drawn again until its reply counts; ServerError after TRIES attempts."""
        endpoint, request, reason = job.endpoint, job.request, ""
        for attempt in range(TRIES):
            index = j + attempt * request.n  # another seed, else the same sample comes again
            seed = sample_seed(request.seed, request.step, request.id, index)
            sampling = job.body["sampling_params"] | {"sampling_seed": seed}
            # A new one every time: SGLang aborts a streamed rid once more 2 s after its end.
            rid = f"{request.id}.{j}.{uuid4().hex}"
            body = job.body | {"rid": rid, "sampling_params": sampling}
            restarts = endpoint.restarts
            try:
                if j or request.n == 1:
                    reply = await endpoint.ask(session.client, "/generate", body)
                else:
                    on_first = job.prefilled.set  # lets the other samples start
                    body |= {"stream": True}
                    reply = await endpoint.stream(session.client, "/generate", body, on_first)
                return self._completion(job, j, reply)
            except Unfit as error:
                self.redrawn["an image token"] += 1
                reason = f"{endpoint.url}: {error}"
                continue
            except Again as error:
                reason = f"{endpoint.url}: {error}"
            except Refused as error:
                raise ServerError(str(error), error.status) from None
            except httpx.TransportError as error:
                reason = f"{endpoint.url}: {type(error).__name__}: {error}"
                await self._revive(session, endpoint, restarts)
                if isinstance(error, httpx.ReadTimeout) and endpoint.restarts == restarts:
                    self.redrawn["a time-out"] += 1  # else the server hung, whatever was drawn
                await endpoint.abort(session.client, rid)
            except asyncio.CancelledError:
                await endpoint.abort(session.client, rid)
                raise
            if attempt < TRIES - 1:
                await pause(attempt)
            endpoint = self._other(endpoint)
        raise ServerError(f"sample {j} of {request.id} failed {TRIES} times: {reason}")

    def _other(self, endpoint: Endpoint) -> Endpoint:
        """The server with the fewest samples among the others; the same where there is no other."""
        others = [e for e in self._endpoints if e is not endpoint]
        return min(others, key=lambda e: e.load, default=endpoint)

    def _completion(self, job: _Job, j: int, reply: bytes) -> Completion:
        """A reply as a completion, once it is checked; raises Again where it does not count."""
        about = checked_sample(
            reply,
            self._expected,
            prompt_tokens=job.prompt_tokens,
            most_tokens=job.sampling.max_tokens,
            version=self._version_name,
        )
        logprobs, tokens, _ = zip(*about.output_token_logprobs, strict=True)
        self.prompt_tokens += job.prompt_tokens
        self.cached_tokens += about.cached_tokens
        return Completion(
            request_id=job.request.id,
            index=j,
            token_ids=tokens,
            rollout_logprobs=logprobs,
            finish_reason="stop" if tokens[-1] in self._parts.stop_ids else "length",
            weight_version=self.weight_version,
        )

    def _probe(self, endpoint: Endpoint) -> bool:
        """Whether log-probs are taken before top_p: with one token left after it, not 0.

        Raises:
            ServerError: the server gives no good reply.
        """
        sampling = {"temperature": 2.0, "top_p": 1e-6, "max_new_tokens": 1}
        body = {"input_ids": list(self._parts.stop_ids), "sampling_params": sampling}

        def logprob(content: bytes) -> float:
            about = read(Generated, content).meta_info
            if about is None or len(about.output_token_logprobs) != 1:
                raise Again("the reply to a request for one token holds another number of them")
            return about.output_token_logprobs[0][0]

        return endpoint.generate(body | {"return_logprob": True}, logprob) < -1e-6

    async def _revive(self, session: Session, endpoint: Endpoint, restarts: int) -> None:
        """Restart a server of ours that has died or hangs, and send it the current weights.

        Args:
            restarts: `endpoint.restarts` when the failed request was sent. If it has grown since,
                another request has had the server restarted.
        """
        async with session.restarting[endpoint.url]:
            if endpoint.server is None or endpoint.restarts > restarts:
                return
            if await asyncio.to_thread(endpoint.server.is_healthy):
                return
            await asyncio.to_thread(endpoint.restart)
            if self._version_name != "default":
                # With a sharded policy this is a collective. The other ranks wait in Ranks.share
                # for this rank's groups, and self._weights() asks them to join in. It runs in a
                # thread, so that replies of the other servers are still received meanwhile.
                async with session.loading:
                    weights = self._weights()
                    await asyncio.to_thread(self._load, [endpoint], weights, self.weight_version)

    def _load(
        self,
        endpoints: Sequence[Endpoint],
        named_weights: Iterator[tuple[str, Tensor]],
        version: int,
    ) -> None:
        """Send weights to some servers and check their version; reads the weights to their end."""
        try:
            named = checkpoint_names(self._parts.model.config, named_weights)
            self._sync.send(endpoints, named, version)
        finally:
            deque(named_weights, maxlen=0)  # the other ranks gather each weight with this one
        for endpoint in endpoints:
            if (found := endpoint.version()) != str(version):
                raise ServerError(
                    f"{endpoint.url} has weights {found[:40]} after an update to {version}"
                )


def _wait_for_memory() -> None:
    """Wait until the GPU's free memory stops growing: servers answer before they release it."""
    if not torch.cuda.is_available():
        return
    deadline = time.monotonic() + SETTLE_S
    free = -1
    while (now := torch.cuda.mem_get_info()[0]) > free and time.monotonic() < deadline:
        free = now
        time.sleep(SETTLE_POLL_S)
