"""A run's state to and from checkpoints, over all ranks and in the background.

Every rank writes its own shards of the optimiser states (torch.distributed.checkpoint, as
safetensors files), rank 0 the whole weights for transformers and everything else. A checkpoint is
there once all of it is on disk (see checkpoint.py), and is read by any number of ranks.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from tercet.core.config import RunConfig
from tercet.core.types import PolicyParts
from tercet.train.learner.checkpoint import (
    checkpoints,
    disk_error,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from tercet.train.learner.lora import is_added
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks, picklable

SHARDS = "sharded"  # folder of a checkpoint
FILE_BYTES = 4 << 30  # of optimiser states, written at once
WEIGHT = "weight"  # of a LoRA addition, beside its optimiser states
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class Trained(Protocol):
    """What is saved of a run."""

    parts: PolicyParts
    policy: Policy
    optimizer: torch.optim.Optimizer
    ranks: Ranks


class Saver:
    """Writes a run's checkpoints.

    Args:
        trained: whose weights and optimiser are written.
        config: out, keep_last, keep_best and async_save are used.
    """

    def __init__(self, trained: Trained, config: RunConfig):
        self._trained, self._config, self._ranks = trained, config, trained.ranks
        self._root = checkpoints(config.out)
        self._pool = ThreadPoolExecutor(1, "checkpoint") if config.async_save else None
        self._pending: Future | None = None
        self._values: list[float] = []
        self._best: tuple[int, float] | None = None

    def note(self, figures: dict[str, float]) -> None:
        """Take in a step's figures, the same on all ranks, for what keep_best asks for.

        Raises:
            ValueError: keep_best is none of them.
        """
        name = self._config.keep_best
        if name is None:
            return
        if name not in figures:
            known = ", ".join(sorted(figures))
            self._ranks.raise_on_all(ValueError(f"run.keep_best is {name!r}; figures are {known}"))
        self._values.append(figures[name])

    def save(self, step: int, state: dict) -> Path:
        """Write a checkpoint; a collective. With async_save it is on its way when this returns.

        Args:
            step: steps done.
            state: what the run needs to go on besides weights, optimiser and random numbers.

        Returns:
            Its folder.

        Raises:
            OSError: this checkpoint, or with async_save the one before, could not be written.
        """
        self.wait()
        trained, ranks = self._trained, self._ranks
        trained.optimizer.zero_grad(set_to_none=True)
        shards, updates = _training_tensors(trained)
        weights = self._whole_weights()
        if self._pool:
            shards = {name: tensor.to("cpu", copy=True) for name, tensor in shards.items()}
        best = self._settle(step)
        state = state | {"updates": updates, "rng": rng_state(), "best": self._best}
        if self._pool:
            state = copy.deepcopy(state)
        folder, partial = self._root / f"step_{step:06d}", self._root / f".{SHARDS}.partial"
        ranks.share(lambda: shutil.rmtree(partial, ignore_errors=True))

        def write() -> None:
            self._write_shards(shards, partial, folder)
            if ranks.is_first:
                save_checkpoint(
                    self._config.out,
                    step,
                    lambda place: self._fill(place, weights, partial),
                    state,
                    self._config.keep_last,
                    best,
                )

        self._pending = _start(self._pool, write)
        if self._pool is None:
            self.wait()
        return folder

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; a collective. Raises what kept it from it."""
        if self._pending is None:
            return
        error, self._pending = self._pending.exception(), None
        failed = [e for e in self._ranks.exchange(error and picklable(error)) if e is not None]
        if failed:
            self._ranks.raise_on_all(failed[0])

    def restore(self, folder: Path, state: dict) -> None:
        """Take over a checkpoint's optimiser states and random numbers, sharded as they are here.

        Raises:
            ValueError: it holds states of parameters that this run does not have.
        """
        trained, tensors = self._trained, {}
        parameters = dict(trained.policy.model.named_parameters())
        shards = folder / SHARDS
        if shards.exists():
            reader = dcp.HuggingFaceStorageReader(str(shards))
            for key, stored in reader.read_metadata().state_dict_metadata.items():
                name, _, kind = key.rpartition("/")
                parameter = parameters.get(name)
                if parameter is None or parameter.shape != stored.size:
                    raise ValueError(
                        f"checkpoint {folder} holds {name} {list(stored.size)}, which this run "
                        "does not train: go on with the options it was started with"
                    )
                like = parameter.detach()
                if kind != WEIGHT:
                    like = torch.zeros_like(like, dtype=stored.properties.dtype)
                    trained.optimizer.state[parameter][kind] = like
                tensors[key] = like
            dcp.load(tensors, storage_reader=reader, **self._process_group())
        fused = trained.optimizer.defaults.get("fused")
        for name, count in state["updates"].items():
            device = parameters[name].device if fused else "cpu"
            trained.optimizer.state[parameters[name]]["step"] = torch.tensor(count, device=device)
        set_rng_state(state["rng"])
        self._best = state["best"]

    def close(self) -> None:
        """Wait for what is being written, without the other ranks."""
        if self._pool:
            self._pool.shutdown()

    def _whole_weights(self) -> dict[str, Tensor] | None:
        """Copies on the CPU of rank 0; None where the model itself can be written."""
        policy = self._trained.policy
        has_lora = any(is_added(name) for name, _ in policy.named_parameters())
        if self._pool is None and self._ranks.mesh is None and not has_lora:
            return None
        weights = {}
        for name, weight in policy.named_weights():
            if self._ranks.is_first:
                weights[name] = weight.to("cpu", copy=True)
        return weights

    def _settle(self, step: int) -> int | None:
        """The step whose checkpoint is to be kept besides the newest, this one counted."""
        if self._values:
            mean = sum(self._values) / len(self._values)
            if self._best is None or mean > self._best[1]:
                self._best = (step, mean)
            self._values = []
        return self._best and self._best[0]

    def _process_group(self) -> dict:
        group = self._ranks.files_group
        return {"no_dist": True} if group is None else {"process_group": group}

    def _write_shards(self, shards: dict[str, Tensor], partial: Path, folder: Path) -> None:
        if not shards:
            return
        writer = dcp.HuggingFaceStorageWriter(
            str(partial), fqn_to_index_mapping=_files(shards), save_distributed=True
        )
        try:
            dcp.save(shards, storage_writer=writer, **self._process_group())
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise disk_error(folder, first) or RuntimeError(str(error)) from first

    def _fill(self, folder: Path, weights: dict[str, Tensor] | None, shards: Path) -> None:
        self._trained.parts.save(folder, weights)
        if shards.exists():
            shards.rename(folder / SHARDS)


def _start(pool: ThreadPoolExecutor | None, work: Callable[[], None]) -> Future:
    """The work begun in the background, or done."""
    if pool:
        return pool.submit(work)
    done: Future = Future()
    try:
        done.set_result(work())
    except Exception as error:
        done.set_exception(error)
    return done


def _training_tensors(trained: Trained) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Optimiser states, and what is trained but not exported, as {parameter/kind: tensor}; and
    {parameter: updates it has had}."""
    tensors, updates = {}, {}
    for name, parameter in trained.policy.model.named_parameters():
        for kind, value in trained.optimizer.state.get(parameter, {}).items():
            if kind == "step":
                updates[name] = float(value)
            else:
                tensors[f"{name}/{kind}"] = value
        if is_added(name):
            tensors[f"{name}/{WEIGHT}"] = parameter.detach()
    return tensors, updates


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Number of the file, from 1, that each tensor goes to."""
    places, used = {}, 0
    for name, tensor in tensors.items():
        places[name] = 1 + used // FILE_BYTES
        used += tensor.nbytes
    return places
