"""Checks how image files are found and decoded: accepted images keep every pixel, and refusals name the image and the reason."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddpm.errors import InputError
from ddpm.sources import decoding
from ddpm.sources.decoding import Layout

Pixels = NDArray[np.uint8]


def noise(height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> Pixels:
    """Returns random pixels: uint8 H,W,C, or H,W for one channel."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encode(picture: Pixels | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def read(
    *contents: bytes,
    channels: int = 3,
    side: int | tuple[int, int] = 8,
    fit: str = "error",
    convert: bool = False,
    background: decoding.Colour | None = None,
) -> list[Pixels]:
    """Reads image files.

    Args:
        contents: the bytes of each file.
        channels: the number of channels.
        side: the side of a square, or height and width.
        fit: data.fit.
        convert: data.convert.
        background: if given, converts everything, with this colour below transparent pixels.

    Returns:
        The images, each uint8 H,W,C.
    """
    files = {f"{index}.png": (lambda content=content: content) for index, content in enumerate(contents)}
    sides = (side, side) if isinstance(side, int) else side
    pixels = np.zeros((len(contents), channels, *sides), np.uint8)
    layout = Layout(channels, sides, fit, convert or background is not None, background=background)
    decoding.read_all(files, layout, list(pixels), "here", lambda done: None)
    return list(pixels.transpose(0, 2, 3, 1))


