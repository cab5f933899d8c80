"""Photos of every kind, and prompts whose numbers are counted by hand or by transformers."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import tiny
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tercet.core.config import ModelConfig
from tercet.core.data import vision
from tercet.core.data.cells import RowGroups
from tercet.core.data.photos import check_images
from tercet.core.data.vision import PromptEncoder, load_image
from tercet.core.models import load_policy
from tercet.core.types import EncodedPrompt

pytestmark = pytest.mark.core

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def loaded(path) -> np.ndarray:
    image = load_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".png", {}), (".webp", {"lossless": True}), (".tif", {}), (".TIFF", {}), (".bmp", {})],
)
def test_lossless_formats_keep_every_pixel(tmp_path, suffix, options):
    pixels = noise(9, 14)
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(pixels).save(path, **options)
    assert (loaded(path) == pixels).all()


def test_cmyk_jpeg(tmp_path):
    inks = {"red": (0, 255, 255, 0), "grey": (0, 0, 0, 155), "teal": (200, 55, 100, 20)}
    for name, ink in inks.items():
        path = tmp_path / f"{name}.jpg"
        Image.new("CMYK", (32, 16), ink).save(path, quality=100)
        with Image.open(path) as stored:
            assert stored.mode == "CMYK"
        cyan_magenta_yellow, black = np.array(ink[:3]), ink[3]
        expected = (255 - cyan_magenta_yellow) * (255 - black) / 255
        assert np.abs(loaded(path) - expected).max() <= 3


def test_grey_photos(tmp_path):
    grey, alpha = noise(5, 7, 1), noise(5, 7, 1, seed=1)
    Image.fromarray(grey).save(tmp_path / "l.png")
    assert (loaded(tmp_path / "l.png") == grey[..., None]).all()
    Image.fromarray(np.stack([grey, alpha], -1), "LA").save(tmp_path / "la.png")
    expected = over_white(np.repeat(grey[..., None], 3, -1), alpha)
    assert np.abs(loaded(tmp_path / "la.png") - expected).max() <= 1


def test_transparency_lies_over_white(tmp_path):
    rgba = noise(6, 8, 4)
    for suffix in (".png", ".tif"):
        Image.fromarray(rgba).save(tmp_path / f"rgba{suffix}")
        expected = over_white(rgba[..., :3], rgba[..., 3])
        assert np.abs(loaded(tmp_path / f"rgba{suffix}") - expected).max() <= 1
    palette = Image.new("P", (3, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    for index in range(3):
        palette.putpixel((index, 0), index)
    palette.save(tmp_path / "one.png", transparency=1)
    assert loaded(tmp_path / "one.png").tolist() == [[[200, 0, 0], [255] * 3, [0, 0, 200]]]
    palette.save(tmp_path / "each.png", transparency=bytes([255, 0, 128]))
    expected = over_white(
        np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]]), np.array([255, 0, 128])
    )
    assert np.abs(loaded(tmp_path / "each.png")[0] - expected).max() <= 1
    coloured = np.array([[[9, 9, 9], [9, 9, 8]]], dtype=np.uint8)
    Image.fromarray(coloured).save(tmp_path / "key.png", transparency=(9, 9, 9))
    assert loaded(tmp_path / "key.png").tolist() == [[[255] * 3, [9, 9, 8]]]


def test_sixteen_bit_grey(tmp_path):
    levels = np.array([[0, 257, 100 * 257], [32767, 65535, 300]], dtype=np.uint16)
    expected = np.array([[0, 1, 100], [127, 255, 1]])
    for name, values in {"a.png": levels, "a.tif": levels, "b.tif": levels.astype(">u2")}.items():
        Image.fromarray(values).save(tmp_path / name)
        with Image.open(tmp_path / name) as stored:
            assert stored.mode.startswith("I;16")
        assert (loaded(tmp_path / name) == expected[..., None]).all()
    beyond = np.array([[-5, 257, 70000]], dtype=np.int32)
    Image.fromarray(beyond).save(tmp_path / "i.tif")
    assert (loaded(tmp_path / "i.tif")[0, :, 0] == [0, 1, 255]).all()


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied_once(tmp_path, orientation):
    pixels = np.kron(noise(2, 3), np.ones((16, 16, 1), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, tolerance in (("a.jpg", 3), ("a.tif", 0), ("a.png", 0)):
        lossy = {"quality": 100, "subsampling": 0} if tolerance else {}
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, **lossy)
        expected = TURNED[orientation](pixels.astype(int))
        assert np.abs(loaded(tmp_path / name) - expected).max() <= tolerance


def jpeg_with_damaged_exif() -> bytes:
    """A resolution unit that is a text, which cannot be written back after the rotation."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x0128, 2, 3, b"ab\0\0")
    directory = b"II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    stored = BytesIO()
    Image.new("RGB", (6, 4)).save(stored, "JPEG", exif=b"Exif\0\0" + directory)
    return stored.getvalue()


