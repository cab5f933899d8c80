"""What a checkpoint tells of its run: which run, its options, data and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.data.fields import load_json
from tercet.core.data.manifest import MANIFEST_NAME, Manifest
from tercet.core.prompts import stage2_text
from tercet.train.cli.arguments import options_of as types_of
from tercet.train.logs.metrics import METRICS_FILE, read_metrics
from tercet.train.run.complete import problem_of, read_complete
from tercet.train.run.identity import Identity, options_of, shared_options

ENVIRONMENT = "environment.json"
"""What a run was started on (see train.logs.environment)."""
CONFIGS = {"tapo": TapoConfig, "sft": SftConfig}
QUESTION = "What is the name of the object in this photo?"
MOST_STAGES = 8
"""Stages of training behind one another that are followed to find the base."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint, and what is known of the run that it is of."""

    folder: Path
    step: int
    identity: Identity | None
    """None for a checkpoint of an earlier version."""
    metrics: list[dict[str, float]]
    """Steps of the run up to this one; empty where its folder is not there."""
    manifest: Manifest | None
    """The run's triplets; None for stage 1, and where its folder is not there."""
    version: str
    """Of the code that trained it; empty where nothing tells."""

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """Read a checkpoint; the checksums of all its files are compared.

        Raises:
            ValueError: it is no whole checkpoint; for a run's folder its checkpoints are named.
        """
        inside = folder / "checkpoints"
        if inside.is_dir() and not (folder / "config.json").exists():
            names = ", ".join(sorted(p.name for p in inside.iterdir() if p.is_dir())) or "none"
            raise ValueError(f"{folder} is a run's folder; give one of its checkpoints: {names}")
        if problem := problem_of(folder):
            raise ValueError(f"{folder} is no whole checkpoint: {problem}")
        complete = read_complete(folder)
        run, step = folder.resolve().parent.parent, complete["step"]
        log, triplets = run / METRICS_FILE, run / MANIFEST_NAME
        return cls(
            folder,
            step,
            Identity.of(complete.get("identity")),
            [s for s in read_metrics(log) if s["step"] <= step] if log.is_file() else [],
            Manifest.read(triplets) if triplets.is_file() else None,
            _version(run / ENVIRONMENT),
        )

    @property
    def run_folder(self) -> Path:
        """Where its run's files are, unless the checkpoint was moved."""
        return self.folder.resolve().parent.parent

    def recipe(self) -> dict[str, dict[str, Any]]:
        """Options that differ from their defaults, by section; see `shared_options`."""
        if self.identity is None:
            return {}
        config = CONFIGS[self.identity.command]
        defaults, found = options_of(config()), {}
        for name, value in shared_options(self.identity.options, types_of(config)).items():
            section, _, option = name.partition(".")
            if name != "model.path" and self.identity.options[name] != defaults.get(name):
                found.setdefault(section, {})[option] = value
        return found

    def question(self) -> str:
        """A prompt as training has it, without the options that some wordings show."""
        options = self.identity.options if self.identity else {}
        asked = self.manifest.anchors[0].question if self.manifest else QUESTION
        is_stage2 = options.get("rollout.prompt", "stage2") == "stage2"
        return stage2_text(asked) if is_stage2 else asked

    def base(self) -> str | None:
        """Hub id of the model that training began with, stage 1 included; None: not known."""
        identity = self.identity
        for _ in range(MOST_STAGES):
            if identity is None:
                return None
            path = str(identity.options["model.path"])
            if identity.model == f"id {path}":  # see model_digest
                return path
            identity = Identity.of((read_complete(Path(path)) or {}).get("identity"))
        return None


def _version(file: Path) -> str:
    """The version of the code in an environment.json; empty where there is none."""
    found = load_json(file) if file.is_file() else {}
    return str(found.get("Tercet", "")) if isinstance(found, dict) else ""
