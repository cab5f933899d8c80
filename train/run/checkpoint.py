"""Checkpoints: all of a run's state on disk, whole or not there at all.

    <out>/checkpoints/step_000020/   a Hugging Face folder that also holds
        README.md, adapter/          with LoRA: what merging lost, and the adapter beside it; with
                                     run.save_lora adapter all that there is of the policy
        sharded/                     optimiser states, as safetensors: each rank writes its shards
        trainer_state.pt             random numbers, data position, carried groups
        complete.json                the run's identity, size and CRC-32 of every other file

A checkpoint is written to a hidden folder, .step_000020.partial, which gets its name once all of it
is on disk. No folder is ever replaced: where step_000020 exists, the new one is step_000020_2. The
newest has the highest serial number in complete.json. Any number of ranks can go on from it.
"""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from tercet.core.config import RunConfig
from tercet.core.types import Group, PolicyParts, Response, Triplet
from tercet.train.learner.device import rng_state, set_rng_state
from tercet.train.learner.lora import is_added
from tercet.train.learner.merged import Export
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks, picklable
from tercet.train.logs.best import BestSoFar
from tercet.train.run.complete import COMPLETE, problem_of, read_complete, sync, write_complete
from tercet.train.run.identity import Identity

Tensors = dict[str, Tensor]
SHARDS = "sharded"
STATE = "trainer_state.pt"
NAMES = r"step_\d+(_\d+)?|\.step_\d+\.replaced"
"""Names of checkpoints; earlier versions could leave one as .step_000020.replaced."""
STATE_TYPES = [Group, Response, Triplet]
"""What a trainer state may hold beside tensors and plain Python values."""
FILE_BYTES = 4 << 30  # bytes of optimiser states in one file
WEIGHT = "weight"  # a LoRA weight is stored under this name, beside its optimiser states
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class Trained(Protocol):
    """The parts of a run that checkpoints are made of."""

    parts: PolicyParts
    policy: Policy
    optimizer: torch.optim.Optimizer
    ranks: Ranks


class Folder(Protocol):
    """What Checkpoints needs of a run's folder (see train.run.run_folder)."""

    identity: Identity

    def reclaim(self) -> None: ...


