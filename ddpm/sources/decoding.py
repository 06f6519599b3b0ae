"""Finds, checks and decodes PNG and JPEG files, in folders and inside zip files, straight into an array.

Reading is strict: an image that does not fit, even after the requested conversion, is an error that names the file.
Without `convert`, all images must be 8-bit grey, or all RGB. With it, bilevel, palette and RGBA images are accepted
too, and all become grey or RGB. Transparent pixels, CMYK, 16 bit and animations are always refused: there is no single
right way to convert them. EXIF orientation is applied; colour profiles are ignored.
"""

from __future__ import annotations

import io
import mmap
import multiprocessing
import os
import posixpath
import re
import signal
import stat
import warnings
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from ddpm.errors import InputError
from ddpm.files.arrays import Images
from ddpm.runtime import watchdog

if TYPE_CHECKING:
    from PIL import Image

Read = Callable[[], bytes]  # returns an encoded image
Fault = tuple[str, str]  # the name of a file, and what is wrong with it

MAX_PIXELS = 2**26  # of one image; the header is checked before anything is decoded
MAX_BYTES = 2**28  # of one encoded image
MODES = {1: "L", 3: "RGB"}
BLOCK = 64  # images that a worker process decodes between two progress reports
MAX_WORKERS = 16
_HELD = {signal.SIGINT, signal.SIGTERM}  # signals held back while processes are forked


# Messages.

ADVICE = "repair or remove them, or have them converted by data.size, data.fit and data.channels"


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, such as "1 image" or "2,000 images"."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def shown(name: str) -> str:
    """Returns a file name as printable text in one line. Names may hold any characters."""
    return name if name.isprintable() else ascii(name)


def offenders(where: str, what: str, faults: Sequence[Fault], advice: str = ADVICE) -> InputError:
    """Returns an error that names the first three faulty files and counts the others.

    Args:
        where: the folder or zip file, as messages name it.
        what: what has happened, such as "3 files cannot be used".
        faults: all faulty files.
        advice: what to do.
    """
    named = ", ".join(f"{shown(name)} ({reason})" for name, reason in sorted(faults)[:3])
    more = f" and {len(faults) - 3:,} more" if len(faults) > 3 else ""
    return InputError(f"{where}: {what}: {named}{more}; {advice}")


# Finding images.


class _Mapped(mmap.mmap):
    """A mapped file for ZipFile. Forked processes can read it in parallel, since each has its own position in it."""

    def seekable(self) -> bool:
        return True


def find(path: Path, where: str) -> tuple[dict[str, Read], list[str]]:
    """Finds the images in a folder or zip file.

    A zip file inside the folder is read as if it were unpacked there. Hidden files do not count as images.

    Args:
        path: a folder or a zip file.
        where: the name of `path` in messages.

    Returns:
        A dict from the path of each image to the function that reads this image; and the paths of all other files. All paths
            are relative to `path`.

    Raises:
        InputError: there are no images, or a file cannot be used.
    """
    images: dict[str, Read] = {}
    left_out: list[str] = []
    faults: list[Fault] = []
    if path.is_dir():
        listing = _folder_listing(path, faults)
    elif path.suffix.lower() == ".zip" and path.exists():
        listing = _zip_listing(path, "", faults)
    else:
        raise InputError(f"{where}: no such folder or zip file; set data.path to the folder or zip file of your images")
    for name, read in listing:
        if not _is_image(name):
            left_out.append(name)
        elif name in images:
            faults.append((name, "two images with this path"))
        else:
            images[name] = read
    if faults:
        raise offenders(where, f"{counted(len(faults), 'file')} cannot be used", faults, "repair or remove them")
    if not images:
        others = f", only {counted(len(left_out), 'other file')}" if left_out else ""
        raise InputError(f"{where}: no PNG or JPEG images there{others}; put some there, or set data.path")
    return images, left_out


def _is_image(name: str) -> bool:
    return name.lower().endswith((".png", ".jpg", ".jpeg")) and not re.search(r"(^|/)(\.|__MACOSX/)", name)


def _folder_listing(top: Path, faults: list[Fault]) -> Iterator[tuple[str, Read]]:
    def unreadable(error: OSError) -> None:
        faults.append((os.path.relpath(error.filename, top), error.strerror or "not readable"))

    for folder, subfolders, names in os.walk(top, onerror=unreadable):
        subfolders.sort()
        inside = Path(folder).relative_to(top).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in subfolders:
            if Path(folder, name).is_symlink():
                faults.append((prefix + name, "a link to a folder, which DVC does not follow"))
        for name in sorted(names):
            file = Path(folder, name)
            if file.suffix.lower() == ".zip" and not name.startswith("."):
                yield from _zip_listing(file, prefix, faults)
            else:
                yield prefix + name, _File(folder, name)