def jpeg_cut_in_half() -> bytes:
    stored = BytesIO()
    Image.fromarray(noise(40, 60)).save(stored, "JPEG")
    return stored.getvalue()[: stored.tell() // 2]


def test_damaged_metadata_leave_the_photo_as_it_is(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg_with_damaged_exif())
    assert load_image(str(path)).size == vision.image_size(str(path)) == (4, 6)  # turned
    assert check_images([str(path)]) == {}
    damaged = jpeg_with_damaged_exif().replace(b"II*\0\x08", b"II*\0\xff")
    path.write_bytes(damaged)
    assert load_image(str(path)).size == vision.image_size(str(path)) == (6, 4)
    assert check_images([str(path)]) == {}


@pytest.mark.parametrize("content", [jpeg_cut_in_half(), b"", b"not a photo"])
def test_damaged_photo_is_named(tmp_path, content):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image '.*bad\.jpg' cannot be read: "):
        load_image(str(path))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks with good checksums, after a head of 64 x 48 RGB."""
    head = (b"IHDR", struct.pack(">IIBBBBB", 64, 48, 8, 2, 0, 0, 0))
    stored = b"\x89PNG\r\n\x1a\n"
    for kind, data in (head, *chunks, (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        stored += struct.pack(">I", len(data)) + kind + data + checksum
    return stored


def one_bit(width: int, height: int) -> bytes:
    stored = BytesIO()
    Image.new("1", (width, height)).save(stored, "PNG")
    return stored.getvalue()


SHORT = zlib.compress(noise(48, 193, 1).tobytes())[:500]
REFUSED = {
    "a short stream": (png((b"IDAT", SHORT)), "cannot be read"),
    "no image data": (png(), "cannot be read"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "or none of JPEG, PNG"),
    "67 million pixels": (one_bit(8192, 8193), "8192 x 8193 pixels are more than 67,108,864"),
    "400 million pixels": (one_bit(20000, 20000), "pixels? ?.*67,108,864|67,108,864 pixels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_check_refuses_what_would_not_load(tmp_path, monkeypatch, case):
    content, message = REFUSED[case]
    path = tmp_path / "photo.png"
    path.write_bytes(content)

    def never(*args, **options):
        raise AssertionError("nothing is to be started, and no pixel of a large photo decoded")

    monkeypatch.setattr("subprocess.Popen", never)
    if "million" in case:
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    for read in (load_image, vision.image_size, vision.check_image):
        with pytest.raises(ValueError, match=rf"image '.*photo\.png' .*({message})"):
            read(str(path))


@pytest.mark.parametrize("top", [255, 1023, 4095, 16383, 65535])
def test_grey_of_any_depth_is_scaled_to_full_range(tmp_path, top):
    levels = np.linspace(0, top, 64).round().astype(np.uint16)[None].repeat(3, 0)
    for name in ("a.tif", "a.png"):
        Image.fromarray(levels).save(tmp_path / name)
        found = loaded(tmp_path / name)[0, :, 0]
        assert np.abs(found - np.linspace(0, 255, 64)).max() < 1.5 and found[-1] == 255


def test_a_declared_depth_counts_more_than_the_brightest_value(tmp_path):
    """12 bits packed, as a camera stores them: half of full range stays half."""
    stored = BytesIO()
    Image.fromarray(np.zeros((2, 4), np.uint16)).save(stored, "TIFF")
    packed = b"".join(
        bytes([high >> 4, (high & 15) << 4 | low >> 8, low & 255])
        for high, low in [(0x000, 0x7FF)] * 4
    )
    content = stored.getvalue().replace(struct.pack("<HHIHH", 258, 3, 1, 16, 0), b"%bits%")
    content = content.replace(b"%bits%", struct.pack("<HHIHH", 258, 3, 1, 12, 0))
    (start,) = struct.unpack("<I", content[content.index(struct.pack("<HH", 273, 4)) + 8 :][:4])
    (tmp_path / "a.tif").write_bytes(content[:start] + packed + content[start + len(packed) :])
    assert loaded(tmp_path / "a.tif")[..., 0].tolist() == [[0, 127] * 2] * 2


def test_floating_point_photos_are_scaled_or_refused(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(3, 0)
    path = tmp_path / "a.tif"
    for factor in (1, 255):
        Image.fromarray(ramp * factor).save(path)
        assert (loaded(path)[0, :, 0] == (ramp[0] * 255).round()).all()
    holed = np.where(ramp == 1, np.nan, ramp)
    for values in (holed, ramp * 2 - 1, ramp * 1.5, ramp * 65535, np.full_like(ramp, np.inf)):
        Image.fromarray(values.astype(np.float32)).save(path)
        with pytest.raises(ValueError, match=r"a\.tif' .*floating-point values go from"):
            load_image(str(path))
        assert list(check_images([str(path)], "skip")) == [str(path)]


def test_deep_colours_that_would_turn_dark_are_refused(tmp_path):
    path = tmp_path / "deep.png"
    for top, fits in ((65535, True), (4095, False)):
        values = np.linspace(0, top, 64 * 48 * 3).astype(">u2").reshape(48, -1)
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        content = png((b"IDAT", zlib.compress(rows)))
        head = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
        content = content[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + content[33:]
        path.write_bytes(content)
        if fits:
            assert loaded(path)[-1, -1].tolist() == [255] * 3
        else:
            with pytest.raises(ValueError, match=r"deep\.png' .*use 12 bits or fewer"):
                load_image(str(path))


def test_photo_that_is_no_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"image '.*nowhere\.jpg': no such file"):
        load_image(str(tmp_path / "nowhere.jpg"))
    with pytest.raises(ValueError, match=f"image '{tmp_path}' cannot be read"):
        load_image(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be read: embedded null"):
        load_image("a\0b.jpg")


@pytest.mark.parametrize(
    ("size", "fits"), [((200, 1), 1), ((2, 400), 1), ((201, 1), 0), ((2, 401), 0)]
)
def test_aspect_ratio_over_200_is_named(tmp_path, size, fits):
    path = tmp_path / "long.png"
    Image.new("RGB", size).save(path)
    if fits:
        assert load_image(str(path)).size == size
    else:
        with pytest.raises(ValueError, match=rf"long\.png.* {size[0]} x {size[1]} is over 200:1"):
            load_image(str(path))


@pytest.fixture
def parquet(tmp_path) -> str:
    """Photos of one shade each, in every kind of cell."""

    def png(shade: int) -> bytes:
        stored = BytesIO()
        Image.new("RGB", (4, 3), (shade, 0, 0)).save(stored, "PNG")
        return stored.getvalue()

    def cell(content: bytes | None, path: str | None) -> dict:
        return {"bytes": content, "path": path}

    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside.png").write_bytes(png(90))
    columns = {
        "raw": [png(10), png(11), None],
        "struct": [cell(png(20), "gone.png"), cell(None, "sub/beside.png"), cell(b"", None)],
        "list": [[cell(png(30), "x")], [cell(png(31), None), cell(None, "sub/beside.png")], []],
        "path": ["sub/beside.png", "sub/gone.png", str(tmp_path / "sub" / "beside.png")],
        "paths": [["sub/beside.png"], [], None],
        "number": [1, 2, 3],
    }
    pq.write_table(pa.table(columns), tmp_path / "photos.parquet", row_group_size=2)
    return str(tmp_path / "photos.parquet")


@pytest.mark.parametrize(
    ("cell", "shade"),
    [
        ("0/raw/0", 10),
        ("1/raw/0", 11),
        ("0/struct/0", 20),
        ("1/struct/0", 90),
        ("0/list/0", 30),
        ("1/list/0", 31),
        ("1/list/1", 90),
        ("0/path/0", 90),
        ("2/path/0", 90),
        ("0/paths/0", 90),
    ],
)
def test_parquet_cells(parquet, monkeypatch, tmp_path, cell, shade):
    monkeypatch.chdir(tmp_path / "sub")  # paths in cells count from the file, not from here
    expected = np.broadcast_to([shade, 0, 0], (3, 4, 3))
    assert (loaded(f"{parquet}#{cell}") == expected).all()


@pytest.mark.parametrize(
    "cell",
    ["3/raw/0", "-2/raw/0", "x/raw/0", "2/raw/0", "0/raw/1", "0/raw", "0/raw/0/0", "", "0/nope/0"]
    + ["0/list/1", "1/list/-1", "2/list/0", "2/struct/0", "1/path/0", "1/paths/0", "2/paths/0"]
    + ["0/number/0"],
)
def test_wrong_parquet_cell_is_named(parquet, cell):
    with pytest.raises(ValueError) as caught:
        load_image(f"{parquet}#{cell}")
    assert str(caught.value).startswith(f"image {parquet + '#' + cell!r} cannot be read: ")


def test_a_row_group_is_read_once_and_the_cache_is_bounded(tmp_path, monkeypatch):
    """Four files of two row groups, in any order; before, whole columns were read again."""
    stored = [[bytes([shard, row]) * 500 for row in range(6)] for shard in range(4)]
    for shard, photos in enumerate(stored):
        table = pa.table({name: photos for name in ("a", "b", "c")})
        pq.write_table(table, tmp_path / f"{shard}.parquet", row_group_size=3)
    places = [(s, r, c) for s in range(4) for r in range(6) for c in "abc"]
    order = np.random.default_rng(0).permutation(len(places) * 2) % len(places)
    reads = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **options: reads.append(group) or read(self, group, **options),
    )

    def play(cache):
        reads.clear()
        for shard, row, column in (places[place] for place in order):
            cell = cache.cell(str(tmp_path / f"{shard}.parquet"), column, row)
            assert cell == stored[shard][row]
        return len(reads)

    assert play(RowGroups()) == 4 * 2 * 3
    assert play(RowGroups(cache_bytes=1)) > 100  # the newest alone is kept


def test_wrong_parquet_file_is_named(tmp_path):
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 and no more")
    for name in ("junk", "gone"):
        with pytest.raises(ValueError, match=rf"image '.*{name}\.parquet#0/raw/0' cannot be read"):
            load_image(f"{tmp_path}/{name}.parquet#0/raw/0")


# prompts

START, PAD, END = 3, 5, 4  # of the tiny tokenizer; so is any other id below 200


def mrope(ids: list[int], grids: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Positions by Qwen2-VL's rule, and the next one; a grid is (rows, columns) of tokens."""
    positions, following, index = [], 0, 0
    remaining = iter(grids)
    while index < len(ids):
        if ids[index] != PAD:
            positions.append((following,) * 3)
            following, index = following + 1, index + 1
            continue
        rows, columns = next(remaining)
        positions += [
            (following, following + row, following + column)
            for row in range(rows)
            for column in range(columns)
        ]
        following, index = following + max(rows, columns), index + rows * columns
    return np.array(positions).T, following


def save_noise(path, width: int, height: int) -> str:
    Image.fromarray(noise(height, width, seed=width)).save(path)
    return str(path)


# The tiny policy takes 8 to 16 tokens' pixels; sides are multiples of a token's: 28, below, or 32.
SIZES = {
    (1, 1): (3, 3),  # up by 79.2: 80 -> 84
    (90, 3): (1, 16),  # up by 4.82: 14.5 -> 28, 434 -> 448
    (3, 90): (16, 1),
    (150, 64): (2, 5),  # as it is: 56 x 140
    (300, 200): (3, 4),  # down by 2.19: 91 -> 84, 137 -> 112
    (200, 1): (1, 40),  # up by 5.6: 5.6 -> 28, 1120
}


@pytest.mark.parametrize(("size", "grid"), SIZES.items())
def test_prompt_numbers(parts, tmp_path, size, grid):
    key = save_noise(tmp_path / "photo.png", *size)
    prompt = PromptEncoder(parts)((50, START, PAD, END, 51, 52), (key,))
    (rows, columns), patch = grid, parts.image_processor.patch_size
    assert patch == (16 if parts.model.config.model_type == "qwen3_vl" else 14)
    expected = [50, START, *[PAD] * (rows * columns), END, 51, 52]
    assert prompt.input_ids.tolist() == expected and len(prompt) == len(expected)
    assert prompt.images[0].grid_thw.tolist() == [[1, 2 * rows, 2 * columns]]
    assert prompt.images[0].pixel_values.shape == (4 * rows * columns, 3 * 2 * patch * patch)
    positions, following = mrope(expected, [grid])
    assert (prompt.position_ids.numpy() == positions).all()
    assert prompt.next_position == following


@pytest.mark.parametrize("ending", [(), (51,), (51, 52, 53)])
def test_positions_go_on_as_in_transformers(parts, photos, ending):
    """A response's positions are those of the whole sequence; the prompt may end with a photo."""
    ids = (50, START, PAD, END, 51, START, PAD, *ending)
    prompt = PromptEncoder(parts)(ids, (photos[0], photos[2]))
    response = torch.tensor([60, 61, 62, 63])
    whole = torch.cat([prompt.input_ids, response])[None]
    expected, _ = parts.model.model.get_rope_index(
        whole,
        mm_token_type_ids=(whole == PAD).int(),
        image_grid_thw=torch.cat([image.grid_thw for image in prompt.images]),
        attention_mask=torch.ones_like(whole),
    )
    following = prompt.next_position + torch.arange(4).expand(3, -1)
    assert torch.equal(torch.cat([prompt.position_ids, following], 1), expected[:, 0])


@pytest.mark.parametrize("size", SIZES)
def test_the_length_of_a_prompt_is_known_without_encoding_it(parts, tmp_path, size):
    keys = (save_noise(tmp_path / "photo.png", *size),) * 2
    encoder = PromptEncoder(parts)
    ids = (50, START, PAD, END, PAD, 51)
    assert encoder.length(ids, keys) == len(encoder(ids, keys))


def test_prompt_without_photos(parts):
    prompt = PromptEncoder(parts)((50, 51, 52), ())
    assert prompt.input_ids.tolist() == [50, 51, 52] and prompt.images == ()
    assert prompt.position_ids.tolist() == [[0, 1, 2]] * 3 and prompt.next_position == 3


def test_pixels_are_those_of_transformers(parts, photos, tmp_path):
    parts.image_processor.save_pretrained(tmp_path / "processor")
    plain = AutoImageProcessor.from_pretrained(tmp_path / "processor")
    encoder = PromptEncoder(parts)
    for key in photos:
        with Image.open(key) as photo:
            expected = plain(images=photo.convert("RGB"), return_tensors="pt")
        assert torch.equal(encoder.image(key).pixel_values, expected["pixel_values"])
        assert torch.equal(encoder.image(key).grid_thw, expected["image_grid_thw"])


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 50), (50, 1), (3, 50), (50, 3), (60, 80)])
def test_channels_stay_channels(tmp_path, size):
    colour = (250, 100, 3)
    Image.new("RGB", size, colour).save(tmp_path / "flat.png")
    pixels = PromptEncoder(tiny()).image(str(tmp_path / "flat.png")).pixel_values
    by_channel = pixels.reshape(len(pixels), 3, -1).numpy()
    expected = (np.array(colour) / 255 - MEAN) / STD
    assert np.abs(by_channel - expected[:, None]).max() < 1e-5


