"""A run's folder: which run it belongs to, who may write into it, and where a run goes on.

A run that begins makes the folder its own by identity.json; each checkpoint holds the same. The
kernel's lock on a file in the folder keeps two processes apart and is gone with its process.
"""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path

from tercet.core.config import SftConfig, TapoConfig
from tercet.train.learner.device import set_up
from tercet.train.learner.ranks import Ranks, restarts
from tercet.train.logs.metrics import METRICS_FILE, read_metrics
from tercet.train.run.checkpoint import find_checkpoint, identity_of, load_state
from tercet.train.run.complete import seal, sync, unseal
from tercet.train.run.identity import (
    IDENTITY,
    LOCK,
    Changes,
    Identity,
    Kind,
    changes,
    launch,
    model_digest,
    of_kind,
    options_of,
    same_launch,
    shown,
)

INPUTS = ("data.path", "data.questions", "data.embedder", "model.path")
"""Options that may name files in the folder of an earlier run."""
ANOTHER = "another --run.out, or --run.overwrite true, which moves this run's folder aside"


class Lock:
    """The lock on a folder, held by rank 0 of its run; gone with the process, kill -9 included."""

    def __init__(self) -> None:
        self._file: int | None = None
        # Else processes that are forked, and outlive this one, would hold it too.
        os.register_at_fork(after_in_child=self._close)

    def take(self, folder: Path) -> None:
        """Raises ValueError when another process has it."""
        self.release()
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._file, 200, 0).decode(errors="replace") or "another process"
            self._close()
            raise ValueError(
                f"run.out {folder} is in use by {holder}: two runs cannot write into one folder"
            ) from error
        except OSError:  # a file system without locks
            return
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def is_on(self, folder: Path) -> bool:
        """Whether it is this folder that is locked, and not one that was moved or removed."""
        try:
            found = os.stat(folder / LOCK)
        except OSError:
            return False
        return self._file is not None and os.path.samestat(found, os.fstat(self._file))

    def release(self) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


@dataclass
class RunFolder:
    """The folder of a run that begins or goes on; a context that ends with the lock on it.

    Only rank 0 holds the lock and writes; the others know where the run goes on.
    """

    path: Path
    identity: Identity
    """Of this run, with its options of now."""
    checkpoint: Path | None = None
    """Where the run goes on; None: at its beginning."""
    saved: Identity | None = None
    """The run as it was when it was saved; None for a new one."""
    changed: Changes = field(default_factory=dict)
    """Options that differ from those."""
    lines: list[str] = field(default_factory=list)
    """What is to be said about it."""
    ranks: Ranks | None = None
    """The processes of the run."""
    lock: Lock | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_) -> None:
        self.lock.release()

    def note_data(self, digests: dict[str, str]) -> None:
        """Make the digests of its data a part of the identity.

        Raises:
            ValueError: they are not those that the run began with.
        """
        then = self.saved.data if self.saved else {}
        for name, digest in digests.items():
            if then.get(name, digest) != digest:
                raise ValueError(
                    f"the run in {self.path} cannot go on: {_what(name, self)} changed since it "
                    f"began. Put back what was there, or begin another run ({ANOTHER})"
                )
        self.identity = replace(self.identity, data=digests)

    def check_step(self) -> None:
        """For a run that goes on within a step.

        Raises:
            ValueError: an option has changed that the groups of the step depend on.
        """
        if refused := of_kind(self.changed, Kind.STEP):
            raise ValueError(
                f"{self.checkpoint} was saved within a step, whose groups depend on options that "
                f"differ: {shown(refused)}. Finish the step with the old ones first (--run.steps)"
            )

    def write(self) -> None:
        """Write identity.json, whole or not at all."""
        partial = self.path / f".{IDENTITY}.partial"
        partial.write_text(seal({"identity": asdict(self.identity)}), encoding="utf-8")
        sync(partial)
        os.replace(partial, self.path / IDENTITY)

    def check(self) -> None:
        """Raises FileNotFoundError where the folder is no longer this run's."""
        if self.lock.is_on(self.path):
            return
        found = read_identity(self.path)
        if found is None or found.id != self.identity.id:
            raise FileNotFoundError(
                f"run.out {self.path} was removed, moved or replaced while the run was in it"
            )
        self.lock.take(self.path)

    def reclaim(self) -> None:
        """Make the folder again where it was removed, so that a checkpoint can be written.

        Raises:
            ValueError: another run has it by now.
        """
        if self.lock.is_on(self.path):
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock.take(self.path)
        found = read_identity(self.path)
        if found is not None and found.id != self.identity.id:
            self.lock.release()
            raise ValueError(f"run.out {self.path} holds another run by now: nothing is saved")
        self.write()


