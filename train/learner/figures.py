"""The two pictures of a run: curves.png from its metrics, samples.png from what the model said."""

from __future__ import annotations

import json
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

PANELS = (
    (
        "Reward",
        {"reward": "reward", "accuracy": "accuracy", "several_names": "several names"},
        "",
        {},
    ),
    (
        "Loss",
        {"loss": "total", "pg_loss": "policy gradient", "cross_entropy": "cross entropy"},
        "",
        {},
    ),
    (
        "Entropy and KL",
        {"entropy": "H", "neg_entropy": "H negative", "exact_entropy": "H exact"},
        "KL",
        {"kl": "KL to negative", "approx_kl": "KL to old"},
    ),
    (
        "Share of tokens clipped",
        {"clip_frac_high": "high", "clip_frac_low": "low", "clip_frac_dual": "dual"},
        "",
        {},
    ),
    (
        "Gradient norm and learning rate",
        {"grad_norm": "gradient norm"},
        "learning rate",
        {"lr": "learning rate"},
    ),
    (
        "Response length and groups kept",
        {"response_length": "tokens a response"},
        "share kept",
        {"acceptance": "share of groups kept"},
    ),
)
"""Title; metrics of the left axis with their labels; label and metrics of the right axis."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's colours, told apart by the colour-blind."""
MARKER_STEPS = 12
"""Runs up to this many steps show each of them as a marker or bar."""
SMOOTH_STEPS = 60
"""From this many steps on they are faint, with a running mean over them."""

PHOTO, GAP, WIDTH, TEXT_COLUMNS = 1.9, 0.15, 15.0, 116
"""Inches of a photo's side, between things and of the picture; characters of a line of text."""
FONT_SIZE, LINE = 8.5, 0.165
"""Points of the text, inches from one line of it to the next."""
MAX_CHARACTERS, PER_ROLE = 3 * TEXT_COLUMNS - 30, 3
"""Of a response, and responses shown of each role."""


def draw_curves(metrics_file: Path | str, png: Path | str) -> None:
    """Draws the metrics of a run over its steps, a panel a subject, only panels with data.

    Args:
        metrics_file: JSON Lines as RunLog writes them.
        png: picture to write.

    Raises:
        ValueError: No line in the file, none with a metric that has a panel, or a line that is not
            a JSON object with a step.
    """
    rows = _read(Path(metrics_file))
    names = list(dict.fromkeys(name for row in rows for name in row))
    panels = [panel for panel in PANELS if {*panel[1], *panel[3]} & {*names}]
    phases = [name for name in names if name.startswith("seconds_")]
    count = len(panels) + bool(phases)
    if not count:
        raise ValueError(f"{metrics_file}: none of its metrics has a panel")
    columns = min(count, 3 if count in (3, 5, 6) else 4)
    lines = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, rows, *panel)
    if phases:
        _draw_seconds(axes[len(panels)], rows, phases)
    for axis in axes[count:]:
        axis.remove()
    _save(figure, png, dpi=110)


def _read(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with a step") from error
    if not rows:
        raise ValueError(f"{path} holds no step")
    return rows


def _draw_panel(
    axis: Axes, rows: list[dict], title: str, left: dict, right_label: str, right: dict
) -> None:
    names = {name for row in rows for name in row}
    left, right = ({n: side[n] for n in side if n in names} for side in (left, right))
    colours = iter(COLOURS)
    handles = [_draw_series(axis, rows, *item, next(colours), "-") for item in left.items()]
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    _style(axis, rows, room=1.2)
    if right:
        twin = axis.twinx()
        handles += [_draw_series(twin, rows, *item, next(colours), "--") for item in right.items()]
        twin.set_ylabel(right_label, fontsize=8)
        _style(twin, rows, room=1.6)
        axis.yaxis.set_visible(bool(left))
    _legend(axis, handles)


def _draw_series(axis: Axes, rows: list[dict], name: str, label: str, colour: str, style: str):
    """Draws one metric and returns the line that the legend shows."""
    points = np.array([(row["step"], row[name]) for row in rows if name in row])
    x, y = points.T
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


def _draw_seconds(axis: Axes, rows: list[dict], phases: list[str]) -> None:
    steps = np.array([row["step"] for row in rows])
    seconds = np.array([[row.get(name, 0.0) for row in rows] for name in phases])
    labels = [name.removeprefix("seconds_") for name in phases]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(phases))]
    if len(steps) <= MARKER_STEPS:
        handles = [
            axis.bar(steps, values, 0.6, top - values, color=colour, label=label)
            for values, top, colour, label in zip(
                seconds, seconds.cumsum(axis=0), colours, labels, strict=True
            )
        ]
    else:
        handles = axis.stackplot(steps, seconds, colors=colours, labels=labels)
    axis.set_title("Seconds a step", fontsize=10)
    _style(axis, rows, room=1.1)
    axis.set_ylim(bottom=0)
    _legend(axis, handles)


