"""The rollout engine over SGLang servers: token-exact requests, checked replies.

Every sample is a request of its own. The first one of a prompt goes ahead until its first token is
there, so that the photo's prefill is computed once and cached; the others follow. Both prompts of
a group go to one server. Ids are sent with one image pad a photo and are never re-tokenised.

A reply counts only if it has the number of prompt tokens that the trainer counts, log-probs for
all of its tokens, no image token among them and the expected weight version; else the sample is
drawn again. What can pass by itself (a lost connection, a 5xx, a time-out) is tried again with
growing pauses; a server of ours that has died or hangs is restarted with the current weights.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from uuid import uuid4

import httpx
import torch
from torch import Tensor

from tercet.core.data.vision import PromptEncoder, data_uri
from tercet.core.models import checkpoint_names
from tercet.core.types import Completion, PolicyParts, Request
from tercet.rollout.endpoint import TRIES, Again, Endpoint, Session, SharedSession, pause
from tercet.rollout.engine import Sampling, sample_seed, together
from tercet.rollout.server import ServerError, stop_all
from tercet.rollout.weights import WeightSync

SETTLE_S = 10.0
SETTLE_POLL_S = 0.2


class _Unfit(Exception):
    """A sample that the policy must not have drawn."""


@dataclass
class _Job:
    """A request on its way: what all of its samples send and must find."""

    request: Request
    endpoint: Endpoint
    sampling: Sampling
    done: asyncio.Queue[Completion | None]
    body: dict | None = None
    prompt_tokens: int = 0
    prefilled: asyncio.Event = field(default_factory=asyncio.Event)


class SglangEngine:
    """Engine on one or several SGLang servers.

    Args:
        parts: the policy: its stop and image tokens.
        encoder: the trainer's, which says how many tokens a prompt must have.
        endpoints: the servers.
        sync: how weights reach them.
        weights: the policy's weights as they are, for a server that had to be restarted.
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
        """Prompt tokens that servers found cached, of all replies that counted."""
        self.prompt_tokens = 0
        """Prompt tokens of all replies that counted."""
        self._parts, self._encoder = parts, encoder
        self._endpoints, self._sync, self._weights = endpoints, sync, weights
        addresses = [e.url for e in self._endpoints]
        if not addresses or len(set(addresses)) < len(addresses):
            raise ValueError(f"rollout.urls: no server, or one address twice: {addresses}")
        first = endpoints[0]
        self._shared = SharedSession(first.timeout_s, concurrency, first.headers)
        self._version_name = "default"  # what servers call the weights they start with
        self._running: dict[str, asyncio.Task] = {}
        for endpoint in self._endpoints:
            endpoint.check()
        self.full_vocabulary = self._probe(self._endpoints[0])
        """Whether the servers' log-probs are those before top_p and top_k, as ours must be."""

    async def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> AsyncIterator[Completion]:
        """Yield each sample as soon as it is finished; several calls may run at once.

        Raises:
            ServerError: a server does not answer rightly, however often it is asked.
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
        """Stop these requests: what of them is not finished is not yielded."""
        for request_id in request_ids:
            if request_id in self._running:
                self._running[request_id].cancel()

    def update_weights(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Send the weights to every server and check that each one has them.

        Raises:
            ServerError, httpx.HTTPError, RuntimeError: twice in a row it did not work.
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
        """Let the servers release their memory, once they are idle."""
        for endpoint in self._endpoints:
            endpoint.sleep()
        _wait_for_memory()

    def wake(self) -> None:
        """Let the servers take their memory back; their weights are empty until the next update."""
        for endpoint in self._endpoints:
            endpoint.wake()

    def close(self) -> None:
        """Stop the servers that are ours; leave the others awake, as far as they can be told."""
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
        """All samples of all requests; a group's go to the server with the fewest."""
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
        """What all samples of a request send."""
        return {
            "input_ids": list(request.prompt_ids),
            "image_data": [data_uri(image) for image in request.images] or None,
            # Else the features of a photo outlive the vision tower that they were computed with.
            "mm_hashes": [self._photo_hash(image) for image in request.images] or None,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "max_new_tokens": sampling.max_tokens,
                "stop_token_ids": list(self._parts.stop_ids),
                "skip_special_tokens": False,
                "no_stop_trim": True,
                # A message at the first token and one at the end.
                "stream_interval": sampling.max_tokens,
            },
            "return_logprob": True,
        }

    def _photo_hash(self, image: str) -> str:
        """Name of a photo at these weights, for the server's caches."""
        text = f"{self.weight_version} {data_uri(image)}"
        return blake2b(text.encode(), digest_size=8).hexdigest()

    async def _run(self, session: Session, job: _Job) -> None:
        """A request's samples, the first one ahead."""

        async def sample(j: int) -> None:
            if j:
                await job.prefilled.wait()
            async with session.places:
                if job.body is None:  # not before its turn: photos are large
                    job.body = self._body(job.request, job.sampling)
                    prompt = self._encoder(job.request.prompt_ids, job.request.images)
                    job.prompt_tokens = len(prompt)
                job.done.put_nowait(await self._sample(session, job, j))

        async with together() as tasks:
            for j in range(job.request.n):
                tasks.create_task(sample(j))

    async def _sample(self, session: Session, job: _Job, j: int) -> Completion:
        """One sample, drawn until it is right."""
        endpoint, request, reason = job.endpoint, job.request, ""
        for attempt in range(TRIES):
            index = j + attempt * request.n  # a server with seeds must draw another one
            seed = sample_seed(request.seed, request.step, request.id, index)
            sampling = job.body["sampling_params"] | {"sampling_seed": seed}
            # Never the same twice: a server aborts a streamed rid again 2 s after its end.
            rid = f"{request.id}.{j}.{uuid4().hex}"
            body = job.body | {"rid": rid, "sampling_params": sampling}
            restarts = endpoint.restarts
            try:
                if j or request.n == 1:
                    reply = await endpoint.ask(session.client, "/generate", body)
                else:
                    reply = await self._prefill(session, job, body)
                return self._completion(job, j, reply)
            except _Unfit as error:
                reason = str(error)
                continue
            except Again as error:
                reason = str(error)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
                await self._revive(session, endpoint, restarts)
                await endpoint.abort(session.client, rid)
            except asyncio.CancelledError:
                await endpoint.abort(session.client, rid)
                raise
            await pause(attempt)
        raise ServerError(
            f"{endpoint.url}: sample {j} of {request.id} failed {TRIES} times: {reason}"
        )

    async def _prefill(self, session: Session, job: _Job, body: dict) -> dict:
        """Reply to a prompt's first sample; the others may start at its first token."""
        reply: dict = {}
        body = body | {"stream": True}
        async for message in job.endpoint.stream(session.client, "/generate", body):
            reply = message
            job.prefilled.set()
        return reply

    def _completion(self, job: _Job, j: int, reply: dict) -> Completion:
        """A checked reply as a completion; raises Again for one that must not count."""
        about = reply.get("meta_info")
        if not about:
            raise Again("the reply is empty")
        reason = (about.get("finish_reason") or {}).get("type")
        if reason not in ("stop", "length"):
            raise Again(f"it ended with {reason}")
        if about.get("prompt_tokens") != job.prompt_tokens:
            raise ServerError(
                f"request {job.request.id}: {job.endpoint.url} counts {about.get('prompt_tokens')} "
                f"prompt tokens, the trainer {job.prompt_tokens}: image settings differ"
            )
        if str(about.get("weight_version")) != self._version_name:
            raise Again(f"weights of version {about.get('weight_version')}")
        entries = about.get("output_token_logprobs") or []
        tokens = tuple(int(entry[1]) for entry in entries)
        if len(tokens) != about.get("completion_tokens") or not tokens:
            raise Again(f"{len(tokens)} log-probs for {about.get('completion_tokens')} tokens")
        if banned := set(tokens) & set(self._parts.banned_ids):
            raise _Unfit(f"it holds image token(s) {sorted(banned)}")
        self.prompt_tokens += job.prompt_tokens
        self.cached_tokens += about.get("cached_tokens", 0)
        return Completion(
            request_id=job.request.id,
            index=j,
            token_ids=tokens,
            rollout_logprobs=tuple(float(entry[0]) for entry in entries),
            finish_reason="stop" if tokens[-1] in self._parts.stop_ids else "length",
            weight_version=self.weight_version,
        )

    def _probe(self, endpoint: Endpoint) -> bool:
        """Whether the log-prob of a nucleus of one token is that of the full vocabulary, not 0."""
        sampling = {"temperature": 2.0, "top_p": 1e-6, "max_new_tokens": 1}
        body = {"input_ids": list(self._parts.stop_ids), "sampling_params": sampling}
        reply = endpoint.post("/generate", body | {"return_logprob": True})
        return reply["meta_info"]["output_token_logprobs"][0][0] < -1e-6

    async def _revive(self, session: Session, endpoint: Endpoint, restarts: int) -> None:
        """Restart a server of ours that has died or hangs, with the current weights.

        `restarts` it had when the failed request was sent: with more, it is a new one already.
        """
        async with session.restarting[endpoint.url]:
            if endpoint.server is None or endpoint.restarts > restarts:
                return
            if await asyncio.to_thread(endpoint.server.is_healthy):
                return
            await asyncio.to_thread(endpoint.restart)
            if self._version_name != "default":
                async with session.loading:
                    weights = self._weights()
                    await asyncio.to_thread(self._load, [endpoint], weights, self.weight_version)

    def _load(
        self,
        endpoints: Sequence[Endpoint],
        named_weights: Iterator[tuple[str, Tensor]],
        version: int,
    ) -> None:
        try:
            named = checkpoint_names(self._parts.model.config, named_weights)
            self._sync.send(endpoints, named, version)
        finally:
            deque(named_weights, maxlen=0)  # to its end: other ranks may put weights together too
        for endpoint in endpoints:
            found = str(endpoint.get("/model_info").get("weight_version"))
            if found != str(version):
                raise ServerError(
                    f"{endpoint.url} has weights {found} after an update to {version}"
                )


def _wait_for_memory() -> None:
    """Wait while the GPU's free memory still grows: servers answer before they have released it."""
    if not torch.cuda.is_available():
        return
    deadline = time.monotonic() + SETTLE_S
    free = -1
    while (now := torch.cuda.mem_get_info()[0]) > free and time.monotonic() < deadline:
        free = now
        time.sleep(SETTLE_POLL_S)
