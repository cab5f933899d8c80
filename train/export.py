"""A checkpoint, or stage-1 records, as a folder for others: weights or records, and a card.

    python -m tercet.train.export runs/mine/checkpoints/step_000060 --out mine
    python -m tercet.train.export runs/mine/checkpoints/step_000060 --out mine --push USER/NAME
    python -m tercet.train.export cots/stage1.json --out records

The card is written from the run's own files: options, data, figures. Nothing in the folder names a
path, an address or a key of this machine. A folder that is pushed becomes a private repository.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tercet.core.tool_config import ExportConfig
from tercet.train.cli.command_line import check_output, command, read_options


def export(options: ExportConfig) -> str:
    """Write the folder, and push it where that is asked for; returns what is to be said.

    Raises:
        ValueError: naming the option, checkpoint, record or repository at fault.
    """
    # Here, so that --help does not wait for torch and transformers.
    from tercet.train.publish.hub import check_push, push

    source, out = Path(options.source), Path(options.out)
    check(options)
    if options.push:
        check_push(options.push)
    is_records = source.is_file()
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        said = (write_records if is_records else write_model)(options, unfinished)
        if out.exists():
            out.rmdir()  # an empty one
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    lines = [f"wrote {out}: {said}"]
    if options.push:
        kind = "dataset" if is_records else "model"
        lines.append(f"pushed to {push(out, options.push, kind, options.private)}")
    return "\n".join(lines)


def check(options: ExportConfig) -> None:
    """Raises ValueError for options that do not go together, before anything is read."""
    source, out = Path(options.source), Path(options.out)
    if not source.exists():
        raise ValueError(f"--source: there is no {source}: give a checkpoint or a stage1.json")
    if options.adapter and options.merged:
        raise ValueError("--adapter and --merged exclude each other: give one of them")
    if source.is_file():
        names = ("adapter", "merged", "base", "evaluation")
        if given := [f"--{name}" for name in names if getattr(options, name)]:
            raise ValueError(f"{given[0]} is for checkpoints; {source} is a file of records")
    elif options.photos:
        raise ValueError("--photos is for stage-1 records; a checkpoint's photos are never copied")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} is there already: give a new folder or an empty one")
    check_output(out / "README.md", "out")


def write_model(options: ExportConfig, out: Path) -> str:
    """Write the folder of a checkpoint's model."""
    from tercet.train.publish.card import CURVES, model_card
    from tercet.train.publish.model_folder import write_adapter, write_merged
    from tercet.train.publish.trained import Trained

    trained = Trained.read(Path(options.source))
    base = options.base or trained.base()
    if options.adapter:
        base = write_adapter(trained.folder, out, base)
    else:
        write_merged(trained.folder, out)
    card = model_card(
        trained,
        name=options.push or Path(options.out).name,
        base=base,
        licence=options.licence,
        is_adapter=options.adapter,
        question=trained.question(),
        evaluation=Path(options.evaluation) if options.evaluation else None,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    if (curves := trained.run_folder / CURVES).is_file():
        shutil.copyfile(curves, out / CURVES)
    return f"{'an adapter' if options.adapter else 'a whole model'} of step {trained.step}"


def write_records(options: ExportConfig, out: Path) -> str:
    """Write the folder of stage-1 records."""
    from tercet.train.publish.records import write_records as write

    name = options.push or Path(options.out).name
    count = write(
        Path(options.source), out, name=name, licence=options.licence, photos=options.photos
    )
    return f"{count} records"


def read(argv: Sequence[str]) -> ExportConfig:
    """Options from a command line that may begin with the checkpoint or the records."""
    words = ["--source", *argv] if argv and not argv[0].startswith("-") else [*argv]
    return read_options(ExportConfig, words, __doc__.split("\n")[0])


def main() -> None:
    print(export(read(sys.argv[1:])))


if __name__ == "__main__":
    command(main)