def _what(name: str, folder: RunFolder) -> str:
    return {
        "triplets": f"{folder.path}/triplets.json",
        "photo_contents": "photos that it trains on",
        "examples": "which records fit optim.max_tokens",
        "source": f"what data.path {folder.identity.options['data.path']} holds",
    }[name]


def read_identity(folder: Path) -> Identity | None:
    """The run that a folder belongs to; None where it says nothing, or is damaged."""
    try:
        raw = (folder / IDENTITY).read_bytes()
    except OSError:
        return None
    return Identity.of((unseal(raw) or {}).get("identity"))


def open_folder(config: TapoConfig | SftConfig, resume: str | None) -> RunFolder:
    """Join the other ranks and make run.out the folder of this run, which rank 0 locks.

    Args:
        config: every option.
        resume: folder of a checkpoint; `auto`: go on, or begin where there is nothing to go on
            with; None: begin, in a folder that holds no run. A restart by the torchrun that began
            the run is `auto`.

    Raises:
        ValueError: on all ranks: the folder is in use, or holds a run and `resume` is None; there
            is no whole checkpoint; or what would go on is not the run that was saved.
    """
    ranks, lock = Ranks(set_up(config.run), config.parallel), Lock()
    try:
        folder = ranks.share(lambda: _open(config, lock, resume))
    except BaseException:
        lock.release()
        raise
    folder.ranks, folder.lock = ranks, lock
    return folder


def _open(config: TapoConfig | SftConfig, lock: Lock, resume: str | None) -> RunFolder:
    out = Path(config.run.out)
    if resume is not None and not resume.strip():
        raise ValueError("--resume is empty: give auto, or the folder of a checkpoint")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run.out {out} cannot be made: {error.strerror}") from error
    lock.take(out)
    found, overwrite = read_identity(out), config.run.overwrite
    if restarts() and found and same_launch(found.launch, launch()):
        resume, overwrite = "auto", False
    now = Identity(
        id=uuid.uuid4().hex,
        command="tapo" if isinstance(config, TapoConfig) else "sft",
        options=options_of(config),
        model=model_digest(config.model.path),
        data={},
        launch=launch(),
    )
    if resume is None:
        return RunFolder(out, now, lines=_begin(out, now, lock, overwrite))
    if overwrite:
        raise ValueError("--resume and run.overwrite true exclude each other: give one of them")
    checkpoint = find_checkpoint(out, resume)
    saved = _saved(out, checkpoint, found)
    if checkpoint is None:
        _check_unsaved(out, saved, config.run.save_every)
    if saved is None:
        if checkpoint is None:
            return RunFolder(out, now)
        return RunFolder(out, now, checkpoint, lines=[_of_an_earlier_version(checkpoint, now)])
    return _go_on(RunFolder(out, replace(now, id=saved.id), checkpoint, saved), type(config))


def _begin(out: Path, now: Identity, lock: Lock, overwrite: bool) -> list[str]:
    """Make sure that the folder of a new run holds no other; returns what is to be said."""
    used = [name for name in (METRICS_FILE, IDENTITY) if (out / name).exists()]
    if (out / "checkpoints").is_dir() and any((out / "checkpoints").iterdir()):
        used.append("checkpoints")
    if not used:
        return []
    if not overwrite:
        raise ValueError(
            f"run.out {out} holds a run already ({', '.join(used)}): --resume auto goes on with "
            f"it; for a new run give {ANOTHER}"
        )
    whole = out.resolve()
    for name in INPUTS:
        given = str(now.options.get(name) or "")
        if given and Path(given).exists() and Path(given).resolve().is_relative_to(whole):
            raise ValueError(
                f"{name} {given} lies in run.out {out}, which run.overwrite would move aside: "
                "give another --run.out"
            )
    line = move_aside(out)
    lock.take(out)
    return [line]


