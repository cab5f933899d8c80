"""Are a run's inputs fit to train on? The model's folder, the data, the servers, the reward."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from tercet.core.config import ModelConfig, TapoConfig
from tercet.core.data.manifest import Manifest
from tercet.core.data.triplets import prepare_manifest
from tercet.core.models import load_policy
from tercet.core.prompts import chat_ids, stage2_text
from tercet.rollout.endpoint import Endpoint, bearer
from tercet.rollout.exchange import check_address
from tercet.rollout.launch import SAME_PIXELS, read_api_key
from tercet.rollout.rewarding import load_reward
from tercet.rollout.server import Server, ServerError
from tercet.train.fit.finding import Finding
from tercet.train.fit.sizes import ModelSizes

TESTED_SGLANG = "0.5.23"
"""Version of SGLang that the tests run on."""
IMPORT_S = 300.0
"""Longest that SGLang may take to be imported."""
MOST_HEADER = 64 << 20
"""Bytes of the header of a file of weights."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
LOOK = "import json, sglang, torch; print(json.dumps([sglang.__version__, torch.__version__]))"


def model(config: ModelConfig) -> Iterator[Finding]:
    """The model's folder: weights, architecture, processor, chat template, image pad.

    Nothing is downloaded, and no weights are loaded.
    """
    folder = local_folder(config.path)
    if folder is None:
        said = f"model.path {config.path!r} is no folder here, nor a model that was downloaded"
        advice = f"hf download {config.path} fetches it beforehand; a run does so itself"
        if HUB_ID.fullmatch(config.path):
            yield Finding("model", "warning", said, advice)
        else:
            yield Finding("model", "error", said, "a hub id is USER/NAME: look at the path")
        return
    files, size = weights(folder)
    yield Finding("weights", "ok", f"{files} files, {size / 2**30:.2f} GiB, all of them whole")
    parts = load_policy(replace(config, path=str(folder)), "meta")
    question = stage2_text("What bird is this?")
    ids = chat_ids(parts.tokenizer, [{"role": "user", "content": question}], images=1)
    count = sum(parameter.numel() for parameter in parts.model.parameters())
    said = f"{parts.model.config.model_type}, {count / 1e9:.2f} B parameters; a prompt without its "
    said += f"photo has {len(ids)} tokens, with one image pad"
    yield Finding("model", "ok", said)


def local_folder(path: str) -> Path | None:
    """The folder of a model that is already on this machine; None where it is not."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError):  # not downloaded, or not the form of a hub id
        return None


def weights(folder: Path) -> tuple[int, int]:
    """Number of files and bytes of a model's weights, each compared with what its header says.

    Raises:
        ValueError: naming a file that is missing, cut or no safetensors file.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = sorted(folder / name for name in listed)
    else:
        files = [folder / "model.safetensors"]
    total = 0
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing: copy or download the model again")
        size, told = file.stat().st_size, _told_size(file)
        if size != told:
            raise ValueError(
                f"{file} has {size:,} bytes, its header says {told:,}: copy or download it again"
            )
        total += size
    return len(files), total


