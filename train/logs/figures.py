"""The two pictures of a run: curves.png from its metrics, samples.png from what the model said."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tercet.core.data.vision import load_image
from tercet.core.rewards import is_correct
from tercet.core.types import Group
from tercet.train.logs.metrics import (
    METRICS,
    METRICS_FILE,
    PANELS,
    Metric,
    phase_seconds,
    read_metrics,
)

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
MARKER_STEPS = 12
"""Runs of up to this many steps show each step as a marker or a bar."""
SMOOTH_STEPS = 60
"""From this many steps on, a metric is a faint line with its running mean over it."""
DPI = 110

PHOTO, GAP, WIDTH = 1.9, 0.15, 15.0
"""Inches: side of a photo, space between things, width of samples.png."""
TEXT_COLUMNS = 116
"""Characters of a line of text in samples.png."""
FONT_SIZE, LINE = 8.5, 0.165
"""Points of the text; inches from one line to the next."""
MARKS = {True: ("✔", "#1a7f37"), False: ("✘", "#c62828"), None: ("○", "#333333")}
"""Mark and colour of right and wrong responses, and of those that nobody judges."""
MAX_CHARACTERS, PER_ROLE = 3 * TEXT_COLUMNS - 30, 3
"""Characters shown of a response; responses shown of each role."""


def draw_figures(out: Path, groups: Sequence[Group] = ()) -> None:
    """Write a run's curves.png, and samples.png where there are groups to show."""
    draw_curves(out / METRICS_FILE, out / "curves.png")
    if groups:
        draw_samples(sample_rows(groups), out / "samples.png")


def draw_curves(metrics_file: Path | str, png: Path | str) -> None:
    """Draw the metrics of a run over its steps: the PANELS that have data, and the seconds.

    Args:
        metrics_file: metrics.jsonl as RunLog writes it.
        png: picture to write.

    Raises:
        ValueError: the file holds no step, none of its metrics has a panel, or a line is not a JSON
            object with a step.
    """
    steps = read_metrics(metrics_file)
    if not steps:
        raise ValueError(f"{metrics_file} holds no step")
    names = {name for step in steps for name in step}
    recorded = [metric for metric in METRICS if metric.name in names]
    panels = {title: [m for m in recorded if m.panel == title] for title in PANELS}
    panels = {title: metrics for title, metrics in panels.items() if metrics}
    phases = [*dict.fromkeys(phase for step in steps for phase in phase_seconds(step))]
    count = len(panels) + bool(phases)
    if not count:
        raise ValueError(f"{metrics_file}: none of its metrics has a panel")
    columns = min(count, 3 if count in (3, 5, 6) else 4)
    lines = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (title, metrics) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, steps, title, metrics)
    if phases:
        _draw_seconds(axes[len(panels)], steps, phases)
    for axis in axes[count:]:
        axis.remove()
    _save(figure, png)


def _draw_panel(axis: Axes, steps: list[dict], title: str, metrics: list[Metric]) -> None:
    left, right = ([m for m in metrics if m.right == side] for side in (False, True))
    colours = iter(COLOURS)
    handles = [_draw_series(axis, steps, metric, next(colours), "-") for metric in left]
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    _style(axis, steps, room=1.2)
    if right:
        twin = axis.twinx()
        handles += [_draw_series(twin, steps, metric, next(colours), "--") for metric in right]
        twin.set_ylabel(PANELS[title], fontsize=8)
        _style(twin, steps, room=1.6)
        axis.yaxis.set_visible(bool(left))
    _legend(axis, handles)


