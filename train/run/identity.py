"""What a run is: its options, model and data, and what of them may change when it goes on."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import get_args

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.data.cells import table_of
from tercet.core.data.files import regular
from tercet.core.option_types import Flags, Host, PathOrEmpty, PathText, Url

IDENTITY, LOCK = "identity.json", ".lock"  # in run.out
Options = dict[str, object]
"""By name, such as `optim.lr`."""
Changes = dict[str, tuple[object, object]]
"""(value then, value now) by option."""


class Kind(Enum):
    """What a change of an option means to a run that goes on."""

    FIXED = "it would be another run: refused"
    CONTENT = "what the path holds counts, not its name: compared by digests"
    STEP = "as LISTED, but refused while a step has begun: its groups depend on it"
    LISTED = "the rest of the run is trained otherwise: shown"
    FREE = "where and how it is computed, logged and kept, no more: shown"
    UNKEPT = "never stored"


KINDS: dict[str, Kind] = {
    "data": Kind.FIXED,  # of the choices in triplets.json
    "data.path": Kind.CONTENT,
    "data.positive": Kind.LISTED,
    "data.on_bad_image": Kind.LISTED,
    "data.on_long": Kind.LISTED,
    "model": Kind.LISTED,
    "model.path": Kind.CONTENT,
    "model.min_pixels": Kind.STEP,
    "model.max_pixels": Kind.STEP,
    "model.gradient_checkpointing": Kind.FREE,
    "model.lora_rank": Kind.FIXED,
    "model.lora_alpha": Kind.FIXED,
    "model.lora_targets": Kind.FIXED,
    "model.compile": Kind.FREE,
    "model.liger": Kind.FREE,
    "rollout": Kind.LISTED,
    "rollout.engine": Kind.FREE,
    "rollout.sglang_python": Kind.FREE,
    "rollout.server_gpus": Kind.FREE,
    "rollout.colocated": Kind.FREE,
    "rollout.sglang_args": Kind.FREE,
    "rollout.urls": Kind.FREE,
    "rollout.weight_sync": Kind.FREE,
    "rollout.weight_bucket_mib": Kind.FREE,
    "rollout.sync_host": Kind.FREE,
    "rollout.api_key": Kind.UNKEPT,
    "rollout.start_timeout_s": Kind.FREE,
    "rollout.request_timeout_s": Kind.FREE,
    "rollout.max_in_flight": Kind.FREE,
    "rollout.max_rows": Kind.FREE,
    "rollout.judge_url": Kind.FREE,
    "rollout.judge_cache": Kind.FREE,
    "rollout.n_anchor": Kind.STEP,
    "rollout.n_positive": Kind.STEP,
    "rollout.temperature": Kind.STEP,
    "rollout.groups_per_step": Kind.STEP,
    "loss": Kind.LISTED,
    "loss.update_on": Kind.STEP,
    "optim": Kind.LISTED,
    "optim.states": Kind.FIXED,  # states come back in the dtype that they were saved in
    "optim.samples_per_step": Kind.FIXED,  # with the step it gives the position in the records
    "optim.groups_per_minibatch": Kind.STEP,
    "optim.minibatch_by": Kind.STEP,
    "optim.max_skipped": Kind.FREE,
    "parallel": Kind.FREE,
    "parallel.mixed_precision": Kind.LISTED,
    "run": Kind.FREE,
    "run.epochs": Kind.LISTED,
    "run.steps": Kind.LISTED,
    "run.preset": Kind.LISTED,
    "run.stop_after": Kind.LISTED,
    "run.seed": Kind.FIXED,
    "run.overwrite": Kind.UNKEPT,
}
"""By option, and by section for those of its options that are not named here."""

OF_THE_PLACE = (
    "data.path",
    "run.out",
    "run.device",
    "run.threads",
    "rollout.sglang_python",
    "rollout.server_gpus",
    "rollout.api_key",
    "rollout.api_key_file",
)
"""Options that say where a run is, and not how it is trained."""

FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Files of a model that `model_digest` reads whole."""
WEIGHTS = (".safetensors", ".bin", ".pt")
MOST_HEADER = 64 << 20  # bytes read of a safetensors header
MOST_HASHED = 32 << 20  # bytes of a file of photos that is read whole
SAMPLES, SAMPLE_BYTES = 1024, 64
"""So many places of a file of weights are read, and so many bytes at each."""


def kind_of(option: str) -> Kind:
    """What a change of an option such as `optim.lr` means."""
    return KINDS.get(option) or KINDS[option.partition(".")[0]]


@dataclass(frozen=True)
class Identity:
    """A run, as it is told from others: in its folder and in each of its checkpoints."""

    id: str
    """Drawn when the run begins."""
    command: str
    """tapo or sft."""
    options: Options
    model: str
    """Digest of the model that it began from."""
    data: dict[str, str]
    """Digests of what it is trained on."""
    launch: dict[str, str]
    """What started the process: see `launch`."""

    @classmethod
    def of(cls, stored: object) -> Identity | None:
        """What `asdict` gave; None for anything else."""
        kinds = {"options": dict, "data": dict, "launch": dict}
        names = {field.name for field in fields(cls)}
        if not isinstance(stored, dict) or stored.keys() != names:
            return None
        if not all(isinstance(value, kinds.get(name, str)) for name, value in stored.items()):
            return None
        return cls(**stored)