def _told_size(file: Path) -> int:
    """Bytes of a safetensors file by its header."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= MOST_HEADER:
            raise ValueError(f"{file} is no safetensors file: copy or download it again")
        try:
            header = json.loads(stream.read(length))
            ends = [v["data_offsets"][1] for name, v in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{file}: its header is damaged: copy or download it again") from error
    return 8 + length + max(ends, default=0)


def checkpoint_bytes(config: TapoConfig) -> int:
    """Bytes of all checkpoints that a run keeps, and of the one being written."""
    folder = local_folder(config.model.path) if config.model.path else None
    if folder is not None:
        config = replace(config, model=replace(config.model, path=str(folder)))
    try:
        sizes = ModelSizes.of(config)
    except ValueError:  # the check of the model says what is wrong
        return 0
    bytes_of, count = sizes.element_bytes, sizes.parameters
    kept = config.run.keep_last + 1 + bool(config.run.keep_best)
    return kept * (count.total * bytes_of.weight + count.trained * bytes_of.states)


def data(config: TapoConfig) -> Iterator[Finding]:
    """The photos, all of them, and whether triplets can be made: of what looks alike at random."""
    drawn = torch.Generator().manual_seed(0)
    manifest = prepare_manifest(config.data, lambda keys: torch.rand(len(keys), 8, generator=drawn))
    classes = {(a.super_category, a.sub_category) for a in manifest.anchors}
    held_out = sum(map(len, manifest.test.values()))
    said = f"{len(manifest.anchors)} anchors of {len(classes)} seen sub-categories in "
    said += f"{len(manifest.names)} super-categories; {held_out} held-out photos"
    yield Finding("data", "ok", said)
    yield from _left_out(manifest)


def _left_out(manifest: Manifest) -> Iterator[Finding]:
    if manifest.skipped:
        said = f"{len(manifest.skipped)} photos are left out, the first: {manifest.skipped[0]}"
        yield Finding("data", "warning", said, "put them right, or leave data.on_bad_image at skip")


def trackers(config: TapoConfig) -> Iterator[Finding]:
    """The packages of what gets the metrics."""
    missing = [name for name in config.run.log_to if find_spec(name) is None]
    for name in missing:
        said = f"run.log_to names {name}, which is not installed"
        yield Finding("trackers", "error", said, f"pip install {name}, or leave it out")
    if not missing:
        yield Finding("trackers", "ok", ", ".join(config.run.log_to) or "metrics.jsonl alone")


def reward(config: TapoConfig) -> Iterator[Finding]:
    """The reward function, and the judge where one is asked."""
    function = load_reward(config)
    if close := getattr(function, "close", None):
        close()
    judge = f", judge at {config.rollout.judge_url}" if config.rollout.judge_url else ""
    yield Finding("reward", "ok", f"{config.rollout.reward}{judge}")


def servers(config: TapoConfig) -> Iterator[Finding]:
    """Running servers answer, or the environment of those to start imports SGLang."""
    rollout = config.rollout
    key = read_api_key(rollout.api_key_file)
    for url in rollout.urls:
        address = check_address(url, "rollout.urls")
        try:
            Endpoint(address, None, bearer(key), rollout.request_timeout_s).check()
        except ServerError as error:
            yield Finding("server", "error", str(error), "start it, or correct rollout.urls")
        else:
            yield Finding("server", "ok", f"{address} answers")
    if rollout.sglang_python:
        yield from _environment(Path(rollout.sglang_python))
    elif not rollout.urls:
        advice = "give --rollout.sglang_python ENV/bin/python, or --rollout.urls"
        yield Finding("server", "error", "rollout.engine sglang has no server", advice)


def _environment(python: Path) -> Iterator[Finding]:
    advice = "docs/sglang.md says how to make the servers' environment"
    safe = os.environ | {"PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    safe.pop("PYTHONPATH", None)
    try:
        with tempfile.TemporaryDirectory() as neutral:
            done = subprocess.run(
                [str(python.absolute()), "-c", LOOK],
                env=safe,
                cwd=neutral,
                capture_output=True,
                text=True,
                timeout=IMPORT_S,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("sglang", "error", f"{python}: {error}", advice)
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Finding("sglang", "error", f"{python} cannot import sglang: {last[:300]}", advice)
        return
    version, of_torch = json.loads(done.stdout.splitlines()[-1])
    said = f"sglang {version} with PyTorch {of_torch}"
    if version == TESTED_SGLANG:
        yield Finding("sglang", "ok", said)
    else:
        advice = f"tested is {TESTED_SGLANG}: install it where replies are refused"
        yield Finding("sglang", "warning", said, advice)


def started_server(config: TapoConfig) -> Iterator[Finding]:
    """Starts a server on the model, asks it whether it is well, and stops it."""
    rollout, folder = config.rollout, local_folder(config.model.path)
    if folder is None or not rollout.sglang_python:
        advice = "give --model.path of a folder and --rollout.sglang_python"
        yield Finding("start", "error", "no server can be started for a look", advice)
        return
    with tempfile.TemporaryDirectory() as place:
        server = Server(
            folder,
            rollout.sglang_python,
            place,
            arguments=[*SAME_PIXELS, *shlex.split(rollout.sglang_args)],
            start_timeout_s=rollout.start_timeout_s,
            environment={"CUDA_VISIBLE_DEVICES": g} if (g := rollout.server_gpus[0]) else {},
        )
        try:
            with server:
                Endpoint(server.url, server, {}, rollout.request_timeout_s).check()
        except ServerError as error:
            yield Finding("start", "error", str(error), "the lines above are the server's own log")
            return
    yield Finding("start", "ok", f"a server on {folder} started, answered and was stopped")