def _style(axis: Axes, rows: list[dict], room: float) -> None:
    """Axes; a single step gets both from 0, by `room` higher than it, so that markers differ."""
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
    axis.yaxis.get_offset_text().set_fontsize(8)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.02)
    if len(rows) == 1 and np.isfinite(axis.dataLim.intervaly).all():
        axis.set_xlim(rows[0]["step"] - 1, rows[0]["step"] + 1)
        low, high = axis.dataLim.intervaly
        axis.set_ylim(min(0.0, room * low), max(0.0, room * high) or 1.0)


def _legend(axis: Axes, handles: list) -> None:
    """Below the panel, where it hides no curve."""
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
    """Draws triplets with what the model said about them, one below the other.

    Args:
        rows: one dict a triplet: `anchor`, `positive`, `negative` (PIL images), `question`,
            `truth`, `negative_name` (may be left out) and `responses`, a list of dicts with `role`
            ("anchor" or "positive"), `text`, `correct` (bool), `reward` and `advantage`.
        png: picture to write.

    Raises:
        ValueError: No row.
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
    _save(figure, png, dpi=110)


def _draw_photos(figure: Figure, row: dict, top: float) -> None:
    """The three photos side by side; `top` in inches from the bottom of the picture."""
    width, height = figure.get_size_inches()
    names = {
        "anchor": row["truth"],
        "positive": row["truth"],
        "negative": row.get("negative_name", ""),
    }
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
    """(text, colour, weight) of each line beside the photos."""
    lines = [(line, "black", "bold") for line in _wrap("Q  ", row["question"])]
    lines += [(line, "black", "bold") for line in _wrap("A  ", row["truth"])]
    for role in ("anchor", "positive"):
        said = [response for response in row["responses"] if response["role"] == role]
        for response in said[:PER_ROLE]:
            mark, colour = ("✔", "#1a7f37") if response["correct"] else ("✘", "#c62828")
            head = (
                f"{mark}  on the {role} photo: reward {response['reward']:.2f}, "
                f"advantage {response['advantage']:+.2f}"
            )
            lines.append((head, colour, "bold"))
            lines += [(line, "#333333", "normal") for line in _wrap("   ", response["text"])]
        if len(said) > PER_ROLE:
            right = sum(bool(response["correct"]) for response in said)
            note = f"   … {len(said)} responses on the {role} photo, {right} of them correct"
            lines.append((note, "#777777", "normal"))
    return lines


def _draw_text(figure: Figure, lines: list[tuple[str, str, str]], top: float) -> None:
    left = 2 * GAP + 3 * (PHOTO + GAP)
    for number, (text, colour, weight) in enumerate(lines):
        _write(figure, left, top - number * LINE, text, color=colour, weight=weight)


def _write(figure: Figure, left: float, top: float, text: str, **style) -> None:
    """One line of text at inches from the left and the bottom; `$` in it is no mathematics."""
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
    """Lines of TEXT_COLUMNS; of a long text the beginning and the end, where the answer stands."""
    text = _plain(text) or "(empty)"
    if len(text) > MAX_CHARACTERS:
        begin, end = text[: MAX_CHARACTERS // 2], text[-MAX_CHARACTERS // 2 :]
        text = f"{begin.rsplit(' ', 1)[0]} … {end.split(' ', 1)[-1]}"
    indent = " " * len(prefix)
    return textwrap.wrap(text, TEXT_COLUMNS, initial_indent=prefix, subsequent_indent=indent)


def _plain(text: str) -> str:
    """The text on one line, without characters that cannot be shown."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _save(figure: Figure, png: Path | str, dpi: int) -> None:
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of scripts that the font lacks
        figure.savefig(png, dpi=dpi)


def sample_rows(groups: Sequence[Group]) -> list[dict]:
    """What samples.png shows of groups."""
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
                    else response.advantage > 0,
                    "reward": response.reward,
                    "advantage": response.advantage,
                }
                for response in group.responses
            ],
        }
        for group in groups
    ]
