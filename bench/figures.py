"""Draws the figures of README from the ledgers in bench/results.

make bench-figures
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from tercet.train.demo.arms import read_rows
from tercet.train.demo.comparison import draw_gains
from tercet.train.demo.forms import draw_forms, whole_seeds

RESULTS = Path(__file__).parent / "results"
LONGEST = 10
"""Bars of this many times ours and more have the same length; their labels tell the value."""
KERNEL_KEYS = ("device", "dtype", "rows", "hidden", "vocabulary")
STEP_KEYS = ("device", "model", "dtype", "clock")
SWEEPS = {
    "groups": ("groups", "o", "tab:red"),
    "responses": ("responses a group", "s", "tab:blue"),
    "length": ("tokens a response", "^", "tab:green"),
}


def newest(
    path: Path, keys: tuple[str, ...] = KERNEL_KEYS, names: tuple[str, ...] = ("method",)
) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Timed rows of a ledger, grouped by `keys`; of rows with the same `names` only the last."""
    groups: dict[tuple[str, ...], dict[tuple[str, ...], dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["ms_50"]:
                key = tuple(row[name] for name in keys)
                groups.setdefault(key, {})[tuple(row[name] for name in names)] = row
    return {key: list(rows.values()) for key, rows in groups.items()}


def draw_kernels(path: Path = RESULTS / "kernels.csv", out: Path = RESULTS / "kernels.png") -> None:
    """Time and extra memory of each method, one line of panels per shape that has peers."""
    groups = {key: rows for key, rows in newest(path).items() if len(rows) > 2}
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
            longest = LONGEST * values[names.index("ours")]
            held = [min(value, longest) if value == value else value for value in values]
            bars = panel.barh(range(len(names)), held, color=colours)
            panel.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4))
            panel.bar_label(bars, [f" {v:,.0f}" if v == v else "" for v in values])
            panel.set_xlabel(unit)
            panel.margins(x=0.15)
            panel.spines[["top", "right"]].set_visible(False)
        memory.set_yticks([])
        time.set_title(f"{device}, {dtype}: R, D, V = {', '.join(shape)}", loc="left", fontsize=10)
    figure.savefig(out, dpi=110)


def draw_step(path: Path = RESULTS / "step.csv", out: Path = RESULTS / "step.png") -> None:
    """Time and memory of each method, and how ours grow: a line of panels each, per device."""
    groups = newest(path, STEP_KEYS, ("sweep", "method", "update_on", "packed_tokens"))
    if not groups:
        raise ValueError(f"{path} holds no timed row")
    shown = [
        (key, [r for r in rows if bool(r["sweep"]) == swept], swept)
        for key, rows in groups.items()
        for swept in (False, True)
    ]
    shown = [one for one in shown if one[1]]
    figure = Figure(figsize=(10, 3.2 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False)
    for pair, (key, rows, swept) in zip(panels, shown, strict=True):
        if swept:
            _step_curves(pair, rows)
            continue
        _step_bars(pair, [row for row in rows if row["groups"] == "1"])
        pair[0].set_title(", ".join(key) + " time", loc="left", fontsize=10)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)


def draw_forms_of_loss(
    path: Path = RESULTS / "forms.jsonl", out: Path = RESULTS / "forms.png"
) -> None:
    """Margin and accuracy of each form of the loss, on the seeds that have all of them."""
    draw_forms(whole_seeds(read_rows(path)), out)


def draw_demo(folder: Path = RESULTS, out: Path = RESULTS / "demo.png") -> None:
    """What the demo's arms gain, with names of each kind."""
    rows = {names: read_rows(folder / f"demo_{names}.jsonl") for names in ("spelled", "opaque")}
    draw_gains(
        {names: [r for r in of if r.equal == "responses"] for names, of in rows.items()}, out
    )


def _step_bars(panels, rows: list[dict[str, str]]) -> None:
    """Methods from slow to fast, with one bar per `loss.update_on`."""
    cells = {(row["method"], row["update_on"]): row for row in rows}
    cost = {method: float(cells[method, on]["ms_50"]) for method, on in reversed(cells)}
    order = sorted(cost, key=lambda method: -cost[method])
    for panel, column, unit, scale in (
        (
            panels[0],
            "ms_50",
            "seconds a step (over one by one: measured, counted)",
            1e3,
        ),
        (panels[1], "extra_mib", "MiB above parameters and gradients", 1),
    ):
        for shift, on in ((0.2, "anchor"), (-0.2, "own")):
            chosen = [cells.get((method, on)) for method in order]
            values = [float(row[column]) / scale if row else float("nan") for row in chosen]
            tint = "tab:red", "tab:gray"
            bars = panel.barh(
                [place + shift for place in range(len(order))],
                values,
                0.38,
                color=[tint[method != "ours"] for method in order],
                alpha=1 if on == "anchor" else 0.55,
                label=f"update on {on}",
            )
            panel.bar_label(
                bars,
                [_bar_text(row, column, value) for row, value in zip(chosen, values, strict=True)],
                fontsize=8,
            )
        panel.set(yticks=range(len(order)), ylim=(-0.6, len(order) - 0.4), xlabel=unit)
        panel.margins(x=0.32 if column == "ms_50" else 0.15)
    panels[0].set_yticklabels([method.replace("_", " ") for method in order])
    panels[1].set_yticks([])
    panels[1].set_title("upper bar: update on the anchor, lower: on their own", loc="right", size=9)


def _bar_text(row: dict[str, str] | None, column: str, value: float) -> str:
    if row is None:
        return ""
    if column != "ms_50" or not row["measured_ratio"]:
        return f" {value:,.0f}"
    ratios = float(row["measured_ratio"]), float(row["predicted_ratio"])
    return f" {value:.2f} ({ratios[0]:.2f}, {ratios[1]:.2f})"


def _step_curves(panels, rows: list[dict[str, str]]) -> None:
    """Ours: time over counted operations, memory over packed tokens."""
    time, memory = panels
    for sweep, (label, marker, colour) in SWEEPS.items():
        points = sorted((r for r in rows if r["sweep"] == sweep), key=lambda r: float(r["tflop"]))
        for panel, across, up, scale in (
            (time, "tflop", "ms_50", 1e3),
            (memory, "packed_tokens", "extra_mib", 1),
        ):
            x = [float(row[across]) for row in points]
            y = [float(row[up]) / scale for row in points]
            panel.plot(x, y, marker=marker, color=colour, label=label, lw=1)
    base = [row for row in rows if row["sweep"] == "groups"][:1]
    if base:
        rate = float(base[0]["ms_50"]) / 1e3 / float(base[0]["tflop"])
        most = max(float(row["tflop"]) for row in rows)
        time.plot([0, most], [0, rate * most], color="black", ls=":", lw=1, label="as counted")
    time.set(xlabel="counted TFLOP of the step", ylabel="seconds")
    memory.set(xlabel="packed tokens, both branches", ylabel="MiB above parameters and gradients")
    for panel in panels:
        panel.set(xlim=0, ylim=0)
    time.legend(title="ours, growing in", loc="upper left", frameon=False)


if __name__ == "__main__":
    draw_kernels()
    draw_step()
    draw_forms_of_loss()
    draw_demo()