def refusal(content: bytes, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        read(encode(noise()), content, encode(noise()), **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith("here: 1 of 3 images cannot be used: 1.png (")
    assert message.isprintable()
    return message.partition("(")[2].partition("); ")[0]


# Accepted files.


def test_png_pixels_arrive_unchanged() -> None:
    for channels in (1, 3):
        picture = noise(channels=channels)
        (pixels,) = read(encode(picture), channels=channels)
        assert np.array_equal(pixels.squeeze(), picture)


def test_interlaced_png() -> None:
    """An Adam7 file made by hand: the last pass of an 8x8 image holds the odd rows, and the earlier passes hold the rest."""
    picture = noise(channels=1)
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    rows = b"".join(
        b"\0" + row.tobytes() for top, down, left, right in passes for row in picture[top::down, left::right]
    )
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(read(png, channels=1)[0].squeeze(), picture)


def test_jpeg_pixels_arrive_nearly_unchanged() -> None:
    ramp = np.indices((8, 8), np.uint8)
    picture = np.stack([ramp[0] * 20, ramp[1] * 20, np.full((8, 8), 77, np.uint8)], axis=2)
    for channels, drawn in ((3, picture), (1, picture[..., 0])):
        (pixels,) = read(encode(drawn, "JPEG", quality=98, subsampling=0), channels=channels)
        assert np.abs(pixels.squeeze().astype(int) - drawn).max() <= 6


def test_cameras_turn_pictures_by_a_tag() -> None:
    picture = noise()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation 6: the first row is the right side
    (pixels,) = read(encode(picture, exif=exif))
    assert np.array_equal(pixels, np.rot90(picture, -1))


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Returns EXIF data made by hand. An entry is tag, type, count, and the value or its offset."""
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


SIDEWAYS = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("other", [(0x011A, 10), (0x011A, 5), (0x9201, 10)])
def test_tags_that_cannot_be_written_do_no_harm(kind: str, other: tuple[int, int]) -> None:
    """The photo lies on its side, and has a rational of -1/2 where the standard requires a positive number."""
    place = struct.pack("<I", 8 + 2 + 2 * 12 + 4)
    tags = exif(SIDEWAYS, (*other, 1, place)) + struct.pack("<ii", -1, 2)
    picture = np.kron(noise(2, 2), np.ones((8, 8, 1), np.uint8))
    (pixels,) = read(encode(picture, kind, exif=tags, quality=98), side=16)
    upright = np.rot90(picture, -1).astype(int)
    assert np.abs(pixels[4:-4:8, 4:-4:8] - upright[4:-4:8, 4:-4:8]).max() <= (0 if kind == "PNG" else 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation: int) -> None:
    """The EXIF specification says for each orientation which sides are the visual top and left."""
    shown = np.stack([np.arange(64).reshape(8, 8).astype(np.uint8)] * 3, axis=2)
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown),
        7: shown[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(shown, -1),
    }[orientation]
    tags = exif((0x0112, 3, 1, struct.pack("<HH", orientation, 0)))
    assert np.array_equal(read(encode(np.ascontiguousarray(stored), exif=tags))[0], shown)


@pytest.mark.parametrize("packed", [b"zTXt", b"iTXt"])
def test_a_png_with_much_text_is_sound(packed: bytes) -> None:
    text = PngInfo()
    if packed == b"zTXt":
        text.add_text("history", "x" * 3_000_000, zip=True)
    else:
        text.add_itxt("history", "x" * 3_000_000, zip=True)
    content = encode(noise(), pnginfo=text)
    assert packed in content
    assert np.array_equal(read(content)[0], noise())


def test_a_jpeg_with_a_second_picture_gives_the_first() -> None:
    first, second = Image.new("RGB", (8, 8), (10, 20, 30)), Image.new("RGB", (8, 8), (200, 0, 0))
    content = encode(first, "MPO", save_all=True, append_images=[second])
    assert np.abs(read(content)[0].astype(int) - [10, 20, 30]).max() <= 3


def test_opaque_images_of_other_modes_are_converted_only_on_request() -> None:
    picture = noise()
    opaque = Image.fromarray(picture).convert("RGBA")
    palette = Image.fromarray(noise(channels=1)).convert("P")
    bilevel = Image.fromarray(noise(channels=1)).convert("1")
    assert np.array_equal(read(encode(opaque), convert=True)[0], picture)
    assert np.array_equal(read(encode(palette), convert=True)[0], np.asarray(palette.convert("RGB")))
    assert set(np.unique(read(encode(bilevel), channels=1, convert=True)[0])) <= {0, 255}
    for image in (opaque, palette, bilevel):
        assert refusal(encode(image)) == f"mode {image.mode}"


def test_grey_and_rgb() -> None:
    grey, colour = noise(channels=1), noise()
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    assert np.array_equal(read(encode(grey), convert=True)[0], grey[..., None].repeat(3, 2))
    assert np.abs(read(encode(colour), channels=1, convert=True)[0].squeeze() - luma).max() <= 1
    assert refusal(encode(grey)) == "mode L instead of RGB"


def test_an_unused_transparent_colour_does_no_harm() -> None:
    picture = noise() | 1
    assert np.array_equal(read(encode(picture, transparency=(0, 0, 0)))[0], picture)
    picture[3, 3] = 0
    assert refusal(encode(picture, transparency=(0, 0, 0))) == "transparent pixels"


# How data.convert changes all other images.


def colour_profile(corners: dict[tuple[int, int, int, int], tuple[int, int, int]]) -> bytes:
    """Returns a CMYK profile with the table of ICC.1:2001, 6.5.8 (lut8Type).

    corners: Lab colours by the inks, each 0 or 1; all other combinations of inks are black.
    """
    nodes = [corners.get(inks, (0, 128, 128)) for inks in product((0, 1), repeat=4)]
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + bytes(sum(nodes, ())) + identity * 3
    text = b"text" + bytes(4) + b"none\0"
    description = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(4 + 4 + 2 + 1 + 67)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"A2B0": lut, b"cprt": text, b"desc": description, b"wtpt": white}
    start, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    size = struct.pack(">I", start + len(data))
    header = size + bytes(4) + struct.pack(">I", 0x02100000) + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


# In this profile, full cyan is sRGB's (255, 0, 0), which is Lab 54.3, 80.8, 69.9, and no ink is white.
PROFILE = colour_profile({(0, 0, 0, 0): (255, 128, 128), (1, 0, 0, 0): (138, 209, 198)})
RED, WHITE, TEAL = (255, 0, 0), (255, 255, 255), (0, 128, 128)


def plain(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 8), colour)  # type: ignore[arg-type]


def frames(kind: str) -> bytes:
    later = [plain("RGB", (0, 0, 255))]
    return encode(plain("RGB", RED), kind, save_all=True, append_images=later, duration=100, lossless=True)


def indexed(**options: object) -> bytes:
    image = Image.fromarray(np.ones((8, 8), np.uint8)).convert("P")
    image.putpalette([9, 9, 9, *TEAL])
    image.putdata([1] * 64)
    return encode(image, **options)


def sixteen(colour: int, *values: int, clear: tuple[int, ...] = ()) -> bytes:
    """Returns a PNG of 16 bits per value, with equal pixels. clear: the transparent colour."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0))
    transparency = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    rows = (b"\0" + struct.pack(f">{len(values)}H", *values) * 8) * 8
    return b"\x89PNG\r\n\x1a\n" + header + transparency + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


JPEG_OPTIONS = {"quality": 98, "subsampling": 0}
# The image, its colour, and the tolerance per channel: 1 for 16 bits, and 3 for lossy files and profiles.
CONVERTED: dict[str, tuple[Callable[[], bytes], tuple[int, int, int], int]] = {
    "grey": (lambda: encode(plain("L", 77)), (77, 77, 77), 0),
    "bilevel": (lambda: encode(plain("1", 1)), WHITE, 0),
    "palette": (indexed, TEAL, 0),
    "a transparent entry of a palette": (lambda: indexed(transparency=1), RED, 0),
    "a half-transparent entry of a palette": (lambda: indexed(transparency=b"\xff\x80"), (127, 64, 64), 1),
    "16 bit grey": (lambda: sixteen(0, 40_000), (156, 156, 156), 1),
    "16 bit grey, transparent": (lambda: sixteen(0, 40_000, clear=(40_000,)), RED, 0),
    "16 bit grey and alpha": (lambda: sixteen(4, 40_000, 65_535), (156, 156, 156), 1),
    "16 bit colour": (lambda: sixteen(2, 65_535, 40_000, 200), (255, 156, 1), 1),
    "16 bit colour, transparent": (lambda: sixteen(2, 60_000, 40_000, 200, clear=(60_000, 40_000, 200)), RED, 0),
    "16 bit colour and alpha": (lambda: sixteen(6, 65_535, 40_000, 200, 0), RED, 0),
    "16 bit TIFF": (lambda: encode(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "TIFF"), (156, 156, 156), 1),
    "RGBA": (lambda: encode(plain("RGBA", (*TEAL, 0))), RED, 0),
    "RGBA, half transparent": (lambda: encode(plain("RGBA", (*TEAL, 128))), (127, 64, 64), 1),
    "grey and alpha": (lambda: encode(plain("LA", (100, 51))), (224, 20, 20), 1),
    "CMYK": (lambda: encode(plain("CMYK", (255, 0, 0, 0)), "JPEG", **JPEG_OPTIONS), (0, 255, 255), 3),
    "CMYK with its profile": (
        lambda: encode(plain("CMYK", (255, 0, 0, 0)), "JPEG", icc_profile=PROFILE, **JPEG_OPTIONS),
        RED,
        3,
    ),
    "CMYK without ink": (
        lambda: encode(plain("CMYK", (0, 0, 0, 0)), "JPEG", icc_profile=PROFILE, **JPEG_OPTIONS),
        WHITE,
        3,
    ),
    "CMYK with a damaged profile": (
        lambda: encode(plain("CMYK", (255, 0, 0, 0)), "JPEG", icc_profile=PROFILE[:300], **JPEG_OPTIONS),
        (0, 255, 255),
        3,
    ),
    "CMYK TIFF": (lambda: encode(plain("CMYK", (255, 0, 0, 0)), "TIFF"), (0, 255, 255), 0),
    "animated PNG": (lambda: frames("PNG"), RED, 0),
    "animated GIF": (lambda: frames("GIF"), RED, 0),
    "animated WebP": (lambda: frames("WEBP"), RED, 0),
    "TIFF of two pages": (lambda: frames("TIFF"), RED, 0),
    "transparent GIF": (lambda: encode(plain("RGBA", (0, 0, 0, 0)), "GIF"), RED, 0),
    "BMP": (lambda: encode(plain("RGB", TEAL), "BMP"), TEAL, 0),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_whatever_has_one_usual_meaning_is_converted(case: str) -> None:
    make, colour, tolerance = CONVERTED[case]
    content = make()
    (pixels,) = read(content, background=RED)
    assert np.abs(pixels.astype(int) - colour).max() <= tolerance
    (grey,) = read(content, background=RED, channels=1)
    assert np.abs(grey - np.array(colour) @ [0.299, 0.587, 0.114]).max() <= tolerance + 1
    if case != "grey":
        assert "; data.convert: true converts them, or leave them out with data.unusable: skip" in advice(content)


def advice(content: bytes) -> str:
    """Returns the message that refuses an image between two good images."""
    with pytest.raises(InputError) as caught:
        read(encode(noise()), content, encode(noise()))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_converted_images_are_upright(kind: str) -> None:
    picture = np.kron(noise(2, 2), np.ones((8, 8, 1), np.uint8))
    tags = Image.Exif()
    tags[decoding.ORIENTATION] = 6
    (pixels,) = read(encode(picture, kind, exif=tags, quality=98), side=16, background=WHITE)
    difference = np.abs(pixels.astype(int) - np.rot90(picture, -1))[4:-4:8, 4:-4:8]
    assert difference.max() <= {"PNG": 0, "TIFF": 0, "JPEG": 6, "WEBP": 40}[kind]


def test_what_has_no_usual_meaning_is_refused_all_the_same() -> None:
    depth = encode(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    assert refusal(depth, background=WHITE) == "mode F"
    assert refusal(b"x", background=WHITE) == "no PNG, JPEG, GIF, WEBP, BMP or TIFF image, or damaged"
    assert "(no PNG or JPEG image, but TIFF); repair or remove them" in advice(depth)


def test_advice_helps_in_that_very_case() -> None:
    grey, small, broken = encode(noise(channels=1)), encode(noise(4, 4)), b""
    skip = ", or leave them out with data.unusable: skip"
    assert advice(small).endswith("; data.size and data.fit give them one size" + skip)
    assert advice(broken).endswith("; repair or remove them" + skip)
    with pytest.raises(InputError) as caught:
        read(grey, small, broken, GOOD, GOOD)
    assert str(caught.value).endswith(
        "; data.convert: true converts some of them; data.size and data.fit give some of them one size;"
        f" repair or remove some of them{skip}"
    )
    with pytest.raises(InputError) as caught:
        read(broken)
    assert str(caught.value).endswith("(empty file); repair or remove them")


def test_no_address_gets_into_a_reason() -> None:
    def fails() -> bytes:
        raise OSError(f"cannot read {object()}")

    with pytest.raises(InputError, match=r"\(cannot read <object>\); "):
        decoding.first_shape({"x.png": fails}, None, "here")


# Refused files.

GOOD = encode(noise())
JPEG = encode(noise(64, 64), "JPEG")


def transparent() -> Image.Image:
    image = Image.fromarray(noise()).convert("RGBA")
    image.putpixel((0, 0), (1, 2, 3, 254))
    return image


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty file"),
    "text": (lambda: b"not an image", "no PNG or JPEG image"),
    "zeros": (lambda: bytes(1000), "no PNG or JPEG image"),
    "gif": (lambda: encode(noise(), "GIF"), "no PNG or JPEG image"),
    "webp": (lambda: encode(noise(), "WEBP"), "no PNG or JPEG image"),
    "png signature only": (lambda: GOOD[:8], "no PNG or JPEG image"),
    "png cut in the header": (lambda: GOOD[:20], "Truncated File Read"),
    "png cut in the data": (lambda: GOOD[:-40], "truncated"),
    "png without its end": (lambda: GOOD[:-12], "truncated"),
    "png with one bit changed": (
        lambda: GOOD[:60] + bytes([GOOD[60] ^ 1]) + GOOD[61:],
        "damaged: a checksum differs",
    ),
    "jpeg cut": (lambda: JPEG[: len(JPEG) // 2], "image file is truncated"),
    "jpeg cut in the header": (lambda: JPEG[:100], "Truncated File Read"),
    "cmyk": (lambda: encode(Image.new("CMYK", (8, 8)), "JPEG"), "mode CMYK"),
    "16 bit grey": (lambda: encode(Image.fromarray(np.zeros((8, 8), np.uint16))), "16 bit per channel"),
    "16 bit colour": (lambda: raw_png(8, 8, 16, 2, bytes(49 * 8)), "16 bit per channel"),
    "16 bit with alpha": (lambda: raw_png(8, 8, 16, 6, bytes(65 * 8)), "16 bit per channel"),
    "animated": (
        lambda: encode(
            Image.fromarray(noise()), save_all=True, append_images=[Image.fromarray(noise(seed=1))], duration=100
        ),
        "animated",
    ),
    "transparent": (lambda: encode(transparent()), "transparent pixels"),
    "another size": (lambda: encode(noise(8, 9)), "9x8 instead of 8x8"),
    "70 million pixels": (lambda: raw_png(10_000, 7_000, 8, 0, b""), "10000x7000 pixels are too many"),
    "a decompression bomb": (lambda: raw_png(60_000, 60_000, 8, 0, b""), "decompression bomb"),
    "two billion pixels wide": (lambda: raw_png(2**31 - 1, 1, 8, 0, b""), "bomb"),
    "no width": (lambda: raw_png(0, 8, 8, 0, b""), ""),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    make, reason = BAD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason in refusal(make(), convert=True)


def test_huge_images_are_refused_unread() -> None:
    """Decoding would allocate 3.6 GB, but refusing allocates less than 256 MiB."""
    content = raw_png(60_000, 60_000, 8, 0, b"")
    before = psutil.Process().memory_info().rss
    refusal(content)
    assert psutil.Process().memory_info().rss - before < 2**28


def test_the_first_three_are_named_and_all_are_counted() -> None:
    with pytest.raises(InputError) as caught:
        read(GOOD, b"", GOOD, b"x", b"", b"", b"")
    message = str(caught.value)
    assert message.startswith("here: 5 of 7 images cannot be used: 1.png (empty file), 3.png (no PNG or JPEG image")
    assert "4.png (empty file) and 2 more; repair or remove them" in message
    assert "5.png" not in message


def test_file_names_cannot_break_the_line(tmp_path: Path) -> None:
    (tmp_path / "a\nb\x1b[31m.png").write_bytes(b"")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    files = decoding.find(tmp_path, "here").images
    with pytest.raises(InputError) as caught:
        decoding.first_shape(files, None, "here")
    assert str(caught.value).isprintable()
    assert "a\\nb" in str(caught.value)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Returns the content cut, with a few bytes changed, or with a part removed, doubled or overwritten."""
    start = draw(st.integers(0, len(content) - 1))
    end = draw(st.integers(start, min(len(content), start + 64)))
    match draw(st.sampled_from(["cut", "remove", "double", "overwrite", "bytes"])):
        case "cut":
            return content[:start]
        case "remove":
            return content[:start] + content[end:]
        case "double":
            return content[:end] + content[start:]
        case "overwrite":
            return content[:start] + draw(st.binary(min_size=end - start, max_size=end - start)) + content[end:]
    changed = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        changed[place] = draw(st.integers(0, 255))
    return bytes(changed)


PICTURE = noise(24, 24)


@settings(max_examples=300, deadline=None)
@given(damaged(encode(PICTURE)))
def test_a_damaged_png_is_refused_or_read_right(content: bytes) -> None:
    try:
        (pixels,) = read(content, side=24)
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert np.array_equal(pixels, PICTURE)


@settings(max_examples=200, deadline=None)
@given(damaged(encode(PICTURE, "JPEG")))
def test_a_damaged_jpeg_is_refused_or_read(content: bytes) -> None:
    """JPEG has no checksums, so every file that decodes is accepted."""
    try:
        read(content, side=24)
    except InputError as error:
        assert str(error).isprintable()


# Sizes.


def test_crop_keeps_the_middle() -> None:
    columns = np.tile(np.arange(40, dtype=np.uint8) * 6, (20, 1))
    (wide,) = read(encode(columns), channels=1, side=20, fit="crop")
    (high,) = read(encode(columns.T), channels=1, side=20, fit="crop")
    assert np.array_equal(wide.squeeze(), columns[:, 10:30])
    assert np.array_equal(high.squeeze(), columns[:, 10:30].T)


def test_pad_keeps_everything_between_zeros() -> None:
    (pixels,) = read(encode(np.full((20, 40), 200, np.uint8)), channels=1, side=20, fit="pad")
    assert (pixels[5:15] == 200).all()
    assert not pixels[:5].any()
    assert not pixels[15:].any()


def test_resize_stretches() -> None:
    halves = np.zeros((20, 40, 3), np.uint8)
    halves[:, :20, 0] = halves[:, 20:, 2] = 255
    (pixels,) = read(encode(halves), side=16, fit="resize")
    assert (pixels[:, :4] == [255, 0, 0]).all()
    assert (pixels[:, -4:] == [0, 0, 255]).all()


def test_rectangles_are_cropped_padded_and_resized_upright() -> None:
    """data.size and arrays have the height first, and Pillow has the width first.

    A mix-up gives another shape or other pixels.
    """
    rows = np.tile(np.arange(40, dtype=np.uint8)[:, None] * 6, (1, 40))
    (cropped,) = read(encode(rows), channels=1, side=(20, 40), fit="crop")
    assert np.array_equal(cropped.squeeze(), rows[10:30])
    (cropped,) = read(encode(rows.T), channels=1, side=(40, 20), fit="crop")
    assert np.array_equal(cropped.squeeze(), rows.T[:, 10:30])

    bright = encode(np.full((10, 40), 200, np.uint8))
    (padded,) = read(bright, channels=1, side=(20, 40), fit="pad")
    assert (padded[5:15] == 200).all() and not padded[:5].any() and not padded[15:].any()
    (padded,) = read(bright, channels=1, side=(10, 60), fit="pad")
    assert (padded[:, 10:50] == 200).all() and not padded[:, :10].any() and not padded[:, 50:].any()

    halves = np.zeros((20, 20, 3), np.uint8)
    halves[:, :10, 0] = halves[:, 10:, 2] = 255
    (stretched,) = read(encode(halves), side=(8, 32), fit="resize")
    assert (stretched[:, :12] == [255, 0, 0]).all() and (stretched[:, -12:] == [0, 0, 255]).all()

    with pytest.raises(InputError, match=r"0\.png \(40x10 instead of 12x8\)"):
        read(bright, channels=1, side=(8, 12))
    thin = encode(np.full((1, 100), 90, np.uint8))
    with pytest.raises(InputError, match="100x1 is less than a pixel high or wide when it is scaled to fit 99x300"):
        read(thin, channels=1, side=(300, 99), fit="pad")
    (padded,) = read(thin, channels=1, side=(300, 100), fit="pad")
    assert padded.sum() == 90 * 100


@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
def test_shrinking_averages(fit: str) -> None:
    """Without antialiasing, a fine chessboard would shrink to only some of its squares."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    (pixels,) = read(encode(board), channels=1, side=16, fit=fit)
    assert np.abs(pixels.astype(int) - 127).max() <= 12


@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
def test_extreme_shapes_are_fitted_or_refused(fit: str) -> None:
    for height, width in ((1, 500), (500, 1)):
        try:
            (pixels,) = read(encode(np.full((height, width), 90, np.uint8)), channels=1, fit=fit)
        except InputError as error:
            assert str(error).isprintable()
        else:
            assert 90 in pixels


# Finding files.


def add(path: Path, name: str, content: bytes = GOOD) -> None:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_folders_and_zips_are_one_tree(tmp_path: Path) -> None:
    for name in ("a.png", "b/c/d.JPG", "b/e.jpeg"):
        add(tmp_path, name, name.encode())
    zipped(tmp_path / "b" / "more.zip", {"c/x.PNG": b"x", "./y.png": b"y"})
    zipped(tmp_path / "stored.ZIP", {"dos\\z.png": b"z", "empty/": b""}, zipfile.ZIP_STORED)
    found = decoding.find(tmp_path, "here")
    assert {name: read() for name, read in found.images.items()} == {
        "a.png": b"a.png",
        "b/c/d.JPG": b"b/c/d.JPG",
        "b/e.jpeg": b"b/e.jpeg",
        "b/c/x.PNG": b"x",
        "b/y.png": b"y",
        "dos/z.png": b"z",
    }
    assert found.left_out == []


def test_other_files_are_left_out_and_counted(tmp_path: Path) -> None:
    others = ["README.md", ".DS_Store", "Thumbs.db", "a/._x.png", ".hidden/x.png", "x.webp", "__MACOSX/x.png", ".png"]
    add(tmp_path, "a/x.png")
    for name in others:
        add(tmp_path, name)
    zipped(tmp_path / "z.zip", {"__MACOSX/a/._y.png": b"", "y.txt": b"", "b/y.png": GOOD})
    found = decoding.find(tmp_path, "here")
    assert sorted(found.images) == ["a/x.png", "b/y.png"]
    assert sorted(found.left_out) == sorted([*others, "__MACOSX/a/._y.png", "y.txt"])


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system = 3
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


def encrypted(path: Path) -> None:
    """Writes a zip whose members are marked as encrypted, in both headers."""
    content = bytearray(zipped(path, {"x.png": GOOD}).read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + place] |= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["/x.png", "../x.png", "a/../../x.png", "a/..", "C:/x.png", "..\\x.png", "\\x.png"])
def test_zip_members_that_escape(tmp_path: Path, name: str) -> None:
    zipped(tmp_path / "bad.zip", {"fine.png": GOOD, name: GOOD})
    with pytest.raises(InputError, match=r"here: 1 file cannot be used: bad\.zip: .* \(escapes its folder\)"):
        decoding.find(tmp_path, "here")


def test_zip_links(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(link("x.png"), "/etc/passwd")
    with pytest.raises(InputError, match=r"bad\.zip: x\.png \(a link\)"):
        decoding.find(tmp_path / "bad.zip", "here")


def test_encrypted_zips(tmp_path: Path) -> None:
    encrypted(tmp_path / "bad.zip")
    with pytest.raises(InputError, match=r"bad\.zip: x\.png \(encrypted\)"):
        decoding.find(tmp_path, "here")


@pytest.mark.parametrize("content", [b"", b"not a zip", bytes(100_000), b"PK\x05\x06" + bytes(10)])
def test_not_a_zip(tmp_path: Path, content: bytes) -> None:
    add(tmp_path, "fine.png")
    add(tmp_path, "a/bad.zip", content)
    with pytest.raises(InputError, match=r"1 file cannot be used: a/bad\.zip \(not a readable zip file: .+\)"):
        decoding.find(tmp_path, "here")


def test_zip_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_BYTES", 2**24)
    zipped(tmp_path / "bomb.zip", {"x.png": bytes(2**24 + 1)})
    assert (tmp_path / "bomb.zip").stat().st_size < 2**16
    files = decoding.find(tmp_path, "here").images
    with pytest.raises(InputError, match=r"x\.png \(16,777,217 bytes are too many\)"):
        decoding.first_shape(files, None, "here")


def test_a_lying_zip_header(tmp_path: Path) -> None:
    """The directory says 10 bytes, but the data unpack to a megabyte. Only 10 bytes are unpacked, so the checksum differs."""
    content = bytearray(zipped(tmp_path / "bad.zip", {"x.png": bytes(2**20)}).read_bytes())
    place = content.index(b"PK\x01\x02") + 24
    content[place : place + 4] = struct.pack("<I", 10)
    (tmp_path / "bad.zip").write_bytes(bytes(content))
    files = decoding.find(tmp_path, "here").images
    with pytest.raises(InputError, match=r"x\.png \(Bad CRC-32"):
        decoding.first_shape(files, None, "here")


def test_two_images_with_one_path(tmp_path: Path) -> None:
    add(tmp_path, "a/x.png")
    zipped(tmp_path / "one.zip", {"a/x.png": GOOD, "a/y.png": GOOD})
    zipped(tmp_path / "two.zip", {"a//y.png": GOOD})
    with pytest.raises(InputError, match=r"2 files cannot .*: a/x\.png \(two images .*\), a/y\.png \(two images"):
        decoding.find(tmp_path, "here")


def test_links_and_pipes_in_folders(tmp_path: Path) -> None:
    add(tmp_path, "real/x.png")
    (tmp_path / "good.png").symlink_to("real/x.png")
    files = decoding.find(tmp_path, "here").images
    assert files["good.png"]() == GOOD
    (tmp_path / "broken.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    files = decoding.find(tmp_path, "here").images
    for name, reason in (("broken.png", "No such file"), ("pipe.png", "not a regular file")):
        with pytest.raises(InputError, match=reason):
            decoding.first_shape({name: files[name]}, None, "here")
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(InputError, match=r"pipe\.zip \(not a readable zip file: not a regular file\)"):
        decoding.find(tmp_path, "here")
    (tmp_path / "pipe.zip").unlink()
    (tmp_path / "linked").symlink_to("real")
    with pytest.raises(InputError, match=r"linked \(a link to a folder, which DVC does not follow\)"):
        decoding.find(tmp_path, "here")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="here: no PNG or JPEG images there; "):
        decoding.find(tmp_path, "here")
    add(tmp_path, "README.md")
    with pytest.raises(InputError, match="here: no PNG or JPEG images there, only 1 other file; "):
        decoding.find(tmp_path, "here")
    for name, problem in (
        ("missing", "no such folder or zip file"),
        ("missing.zip", "no such folder or zip file"),
        ("README.md", "neither a folder nor a zip file"),
    ):
        with pytest.raises(InputError, match=f"here: {problem}; set data.path"):
            decoding.find(tmp_path / name, "here")


ORIGINALS = {f"a/{seed}.png": encode(noise(seed=seed)) for seed in range(3)}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return zipped(tmp_path_factory.mktemp("zip") / "x.zip", ORIGINALS, zipfile.ZIP_STORED).read_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_zip_is_refused_or_read_right(archive: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(data.draw(damaged(archive)))
    try:
        files = decoding.find(path, "here").images
        pixels = np.zeros((len(files), 3, 8, 8), np.uint8)
        decoding.read_all(files, Layout(3, (8, 8), "error", False), list(pixels), "here", lambda done: None)
    except InputError as error:
        assert str(error).isprintable()
    else:
        known = {noise(seed=seed).transpose(2, 0, 1).tobytes() for seed in range(3)}
        assert {image.tobytes() for image in pixels} <= known


# Reading with several processes.


@pytest.fixture
def many(tmp_path: Path) -> dict[str, decoding.Read]:
    zipped(tmp_path / "many.zip", {f"{seed:04}.png": encode(noise(seed=seed)) for seed in range(300)})
    return decoding.find(tmp_path, "here").images


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3), raising=False)
    yield
    assert multiprocessing.active_children() == []


def shared_pixels(path: Path, count: int) -> Pixels:
    return np.asarray(np.lib.format.open_memmap(path, "w+", np.uint8, (count, 3, 8, 8)))


def test_processes_read_what_one_reads(many: dict[str, decoding.Read], tmp_path: Path, processes: None) -> None:
    pixels = shared_pixels(tmp_path / "x.npy", 300)
    reports: list[int] = []
    decoding.read_all(many, Layout(3, (8, 8), "error", False), list(pixels), "here", reports.append)
    assert all(np.array_equal(pixels[seed].transpose(1, 2, 0), noise(seed=seed)) for seed in range(300))
    assert sorted(reports) == reports
    assert len(reports) == 5
    assert reports[-1] == 300


def test_faults_of_all_processes_are_named_in_order(
    many: dict[str, decoding.Read], tmp_path: Path, processes: None
) -> None:
    for name in ("0290.png", "0003.png", "0150.png"):
        many[name] = lambda: b""
    with pytest.raises(InputError, match=r"3 of 300 images .*: 0003\.png .*, 0150\.png .*, 0290\.png \(empty file\);"):
        pixels = shared_pixels(tmp_path / "x.npy", 300)
        decoding.read_all(many, Layout(3, (8, 8), "error", False), list(pixels), "here", lambda done: None)


def test_a_process_that_dies_is_an_error(many: dict[str, decoding.Read], tmp_path: Path, processes: None) -> None:
    many["0100.png"] = lambda: os.kill(os.getpid(), signal.SIGKILL) or b""
    with pytest.raises(InputError, match="a process that reads images was killed"):
        pixels = shared_pixels(tmp_path / "x.npy", 300)
        decoding.read_all(many, Layout(3, (8, 8), "error", False), list(pixels), "here", lambda done: None)


def test_an_interrupted_reader_leaves_no_processes(
    many: dict[str, decoding.Read], tmp_path: Path, processes: None
) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pixels = shared_pixels(tmp_path / "x.npy", 300)
        decoding.read_all(many, Layout(3, (8, 8), "error", False), list(pixels), "here", interrupt)


SLOW = """
import os, time
from ddpm.sources import decoding
os.sched_getaffinity = lambda pid: range(3)
decoding._in_processes(lambda block: time.sleep(0.05) or [], 64 * 10_000, lambda done: print(done, flush=True))
"""


def test_a_killed_reader_leaves_no_processes() -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        children = psutil.Process(process.pid).children()
        assert len(children) == 3
        process.kill()
    gone, alive = psutil.wait_procs(children, timeout=30)
    for child in alive:
        child.kill()
    assert not alive
    assert len(gone) == 3


def test_reading_beside_threads(many: dict[str, decoding.Read], tmp_path: Path, processes: None) -> None:
    """The stage runs beside the threads of the progress display and of tracking."""
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            print("", end="", flush=True)
            time.sleep(0)

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        pixels = shared_pixels(tmp_path / "x.npy", 300)
        decoding.read_all(many, Layout(3, (8, 8), "error", False), list(pixels), "here", lambda done: None)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert np.array_equal(pixels[299].transpose(1, 2, 0), noise(seed=299))


ENDED_AT_THE_FORK = """
import os, signal
from ddpm.runtime.stopping import on_sigterm
from ddpm.sources import decoding

fork = os.fork

def forked():
    pid = fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return pid

os.fork = forked
on_sigterm()
try:
    list(decoding._forked(lambda block: [], [range(1)] * 4, 2))
except BaseException as error:
    print(type(error).__name__, flush=True)
"""


def test_a_worker_ended_before_it_begins_does_not_go_on_as_its_parent() -> None:
    """The forked worker must not run its parent's SIGTERM handler.

    Otherwise the worker would print an error of its own and keep running.
    """
    done = subprocess.run(
        [sys.executable, "-c", ENDED_AT_THE_FORK], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "InputError\n", done
