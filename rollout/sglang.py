"""The rollout engine over SGLang servers: token-exact requests, checked replies, weights by disk.

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
import base64
import json
import shlex
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import httpx
from torch import Tensor

from tercet.core.config import RolloutConfig
from tercet.core.model import PolicyParts
from tercet.core.types import Completion, Request
from tercet.core.vision import PromptEncoder, load_image
from tercet.rollout.engine import Sampling
from tercet.rollout.server import CONNECT_S, Endpoint, Server, ServerError
from tercet.rollout.weights import write_weights

TRIES = 5
FIRST_PAUSE_S = 0.5
SAME_PIXELS = ("--image-processor-backend", "pil")
"""The trainer's image processor; torchvision's resizes differently, by up to 4e-4 in a log-prob."""
POLICY = "policy"  # folder with what a weight folder needs beside weights


class _Again(Exception):
    """A sample that must be drawn again; says why."""


def open_engine(
    parts: PolicyParts, encoder: PromptEncoder, config: RolloutConfig, work_dir: Path
) -> SglangEngine:
    """The engine that the options ask for; starts a server where none runs.

    Args:
        parts, encoder: as `SglangEngine` takes them.
        config: its sglang options are used.
        work_dir: for the server's log and files, and for the weights on their way.

    Raises:
        ValueError: neither or both of sglang_python and urls.
        ServerError: a server that does not start or does not answer.
    """
    if bool(config.sglang_python) == bool(config.urls):
        raise ValueError(
            "rollout.engine sglang needs rollout.sglang_python, to start a server, or rollout.urls"
        )
    servers = []
    if config.sglang_python:
        parts.save(work_dir / POLICY)
        server = Server(
            work_dir / POLICY,
            config.sglang_python,
            work_dir / "server",
            arguments=[*SAME_PIXELS, *shlex.split(config.sglang_args)],
            api_key=config.api_key,
            start_timeout_s=config.start_timeout_s,
        )
        server.start()
        servers.append(server)
    return SglangEngine(
        parts,
        encoder,
        servers=servers,
        urls=config.urls,
        work_dir=work_dir,
        concurrency=config.max_in_flight,
        timeout_s=config.request_timeout_s,
        api_key=config.api_key,
    )


class SglangEngine:
    """Engine on one or several SGLang servers.

    Args:
        parts: the policy: its stop and image tokens, and what a weight folder holds beside weights.
        encoder: the trainer's, which says how many tokens a prompt must have.
        servers: started servers of ours.
        urls: servers that run already; they are never restarted.
        work_dir: where weights are written for the servers (best a memory file system).
        concurrency: most requests in flight, over all servers.
        timeout_s: longest that one sample may take.
        api_key: sent with every request when given.
    """

    def __init__(
        self,
        parts: PolicyParts,
        encoder: PromptEncoder,
        *,
        servers: Sequence[Server] = (),
        urls: Sequence[str] = (),
        work_dir: str | Path,
        concurrency: int = 256,
        timeout_s: float = 600.0,
        api_key: str | None = None,
    ):
        self.weight_version = 0
        self.cached_tokens = 0
        """Prompt tokens that servers found cached, since the engine was made."""
        self._parts, self._encoder = parts, encoder
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        of_all = {"headers": self._headers, "timeout_s": timeout_s}
        self._endpoints = [Endpoint(s.url, s, **of_all) for s in servers]
        self._endpoints += [Endpoint(url.rstrip("/"), None, **of_all) for url in urls]
        addresses = [e.url for e in self._endpoints]
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"rollout.urls: one address stands there twice: {addresses}")
        self._work_dir = Path(work_dir)
        self._concurrency, self._timeout_s = concurrency, timeout_s
        self._weights: Path | None = None
        self._aborted: set[str] = set()
        for endpoint in self._endpoints:
            endpoint.check()

    async def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> AsyncIterator[Completion]:
        """Yield each sample as soon as it is finished; see `Engine`.

        Raises:
            ServerError: a server does not answer rightly, however often it is asked.
        """
        self._aborted.difference_update(request.id for request in requests)
        places = {group: n for n, group in enumerate(dict.fromkeys(r.group_id for r in requests))}
        for endpoint in self._endpoints:
            endpoint.lock = asyncio.Lock()
        finished: asyncio.Queue[Completion | None] = asyncio.Queue()
        slots = asyncio.Semaphore(self._concurrency)
        timeout = httpx.Timeout(self._timeout_s, connect=CONNECT_S)
        limits = httpx.Limits(max_connections=self._concurrency)
        async with httpx.AsyncClient(
            timeout=timeout, limits=limits, headers=self._headers, trust_env=False
        ) as client:

            async def run(request: Request) -> None:
                endpoint = self._endpoints[places[request.group_id] % len(self._endpoints)]
                prefilled = asyncio.Event()

                async def sample(j: int) -> None:
                    if j:
                        await prefilled.wait()
                    async with slots:
                        done = await self._sample(client, endpoint, request, j, sampling, prefilled)
                    if done is not None:
                        finished.put_nowait(done)

                await _gather(sample(j) for j in range(request.n))

            async def run_all() -> None:
                try:
                    await _gather(run(request) for request in requests)
                finally:
                    finished.put_nowait(None)

            task = asyncio.create_task(run_all())
            try:
                while (completion := await finished.get()) is not None:
                    yield completion
                await task
            finally:
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    await self._abort_all(client)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop these requests: what of them is not finished is not yielded."""
        self._aborted.update(request_ids)

    def update_weights(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Write the weights to disk, let every server load them, and check that each one did."""
        folder = self._work_dir / f"weights_{version % 2}"
        write_weights(named_weights, self._config_folder(), folder)
        self._weights = folder
        for endpoint in self._endpoints:
            try:
                self._load(endpoint, version)
            except (httpx.TransportError, ServerError):
                if endpoint.server is None:
                    raise
                endpoint.server.restart()
                self._load(endpoint, version)
        self.weight_version = version

    def sleep(self) -> None:
        """Let the servers release their memory."""
        for endpoint in self._endpoints:
            endpoint.post("/release_memory_occupation", {})

    def wake(self) -> None:
        """Let the servers take their memory back; their weights are empty until the next update."""
        for endpoint in self._endpoints:
            endpoint.post("/resume_memory_occupation", {})

    def close(self) -> None:
        """Stop the servers that are ours."""
        for endpoint in self._endpoints:
            if endpoint.server is not None:
                endpoint.server.stop()

    async def _sample(
        self,
        client: httpx.AsyncClient,
        endpoint: Endpoint,
        request: Request,
        j: int,
        sampling: Sampling,
        prefilled: asyncio.Event,
    ) -> Completion | None:
        """One sample, drawn until it is right; None where it was aborted."""
        reason = ""
        for attempt in range(TRIES):
            if request.id in self._aborted:
                prefilled.set()
                return None
            if attempt:
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            body = self._body(request, f"{request.id}.{j}.{attempt}", sampling)
            try:
                reply = await self._ask(client, endpoint, body, prefilled)
                return self._completion(request, j, reply)
            except _Again as error:
                reason = str(error)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
                await self._revive(endpoint)
        prefilled.set()
        raise ServerError(
            f"{endpoint.url}: sample {j} of {request.id} failed {TRIES} times: {reason}"
        )

    async def _ask(
        self, client: httpx.AsyncClient, endpoint: Endpoint, body: dict, prefilled: asyncio.Event
    ) -> dict:
        """The last message of a streamed reply; `prefilled` is set at the first."""
        last = None
        async with client.stream("POST", f"{endpoint.url}/generate", json=body) as reply:
            if reply.status_code >= 500 or reply.status_code == 429:
                raise _Again(f"status {reply.status_code}")
            if reply.status_code != 200:
                text = (await reply.aread()).decode(errors="replace")[:500]
                raise ServerError(f"{endpoint.url} refused a request: {reply.status_code} {text}")
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    break
                if line.startswith("data: "):
                    try:
                        last = json.loads(line.removeprefix("data: "))
                    except json.JSONDecodeError:
                        raise _Again("the reply is cut") from None
                    prefilled.set()
        if last is None or "error" in last:
            raise _Again(str((last or {}).get("error", "the reply is empty"))[:300])
        return last

    def _body(self, request: Request, rid: str, sampling: Sampling) -> dict:
        return {
            "rid": rid,
            "input_ids": list(request.prompt_ids),
            "image_data": [_data_uri(image) for image in request.images] or None,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "max_new_tokens": sampling.max_tokens,
                "stop_token_ids": list(self._parts.stop_ids),
                "skip_special_tokens": False,
                "no_stop_trim": True,
            },
            "return_logprob": True,
            "stream": True,
        }

    def _completion(self, request: Request, j: int, reply: dict) -> Completion:
        """A checked reply as a completion; raises _Again for one that must not count."""
        about = reply.get("meta_info", {})
        expected = len(self._encoder(request.prompt_ids, request.images))
        if about.get("prompt_tokens") != expected:
            raise ServerError(
                f"request {request.id}: the server counts {about.get('prompt_tokens')} prompt "
                f"tokens, the trainer {expected}: image settings differ"
            )
        if str(about.get("weight_version")) != self._version_name(self.weight_version):
            raise _Again(f"weights of version {about.get('weight_version')}")
        reason = (about.get("finish_reason") or {}).get("type")
        if reason not in ("stop", "length"):
            raise _Again(f"it ended with {reason}")
        entries = about.get("output_token_logprobs") or []
        tokens = tuple(int(entry[1]) for entry in entries)
        if len(tokens) != about.get("completion_tokens") or not tokens:
            raise _Again(f"{len(tokens)} log-probs for {about.get('completion_tokens')} tokens")
        if banned := set(tokens) & set(self._parts.banned_ids):
            raise _Again(f"it holds image token(s) {sorted(banned)}")
        self.cached_tokens += about.get("cached_tokens", 0)
        return Completion(
            request_id=request.id,
            index=j,
            token_ids=tokens,
            rollout_logprobs=tuple(float(entry[0]) for entry in entries),
            finish_reason="stop" if tokens[-1] in self._parts.stop_ids else "length",
            weight_version=self.weight_version,
        )

    async def _revive(self, endpoint: Endpoint) -> None:
        """Restart a server of ours that has died or hangs, with the current weights."""
        async with endpoint.lock:
            server = endpoint.server
            if server is None or (server.is_running() and server.is_healthy()):
                return
            await asyncio.to_thread(server.restart)
            if self._weights is not None:
                await asyncio.to_thread(self._load, endpoint, self.weight_version)

    async def _abort_all(self, client: httpx.AsyncClient) -> None:
        for endpoint in self._endpoints:
            try:
                await client.post(
                    f"{endpoint.url}/abort_request", json={"abort_all": True}, timeout=CONNECT_S
                )
            except httpx.HTTPError:
                pass  # it runs into its own limits

    def _version_name(self, version: int) -> str:
        """What servers call a version; before the first update they have their own name for it."""
        return str(version) if self._weights is not None else "default"

    def _config_folder(self) -> Path:
        folder = self._work_dir / POLICY
        if not folder.exists():
            self._parts.save(folder)
        return folder

    def _load(self, endpoint: Endpoint, version: int) -> None:
        body = {"model_path": str(self._weights.resolve()), "weight_version": str(version)}
        reply = endpoint.post("/update_weights_from_disk", body | {"flush_cache": True})
        if not reply.get("success", False):
            raise ServerError(
                f"{endpoint.url} did not load {self._weights}: {reply.get('message')}"
            )
        found = str(endpoint.get("/model_info").get("weight_version"))
        if found != str(version):
            raise ServerError(f"{endpoint.url} has weights {found} after an update to {version}")


async def _gather(coroutines: Iterable) -> None:
    """Run all; the first error cancels the others and goes on as it is."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@lru_cache(maxsize=1024)
def _data_uri(image: str) -> str:
    """A photo as PNG: the very pixels that the trainer sees."""
    buffer = BytesIO()
    load_image(image).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