@pytest.mark.parametrize("number", [0, 1, 3])
def test_pads_and_photos_must_agree(photos, number):
    with pytest.raises(ValueError, match=f"2 image pads got {number} images"):
        PromptEncoder(tiny())((START, PAD, END, START, PAD, END), tuple(photos[:number]))


def test_bad_photo_of_a_prompt_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png"):
        PromptEncoder(tiny())((START, PAD, END), (str(tmp_path / "gone.png"),))


def test_pixel_limits_take_effect(parts, tmp_path):
    parts.save(tmp_path / "policy")
    key = save_noise(tmp_path / "photo.png", 300, 200)
    of_32 = parts.image_processor.patch_size == 16  # a token's side; else 28
    options = [
        ({}, (3, 4)),
        # 196 x 308 or 192 x 288, barely resized
        ({"min_pixels": 40_000, "max_pixels": 90_000}, (6, 9) if of_32 else (7, 11)),
        ({"max_pixels": 3000}, None),  # below the policy's own fewest
        ({"min_pixels": 100, "max_pixels": 3000}, (1, 2)),  # down by 4.47: 44.7, 67.1
        # up by 1.29: 258.2, 387.3
        ({"min_pixels": 100_000, "max_pixels": 200_000}, (9, 13) if of_32 else (10, 14)),
    ]
    for limits, grid in options:
        config = ModelConfig(path=str(tmp_path / "policy"), **limits)
        if grid is None:
            with pytest.raises(ValueError, match=f"got {8192 if of_32 else 6272}, 3000"):
                load_policy(config)
            continue
        image = PromptEncoder(load_policy(config)).image(key)
        assert image.grid_thw.tolist() == [[1, 2 * grid[0], 2 * grid[1]]]


