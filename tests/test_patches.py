"""8-bit patches against transformers' image processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny

from tercet.core.data.patches import Patches
from tercet.core.models import FAMILIES

pytestmark = pytest.mark.core


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("size", [(300, 200), (97, 411), (1, 1), (3, 50)])
def test_pixel_values_are_those_of_the_processor(architecture, size):
    """Bit for bit; the deviations of the three colours differ."""
    processor = tiny(architecture).image_processor
    processor.image_mean, processor.image_std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    wanted = processor(
        images=(photo := noise(*size)), return_tensors="pt", input_data_format="channels_last"
    )
    patches = Patches(processor)
    levels, grid = patches.cut(photo)
    assert levels.dtype == torch.uint8 and torch.equal(grid, wanted["image_grid_thw"])
    assert 8 * levels.nbytes == wanted["pixel_values"].nbytes
    found = patches.pixel_values(levels)
    assert found.is_contiguous() and torch.equal(found, wanted["pixel_values"])


class Odd:
    """An image processor that changes what another one gives."""

    def __init__(self, change):
        self.inner, self.change = tiny().image_processor, change
        self.patch_size, self.merge_size, self.temporal_patch_size = 14, 2, 2

    def __call__(self, **given):
        found = self.inner(**given)
        return {**found, "pixel_values": self.change(found["pixel_values"])}


def test_processors_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="Odd does not resize photos to whole numbers"):
        Patches(Odd(lambda values: values + 0.5)).cut(noise(60, 60))
    by_mean = Patches(Odd(lambda values: values if values.max() > 99 else values - values.mean(0)))
    with pytest.raises(ValueError, match="Odd does not normalise each colour by itself"):
        by_mean.pixel_values(torch.zeros(4, 3, 196, dtype=torch.uint8))
