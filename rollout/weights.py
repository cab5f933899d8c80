"""Sending the policy's weights to servers: over the disk, by broadcast, or as memory handles.

`open_sync` gives one of three ways. `disk` writes safetensors that the servers read. `distributed`
broadcasts buckets in a process group of trainer and servers (NCCL, where servers have GPUs of their
own; gloo on a CPU). `tensor` passes buckets on one host (CUDA IPC: no copy leaves the GPU).

Weights have the names of published checkpoints, which servers know (core.models.checkpoint_names).
A tied head is not among them: servers tie it themselves.
"""

from __future__ import annotations

import base64
import io
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import httpx
import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, TCPStore
from torch.distributed import distributed_c10d as c10d
from torch.multiprocessing import reductions

from tercet.rollout.endpoint import Endpoint
from tercet.rollout.exchange import wait
from tercet.rollout.server import ServerError
from tercet.rollout.weight_folder import NamedWeights, buckets, own_folder, write_weights

Value = TypeVar("Value")
Way = Literal["disk", "distributed", "tensor"]
POLL_S = 0.005
UUID_PLACE = 6  # index of the device in the arguments by which torch rebuilds a CUDA tensor


class WeightSync(Protocol):
    """One way for weights to reach servers."""

    def send(
        self, endpoints: Sequence[Endpoint], named_weights: NamedWeights, version: int
    ) -> None:
        """Load weights into every server and name them by their version.

        Raises:
            ServerError, httpx.HTTPError, RuntimeError: it failed; some servers may have them.
        """
        ...

    def close(self) -> None:
        """Release what is kept between two updates; `send` may be called again."""
        ...


def open_sync(
    way: Way,
    *,
    parent: Path,
    config_from: Path,
    bucket_bytes: int = 512 << 20,
    host: str = "127.0.0.1",
    timeout_s: float = 600.0,
) -> WeightSync:
    """The weight sync that is asked for.

    Args:
        way: `disk`, `distributed` or `tensor`.
        parent: folder in which `disk` writes; every server must see it.
        config_from: Hugging Face folder; `disk` copies its other files (configuration, tokenizer).
        bucket_bytes: most bytes of a file or a bucket.
        host: address of this machine at which servers join the group of `distributed`.
        timeout_s: longest that a broadcast may take.

    Raises:
        ValueError: another way.
    """
    if way == "disk":
        return DiskSync(parent.resolve(), config_from, bucket_bytes)
    if way == "distributed":
        return DistributedSync(bucket_bytes, host, timeout_s)
    if way == "tensor":
        return TensorSync(bucket_bytes)
    raise ValueError(f"rollout.weight_sync must be disk, distributed or tensor, got {way!r}")


class DiskSync:
    """Writes a Hugging Face folder, lets every server load it, and removes it."""

    def __init__(self, parent: Path, config_from: Path, bucket_bytes: int):
        self._parent, self._config_from = parent, config_from
        self._bucket_bytes = bucket_bytes

    def send(
        self, endpoints: Sequence[Endpoint], named_weights: NamedWeights, version: int
    ) -> None:
        with own_folder(self._parent) as folder:
            write_weights(named_weights, self._config_from, folder, self._bucket_bytes)
            body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": True}
            _post_all(endpoints, "/update_weights_from_disk", body)

    def close(self) -> None:
        """Nothing is held."""