def counted_loads(monkeypatch) -> list[str]:
    """Keys of the photos that are decoded for their pixels from now on."""
    loads: list[str] = []
    levels = PromptEncoder.levels
    monkeypatch.setattr(
        PromptEncoder, "levels", lambda self, key: loads.append(key) or levels(self, key)
    )
    return loads


def test_a_photo_is_decoded_once(monkeypatch, photos):
    loads = counted_loads(monkeypatch)
    encoder = PromptEncoder(tiny())
    first: EncodedPrompt = encoder((START, PAD, END), (photos[0],))
    again = encoder((7, START, PAD, END, START, PAD, END), (photos[0], photos[0]))
    assert loads == []  # nobody has asked for pixels yet
    pixels = first.images[0].pixel_values
    assert all(torch.equal(image.pixel_values, pixels) for image in again.images)
    assert loads == [photos[0]]
    assert encoder((START, PAD, END), (photos[0],)) is first


def test_a_photo_that_changes_during_the_run_is_named(parts, tmp_path):
    key = save_noise(tmp_path / "photo.png", 112, 100)
    prompt = PromptEncoder(parts)((START, PAD, END), (key,))
    save_noise(tmp_path / "photo.png", 60, 140)
    with pytest.raises(ValueError, match=r"photo\.png.*the file was changed during the run"):
        prompt.images[0].decode()


