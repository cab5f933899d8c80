"""From options to an engine: the in-process one, or SGLang servers, started or already running."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from tercet.core.data.vision import PromptEncoder
from tercet.core.rollout_config import RolloutConfig
from tercet.core.types import PolicyParts
from tercet.rollout.endpoint import Endpoint, bearer
from tercet.rollout.exchange import check_address
from tercet.rollout.guard import MEMORY_DISK, remove_abandoned
from tercet.rollout.local import LocalEngine
from tercet.rollout.server import API_KEY, Server, free_ports, start_all, stop_all
from tercet.rollout.sglang import SglangEngine
from tercet.rollout.weight_folder import roomy_folder
from tercet.rollout.weights import WeightSync, open_sync

SAME_PIXELS = ("--image-processor-backend", "pil")
"""The trainer's image processor. SGLang's default, torchvision's, resizes differently, which
changes a log-prob by up to 4e-4."""
POLICY = "policy"
"""Folder that servers start from."""


def open_engine(
    parts: PolicyParts,
    encoder: PromptEncoder,
    config: RolloutConfig,
    work_dir: Path,
    weights: Callable[[], Iterator[tuple[str, Tensor]]],
    *,
    dtype: torch.dtype | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> LocalEngine | SglangEngine:
    """The engine that the options ask for; starts SGLang servers unless `urls` names running ones.

    Args:
        parts: the policy.
        encoder: the trainer's.
        config: which engine, and its options.
        work_dir: for the servers' logs and files, and for weights that are sent over the disk.
        weights: gives the policy's current weights, for a server that has been restarted.
        dtype: what servers are started to compute in; None: as the policy.
        check_stop: called before every token of the in-process engine, and while servers are waited
            for; raises where the run is to stop.

    Raises:
        ValueError: neither or both of sglang_python and urls, a bad address, or an API key that
            cannot be read or that stands on a command line.
        ServerError: a server that does not start or does not answer.
    """
    if config.engine == "local":
        return LocalEngine(parts, encoder, max_rows=config.max_rows, check_stop=check_stop)
    if bool(config.sglang_python) == bool(config.urls):
        raise ValueError(
            "rollout.engine sglang needs rollout.sglang_python, to start servers, or rollout.urls"
        )
    addresses = [check_address(url, "rollout.urls") for url in config.urls]
    api_key = read_api_key(config.api_key_file)
    parts.save(work_dir / POLICY)
    sync = _open_sync(parts, config, work_dir)
    dtype = dtype or parts.model.dtype
    servers = _make_servers(config, work_dir, api_key, dtype, check_stop)
    endpoints = [
        Endpoint(url, server, bearer(api_key), config.request_timeout_s, check_stop)
        for url, server in zip_longest([s.url for s in servers] or addresses, servers)
    ]
    start_all(servers)
    try:
        return SglangEngine(
            parts, encoder, endpoints, sync, weights, concurrency=config.max_in_flight
        )
    except BaseException:
        stop_all(servers)
        raise


def _open_sync(parts: PolicyParts, config: RolloutConfig, work_dir: Path) -> WeightSync:
    """The weight sync of the options; what killed runs left behind is removed first."""
    for parent in (MEMORY_DISK, work_dir):
        remove_abandoned(parent)
    size = sum(parameter.nbytes for parameter in parts.model.parameters())
    return open_sync(
        config.weight_sync,
        parent=work_dir if config.urls else roomy_folder(size, work_dir),
        config_from=work_dir / POLICY,
        bucket_bytes=config.weight_bucket_mib << 20,
        host=config.sync_host,
        timeout_s=config.request_timeout_s,
    )


def read_api_key(file: str, option: str = "rollout.api_key_file") -> str | None:
    """A server's key, from a file where one is named, else from the variable TERCET_API_KEY.

    Args:
        file: its path; empty: none.
        option: that named it, for errors.

    Raises:
        ValueError: it cannot be read, or is no single word; the message does not hold it.
    """
    key, source = os.environ.get(API_KEY, ""), API_KEY
    if file:
        source = f"{option}: {file}"
        try:
            key = Path(file).expanduser().read_text(encoding="ascii").strip()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not ASCII text"
            raise ValueError(f"{source}: {reason}") from None
        if not key:
            raise ValueError(f"{source}: it holds no key")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"{source}: a key is one word of printable ASCII characters")
    return key or None


def _make_servers(
    config: RolloutConfig,
    work_dir: Path,
    api_key: str | None,
    dtype: torch.dtype,
    check_stop: Callable[[], None],
) -> list[Server]:
    """The servers to start; none where they run already."""
    if not config.sglang_python:
        return []
    more = shlex.split(config.sglang_args)
    if any(word.startswith(("--api-key", "--admin-api-key")) for word in more):
        raise ValueError(
            "rollout.sglang_args: a key on a command line is seen by others: set the variable "
            f"{API_KEY} or rollout.api_key_file"
        )
    # Left to itself, SGLang serves a float32 model in float16.
    served = "float32" if config.served_dtype == "float32" else str(dtype).removeprefix("torch.")
    own = [*SAME_PIXELS, "--dtype", served]
    ports = free_ports(len(config.server_gpus))
    return [
        Server(
            work_dir / POLICY,
            config.sglang_python,
            work_dir / f"server_{number}",
            arguments=[*own, *more],
            port=port,
            api_key=api_key,
            start_timeout_s=config.start_timeout_s,
            environment={"CUDA_VISIBLE_DEVICES": gpus} if gpus else {},
            weight_folders=(MEMORY_DISK, work_dir.resolve()),
            check_stop=check_stop,
        )
        for number, (gpus, port) in enumerate(zip(config.server_gpus, ports, strict=True))
    ]