class Checkpoints:
    """Writes a run's checkpoints and restores its state from one; made by all ranks together.

    Args:
        trained: the run whose weights and optimiser are written.
        config: out, keep_last, keep_best, stop_after, save_lora and async_save are used.
        folder: the run's; its identity is a part of every checkpoint.

    Raises:
        ValueError: keep_last below 1.
    """

    def __init__(self, trained: Trained, config: RunConfig, folder: Folder | None = None):
        if config.keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {config.keep_last}")
        self._trained, self._config, self._ranks = trained, config, trained.ranks
        self._folder = folder
        self._root = Path(config.out) / "checkpoints"
        group = trained.ranks.files_group
        self._among = {"no_dist": True} if group is None else {"process_group": group}
        self._pool = ThreadPoolExecutor(1, "checkpoint") if config.async_save else None
        self._pending: Callable[[], None] | None = None
        self.best = BestSoFar(config)
        self._latest: tuple[Path, dict] | None = None
        """The last checkpoint and the state that it holds."""
        self._ranks.share(lambda: _clear_leftovers(self._root))

    def note(self, figures: dict[str, float]) -> None:
        """Remember the value that keep_best names of a step's figures, the same on all ranks.

        Raises:
            ValueError: no step had it, and this one is whole (it may lack a reward or be skipped).
        """
        try:
            self.best.note(figures)
        except ValueError as error:
            self._ranks.raise_on_all(error)

    def save(self, step: int, state: dict, keep: int = 0) -> Path:
        """Write a checkpoint, then remove all but the newest ones and the best; a collective.

        With async_save it is written in the background, from copies made before this returns. When
        a save is interrupted, earlier checkpoints stay whole; the next run removes what it left.

        Args:
            step: steps done.
            state: what the run needs to go on besides weights, optimiser and random numbers: plain
                values, tensors and the dataclasses of STATE_TYPES.
            keep: how many of the newest stay; 0: keep_last.

        Returns:
            The folder of the checkpoint: an earlier one where nothing has happened since, so that a
            run that is started again and again, and fails each time, does not fill the disk.

        Raises:
            OSError: this checkpoint, or with async_save the one before, could not be written.
            TypeError: `state` holds a type that `load_state` would refuse.
        """
        self.wait()
        if same := self._ranks.share(lambda: self._same(state)):
            return same
        self._trained.optimizer.zero_grad(set_to_none=True)
        folder = self._ranks.share(lambda: self._begin(step))
        self._latest = (folder, copy.deepcopy(state))
        shards, updates = _training_tensors(self._trained)
        given = self._trained.policy, self._ranks, self._pool is not None
        export = Export.take(*given, self._config.save_lora)
        if self._pool:
            shards = {name: tensor.to("cpu", copy=True) for name, tensor in shards.items()}
        self.best.rate(folder.name)
        state = state | {"updates": updates, "rng": rng_state(), **self.best.state()}
        if self._pool:
            state = copy.deepcopy(state)
        identity = self._folder and asdict(self._folder.identity)
        write = partial(self._write, folder, step, shards, export, state, identity, keep)
        self._pending = self._pool.submit(write).result if self._pool else write
        if self._pool is None:
            self.wait()
        return folder

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; a collective. Raises the error of any rank."""
        if self._pending is None:
            return
        pending, self._pending, error = self._pending, None, None
        try:
            pending()
        except Exception as raised:
            error = picklable(raised)
        failed = [e for e in self._ranks.exchange(error) if e is not None]
        if failed:
            self._ranks.raise_on_all(failed[0])

    def restore(self, folder: Path, state: dict) -> None:
        """Load a checkpoint's optimiser states, sharded as they are here, and its random numbers.

        Raises:
            ValueError: it holds states of parameters that this run does not train.
        """
        self._latest = (folder, state)
        trained, tensors = self._trained, {}
        parameters = dict(trained.policy.model.named_parameters())
        if (shards := folder / SHARDS).exists():
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
            dcp.load(tensors, storage_reader=reader, **self._among)
        fused = trained.optimizer.defaults.get("fused")
        for name, updates in state["updates"].items():
            device = parameters[name].device if fused else "cpu"
            trained.optimizer.state[parameters[name]]["step"] = torch.tensor(updates, device=device)
        set_rng_state(state["rng"])
        self.best.restore(state)

    def _same(self, state: dict) -> Path | None:
        """This run's last checkpoint, where it is whole and the state is that between two steps."""
        if self._latest is None or "steps_done" not in state or state.get("groups"):
            return None
        folder, held = self._latest
        is_ours = folder.parent.resolve() == self._root.resolve() and (folder / COMPLETE).is_file()
        return folder if is_ours and state == {name: held.get(name) for name in state} else None

    def close(self) -> None:
        """Wait for the checkpoint that is being written, without the other ranks."""
        if self._pool:
            self._pool.shutdown()

    def _begin(self, step: int) -> Path:
        """Choose a name that no checkpoint has and make the hidden folder; returns the named one.

        The run's folder may have been removed, or belong to another run by now.
        """
        if self._folder:
            self._folder.reclaim()
        names = (f"step_{step:06d}" + (f"_{n}" if n > 1 else "") for n in count(1))
        folder = next(self._root / name for name in names if not (self._root / name).exists())
        with _cleaning_up(folder):
            _clear_leftovers(self._root)
            _hidden(folder).mkdir(parents=True)
        return folder

    def _write(
        self,
        folder: Path,
        step: int,
        shards: Tensors,
        export: Export,
        state: dict,
        identity: dict | None,
        keep: int,
    ) -> None:
        """Write this rank's shards; rank 0 then writes everything else and removes old ones."""
        hidden, best = _hidden(folder), state["best"] and state["best"][0]
        with _cleaning_up(folder):
            if shards:
                self._write_shards(hidden / SHARDS, shards)
            if not self._ranks.is_first:
                return
            export.save(self._trained.parts, hidden)
            serials = {path: s for path, s in _serials(self._root).items() if s < math.inf}
            serials[folder] = 1 + max(serials.values(), default=0)
            _write_state(hidden, state)
            write_complete(hidden, step, serials[folder], identity)
            hidden.rename(folder)
            sync(self._root)
        for old in sorted(serials, key=serials.get)[: -(keep or self._config.keep_last)]:
            if old.name != best:
                shutil.rmtree(old.rename(_hidden(old)))

    def _write_shards(self, folder: Path, shards: Tensors) -> None:
        numbers, used = {}, 0  # number of each tensor's file, from 1; bytes so far
        for name, tensor in shards.items():
            numbers[name] = 1 + used // FILE_BYTES
            used += tensor.nbytes
        writer = dcp.HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True)
        try:
            dcp.save(shards, storage_writer=writer, **self._among)
        except dcp.CheckpointException as error:  # a BaseException
            first, _ = next(iter(error.failures.values()))
            raise RuntimeError(str(error)) from first