@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_sizes_are_those_of_loaded_photos(tmp_path, suffix, orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    key = str(tmp_path / f"photo.{suffix}")
    Image.new("RGB", (30, 20), "red").save(key, exif=exif)
    assert vision.image_size(key) == load_image(key).size


def test_cache_is_bounded_by_bytes_and_drops_the_oldest(monkeypatch, photos):
    parts = tiny()
    sizes = [PromptEncoder(parts).levels(key)[0].nbytes for key in photos]
    assert sizes == [4 * rows * columns * 588 for rows, columns in ((4, 4), (5, 2), (2, 5))]
    a, b, c = photos
    loads = counted_loads(monkeypatch)
    encoder = PromptEncoder(parts, cache_bytes=sizes[0] + sizes[1])
    for key in (a, b, a, b, a):
        encoder.image(key).decode()
    assert loads == [a, b]  # both fit
    encoder.image(c).decode()  # b has not been asked for the longest, and c is as large
    encoder.image(a).decode()
    assert loads == [a, b, c]
    encoder.image(b).decode()  # drops c
    encoder.image(a).decode()
    encoder.image(c).decode()  # drops b
    assert loads == [a, b, c, b, c]


def test_photo_larger_than_the_cache(monkeypatch, photos):
    loads = counted_loads(monkeypatch)
    encoder = PromptEncoder(tiny(), cache_bytes=1)
    for key in (photos[0], photos[0], photos[1], photos[0]):
        encoder.image(key).decode()
    assert loads == [photos[0], photos[1], photos[0]]


@pytest.mark.photos
def test_real_photos_keep_their_aspect_ratio(real_photos, tmp_path):
    tiny().save(tmp_path / "policy")
    limits = {"min_pixels": 200_704, "max_pixels": 1_003_520}  # the released runs'
    parts = load_policy(ModelConfig(path=str(tmp_path / "policy"), **limits))
    encoder = PromptEncoder(parts)
    keys = [
        sorted((real_photos / kind).rglob("*.jpg"))[::25][:3] for kind in ("bird", "car", "flower")
    ]
    keys = [key for kind in keys for key in kind]
    assert len(keys) >= 6
    ratios = set()
    for key in keys:
        with Image.open(key) as photo:
            width, height = photo.size
        prompt = encoder((START, PAD, END), (str(key),))
        _, rows, columns = (prompt.images[0].grid_thw[0] // torch.tensor([1, 2, 2])).tolist()
        ratios.add(round(width / height, 2))
        assert columns / rows == pytest.approx(width / height, rel=0.1)
        assert 256 <= rows * columns <= 1280 and len(prompt) == rows * columns + 2
    assert len(ratios) > 3