def options_of(config: TapoConfig | SftConfig) -> Options:
    """Every option by its name, as JSON gives it back, without those that are never stored."""
    flat = {
        f"{section}.{name}": value
        for section, options in asdict(config).items()
        for name, value in options.items()
    }
    flat = {name: value for name, value in flat.items() if kind_of(name) is not Kind.UNKEPT}
    return json.loads(json.dumps(flat))


def shared_options(options: Options, types: dict[str, object]) -> Options:
    """Options that may be shown to others: without the names of this machine, without addresses
    and servers' flags, and of paths the last part alone.

    Args:
        options: by dotted name.
        types: of all options by dotted name.
    """
    shown = {}
    for name, value in options.items():
        hint = types.get(name)
        if name in OF_THE_PLACE or hint is None or _mentions(hint, Url, Host, Flags):
            continue
        is_path = isinstance(value, str) and _mentions(hint, PathText, PathOrEmpty)
        shown[name] = Path(value).name if is_path else value
    return shown


def _mentions(hint: object, *types: object) -> bool:
    """Whether a type is one of some, or holds one of them."""
    return hint in types or any(_mentions(part, *types) for part in get_args(hint))


def changes(saved: Identity, now: Options, defaults: Options) -> Changes:
    """The options of which the run that was saved had other values.

    Args:
        saved: the run as it was.
        now: every option.
        defaults: stand in for options that were not there yet.
    """
    then = defaults | saved.options
    return {name: (then[name], value) for name, value in now.items() if then[name] != value}


def of_kind(changed: Changes, *kinds: Kind) -> Changes:
    """Those of the changes that are of some kinds."""
    return {name: values for name, values in changed.items() if kind_of(name) in kinds}


def shown(changed: Changes) -> str:
    """Changes as text: `optim.lr 1e-06 -> 1e-05, run.steps null -> 9`."""
    return ", ".join(f"{name} {_text(old)} -> {_text(new)}" for name, (old, new) in changed.items())


def _text(value: object) -> str:
    if isinstance(value, str) and value and not any(c.isspace() for c in value):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def digest(value: object) -> str:
    """Of anything that JSON can hold."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def photos_digest(keys: Iterable[str], root: str) -> str:
    """Of photos, by their keys relative to a folder and what their files hold.

    Of files above MOST_HASHED, which Parquet files may be, size and bytes at SAMPLES places.

    Raises:
        ValueError: naming a photo that is not there.
    """
    found: dict[str, str] = {}
    for key in keys:
        file = table_of(key) or key
        if file not in found:
            try:
                found[file] = _file_digest(Path(file))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ValueError(
                    f"{file}, which the run trains on, cannot be read: {reason}"
                ) from error
    return digest(sorted((os.path.relpath(file, root), held) for file, held in found.items()))


def _file_digest(file: Path) -> str:
    size = regular(file)
    parts = _sampled(file) if size > MOST_HASHED else [file.read_bytes()]
    held = blake2b(str(size).encode(), digest_size=16)
    for part in parts:
        held.update(part)
    return held.hexdigest()


def model_digest(path: str) -> str:
    """Of a model's folder, in a fraction of a second whatever its size; of a hub id the id itself.

    It covers configuration, tokenizer, and of each file of weights the name, the size, the header
    and bytes at SAMPLES places.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"id {path}"
    found = blake2b(digest_size=16)
    for name in FILES:
        if (folder / name).is_file():
            found.update(f"\0{name}\0".encode() + (folder / name).read_bytes())
    for file in sorted(folder.iterdir()):
        if file.suffix in WEIGHTS and file.name != "trainer_state.pt":
            found.update(f"\0{file.name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
            for part in _sampled(file):
                found.update(part)
    return found.hexdigest()


def _sampled(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if file.suffix == ".safetensors":
            yield stream.read(min(int.from_bytes(stream.read(8), "little"), MOST_HEADER))
        for place in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
            stream.seek(place)
            yield stream.read(SAMPLE_BYTES)


def launch() -> dict[str, str]:
    """What started this process: the host and the process above it (torchrun's agent), and the id
    that several nodes of torchrun share."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    shared = os.environ.get("TORCHELASTIC_RUN_ID", "none") if several else "none"
    return {
        "host": socket.gethostname(),
        "parent": f"{os.getppid()} since {_start_time(os.getppid())}",
        "run_id": "" if shared == "none" else shared,
    }


def same_launch(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether one torchrun has started both, the second one as a restart."""
    if one.get("run_id") and one.get("run_id") == other.get("run_id"):
        return True
    return all(one.get(name) == other.get(name) for name in ("host", "parent"))


def _start_time(process: int) -> str:
    """When a process started, in the kernel's ticks; empty where there is no /proc."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]
