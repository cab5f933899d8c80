"""A photo's file to upright 8-bit RGB: which formats are read, how large, how they are converted.

Files come from anywhere. Only the formats named here are tried, so that a PostScript file called
`.png` starts no interpreter; sizes are looked at before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from tercet.core.data.cells import cell_bytes, table_of
from tercet.core.data.files import regular

MAX_ASPECT = 200
MAX_PIXELS = 2**26
"""Of a photo as it is stored, 67 million: 8,192 x 8,192. Decoding takes up to 16 bytes a pixel."""
MAX_SCANS = 200
"""Of a progressive JPEG; encoders write about ten."""
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}
"""The formats that are read, with the suffixes that their files have."""
_FEATURES = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
DEPTHS = (8, 10, 12, 14, 16)
"""Bits that a camera or scanner gives a sample, in a file whose samples take 16 or 32."""
_TIFF_BITS = 258
_TRANSPOSE = Image.Transpose
_UPRIGHT = {
    2: _TRANSPOSE.FLIP_LEFT_RIGHT,
    3: _TRANSPOSE.ROTATE_180,
    4: _TRANSPOSE.FLIP_TOP_BOTTOM,
    5: _TRANSPOSE.TRANSPOSE,
    6: _TRANSPOSE.ROTATE_270,
    7: _TRANSPOSE.TRANSVERSE,
    8: _TRANSPOSE.ROTATE_90,
}


@cache
def readable_formats() -> tuple[str, ...]:
    """The keys of SUFFIXES, less the formats that the installed Pillow cannot decode."""
    Image.init()
    known = [name for name in SUFFIXES if name in Image.OPEN]
    return tuple(n for n in known if n not in _FEATURES or features.check(_FEATURES[n]))


@cache
def photo_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the files that are taken for photos."""
    return frozenset(suffix for name in readable_formats() for suffix in SUFFIXES[name])


@contextmanager
def opened(key: str) -> Iterator[Image.Image]:
    """A photo whose header was read and whose size is allowed; errors name the key.

    Args:
        key: a path, or `file.parquet#row/column/index` for a cell of a Parquet (or Arrow) file.

    Raises:
        ValueError: naming the key, for whatever goes wrong here or in the `with` block.
    """
    try:
        with _open(key) as image:
            _check_size(*image.size)
            if image.info.get("progressive"):
                _check_scans(image)
            yield image
    except FileNotFoundError:
        raise ValueError(f"image {key!r}: no such file") from None
    except Exception as error:  # decoders raise many kinds on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"image {key!r} cannot be read: {reason}") from error


def _open(key: str) -> Image.Image:
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8: rename it") from None
    source = BytesIO(cell_bytes(key)) if table_of(key) else key
    if source is key:
        regular(key)
    try:
        return Image.open(source, formats=readable_formats())
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ValueError(f"it is damaged, or none of {', '.join(readable_formats())}") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"its {width} x {height} pixels are more than {MAX_PIXELS:,}: store it smaller"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"aspect ratio of {width} x {height} is over {MAX_ASPECT}:1")


def _check_scans(image: Image.Image) -> None:
    """Each scan of a progressive JPEG goes over all pixels again, and may take ten bytes."""
    stream, place = image.fp, image.fp.tell()
    stream.seek(0)
    scans = sum(part.count(b"\xff\xda") for part in iter(lambda: stream.read(1 << 20), b""))
    stream.seek(place)
    if scans > MAX_SCANS:
        raise ValueError(f"it has {scans} scans, more than {MAX_SCANS}: store it again")


def orientation(image: Image.Image) -> int:
    """How a photo is to be turned, 1 to 8; 1 where the metadata cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the metadata alone is damaged: the photo need not be
        return 1
    return value if value in _UPRIGHT else 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened photo: 8-bit RGB, turned as its EXIF says, transparency over white.

    Raises:
        ValueError: its samples would turn dark, as far as their values tell.
        Exception: what Pillow raises on a damaged photo.
    """
    is_deep = image.format in ("PNG", "TIFF") and any(";16" in str(t[3]) for t in image.tile)
    declared = image.tag_v2.get(_TIFF_BITS, (16,))[0] if image.format == "TIFF" else 16
    image.load()
    turned = _UPRIGHT.get(orientation(image))
    image = image if turned is None else image.transpose(turned)
    if image.mode.startswith("I"):
        image = _from_integers(np.asarray(image), declared)
    elif image.mode == "F":
        image = _from_floats(np.asarray(image))
    elif is_deep:
        _refuse_dark(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_integers(values: np.ndarray, declared: int) -> Image.Image:
    """Grey of as many bits as the file declares, or else as its largest value needs."""
    highest = int(values.max())
    bits = next((bits for bits in DEPTHS if highest < 2**bits), 16)
    bits = declared if bits <= declared < 16 else bits
    top = 2**bits - 1
    grey = values.clip(0, top).astype(np.uint32) * 255 // top
    return Image.fromarray(grey.astype(np.uint8))


def _from_floats(values: np.ndarray) -> Image.Image:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and (high <= 1 or 16 <= high <= 255)):  # false for NaN
        raise ValueError(
            f"its floating-point values go from {low:g} to {high:g}: they must fill 0 to 1 or "
            "0 to 255"
        )
    return Image.fromarray((values * (255 if high <= 1 else 1)).round().astype(np.uint8))


def _refuse_dark(image: Image.Image) -> None:
    """Pillow keeps the high byte of 16-bit colours, in which a 12-bit photo is nearly black."""
    bands = {band: high for band, (_, high) in zip(image.getbands(), _extrema(image), strict=True)}
    if max(high for band, high in bands.items() if band != "A") < 16:
        raise ValueError(
            "its 16-bit samples use 12 bits or fewer and would turn dark: store it in 8 bits"
        )


def _extrema(image: Image.Image) -> tuple:
    found = image.getextrema()
    return found if isinstance(found[0], tuple) else (found,)
