"""Draws the figures of README from the ledgers in bench/results.

make bench-figures
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def newest(path: Path) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Timed rows of a ledger by (device, dtype, shape), of each method the last one written."""
    groups: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["ms_50"]:
                key = tuple(row[n] for n in ("device", "dtype", "rows", "hidden", "vocabulary"))
                groups.setdefault(key, {})[row["method"]] = row
    return {key: list(rows.values()) for key, rows in groups.items()}


def draw_kernels(path: Path = RESULTS / "kernels.csv", out: Path = RESULTS / "kernels.png") -> None:
    """Time and extra memory of each method, one line of panels a shape."""
    groups = newest(path)
    if not groups:
        raise ValueError(f"{path} holds no timed row")
    figure = Figure(figsize=(10, 2.8 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for (time, memory), (key, rows) in zip(panels, groups.items(), strict=True):
        device, dtype, *shape = key
        rows = sorted(rows, key=lambda row: -float(row["ms_50"]))
        names = [row["method"].replace("_", " ") for row in rows]
        colours = ["tab:red" if name == "ours" else "tab:gray" for name in names]
        for panel, values, unit in (
            (time, [float(row["ms_50"]) for row in rows], "ms, forward + backward"),
            (memory, [float(row["extra_mib"] or "nan") for row in rows], "MiB above gradients"),
        ):
            bars = panel.barh(range(len(names)), values, color=colours)
            panel.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4))
            panel.bar_label(bars, [f" {v:,.0f}" if v == v else "" for v in values])
            panel.set_xlabel(unit)
            panel.margins(x=0.15)
            panel.spines[["top", "right"]].set_visible(False)
        memory.set_yticks([])
        time.set_title(f"{device}, {dtype}: R, D, V = {', '.join(shape)}", loc="left", fontsize=10)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw_kernels()