def move_aside(folder: Path) -> str:
    """Rename a folder to the first free one of its name.1, name.2, ... and make it anew; returns a
    line that says so."""
    whole = folder.resolve()
    names = (whole.with_name(f"{whole.name}.{number}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    whole.rename(aside)
    whole.mkdir()
    return f"the run that was in {folder} is now in {aside}"


def _saved(out: Path, checkpoint: Path | None, found: Identity | None) -> Identity | None:
    """The run that goes on, as it was saved: as the checkpoint says, or else the folder.

    Raises:
        ValueError: the checkpoint is of another run than the folder.
    """
    if checkpoint is None:
        return found
    saved = identity_of(checkpoint)
    if saved is None and checkpoint.resolve().parent == (out / "checkpoints").resolve():
        return found
    if found and (saved is None or saved.id != found.id):
        of = f"run {saved.id[:8]}" if saved else "a run that is not known"
        raise ValueError(
            f"cannot resume from {checkpoint}: it is of {of}, and run.out {out} holds run "
            f"{found.id[:8]}. Give the --run.out of the checkpoint's own run, or begin a new run "
            "from its weights (--model.path)"
        )
    return saved


def _check_unsaved(out: Path, saved: Identity | None, save_every: int) -> None:
    """Raises ValueError where a run must have been saved, but its checkpoints are gone."""
    metrics = out / METRICS_FILE
    last = (
        max((line["step"] for line in read_metrics(metrics)), default=0) if metrics.exists() else 0
    )
    # A step's line comes before its checkpoint, which is written beside the next steps at most.
    if last > 2 * (saved.options["run.save_every"] if saved else save_every):
        raise ValueError(
            f"run.out {out} has {METRICS_FILE} up to step {last}, but no checkpoint to go on from: "
            f"put its checkpoints back, or begin a new run ({ANOTHER})"
        )


def _of_an_earlier_version(checkpoint: Path, now: Identity) -> str:
    """What is said of a checkpoint that does not tell its run."""
    _check_command(checkpoint, "tapo" if "stream" in load_state(checkpoint) else "sft", now.command)
    return (
        f"going on from {checkpoint}. Warning: it is of an earlier version and does not tell the "
        "options, model and data of its run, so these are not compared"
    )


def _check_command(checkpoint: Path | None, saved: str, now: str) -> None:
    if saved != now:
        raise ValueError(
            f"cannot resume {checkpoint or 'this run'} with train/{now}.py: it is of "
            f"train/{saved}.py. To begin from its weights give it as --model.path"
        )


def _go_on(folder: RunFolder, config_class: Callable[[], TapoConfig | SftConfig]) -> RunFolder:
    """Compare the run that goes on with what was saved of it.

    Raises:
        ValueError: naming what cannot change.
    """
    saved, now = folder.saved, folder.identity
    _check_command(folder.checkpoint, saved.command, now.command)
    folder.changed = changes(saved, now.options, options_of(config_class()))
    refused, why = of_kind(folder.changed, Kind.FIXED), ""
    if saved.model != now.model and not _may_be_gone(saved, now, folder):
        then, given = (i.options["model.path"] for i in (saved, now))
        refused["model.path"], why = (then, given), f" ({_other_model(given, saved)})"
    where = folder.checkpoint or f"the run in {folder.path}, which has no checkpoint yet"
    if refused:
        raise ValueError(
            f"cannot go on from {where}: {shown(refused)}{why} would make it another run. Give the "
            f"old options ({folder.path}/config.yaml), or begin another run ({ANOTHER})"
        )
    listed, free = (
        of_kind(folder.changed, Kind.LISTED, Kind.STEP),
        of_kind(folder.changed, Kind.FREE, Kind.CONTENT),
    )
    line = f"going on from {where}"
    line += f"; from here on it is trained with {shown(listed)}" if listed else ""
    line += f"; also changed: {shown(free)}" if free else ""
    folder.lines.append(line)
    return folder


def _may_be_gone(saved: Identity, now: Identity, folder: RunFolder) -> bool:
    """Whether the model's folder is missing, but not needed: its weights are in the checkpoint."""
    path = now.options["model.path"]
    if folder.checkpoint is None or now.options["model.lora_rank"] or Path(path).is_dir():
        return False
    if path != saved.options["model.path"]:
        return False
    folder.identity = replace(now, model=saved.model)
    folder.lines.append(f"model.path {path} is gone; the run goes on with the checkpoint's weights")
    return True


def _other_model(path: str, saved: Identity) -> str:
    if not Path(path).is_dir():
        return "no such folder"
    own = identity_of(Path(path))
    if own and own.options.get("model.lora_rank"):
        whose = "this run" if own.id == saved.id else "another run"
        return f"LoRA weights of {whose}, merged already"
    return "another model than the run began from"