def _zip_listing(path: Path, prefix: str, faults: list[Fault]) -> Iterator[tuple[str, Read]]:
    """Lists the files in an archive. The archive stays open for the functions that read them."""
    try:
        if not path.is_file():
            raise OSError("not a regular file")
        with path.open("rb") as file:
            archive = zipfile.ZipFile(cast(IO[bytes], _Mapped(file.fileno(), 0, access=mmap.ACCESS_READ)))
        members = _Members(archive)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, OverflowError) as error:
        faults.append((prefix + path.name, f"not a readable zip file: {_reason(error)}"))
        return
    for index in range(len(members)):
        member = members.entry(index)
        name = member.filename.replace("\\", "/")
        if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
            faults.append((f"{prefix}{path.name}: {name}", "escapes its folder"))
        elif stat.S_ISLNK(member.external_attr >> 16):
            faults.append((f"{prefix}{path.name}: {name}", "a link"))
        elif member.flag_bits & 1:
            faults.append((f"{prefix}{path.name}: {name}", "encrypted"))
        elif not member.is_dir():
            yield posixpath.normpath(prefix + name), _Member(members, index)


# There may be millions of files. So the objects for each are small: with its name and its place in a dict, a file takes 0.3 KB of
# memory, instead of 0.9 KB with zipfile's entries. Every worker process copies the objects that it uses.


class _File:
    """Reads a file of a folder."""

    __slots__ = ("folder", "name")

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name

    def __call__(self) -> bytes:
        path = Path(self.folder, self.name)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("not a regular file")
        if status.st_size > MAX_BYTES:
            raise _Refused(f"{status.st_size:,} bytes are too many")
        return path.read_bytes()


class _Members:
    """The members of an archive, which stays open: the part of their entries that reading takes, in arrays.

    Empties the archive's own list at once. The memory of that list then goes back to the system, since nothing that stays lies
    between its entries.
    """

    FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits", "external_attr")

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive, self._numbers, self._names, self._ends = archive, array("q"), bytearray(), array("q")
        for entry in archive.infolist():
            self._numbers.extend(getattr(entry, field) for field in self.FIELDS)
            self._names += entry.orig_filename.encode(errors="surrogatepass")
            self._ends.append(len(self._names))
        archive.infolist().clear()
        archive.NameToInfo.clear()

    def __len__(self) -> int:
        return len(self._ends)

    def entry(self, index: int) -> zipfile.ZipInfo:
        """Returns the entry of a member, without its time and comment."""
        start = self._ends[index - 1] if index else 0
        entry = zipfile.ZipInfo(self._names[start : self._ends[index]].decode(errors="surrogatepass"))
        for place, field in enumerate(self.FIELDS, index * len(self.FIELDS)):
            setattr(entry, field, self._numbers[place])
        return entry

    def read(self, index: int) -> bytes:
        """Reads a member. Raises the errors of zipfile."""
        entry = self.entry(index)
        if entry.file_size > MAX_BYTES:
            raise _Refused(f"{entry.file_size:,} bytes are too many")
        with self._archive.open(entry) as file:
            return file.read()


class _Member:
    """Reads a member of an archive."""

    __slots__ = ("index", "members")

    def __init__(self, members: _Members, index: int) -> None:
        self.members, self.index = members, index

    def __call__(self) -> bytes:
        return self.members.read(self.index)


# Reading images.


class _Refused(Exception):
    """An image cannot be used. The message is the reason."""


class _Mismatch(_Refused):
    """A valid image does not have the expected layout. actual: the layout that it has."""

    def __init__(self, reason: str, actual: Layout) -> None:
        super().__init__(reason)
        self.actual = actual


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Layout:
    """The shape that every image gets: uint8 [channels, side, side].

    Args:
        channels: 1 for grey, 3 for RGB.
        side: height and width in pixels.
        fit: what to do with images of another size: "error", "crop" (scale the short side, cut off the rest), "pad"
            (scale the long side, fill up with zeros) or "resize" (stretch).
        convert: whether to convert images of other modes.
        given: whether the user has chosen the side. If not, it is that of the first image.
    """

    channels: int
    side: int
    fit: str
    convert: bool
    given: bool = True

    def pixels(self, read: Read) -> Images:
        """Reads and decodes an image: uint8 [channels, side, side]. Raises _Refused."""
        picture = _picture(read, self.channels if self.convert else None)
        channels, (width, height) = len(picture.getbands()), picture.size
        side = self.side if self.given or width != height else width
        if channels != self.channels:
            actual = replace(self, channels=channels, side=side)
            raise _Mismatch(f"mode {picture.mode} instead of {MODES[self.channels]}", actual)
        if side != self.side and self.fit == "error":
            raise _Mismatch(f"{width}x{height} instead of {self.side}x{self.side}", replace(self, side=side))
        if picture.size != (self.side, self.side):
            picture = _fitted(picture, self.side, self.fit)
        return np.asarray(picture).reshape(self.side, self.side, self.channels).transpose(2, 0, 1)