class DistributedSync:
    """Broadcasts from the trainer, rank 0 of a process group, to the servers' processes."""

    def __init__(self, bucket_bytes: int, host: str, timeout_s: float):
        self._bucket_bytes, self._host = bucket_bytes, host
        self._timeout = timedelta(seconds=timeout_s)
        self._group: c10d.Backend | None = None
        self._endpoints: Sequence[Endpoint] = ()
        self._members: tuple[str, ...] = ()
        """Address and process id of each server in the group."""
        self._name = ""

    def send(
        self, endpoints: Sequence[Endpoint], named_weights: NamedWeights, version: int
    ) -> None:
        try:
            with _update(endpoints):
                for bucket, last in _marked(buckets(named_weights, self._bucket_bytes)):
                    flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
                    self._join(endpoints, flat.device)
                    body = _about(bucket) | _ending(version, last)
                    body |= {"group_name": self._name, "load_format": "flattened_bucket"}
                    with _posting(endpoints, "/update_weights_from_distributed", body) as replies:
                        self._broadcast(flat, endpoints, replies)
        except BaseException:
            self._drop()  # its members no longer agree on what comes next
            raise

    def close(self) -> None:
        """Leave the group, and let the servers leave it if they answer."""
        if self._group is None:
            return
        try:
            body = {"group_name": self._name}
            _post_all(self._endpoints, "/destroy_weights_update_group", body)
        except (ServerError, httpx.HTTPError):
            pass
        self._drop()

    def _drop(self) -> None:
        """Give the group up without waiting for its members."""
        if self._group is None:
            return
        self._group.abort()  # NCCL: ends a broadcast that still waits
        # A gloo group waits for its peers when it is destroyed, and they may be gone: a thread
        # drops the last reference to it.
        held, self._group = [self._group], None
        threading.Thread(target=held.clear, daemon=True).start()

    def _join(self, endpoints: Sequence[Endpoint], device: torch.device) -> None:
        """Make the group of trainer and servers, unless there is one of the same members."""
        members = tuple(f"{e.url} {e.server and e.server.process_group}" for e in endpoints)
        if self._group is not None and members == self._members:
            return
        self._drop()
        sizes = [e.ranks() for e in endpoints]
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._name = f"tercet-{time.time_ns()}"  # new, as servers keep groups of dead trainers
        with socket.create_server((self._host, 0)) as listener:
            port = listener.getsockname()[1]
            store = TCPStore(
                self._host,
                port,
                is_master=True,
                timeout=self._timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        bodies = [
            {
                "master_address": self._host,
                "master_port": port,
                "rank_offset": 1 + sum(sizes[:place]),
                "world_size": 1 + sum(sizes),
                "group_name": self._name,
                "backend": backend,
            }
            for place in range(len(endpoints))
        ]
        # The prefixes that torch.distributed, which the servers use, puts before a group's keys.
        for prefix in (self._name, f"{self._name}/", f"{device.type}/"):
            store = PrefixStore(prefix, store)
        with _posting(endpoints, "/init_weights_update_group", *bodies) as replies:
            made = _in_thread(lambda: self._make(backend, store, 1 + sum(sizes)))
            _watch(endpoints, made.done, replies)
            self._group = made.result()
            _await(endpoints, replies)
        self._endpoints, self._members = endpoints, members

    def _make(self, backend: str, store: PrefixStore, size: int) -> c10d.Backend:
        # Not by torch.distributed.new_group, which only knows ranks of the trainer's default group.
        if backend == "nccl":
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            return c10d.ProcessGroupNCCL(store, 0, size, options)
        options = c10d.ProcessGroupGloo._Options()
        options._timeout = self._timeout
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=self._host)]
        return c10d.ProcessGroupGloo(store, 0, size, options)

    def _broadcast(
        self, flat: Tensor, endpoints: Sequence[Endpoint], replies: Sequence[Future]
    ) -> None:
        options = BroadcastOptions()
        options.rootRank = 0
        work = self._group.broadcast([flat], options)
        _watch(endpoints, work.is_completed, replies)
        work.wait()
        _await(endpoints, replies)


class TensorSync:
    """Passes tensors to servers on this host: on a GPU as handles of its memory."""

    def __init__(self, bucket_bytes: int):
        self._bucket_bytes = bucket_bytes

    def send(
        self, endpoints: Sequence[Endpoint], named_weights: NamedWeights, version: int
    ) -> None:
        with _update(endpoints):
            for bucket, last in _marked(buckets(named_weights, self._bucket_bytes)):
                payload = pickled(bucket)
                bodies = [
                    {"serialized_named_tensors": [payload] * e.ranks()} | _ending(version, last)
                    for e in endpoints
                ]
                _post_all(endpoints, "/update_weights_from_tensor", *bodies)

    def close(self) -> None:
        """Nothing is held."""


