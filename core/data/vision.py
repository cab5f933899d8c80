"""Photos to model inputs: pixel_values, image_grid_thw, expanded image pads, M-RoPE positions.

Every number comes from transformers' own image processor (see core/data/patches.py) and
`get_rope_index`, which are called one prompt at a time, so that a prompt's arrays are the same
wherever it is packed.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache, partial
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from tercet.core.data.decoding import opened, orientation, upright_rgb
from tercet.core.data.patches import Patches
from tercet.core.models import family_of
from tercet.core.types import EncodedImage, EncodedPrompt, PolicyParts

JPEGS = ("JPEG", "MPO")  # an MPO is a JPEG with further pictures behind it
CACHE_BYTES = 2 * 1024**3
PNGS = 512
"""Photos kept as PNG, 40 ms and 1 to 2 MB a megapixel: four each of 128 sub-categories."""


def load_image(key: str) -> Image.Image:
    """Load a photo as upright 8-bit RGB.

    Grey, palette, CMYK, 16-bit and floating-point photos are converted, transparency is laid over
    white and the EXIF orientation is applied. Of several frames the first one counts.

    Args:
        key: a path, or `file.parquet#row/column/index` for a cell of a Parquet file.

    Returns:
        A PIL image in mode RGB.

    Raises:
        ValueError: naming the key, if it is missing, unreadable, too large or longer than 200 : 1.
    """
    with opened(key) as image:
        return upright_rgb(image)


def check_image(key: str) -> None:
    """Raises ValueError where `load_image` would; a JPEG takes an eighth of the time.

    It is decoded at an eighth of its size, which reads the whole stream as well.
    """
    with opened(key) as image:
        if image.format in JPEGS:
            image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
        else:
            upright_rgb(image)


def image_size(key: str) -> tuple[int, int]:
    """Width and height of what `load_image` gives; a JPEG is not decoded for them.

    Raises:
        ValueError: as `load_image`, as far as a JPEG's header tells.
    """
    with opened(key) as image:
        if image.format not in JPEGS:
            return upright_rgb(image).size
        width, height = image.size
        return (height, width) if orientation(image) in (5, 6, 7, 8) else (width, height)


def data_uri(key: str, name: str = "") -> str:
    """A photo as PNG in a data URI: the very pixels that the trainer sees, for a server.

    Args:
        key: image key.
        name: stands behind the end of the PNG, where no reader looks: servers that know photos by
            their bytes tell photos of different names apart.
    """
    return "data:image/png;base64," + base64.b64encode(_png(key) + name.encode()).decode()


@lru_cache(maxsize=PNGS)
def _png(key: str) -> bytes:
    buffer = BytesIO()
    load_image(key).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class PromptEncoder:
    """Turns prompt ids with one pad per image into EncodedPrompts.

    A prompt's ids, positions and grids are computed once, from its photos' sizes, and kept. Photos
    are decoded when their pixels are asked for; the 8-bit patches of the most recent ones are kept,
    588 bytes each where a patch has 14 x 14 pixels.

    Args:
        parts: the policy.
        cache_bytes: most bytes of patches that are kept.
    """

    def __init__(self, parts: PolicyParts, cache_bytes: int = CACHE_BYTES):
        self._body = parts.model.model
        self._family = family_of(parts.model.config)
        self._processor = parts.image_processor
        self._image_token_id = parts.model.config.image_token_id
        self._prompts: dict[tuple, EncodedPrompt] = {}
        self._merge = parts.model.config.vision_config.spatial_merge_size
        self._images: dict[str, EncodedImage] = {}
        self._patches = Patches(parts.image_processor)
        self._levels: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._used_bytes = 0

    def __call__(self, prompt_ids: tuple[int, ...], keys: tuple[str, ...]) -> EncodedPrompt:
        """Expand each image pad to its photo's merged patches and number the positions.

        Args:
            prompt_ids: token ids with exactly one image pad per photo.
            keys: image keys, in the order of the pads.

        Raises:
            ValueError: when pads and photos differ in number, or a photo is bad.
        """
        known = (tuple(prompt_ids), tuple(keys))
        if known not in self._prompts:
            self._prompts[known] = self._encode(*known)
        return self._prompts[known]

    def length(self, prompt_ids: Sequence[int], keys: tuple[str, ...]) -> int:
        """Tokens of an expanded prompt, from its photos' sizes; nothing is kept but their grids."""
        return len(prompt_ids) + sum(self._merged(self.image(key)) - 1 for key in keys)

    def image(self, key: str) -> EncodedImage:
        """The photo `key`, resized, normalised and cut in patches; ValueError if it is bad."""
        if key not in self._images:
            self._images[key] = EncodedImage(partial(self._pixel_values, key), self.grid(key))
        return self._images[key]

    def grid(self, key: str) -> Tensor:
        """[1, 3] int64: patches of a photo in time, height and width, from its size alone."""
        width, height = image_size(key)
        resized = self._family.resized(self._processor, height, width)
        return torch.tensor([[1, *(side // self._processor.patch_size for side in resized)]])

    def levels(self, key: str) -> tuple[Tensor, Tensor]:
        """A photo's 8-bit patches and their grid, as `Patches.cut` has them."""
        return self._patches.cut(load_image(key))

    def _merged(self, image: EncodedImage) -> int:
        """Tokens that a photo takes in a prompt."""
        return image.patches // self._merge**2

    def _pixel_values(self, key: str) -> Tensor:
        if key in self._levels:
            self._levels.move_to_end(key)
            return self._patches.pixel_values(self._levels[key])
        levels, grid = self.levels(key)
        known = self._images[key].grid_thw
        if not torch.equal(grid, known):
            raise ValueError(
                f"image {key!r} has {grid.tolist()} patches, at first {known.tolist()}: "
                "the file was changed during the run"
            )
        self._levels[key] = levels
        self._used_bytes += levels.nbytes
        while self._used_bytes > self._cache_bytes and len(self._levels) > 1:
            self._used_bytes -= self._levels.popitem(last=False)[1].nbytes
        return self._patches.pixel_values(levels)

    def _encode(self, prompt_ids: tuple[int, ...], keys: tuple[str, ...]) -> EncodedPrompt:
        pads = sum(token == self._image_token_id for token in prompt_ids)
        if pads != len(keys):
            raise ValueError(f"a prompt with {pads} image pads got {len(keys)} images: {keys}")
        images = tuple(self.image(key) for key in keys)
        counts = iter(map(self._merged, images))
        ids: list[int] = []
        for token in prompt_ids:
            ids.extend([token] * next(counts) if token == self._image_token_id else [token])
        input_ids = torch.tensor(ids, dtype=torch.int64)
        is_image = (input_ids == self._image_token_id).to(torch.int32)
        positions, delta = self._body.get_rope_index(
            input_ids[None],
            mm_token_type_ids=is_image[None],
            image_grid_thw=torch.cat([i.grid_thw for i in images]) if images else None,
        )
        return EncodedPrompt(input_ids, positions[:, 0], int(delta) + len(ids), images)