# The index of an image, what is wrong with it, and its layout if that is what is wrong.
_ImageFault = tuple[int, str, Layout | None]


def first_shape(files: Mapping[str, Read], channels: int | None, where: str) -> tuple[str, int, tuple[int, int]]:
    """Returns name, number of channels and (width, height) of the first valid image. Raises InputError without one.

    channels: convert the image to 1 or 3 channels; None keeps its own.
    """
    faults: list[Fault] = []
    for name, read in files.items():
        try:
            with _strict_pillow():
                picture = _picture(read, channels)
        except _Refused as refusal:
            faults.append((name, str(refusal)))
        else:
            return name, len(picture.getbands()), picture.size
    raise offenders(where, f"none of {counted(len(faults), 'image')} can be used", faults)


def read_all(
    files: Mapping[str, Read],
    layout: Layout,
    places: Sequence[Images],
    where: str,
    done: Callable[[int], None],
) -> None:
    """Decodes every image into its place in an array, in several processes.

    Args:
        files: functions that read the images, by name.
        layout: the layout of all images.
        places: for each image a view [channels, side, side] of a memory-mapped array, which the processes share.
        where: the folder or zip file, as messages name it.
        done: is called with the number of finished images.

    Raises:
        InputError: images cannot be used. It names the first three.
    """
    names = list(files)

    def read(block: range, tried: Layout) -> list[_ImageFault]:
        faults = []
        with _strict_pillow():
            for index in block:
                try:
                    pixels = tried.pixels(files[names[index]])
                except _Refused as refusal:
                    faults.append((index, str(refusal), getattr(refusal, "actual", None)))
                else:
                    if tried == layout:  # the places have its shape
                        places[index][:] = pixels
        return faults

    found = sorted(_in_processes(partial(read, tried=layout), len(names), done), key=itemgetter(0))
    if not found:
        return
    usual = _usual(layout, len(names) - len(found), [actual for *_, actual in found if actual])
    if usual != layout:  # the first image itself differs from most: name those that differ from most
        found = _in_processes(partial(read, tried=usual), len(names), lambda _: None)
    faults = [(names[index], reason) for index, reason, _ in found]
    raise offenders(where, f"{len(faults):,} of {counted(len(names), 'image')} cannot be used", faults)


def _usual(layout: Layout, count: int, others: Sequence[Layout]) -> Layout:
    """Returns the most frequent layout: `count` images have `layout`, and one image has each of `others`."""
    ((best, most),) = Counter(others).most_common(1) or [(layout, count)]
    return best if most > count else layout


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Turns Pillow's warnings of huge images into errors. Ignores its other warnings, such as those of odd metadata."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _picture(read: Read, channels: int | None) -> Image.Image:
    """Reads and decodes an image, upright, in mode L or RGB. Raises _Refused."""
    try:
        content = read()
        if not content:
            raise _Refused("empty file")
        return _decoded(content, channels)
    except _Refused:
        raise
    except Exception as error:  # Pillow and zipfile raise a dozen types on damaged data
        raise _Refused(_reason(error)) from error


def _decoded(content: bytes, channels: int | None) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    except UnidentifiedImageError:
        raise _Refused("no PNG or JPEG image, or damaged") from None
    _check(image, content, channels)
    image.load()
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise _Refused("transparent pixels")
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    return image if channels is None else image.convert("L" if channels == 1 else "RGB")


