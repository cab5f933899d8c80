"""Photos to model inputs: pixel_values, image_grid_thw, expanded image pads, M-RoPE positions.

Every number comes from transformers' own image processor and `get_rope_index`, which are called one
prompt at a time, so that a prompt's arrays are the same wherever it is packed.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from tercet.core.models import family_of
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


def image_size(key: str) -> tuple[int, int]:
    """Width and height of what `load_image` gives; a JPEG is not decoded for them.

    Raises:
        ValueError: as `load_image`, as far as a JPEG's header tells.
    """
    if ".parquet#" not in key:
        try:
            with Image.open(key) as opened:
                width, height = opened.size
                sideways = opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
                too_long = max(width, height) > MAX_ASPECT * min(width, height)
                if opened.format == "JPEG" and not too_long:
                    return (height, width) if sideways else (width, height)
        except Exception:  # load_image says what is wrong
            pass
    return load_image(key).size


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
    """Turns prompt ids with one pad per image into EncodedPrompts.

    A prompt's ids, positions and grids are computed once, from its photos' sizes, and kept. Photos
    are decoded when their pixels are asked for; the most recent ones are kept.

    Args:
        parts: the policy.
        cache_bytes: most bytes of pixels that are kept.
    """

    def __init__(self, parts: PolicyParts, cache_bytes: int = CACHE_BYTES):
        self._body = parts.model.model
        self._family = family_of(parts.model.config)
        self._processor = parts.image_processor
        self._image_token_id = parts.model.config.image_token_id
        self._prompts: dict[tuple, EncodedPrompt] = {}
        self._grids: dict[str, Tensor] = {}
        self._pixels: OrderedDict[str, Tensor] = OrderedDict()
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

    def image(self, key: str) -> EncodedImage:
        """The photo `key`, resized, normalised and cut in patches; ValueError if it is bad."""
        if key not in self._grids:
            self._grids[key] = self.grid(key)
        return EncodedImage(partial(self._kept_pixels, key), self._grids[key])

    def grid(self, key: str) -> Tensor:
        """[1, 3] int64: patches of a photo in time, height and width, from its size alone."""
        width, height = image_size(key)
        resized = self._family.resized(self._processor, height, width)
        return torch.tensor([[1, *(side // self._processor.patch_size for side in resized)]])

    def pixels(self, key: str) -> tuple[Tensor, Tensor]:
        """A photo's patches, as EncodedImage has them, and their grid [1, 3]."""
        # A photo 1 or 3 pixels high would otherwise be taken for a channels-first array.
        arrays = self._processor(
            images=load_image(key), return_tensors="pt", input_data_format="channels_last"
        )
        return arrays["pixel_values"], arrays["image_grid_thw"]

    def _kept_pixels(self, key: str) -> Tensor:
        if key in self._pixels:
            self._pixels.move_to_end(key)
            return self._pixels[key]
        pixels, grid = self.pixels(key)
        if not torch.equal(grid, self._grids[key]):
            raise ValueError(
                f"image {key!r} has {grid.tolist()} patches, at first {self._grids[key].tolist()}: "
                "the file was changed during the run"
            )
        self._pixels[key] = pixels
        self._used_bytes += pixels.nbytes
        while self._used_bytes > self._cache_bytes and len(self._pixels) > 1:
            self._used_bytes -= self._pixels.popitem(last=False)[1].nbytes
        return pixels

    def _encode(self, prompt_ids: tuple[int, ...], keys: tuple[str, ...]) -> EncodedPrompt:
        pads = sum(token == self._image_token_id for token in prompt_ids)
        if pads != len(keys):
            raise ValueError(f"a prompt with {pads} image pads got {len(keys)} images: {keys}")
        images = tuple(self.image(key) for key in keys)
        merged = self._body.config.vision_config.spatial_merge_size**2
        counts = iter([int(i.grid_thw.prod()) // merged for i in images])
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
