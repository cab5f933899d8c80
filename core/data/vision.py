"""Photos to model inputs: pixel_values, image_grid_thw, expanded image pads, M-RoPE positions.

Every number comes from transformers' own image processor and `get_rope_index`; this file only
calls them one prompt at a time, so that a prompt's arrays are the same wherever it is packed.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tercet.core.types import EncodedImage, EncodedPrompt, PolicyParts

MAX_ASPECT = 200
CACHE_BYTES = 2 * 1024**3


def load_image(key: str) -> Image.Image:
    """Load a photo as upright 8-bit RGB.

    Grey, palette, CMYK and 16-bit photos are converted, transparency is laid over white and the
    EXIF orientation is applied.

    Args:
        key: a path, or `file.parquet#row/column/index` for a cell of a Parquet file.

    Returns:
        A PIL image in mode RGB.

    Raises:
        ValueError: naming the key, when it is missing, unreadable or longer than 200 : 1.
    """
    source = BytesIO(_cell_bytes(key)) if ".parquet#" in key else key
    try:
        with Image.open(source) as opened:
            image = _to_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise ValueError(f"image {key!r}: no such file") from None
    except Exception as error:  # decoders raise many kinds on a damaged file
        raise ValueError(f"image {key!r} cannot be read: {error}") from error
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(
            f"image {key!r}: aspect ratio of {image.width} x {image.height} is over {MAX_ASPECT}:1"
        )
    return image


@lru_cache(maxsize=128)
def data_uri(key: str) -> str:
    """A photo as PNG in a data URI: the very pixels that the trainer sees, for a server."""
    buffer = BytesIO()
    load_image(key).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, kept by PIL as I;16 or I
        values = np.asarray(image, dtype=np.float64)
        values = (values / (257 if values.max() > 255 else 1)).clip(0, 255)
        image = Image.fromarray(values.astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _cell_bytes(key: str) -> bytes:
    path, _, cell = key.rpartition("#")
    try:
        row, column, index = cell.split("/")
        if min(int(row), int(index)) < 0:
            raise IndexError("row and index count from 0")
        value = _column(path, column)[int(row)].as_py()
        value = (value if isinstance(value, list) else [value])[int(index)]
        value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not value:
            raise ValueError("the cell is empty")
        return value if isinstance(value, bytes) else Path(path).parent.joinpath(value).read_bytes()
    except (OSError, KeyError, IndexError, TypeError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"image {key!r} cannot be read: {error}") from error


@lru_cache(maxsize=8)
def _column(path: str, column: str) -> pa.ChunkedArray:
    return pq.read_table(path, columns=[column], memory_map=True).column(column)


class PromptEncoder:
    """Turns prompt ids with one pad per image into EncodedPrompts; keeps recent photos encoded."""

    def __init__(self, parts: PolicyParts, cache_bytes: int = CACHE_BYTES):
        self._body = parts.model.model
        self._processor = parts.image_processor
        self._image_token_id = parts.model.config.image_token_id
        self._merge_area = parts.image_processor.merge_size**2
        self._cache: OrderedDict[str, EncodedImage] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._used_bytes = 0

    def image(self, key: str) -> EncodedImage:
        """The photo `key` resized, normalised and cut in patches; ValueError if it is bad."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        # A photo 1 or 3 pixels high would otherwise be taken for a channels-first array.
        arrays = self._processor(
            images=load_image(key), return_tensors="pt", input_data_format="channels_last"
        )
        image = EncodedImage(arrays["pixel_values"], arrays["image_grid_thw"])
        self._cache[key] = image
        self._used_bytes += image.pixel_values.nbytes
        while self._used_bytes > self._cache_bytes and len(self._cache) > 1:
            self._used_bytes -= self._cache.popitem(last=False)[1].pixel_values.nbytes
        return image

    def __call__(self, prompt_ids: tuple[int, ...], keys: tuple[str, ...]) -> EncodedPrompt:
        """Expand each image pad to its photo's merged patches and number the positions.

        Args:
            prompt_ids: token ids with exactly one image pad per photo.
            keys: image keys, in the order of the pads.

        Raises:
            ValueError: when pads and photos differ in number, or a photo is bad.
        """
        pads = sum(token == self._image_token_id for token in prompt_ids)
        if pads != len(keys):
            raise ValueError(f"a prompt with {pads} image pads got {len(keys)} images: {keys}")
        images = tuple(self.image(key) for key in keys)
        counts = iter([int(i.grid_thw.prod()) // self._merge_area for i in images])
        ids: list[int] = []
        for token in prompt_ids:
            ids.extend([token] * next(counts) if token == self._image_token_id else [token])
        input_ids = torch.tensor(ids, dtype=torch.int64)
        positions, next_position = self._positions(input_ids, images)
        return EncodedPrompt(input_ids, positions, next_position, images)

    def _positions(self, ids: Tensor, images: tuple[EncodedImage, ...]) -> tuple[Tensor, int]:
        is_image = (ids == self._image_token_id).to(torch.int32)
        grids = torch.cat([i.grid_thw for i in images]) if images else None
        positions, delta = self._body.get_rope_index(
            ids[None], mm_token_type_ids=is_image[None], image_grid_thw=grids
        )
        return positions[:, 0], int(delta) + ids.numel()