def _check(image: Any, content: bytes, channels: int | None) -> None:
    """Checks the header before anything is decoded, and the checksums of a PNG, which Pillow skips when it decodes."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _Refused(f"{width}x{height} pixels are too many")
    if image.format == "PNG" and image.is_animated:
        raise _Refused("animated")
    if image.format == "PNG" and content[24] == 16:  # the bit depth; Pillow silently converts some of these to 8 bit
        raise _Refused("16 bit per channel")
    if image.mode not in (("L", "RGB") if channels is None else ("1", "L", "LA", "P", "RGB", "RGBA")):
        raise _Refused(f"mode {image.mode}")
    if image.format == "PNG":
        _check_sums(content)


def _check_sums(png: bytes) -> None:
    """Checks the CRC of each chunk: length, type, data, CRC of type and data. Pillow's verify() takes 4 times as long."""
    start, kind, data = 8, b"", []
    while kind != b"IEND":
        end = start + 8 + int.from_bytes(png[start : start + 4])
        kind = png[start + 4 : start + 8]
        if len(png) < end + 4:
            raise _Refused("truncated")
        if zlib.crc32(memoryview(png)[start + 4 : end]) != int.from_bytes(png[end : end + 4]):
            raise _Refused("damaged: a checksum differs")
        if kind == b"IDAT":
            data.append(png[start + 8 : end])
        start = end + 4
    _check_rows(png, b"".join(data))


# The passes of an interlaced PNG: column step, first column, row step, first row.
ADAM7 = ((8, 0, 8, 0), (8, 4, 8, 0), (4, 0, 8, 4), (4, 2, 4, 0), (2, 0, 4, 2), (2, 1, 2, 0), (1, 0, 2, 1))
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # values per pixel, by colour type


def _check_rows(png: bytes, data: bytes) -> None:
    """Checks that no rows are missing: Pillow would leave them black. A row is one filter byte and packed pixels."""
    width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
    bits = png[24] * SAMPLES[png[25]]
    expected = 0
    for across, left, down, top in ADAM7 if png[28] else ((1, 0, 1, 0),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        expected += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    unpacker, found = zlib.decompressobj(), 0
    while found < expected and (piece := unpacker.decompress(data, 2**20)):
        found, data = found + len(piece), unpacker.unconsumed_tail
    if found < expected:
        raise _Refused(f"truncated: {found:,} of {expected:,} bytes of pixels")


def _fitted(picture: Image.Image, side: int, fit: str) -> Image.Image:
    """Returns the picture in side x side pixels; see Layout.fit. Raises _Refused."""
    from PIL import Image, ImageOps

    width, height = picture.size
    best = Image.Resampling.LANCZOS
    if fit == "crop":
        return ImageOps.fit(picture, (side, side), best)
    if fit == "pad":
        if min(width, height) * side < max(width, height):
            raise _Refused(f"{width}x{height} is less than a pixel high or wide when it is scaled to {side}")
        return ImageOps.pad(picture, (side, side), best, color=0)
    if fit == "resize":
        return picture.resize((side, side), best)
    raise _Refused(f"{width}x{height} instead of {side}x{side}")


# Reading in several processes, since decoding a small image mostly runs Python, which threads cannot do in parallel.

_ReadBlock = Callable[[range], list[_ImageFault]]
_read_block: list[_ReadBlock] = []  # in a worker process: the function that reads a block of images


def _in_processes(read: _ReadBlock, count: int, done: Callable[[int], None]) -> list[_ImageFault]:
    """Calls `read` with all blocks of range(count), in forked processes if the system supports them."""
    blocks = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS, len(blocks)) if hasattr(os, "sched_getaffinity") else 1
    finished, faults = 0, list[_ImageFault]()
    for block, found in _forked(read, blocks, workers) if workers > 1 else ((block, read(block)) for block in blocks):
        finished += len(block)
        faults.extend(found)
        done(finished)
    return faults


def _forked(read: _ReadBlock, blocks: list[range], workers: int) -> Iterator[tuple[range, list[_ImageFault]]]:
    """Yields each block with its faults once it is read. Raises InputError if a worker process was killed."""
    context = multiprocessing.get_context("fork")  # processes inherit `read` with its files and arrays: no pickling
    before = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, context, _begin, (read, os.getpid()))
    try:
        # A signal between a fork and _begin would run the handler of this process in the copy, which would go on as this process.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
        try:
            waiting = {pool.submit(_run, block): block for block in blocks}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool:
        raise InputError("a process that reads images was killed; out of memory?") from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - set(before):
            process.terminate()  # otherwise shutdown() waits for the blocks at hand
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(read: _ReadBlock, parent: int) -> None:
    """Prepares a worker process: it leaves Ctrl-C to its parent, and ends if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    os.environ[watchdog.VARIABLE] = str(parent)
    watchdog.start()
    _read_block.append(read)


def _run(block: range) -> list[_ImageFault]:
    return _read_block[-1](block)