def _draw_series(axis: Axes, steps: list[dict], metric: Metric, colour: str, style: str) -> Line2D:
    """Draw one metric; returns the line that the legend shows."""
    name, label = metric.name, metric.curve
    x, y = np.array([(step["step"], step[name]) for step in steps if name in step]).T
    smooth = len(x) >= SMOOTH_STEPS
    (line,) = axis.plot(x, y, style, color=colour, label=label)
    line.set(linewidth=0.8 if smooth else 1.5, alpha=0.3 if smooth else 1)
    if len(x) <= MARKER_STEPS:
        line.set(marker="o", markersize=4)
    if smooth:
        window = np.ones(2 * (len(x) // 30) + 1)
        mean = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
        (line,) = axis.plot(x, mean, style, color=colour, label=label, linewidth=1.8)
    return line


def _draw_seconds(axis: Axes, steps: list[dict], phases: list[str]) -> None:
    """Draw the seconds of each step, the phases on top of one another."""
    numbers = np.array([step["step"] for step in steps])
    seconds = np.array([[phase_seconds(step).get(name, 0.0) for step in steps] for name in phases])
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(phases))]
    if len(numbers) <= MARKER_STEPS:
        handles = [
            axis.bar(numbers, values, 0.6, top - values, color=colour, label=label)
            for values, top, colour, label in zip(
                seconds, seconds.cumsum(axis=0), colours, phases, strict=True
            )
        ]
    else:
        handles = axis.stackplot(numbers, seconds, colors=colours, labels=phases)
    axis.set_title("Seconds a step", fontsize=10)
    _style(axis, steps, room=1.1)
    axis.set_ylim(bottom=0)
    _legend(axis, handles)


def _style(axis: Axes, steps: list[dict], room: float) -> None:
    """Set ticks, labels and limits.

    With a single step the y axis reaches from 0 to `room` times the value. `room` differs between
    the left and the right axis, so that their markers do not hide one another.
    """
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
    axis.yaxis.get_offset_text().set_fontsize(8)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.02)
    if len(steps) == 1 and np.isfinite(axis.dataLim.intervaly).all():
        axis.set_xlim(steps[0]["step"] - 1, steps[0]["step"] + 1)
        low, high = axis.dataLim.intervaly
        axis.set_ylim(min(0.0, room * low), max(0.0, room * high) or 1.0)


def _legend(axis: Axes, handles: list) -> None:
    """Put the legend below the panel, where it hides no curve."""
    axis.legend(
        handles=handles,
        fontsize=7.5,
        frameon=False,
        ncols=len(handles) if len(handles) < 5 else 3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        columnspacing=1.2,
        handlelength=2.2,
    )


def draw_samples(rows: list[dict], png: Path | str) -> None:
    """Draw triplets and what the model said about them, one triplet below the other.

    Args:
        rows: one dict a triplet: `anchor`, `positive`, `negative` (PIL images), `question`,
            `truth` and `responses`, a list of dicts with `role` ("anchor" or "positive"), `text`,
            `correct` (bool; None: the reward function does not tell), `reward` and `advantage`.
        png: picture to write.

    Raises:
        ValueError: there is no triplet.
    """
    if not rows:
        raise ValueError("there is no triplet to draw")
    texts = [_text_lines(row) for row in rows]
    heights = [max(PHOTO + 2 * LINE, LINE * len(text)) + 2 * GAP for text in texts]
    figure = Figure(figsize=(WIDTH, sum(heights)))
    top = sum(heights)
    for number, (row, text, height) in enumerate(zip(rows, texts, heights, strict=True)):
        if number:
            y = [top / sum(heights)] * 2
            figure.add_artist(Line2D([0.01, 0.99], y, color="#bbbbbb", linewidth=0.8))
        _draw_photos(figure, row, top - GAP)
        _draw_text(figure, text, top - GAP)
        top -= height
    _save(figure, png)