def pickled(bucket: list[tuple[str, Tensor]]) -> str:
    """Tensors pickled for SGLang, in base64: their bytes on a CPU, memory handles on a GPU."""
    buffer = io.BytesIO()
    on_gpu = bucket[0][1].is_cuda
    (_HandlePickler if on_gpu else pickle.Pickler)(buffer).dump(bucket)
    return base64.b64encode(buffer.getvalue()).decode()


class _HandlePickler(ForkingPickler):
    """Names a GPU by its UUID, since trainer and server may number GPUs differently."""

    def reducer_override(self, value):
        if not isinstance(value, Tensor):
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(value)
        device = torch.cuda.get_device_properties(arguments[UUID_PLACE])
        return rebuild, (
            *arguments[:UUID_PLACE],
            str(device.uuid),
            *arguments[UUID_PLACE + 1 :],
        )


def _about(bucket: list[tuple[str, Tensor]]) -> dict:
    """Names, dtypes and shapes of a bucket, as SGLang's request has them."""
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def _ending(version: int, last: bool) -> dict:
    """Fields that only the last bucket sets: the version, and that the prefix cache is emptied."""
    return {"flush_cache": last} | ({"weight_version": str(version)} if last else {})


def _marked(items: Iterable) -> Iterator[tuple[object, bool]]:
    """Each item, and whether it is the last one; at least one item."""
    iterator = iter(items)
    held = next(iterator)
    for item in iterator:
        yield held, False
        held = item
    yield held, True


@contextmanager
def _update(endpoints: Sequence[Endpoint]) -> Iterator[None]:
    """Begin and end an update on servers that have calls for it (SGLang from about 0.5.18)."""
    having = [e for e in endpoints if _begin(e)]
    yield
    _post_all(having, "/end_weight_update", {})


def _begin(endpoint: Endpoint) -> bool:
    """Begin an update; False where the server has no call for it."""
    try:
        endpoint.post("/begin_weight_update", {})
    except ServerError as error:
        if error.status == 404:
            return False
        if "already open" not in str(error):
            raise
        endpoint.post("/end_weight_update", {})  # left open by a trainer that died
        endpoint.post("/begin_weight_update", {})
    return True


@contextmanager
def _posting(
    endpoints: Sequence[Endpoint], path: str, *bodies: dict
) -> Iterator[list[Future[None]]]:
    """Post to all servers at once while the block runs: one body for all, or one each."""
    each = bodies * len(endpoints) if len(bodies) == 1 else bodies
    replies = [e.begin_post(path, body) for e, body in zip(endpoints, each, strict=True)]
    try:
        yield replies
    finally:
        for reply in replies:
            reply.cancel()


def _post_all(endpoints: Sequence[Endpoint], path: str, *bodies: dict) -> None:
    """Post to all servers at once and wait for their replies; raises the first error."""
    with _posting(endpoints, path, *bodies) as replies:
        _await(endpoints, replies)


def _await(endpoints: Sequence[Endpoint], replies: Sequence[Future]) -> None:
    """Wait for the servers' replies; raises the first error, and where the run is to stop."""
    for endpoint, reply in zip(endpoints, replies, strict=True):
        wait(reply, endpoint.check_stop)


def _watch(
    endpoints: Sequence[Endpoint], is_done: Callable[[], bool], replies: Sequence[Future]
) -> None:
    """Wait for what the trainer and all servers do together.

    Raises at once where a server replies with an error, as it never takes part, and where the run
    is to stop.
    """
    while not is_done():
        for endpoint, reply in zip(endpoints, replies, strict=True):
            endpoint.check_stop()
            if reply.done():
                reply.result()
        time.sleep(POLL_S)


def _in_thread(work: Callable[[], Value]) -> Future[Value]:
    """Run what cannot be interrupted in a thread that the process does not wait for."""
    future: Future[Value] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
