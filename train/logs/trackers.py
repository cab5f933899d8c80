"""Weights & Biases, MLflow and SwanLab, by accelerate's trackers: what they get of a run.

Each takes its address and key from its own variables and files, not from the options. One that
cannot be started ends the run before its first step; one that fails later is left out from then on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from PIL import Image

PACKAGES = ("wandb", "mlflow", "swanlab")
"""Packages by the words of run.log_to, in which they are the same."""
OFFLINE = {
    "wandb": "wandb login, or WANDB_MODE=offline",
    "mlflow": "look at MLFLOW_TRACKING_URI; it may be a folder",
    "swanlab": "swanlab login, or SWANLAB_MODE=offline",
}
"""What to do where one cannot be started."""


class Trackers:
    """The trackers of a run; none of its methods raises.

    Args:
        names: words of run.log_to.
        project: of all of them.
        out: folder of the run; its name is the run's. Gets what a tracker writes on this machine.
        options: by dotted name, without what is not to be sent.

    Raises:
        ValueError: a package is not installed, or a tracker cannot be started.
    """

    def __init__(self, names: Sequence[str], project: str, out: Path, options: dict[str, object]):
        wanted = [name for name in PACKAGES if name in names]
        self._open: dict[str, object] = {}
        for name in wanted:
            try:
                import_module(name)
            except ImportError as error:
                raise ValueError(
                    f"run.log_to names {name}, but the package {name} is not installed: "
                    f"`pip install {name}`, or leave it out ({error})"
                ) from error
        for name in wanted:
            try:
                tracker = self._open[name] = _made(name, project, out)
                tracker.start()
                tracker.store_init_configuration(options)
            except Exception as error:  # each package has exceptions of its own
                said = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"run.log_to: {name} cannot be started: {said} ({OFFLINE[name]})"
                ) from error

    def log(self, step: int, numbers: dict[str, float]) -> list[str]:
        """Send a step's metrics; returns a line for each tracker that fails, and leaves it out."""
        return self._each(lambda tracker: tracker.log(numbers, step=step))

    def picture(self, name: str, png: Path, step: int) -> list[str]:
        """Send a picture; returns as `log`."""

        def send(tracker) -> None:
            if hasattr(tracker, "log_images"):
                with Image.open(png) as image:
                    tracker.log_images({name: [image]}, step=step)
            else:
                tracker.log_artifact(str(png))

        return self._each(send)

    def close(self) -> list[str]:
        """End the runs of all trackers; returns as `log`."""
        lines = self._each(lambda tracker: tracker.finish())
        self._open = {}
        return lines

    def _each(self, send: Callable[[object], None]) -> list[str]:
        lines = []
        for name, tracker in [*self._open.items()]:
            try:
                send(tracker)
            except Exception as error:  # what only reports does not end a run
                del self._open[name]
                said = " ".join(str(error).split())[:300]
                lines.append(f"{name} gets nothing from here on: {said}")
        return lines


def _made(name: str, project: str, out: Path):
    """A tracker of accelerate's that is not started yet."""
    from accelerate import PartialState, tracking  # takes a second, and only trackers need it

    PartialState()  # accelerate's log needs it
    run = out.resolve().name
    if name == "wandb":
        # A run and those that resume it share a group.
        return tracking.WandBTracker(project, group=run, dir=str(out))
    if name == "mlflow":
        # Where nothing says otherwise mlflow writes into the current directory.
        os.environ.setdefault("MLFLOW_TRACKING_URI", (out.resolve() / "mlruns").as_uri())
        return tracking.MLflowTracker(experiment_name=project, run_name=run)
    return tracking.SwanLabTracker(project, experiment_name=run, logdir=str(out / "swanlab"))