def _draw_photos(figure: Figure, row: dict, top: float) -> None:
    """Draw the three photos side by side; `top` is in inches from the bottom of the picture."""
    width, height = figure.get_size_inches()
    # A triplet does not hold the name of its negative's sub-category.
    names = {"anchor": row["truth"], "positive": row["truth"], "negative": ""}
    for place, (role, name) in enumerate(names.items()):
        left = GAP + place * (PHOTO + GAP)
        for line, text in enumerate((role, textwrap.shorten(_plain(name), 26, placeholder="…"))):
            _write(figure, left, top - line * LINE, text, weight="bold" if line == 0 else "normal")
        box = (left / width, (top - 2 * LINE - PHOTO) / height, PHOTO / width, PHOTO / height)
        axis = figure.add_axes(box, anchor="NW")
        photo = row[role].convert("RGB")
        photo.thumbnail((320, 320))
        axis.imshow(np.asarray(photo))
        axis.set_axis_off()


def _text_lines(row: dict) -> list[tuple[str, str, str]]:
    """(text, colour, weight) of each line of text beside the photos."""
    lines = [(line, "black", "bold") for line in _wrap("Q  ", row["question"])]
    lines += [(line, "black", "bold") for line in _wrap("A  ", row["truth"])]
    for role in ("anchor", "positive"):
        said = [response for response in row["responses"] if response["role"] == role]
        for response in said[:PER_ROLE]:
            mark, colour = MARKS[response["correct"]]
            head = (
                f"{mark}  on the {role} photo: reward {response['reward']:.2f}, "
                f"advantage {response['advantage']:+.2f}"
            )
            lines.append((head, colour, "bold"))
            lines += [(line, "#333333", "normal") for line in _wrap("   ", response["text"])]
        if len(said) > PER_ROLE:
            note = f"   … {len(said)} responses on the {role} photo"
            if None not in (marks := [response["correct"] for response in said]):
                note += f", {sum(marks)} of them correct"
            lines.append((note, "#777777", "normal"))
    return lines


def _draw_text(figure: Figure, lines: list[tuple[str, str, str]], top: float) -> None:
    left = 2 * GAP + 3 * (PHOTO + GAP)
    for number, (text, colour, weight) in enumerate(lines):
        _write(figure, left, top - number * LINE, text, color=colour, weight=weight)


def _write(figure: Figure, left: float, top: float, text: str, **style) -> None:
    """Write a line of text, `left` and `top` in inches from the left and the bottom.

    A `$` in the text stands for itself, not for mathematics.
    """
    width, height = figure.get_size_inches()
    figure.text(
        left / width,
        top / height,
        text,
        va="top",
        family="DejaVu Sans Mono",
        fontsize=FONT_SIZE,
        parse_math=False,
        **style,
    )


def _wrap(prefix: str, text: str) -> list[str]:
    """Lines of at most TEXT_COLUMNS; the middle of a long text is left out, not its answer."""
    text = _plain(text) or "(empty)"
    if len(text) > MAX_CHARACTERS:
        begin, end = text[: MAX_CHARACTERS // 2], text[-MAX_CHARACTERS // 2 :]
        text = f"{begin.rsplit(' ', 1)[0]} … {end.split(' ', 1)[-1]}"
    indent = " " * len(prefix)
    return textwrap.wrap(text, TEXT_COLUMNS, initial_indent=prefix, subsequent_indent=indent)


def _plain(text: str) -> str:
    """The text on one line, without characters that cannot be shown."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _save(figure: Figure, png: Path | str) -> None:
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # characters that the font lacks
        figure.savefig(png, dpi=DPI)


def sample_rows(groups: Sequence[Group]) -> list[dict]:
    """The rows of samples.png, as `draw_samples` takes them: one a group."""
    return [
        {
            "anchor": load_image(group.triplet.anchor),
            "positive": load_image(group.triplet.positive),
            "negative": load_image(group.triplet.negative),
            "question": group.triplet.question,
            "truth": group.triplet.sub_category,
            "responses": [
                {
                    "role": response.role,
                    "text": response.text,
                    "correct": is_correct(response.metrics)
                    if "accuracy" in response.metrics
                    else None,
                    "reward": response.reward,
                    "advantage": response.advantage,
                }
                for response in group.responses
            ],
        }
        for group in groups
    ]