def find_checkpoint(out: Path | str, resume: Path | str) -> Path | None:
    """The checkpoint to resume from; the checksums of all its files are compared.

    Args:
        out: folder of the run.
        resume: "auto" for the newest checkpoint that is whole, or the folder of a checkpoint.

    Returns:
        Its folder; None when "auto" finds no checkpoints. Damaged ones are passed over with a
        warning.

    Raises:
        ValueError: the folder named by `resume` is not a whole checkpoint, or none of those that
            "auto" finds.
    """
    if str(resume) != "auto":
        if problem := problem_of(Path(resume)):
            raise ValueError(f"cannot resume from {resume}: {problem}")
        return Path(resume)
    serials = _serials(Path(out) / "checkpoints")
    # One whose complete.json cannot be read may be the newest: it comes first, to be named.
    newest_first = sorted(serials, key=lambda p: (serials[p], p.name), reverse=True)
    problems = {}
    for folder in newest_first:
        problem = problem_of(folder)
        if problem is None:
            return folder
        warnings.warn(f"checkpoint {folder} is passed over: {problem}", stacklevel=2)
        problems[folder.name] = problem
    if problems:
        raise ValueError(
            f"cannot resume in {out}: every checkpoint is damaged "
            f"({'; '.join(f'{name}: {problem}' for name, problem in problems.items())})"
        )
    return None


def identity_of(checkpoint: Path) -> Identity | None:
    """The run that a checkpoint is of; None for one of an earlier version, or another folder."""
    return Identity.of((read_complete(checkpoint) or {}).get("identity"))


def load_state(folder: Path | str) -> dict:
    """The trainer state of a checkpoint, tensors on the CPU; loads data only, never code.

    Raises:
        ValueError: no trainer state in the folder.
    """
    file = Path(folder) / STATE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {STATE}: it is not a checkpoint of this trainer")
    with safe_globals(STATE_TYPES):
        return torch.load(file, map_location="cpu", weights_only=True)


def _hidden(folder: Path) -> Path:
    """The hidden folder in which a checkpoint is written, and removed."""
    return folder.with_name(f".{folder.name}.partial")


def _clear_leftovers(root: Path) -> None:
    """Remove what an interrupted save left."""
    for path in root.glob(".*.partial"):
        shutil.rmtree(path)


@contextmanager
def _cleaning_up(folder: Path) -> Iterator[None]:
    """Remove the hidden folder on an exception; one about the disk names the checkpoint."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(_hidden(folder), ignore_errors=True)
        cause: BaseException | None = error
        while cause is not None:  # torch and safetensors put the system's error into their own
            if found := re.search(r"(?:\[Errno|os error) (\d+)", str(cause)):
                number = int(found[1])
                said = f"could not be written, earlier ones are as they were: {os.strerror(number)}"
                raise OSError(number, f"checkpoint {folder} {said}") from error
            cause = cause.__cause__ or cause.__context__
        raise


def _training_tensors(trained: Trained) -> tuple[Tensors, dict[str, float]]:
    """{parameter/kind: optimiser state or LoRA weight} and {parameter: number of its updates}."""
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


def _write_state(folder: Path, state: dict) -> None:
    with open(folder / STATE, "wb") as file:
        torch.save(state, file)
    with safe_globals(STATE_TYPES):
        refused = get_unsafe_globals_in_checkpoint(str(folder / STATE))
    if refused:
        raise TypeError(
            f"the trainer state holds {', '.join(sorted(refused))}; allowed are plain values, "
            f"tensors and {', '.join(kind.__name__ for kind in STATE_TYPES)}"
        )


def _serials(root: Path) -> dict[Path, float]:
    """Serial number of every checkpoint; infinite where complete.json cannot be read."""
    folders = [path for path in root.glob("*") if re.fullmatch(NAMES, path.name)]
    completes = {folder: read_complete(folder) for folder in folders}
    return {folder: c["serial"] if c else math.inf for folder, c in completes.items()}
