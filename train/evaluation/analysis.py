"""What a policy's hidden states hold (Fine-R1, section 5.4): a probe, genera, and a plane."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import ttest_rel
from torch import Tensor

from tercet.core.data.files import read_bytes
from tercet.core.draws import seeded_order
from tercet.core.names import normal_form

EPOCHS, BATCH, LR = 500, 512, 1e-4
"""The paper's settings of the linear probe, with Adam."""
OTHERS = 4
"""Species of other genera that one of the same genus is held against."""
MOST_CSV_BYTES = 1 << 24


@dataclass(frozen=True)
class Probe:
    """Accuracy of a linear classifier on test photos, in percent."""

    best: float
    """Over the epochs, as the paper reports it: chosen on the test photos themselves."""
    last: float
    """After the last epoch."""


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seed: int = 0
) -> Probe:
    """Train a linear layer on frozen features, with the paper's settings.

    Args:
        train, test: [N, D] float32 features.
        train_labels, test_labels: [N] int64 classes from 0.
        seed: of initialisation and batches.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    bound = train.shape[1] ** -0.5  # as torch.nn.Linear begins
    weight = (torch.rand(classes, train.shape[1], generator=generator) * 2 - 1) * bound
    bias = (torch.rand(classes, generator=generator) * 2 - 1) * bound
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer, accuracies = torch.optim.Adam(parameters, lr=LR), []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train), generator=generator).split(BATCH):
            optimizer.zero_grad()
            logits = train[rows] @ weight.T + bias
            torch.nn.functional.cross_entropy(logits, train_labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            found = (test @ weight.T + bias).argmax(dim=1)
        accuracies.append(100 * (found == test_labels).float().mean().item())
    return Probe(max(accuracies), accuracies[-1])


def genera_of(names: Sequence[str], file: str | Path | None = None) -> dict[str, str]:
    """The genus of each species that has one.

    Args:
        names: of species.
        file: CSV with the columns `name` and `genus`; None: the first word of names of two words or
            more, as of scientific names.

    Raises:
        ValueError: naming the file, for other columns or a name with two genera.
    """
    if file is None:
        return {name: name.split()[0].lower() for name in names if len(name.split()) > 1}
    text = read_bytes(Path(file), MOST_CSV_BYTES).decode("utf-8-sig", errors="replace")
    reader, found = csv.DictReader(text.splitlines()), {}
    if not {"name", "genus"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{file} needs the columns name and genus, got {reader.fieldnames}")
    for row in reader:
        name, genus = normal_form(row["name"] or ""), (row["genus"] or "").strip().lower()
        if found.setdefault(name, genus) != genus:
            raise ValueError(f"{file}: {row['name']!r} has two genera, {found[name]} and {genus}")
    return {name: found[normal_form(name)] for name in names if found.get(normal_form(name))}


def genus_differences(
    embeddings: Mapping[str, Tensor], genera: Mapping[str, str], seed: int = 0
) -> dict[str, float]:
    """How much closer a species is to one of its genus than to four others.

    Args:
        embeddings: [D] of each name.
        genera: of each name; species that are alone in their genus have no difference.
        seed: of the draws, which do not depend on the embeddings: models compare.

    Returns:
        By name: cosine with one drawn species of its genus, minus the mean of the cosines with
        OTHERS drawn ones of other genera.
    """
    unit = {
        name: torch.nn.functional.normalize(e.double(), dim=0) for name, e in embeddings.items()
    }
    found = {}
    for name, genus in genera.items():
        same = [other for other in genera if genera[other] == genus and other != name]
        others = [other for other in genera if genera[other] != genus]
        if same and others:
            near = seeded_order(same, seed, "same genus", name)[0]
            far = seeded_order(others, seed, "other genus", name)[:OTHERS]
            cosines = [float(unit[name] @ unit[other]) for other in far]
            found[name] = float(unit[name] @ unit[near]) - sum(cosines) / len(cosines)
    return found


def compare_differences(
    first: Mapping[str, float], second: Mapping[str, float]
) -> tuple[float, float]:
    """t and p of the paired t-test of second against first, over the species of both.

    Raises:
        ValueError: fewer than two species are in both.
    """
    both = [name for name in first if name in second]
    if len(both) < 2:
        raise ValueError(f"a t-test needs at least two species, got {len(both)}")
    result = ttest_rel([second[name] for name in both], [first[name] for name in both])
    return float(result.statistic), float(result.pvalue)


def principal_components(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The plane of the largest variance.

    Args:
        rows: [N, D] float.

    Returns:
        [N, 2] coordinates, and the share of the variance along each of the two axes.
    """
    centred = (rows - rows.mean(dim=0)).double().numpy()
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    variance = values**2
    return left[:, :2] * values[:2], variance[:2] / max(variance.sum(), 1e-30)


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
