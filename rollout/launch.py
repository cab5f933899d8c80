"""From options to an engine: the in-process one, or SGLang servers, started or already running."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from tercet.core.data.vision import PromptEncoder
from tercet.core.rollout_config import RolloutConfig
from tercet.core.types import PolicyParts
from tercet.rollout.endpoint import Endpoint, bearer
from tercet.rollout.local import LocalEngine
from tercet.rollout.server import Server, free_ports, start_all, stop_all
from tercet.rollout.sglang import SglangEngine
from tercet.rollout.weights import open_sync, roomy_folder

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
    check_stop: Callable[[], None] = lambda: None,
) -> LocalEngine | SglangEngine:
    """The engine that the options ask for; starts SGLang servers unless `urls` names running ones.

    Args:
        parts: the policy.
        encoder: the trainer's.
        config: which engine, and its options.
        work_dir: for the servers' logs and files, and for weights that are sent over the disk.
        weights: gives the policy's current weights, for a server that has been restarted.
        check_stop: the in-process engine calls it before every token.

    Raises:
        ValueError: neither or both of sglang_python and urls.
        ServerError: a server that does not start or does not answer.
    """
    if config.engine == "local":
        return LocalEngine(parts, encoder, max_rows=config.max_rows, check_stop=check_stop)
    if bool(config.sglang_python) == bool(config.urls):
        raise ValueError(
            "rollout.engine sglang needs rollout.sglang_python, to start servers, or rollout.urls"
        )
    parts.save(work_dir / POLICY)
    size = sum(parameter.nbytes for parameter in parts.model.parameters())
    sync = open_sync(
        config.weight_sync,
        parent=work_dir if config.urls else roomy_folder(size, work_dir),
        config_from=work_dir / POLICY,
        bucket_bytes=config.weight_bucket_mib << 20,
        host=config.sync_host,
        timeout_s=config.request_timeout_s,
    )
    servers = _make_servers(config, work_dir) if config.sglang_python else []
    addresses = [server.url for server in servers] + [url.rstrip("/") for url in config.urls]
    endpoints = [
        Endpoint(url, server, bearer(config.api_key), config.request_timeout_s)
        for url, server in zip_longest(addresses, servers)
    ]
    start_all(servers)
    try:
        return SglangEngine(
            parts, encoder, endpoints, sync, weights, concurrency=config.max_in_flight
        )
    except BaseException:
        stop_all(servers)
        raise


def _make_servers(config: RolloutConfig, work_dir: Path) -> list[Server]:
    ports = free_ports(len(config.server_gpus))
    return [
        Server(
            work_dir / POLICY,
            config.sglang_python,
            work_dir / f"server_{number}",
            arguments=[*SAME_PIXELS, *shlex.split(config.sglang_args)],
            port=port,
            api_key=config.api_key,
            start_timeout_s=config.start_timeout_s,
            environment={"CUDA_VISIBLE_DEVICES": gpus} if gpus else {},
        )
        for number, (gpus, port) in enumerate(zip(config.server_gpus, ports, strict=True))
    ]
