"""Photos' patches in 8 bits: an eighth of the memory of pixel_values, and the same numbers.

An image processor resizes a photo to 8-bit colours, then normalises each of their 256 levels to a
float32 number and writes every patch once for each frame. Only the levels are worth keeping.
"""

from __future__ import annotations

from functools import cached_property
from math import ceil

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

LEVELS = 256


class Patches:
    """Cuts photos in 8-bit patches, and makes pixel_values of them.

    Args:
        processor: the policy's own, whose numbers these are.
    """

    def __init__(self, processor: BaseImageProcessor):
        self._processor = processor
        self._name = type(processor).__name__

    def cut(self, photo: Image.Image, **options: bool) -> tuple[Tensor, Tensor]:
        """A photo's patches [P, 3, patch * patch] uint8, and their grid [1, 3] int64.

        Args:
            photo: upright RGB.
            options: further ones of the processor.

        Raises:
            ValueError: the processor does not resize to 8-bit colours.
        """
        as_they_are = {"do_rescale": False, "do_normalize": False, "temporal_patch_size": 1}
        found, grid = self._call(photo, **as_they_are, **options)
        found = found.view(len(found), 3, -1)
        levels = found.to(torch.uint8)
        if not torch.equal(levels.to(found.dtype), found):
            raise ValueError(f"{self._name} does not resize photos to whole numbers of 0 to 255")
        return levels, grid

    def pixel_values(self, levels: Tensor) -> Tensor:
        """[P, 3 * temporal_patch * patch * patch] float32, as the processor gives them.

        Raises:
            ValueError: the processor does not normalise each colour by itself.
        """
        return self._values(levels, self._table)

    @cached_property
    def _table(self) -> Tensor:
        """[3, LEVELS] float32: what the processor makes of each level of each colour."""
        side = self._processor.patch_size * self._processor.merge_size
        ramp = np.arange(side * side * ceil(LEVELS / side**2)).reshape(side, -1) % LEVELS
        photo = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
        levels, _ = self.cut(photo, do_resize=False)
        wanted, _ = self._call(photo, do_resize=False)
        one = wanted.view(*levels.shape[:2], self._processor.temporal_patch_size, -1)[:, :, 0]
        by_colour = (x.transpose(0, 1).flatten(1) for x in (levels.long(), one))
        table = torch.zeros(3, LEVELS).scatter(1, *by_colour)
        if not torch.equal(self._values(levels, table), wanted):
            raise ValueError(f"{self._name} does not normalise each colour by itself")
        return table

    def _values(self, levels: Tensor, table: Tensor) -> Tensor:
        colours = zip(table, levels.unbind(1), strict=True)
        values = [of.index_select(0, x.flatten().int()).view_as(x) for of, x in colours]
        frames = self._processor.temporal_patch_size
        every = torch.stack(values, 1).unsqueeze(2).expand(-1, -1, frames, -1)
        return every.reshape(len(levels), -1)

    def _call(self, photo: Image.Image, **options: bool | int) -> tuple[Tensor, Tensor]:
        # A photo 1 or 3 pixels high would otherwise be taken for a channels-first array.
        layout = {"return_tensors": "pt", "input_data_format": "channels_last"}
        arrays = self._processor(images=photo, **layout, **options)
        return arrays["pixel_values"], arrays["image_grid_thw"]
