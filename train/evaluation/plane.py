"""The figure of the analysis: hidden states in the plane of their largest variance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def draw_plane(
    points: np.ndarray, right: Sequence[bool], shares: np.ndarray, title: str, path: Path
) -> None:
    """Draw points, those of right and of wrong names in two colours.

    Args:
        points: [N, 2].
        right: of each point.
        shares: [2], of the variance along each axis.
        title: of the figure.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    right = np.asarray(right)
    for of, label, colour in ((right, "right name", "C0"), (~right, "wrong name", "C3")):
        axes.scatter(*points[of].T, s=14, alpha=0.7, label=label, color=colour)
    axes.set_xlabel(f"component 1 ({100 * shares[0]:.0f} % of the variance)")
    axes.set_ylabel(f"component 2 ({100 * shares[1]:.0f} %)")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=130)
