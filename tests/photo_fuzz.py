"""Photos with damaged bytes: what is accepted at the start must load later.

python tests/photo_fuzz.py 20000    # seeds 0 to 19,999; prints how many were accepted
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from tercet.core.data.vision import check_image, image_size, load_image


def originals() -> dict[str, bytes]:
    """Small photos in every format that is read, with EXIF that says they lie on their side."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = 72.5
    exif[ExifTags.Base.Make] = "camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.01
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (1.0, 2.0, 3.0)
    ramp = np.linspace(0, 255, 40 * 32 * 3).reshape(32, 40, 3).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    rgb = Image.fromarray(ramp // 2 + noise // 2)
    kinds = {
        "jpg": (rgb, {"format": "JPEG", "exif": exif}),
        "progressive.jpg": (rgb, {"format": "JPEG", "exif": exif, "progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {"format": "JPEG", "exif": exif}),
        "grey.jpg": (rgb.convert("L"), {"format": "JPEG", "exif": exif, "restart_marker_rows": 1}),
        "large.jpg": (rgb.resize((231, 170)), {"format": "JPEG", "quality": 30, "exif": exif}),
        "png": (rgb, {"format": "PNG", "exif": exif}),
        "palette.png": (rgb.quantize(16), {"format": "PNG", "transparency": 3}),
        "grey16.png": (Image.fromarray(ramp[..., 0].astype(np.uint16) * 257), {"format": "PNG"}),
        "webp": (rgb, {"format": "WEBP", "exif": exif}),
        "lossless.webp": (rgb.convert("RGBA"), {"format": "WEBP", "lossless": True}),
        "tif": (rgb, {"format": "TIFF", "exif": exif}),
        "deflate.tif": (rgb, {"format": "TIFF", "exif": exif, "compression": "tiff_deflate"}),
        "jpeg.tif": (rgb, {"format": "TIFF", "compression": "jpeg"}),
        "float.tif": (Image.fromarray(ramp[..., 0].astype(np.float32) / 255), {"format": "TIFF"}),
        "bmp": (rgb, {"format": "BMP"}),
        "gif": (rgb.quantize(16), {"format": "GIF"}),
    }
    stored = {}
    for name, (image, options) in kinds.items():
        buffer = BytesIO()
        image.save(buffer, **options)
        stored[name] = buffer.getvalue()
    return stored


def damaged(content: bytes, seed: int) -> bytes:
    """A photo with some bytes changed, most of them in its head, or a piece cut out or doubled."""
    rng = np.random.default_rng(seed)
    changed = bytearray(content)
    kind = rng.integers(10)
    if kind == 0:
        return bytes(changed[: rng.integers(len(changed))])
    if kind == 1:
        start = int(rng.integers(len(changed)))
        piece = changed[start : start + int(rng.integers(1, 40))]
        changed[start : start + len(piece)] = piece * int(rng.choice([0, 2]))
        return bytes(changed)
    for _ in range(rng.integers(1, 6)):
        end = 400 if kind < 8 else len(changed)
        place = rng.integers(min(end, len(changed)))
        changed[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
    return bytes(changed)


def outcome(path: Path, content: bytes) -> str:
    """`accepted` or `refused`, by the check and by the real read alike; else what differs."""
    path.write_bytes(content)
    key = str(path)
    try:
        check_image(key)
        is_accepted = True
    except ValueError as error:
        is_accepted = False
        assert key in str(error) and "\n" not in str(error), error
    try:
        size = load_image(key).size
    except ValueError as error:
        return f"accepted, but: {error}" if is_accepted else "refused"
    if not is_accepted:
        return "refused, but it loads"
    return "accepted" if image_size(key) == size else f"size {image_size(key)} is {size}"


def count(seeds: range, folder: Path) -> Counter:
    """Outcomes of damaged photos, the formats in turn."""
    found: Counter = Counter()
    kinds = list(originals().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in seeds:
            name, content = kinds[seed % len(kinds)]
            result = outcome(folder / "photo.bin", damaged(content, seed))
            found[result] += 1
            if result not in ("accepted", "refused"):
                print(seed, name, result)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(count(range(int(sys.argv[1])), Path(made)))
