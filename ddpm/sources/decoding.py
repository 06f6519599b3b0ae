"""Finds, checks and decodes image files, in folders and inside zip files, straight into an array.

Reading is strict: an image that does not fit, even after the requested conversion, is an error that names the file. EXIF
orientation is always applied. The section `data` of params.yaml chooses one of three levels of conversion:

- none: PNG and JPEG files, all in 8-bit grey or all in RGB.
- channels (`data.channels`): also bilevel, palette, LA and RGBA images without transparent pixels. All become grey or RGB.
- everything (`data.convert`): also GIF, WebP, BMP and TIFF files, and every mode that has an unambiguous meaning as RGB.
  Transparent pixels are laid on a background. The upper 8 of 16 bits are kept. CMYK is converted by the embedded profile. The
  first frame of an animation is used. Other colour profiles are ignored.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
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
Fault = tuple[str, str]  # the name of a file, and the reason why the file cannot be used
Colour = tuple[int, int, int]  # R, G, B in 0 ... 255

MAX_PIXELS = 2**26  # the most pixels of an image; the header is checked before the image is decoded
MAX_BYTES = 2**28  # the most bytes of an encoded image
MAX_TEXT = 2**26  # the most bytes of decompressed text in a PNG; Pillow's own limit refuses usable photos
MODES = {1: "L", 3: "RGB"}
PLAIN = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg")}  # the formats that are always read, with their suffixes
OTHERS = {"GIF": (".gif",), "WEBP": (".webp",), "BMP": (".bmp",), "TIFF": (".tif", ".tiff")}  # read with data.convert
# The modes of Pillow that have an unambiguous meaning as RGB.
CONVERTED = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"}
ORIENTATION = 0x0112  # the EXIF tag
BLOCK = 64  # images that a worker process decodes between two progress reports
MAX_WORKERS = 16
_HELD = {signal.SIGINT, signal.SIGTERM}  # signals held back while processes are forked


# Messages.

# The remedies for a faulty file. {} stands for the files.
CONVERT = "data.convert: true converts {}"
FIT = "data.size and data.fit give {} one size"
REPAIR = "repair or remove {}"


def advice(remedies: Sequence[str], some_left: bool) -> str:
    """Returns advice about faulty files.

    Args:
        remedies: the remedy for each faulty file: CONVERT, FIT or REPAIR.
        some_left: whether there are usable files too, so that leaving out the faulty files helps.
    """
    found = [remedy for remedy in (CONVERT, FIT, REPAIR) if remedy in remedies]
    steps = [remedy.format("them" if len(found) == 1 else "some of them") for remedy in found]
    return "; ".join(steps) + (", or leave them out with data.unusable: skip" if some_left else "")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, such as "1 image" or "2,000 images"."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def shown(name: str) -> str:
    """Returns a file name as printable text in one line. Names may hold any characters."""
    return name if name.isprintable() else ascii(name)


def offenders(where: str, what: str, faults: Sequence[Fault], advice: str) -> InputError:
    """Returns an error that names the first three faulty files and counts the rest.

    Args:
        where: the folder or zip file, for messages.
        what: the problem, such as "3 files cannot be used".
        faults: all faulty files.
        advice: what the user can do, as the end of the message.
    """
    named = ", ".join(f"{shown(name)} ({reason})" for name, reason in sorted(faults)[:3])
    more = f" and {len(faults) - 3:,} more" if len(faults) > 3 else ""
    return InputError(f"{where}: {what}: {named}{more}; {advice}")


# Finding images.


class _Mapped(mmap.mmap):
    """A memory-mapped file for ZipFile. Forked processes can read the file in parallel, each from its own position."""

    def seekable(self) -> bool:
        return True


@dataclass(frozen=True)
class Found:
    """The files of a folder or zip file. All paths are relative to this folder or zip file.

    Args:
        images: the function that reads each image, by path.
        left_out: the paths of files that are not images.
        faults: the files that cannot be used.
    """

    images: dict[str, Read]
    left_out: list[str]
    faults: list[Fault]


def find(path: Path, where: str, convert: bool = False, skip: bool = False) -> Found:
    """Finds the images in a folder or zip file.

    A zip file inside the folder is read as if it were unpacked there. Hidden files do not count as images.

    Args:
        path: a folder or a zip file.
        where: the name of `path` in messages.
        convert: look for images of all formats, not only for PNG and JPEG.
        skip: return the files that cannot be used, instead of raising an error.

    Raises:
        InputError: there are no images, or a file cannot be used.
    """
    found = Found({}, [], [])
    suffixes = tuple(suffix for each in (PLAIN | OTHERS if convert else PLAIN).values() for suffix in each)
    if path.is_dir():
        listing = _folder_listing(path, found.faults)
    elif path.suffix.lower() == ".zip" and path.exists():
        listing = _zip_listing(path, "", found.faults)
    else:
        problem = "neither a folder nor a zip file" if path.exists() else "no such folder or zip file"
        raise InputError(f"{where}: {problem}; set data.path to the folder or zip file of your images")
    for name, read in listing:
        if not is_image(name, suffixes):
            found.left_out.append(name)
        elif name in found.images:
            found.faults.append((name, "two images with this path"))
        else:
            found.images[name] = read
    if found.faults and not (skip and found.images):
        raise offenders(
            where,
            f"{counted(len(found.faults), 'file')} cannot be used",
            found.faults,
            advice([REPAIR], some_left=bool(found.images)),
        )
    if not found.images:
        raise _no_images(found, where, convert)
    return found


def _no_images(found: Found, where: str, convert: bool) -> InputError:
    kinds = _either(PLAIN | OTHERS if convert else PLAIN)
    others = f", only {counted(len(found.left_out), 'other file')}" if found.left_out else ""
    help = "" if convert else convertible(found.left_out)
    return InputError(f"{where}: no {kinds} images there{others}; {help or 'put some there, or set data.path'}")


def _either(formats: Iterable[str]) -> str:
    *most, last = formats
    return f"{', '.join(most)} or {last}"


def convertible(names: Sequence[str]) -> str:
    """Returns the advice to set data.convert if that helps with any of these files, else ""."""
    suffixes = [suffix for each in OTHERS.values() for suffix in each]
    there = [suffix for suffix in suffixes if any(is_image(name, (suffix,)) for name in names)]
    return f"data.convert: true reads {', '.join(there)} too" if there else ""


def is_image(name: str, suffixes: tuple[str, ...]) -> bool:
    """Returns whether a path has one of these suffixes and is not hidden."""
    return name.lower().endswith(suffixes) and not re.search(r"(^|/)(\.|__MACOSX/)", name)


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
    """Yields each path in a zip file with a function that reads the file. The zip file stays open for these functions."""
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


# There may be millions of files, and every worker process copies the objects that the worker uses. So the objects are small. With
# its name and its place in a dict, a file takes 0.3 KB of memory. With zipfile's entries, a file would take 0.9 KB.


class _File:
    """Reads a file of a folder."""

    __slots__ = ("folder", "name")

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name

    def __call__(self) -> bytes:
        return read_file(Path(self.folder, self.name))


def read_file(path: Path) -> bytes:
    """Reads an image file. Raises an error for anything but a regular file, since a pipe, for example, may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _Refused("not a regular file")
    if status.st_size > MAX_BYTES:
        raise _Refused(f"{status.st_size:,} bytes are too many")
    return path.read_bytes()


class _Members:
    """The members of an open zip file. Stores in arrays only the fields that are needed to read a member.

    Then empties the list of entries that ZipFile has made. No lasting object was allocated between these entries, so their memory
    goes back to the system.
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
    """An image cannot be used. The message is the reason. The remedy is CONVERT, FIT or REPAIR."""

    def __init__(self, reason: str, remedy: str = REPAIR) -> None:
        super().__init__(reason)
        self.remedy = remedy


class _Mismatch(_Refused):
    """A valid image has an unexpected layout. actual: the layout of the image."""

    def __init__(self, reason: str, remedy: str, actual: Layout) -> None:
        super().__init__(reason, remedy)
        self.actual = actual


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    text = re.sub(r" (object )?at 0x[0-9a-f]+", "", str(error))  # removes an address, which differs from run to run
    return strerror or " ".join(text.split()) or type(error).__name__


@dataclass(frozen=True)
class Layout:
    """The layout to which every image is converted: uint8 [channels, height, width].

    Args:
        channels: 1 for grey, 3 for RGB.
        sides: height and width in pixels.
        fit: the treatment of images of another size. "error" refuses the image. "crop" scales the image to cover the rectangle
            and cuts off the rest. "pad" scales the image to fit into the rectangle and fills the rest with `border`. "resize"
            stretches the image.
        convert: whether to convert images of other modes.
        given: whether the user has chosen the sides. Otherwise the images have decided the sides.
        background: R, G, B behind transparent pixels. With a background, the level of conversion is "everything" (see the top of
            this module).
    """

    channels: int
    sides: tuple[int, int]
    fit: str
    convert: bool
    given: bool = True
    background: Colour | None = None

    @property
    def border(self) -> tuple[int, ...]:
        """The colour of padding, one value per channel: the background, or black without a background."""
        from PIL import Image

        pixel = Image.new("RGB", (1, 1), self.background or (0, 0, 0)).convert(MODES[self.channels])
        return tuple(pixel.tobytes())

    def pixels(self, read: Read) -> Images:
        """Reads and decodes an image: uint8 [channels, height, width]. Raises _Refused."""
        picture = _picture(read, self.channels if self.convert else None, self.background)
        channels, (width, height) = len(picture.getbands()), picture.size
        sides = self.sides if self.given else (height, width)
        if channels != self.channels:
            actual = replace(self, channels=channels, sides=sides)
            raise _Mismatch(f"mode {picture.mode} instead of {MODES[self.channels]}", CONVERT, actual)
        if sides != self.sides and self.fit == "error":
            raise _Mismatch(_other_size(picture, self.sides), FIT, replace(self, sides=sides))
        if (height, width) != self.sides:
            picture = _fitted(picture, self.sides, self.fit, self.border)
        return np.asarray(picture).reshape(*self.sides, self.channels).transpose(2, 0, 1)


# The index of an image, the fault, the remedy, and the layout of the image if the layout is the fault.
_ImageFault = tuple[int, str, str, Layout | None]


def first_shape(
    files: Mapping[str, Read], channels: int | None, where: str, background: Colour | None = None
) -> tuple[str, int, tuple[int, int]]:
    """Returns the name, the number of channels and (width, height) of the first valid image.

    Args:
        files: functions that read the images, by name.
        channels: convert the image to 1 or 3 channels; None keeps the image's channels.
        where: the folder or zip file, for messages.
        background: see Layout.

    Raises:
        InputError: no image can be used.
    """
    faults: list[Fault] = []
    remedies: list[str] = []
    for name, read in files.items():
        try:
            with _strict_pillow():
                picture = _picture(read, channels, background)
        except _Refused as refusal:
            faults.append((name, str(refusal)))
            remedies.append(refusal.remedy)
        else:
            return name, len(picture.getbands()), picture.size
    what = f"none of {counted(len(faults), 'image')} can be used"
    raise offenders(where, what, faults, advice(remedies, some_left=False))


def read_all(
    files: Mapping[str, Read],
    layout: Layout,
    places: Sequence[Images],
    where: str,
    done: Callable[[int], None],
) -> None:
    """Decodes every image into its view of an array, in several processes.

    Args:
        files: for each image name, a function that returns the encoded image.
        layout: the layout that the decoded images must have.
        places: for each image a view [channels, height, width] of a memory-mapped array, which the processes share.
        where: the folder or zip file, for messages.
        done: called with the number of finished images.

    Raises:
        InputError: some images cannot be used. The message names the first three of them.
    """
    layout, found = _faults(files, layout, done, places)
    if found:
        raise _unusable(files, found, where)


def usable(
    files: Mapping[str, Read], layout: Layout, where: str, done: Callable[[int], None]
) -> tuple[dict[str, Read], Layout, list[Fault]]:
    """Decodes every image to find the usable images.

    Args:
        files: functions that read the images, by name.
        layout: the layout of the first image. If another layout is more frequent, the more frequent layout is used.
        where: the folder or zip file, for messages.
        done: called with the number of finished images.

    Returns:
        The usable images, the layout of these images, and the unusable images with their reasons.

    Raises:
        InputError: no image can be used.
    """
    layout, found = _faults(files, layout, done)
    if len(found) == len(files):
        raise _unusable(files, found, where)
    names, refused = list(files), {index for index, *_ in found}
    left = {name: files[name] for index, name in enumerate(names) if index not in refused}
    return left, layout, [(names[index], reason) for index, reason, *_ in found]


def _faults(
    files: Mapping[str, Read],
    layout: Layout,
    done: Callable[[int], None],
    places: Sequence[Images] | None = None,
) -> tuple[Layout, list[_ImageFault]]:
    """Decodes every image. Returns the most frequent layout, and the images that cannot be used with this layout.

    Args:
        files: functions that read the images, by name.
        layout: the layout to try first.
        done: called with the number of finished images.
        places: where to put the decoded images; None to decode without keeping the images.
    """
    names = list(files)

    def read(block: range, tried: Layout) -> list[_ImageFault]:
        faults = []
        with _strict_pillow():
            for index in block:
                try:
                    pixels = tried.pixels(files[names[index]])
                except _Refused as refusal:
                    faults.append((index, str(refusal), refusal.remedy, getattr(refusal, "actual", None)))
                else:
                    if places is not None and tried == layout:  # the places have the shape of this layout
                        places[index][:] = pixels
        return faults

    found = _in_processes(partial(read, tried=layout), len(names), done)
    usual = _usual(layout, len(names) - len(found), [actual for *_, actual in found if actual])
    if usual != layout:  # the first image differs from most images, so name the images that differ from most
        found = _in_processes(partial(read, tried=usual), len(names), lambda _: None)
    return usual, sorted(found, key=itemgetter(0))


def _unusable(files: Mapping[str, Read], found: Sequence[_ImageFault], where: str) -> InputError:
    names = list(files)
    faults = [(names[index], reason) for index, reason, *_ in found]
    what = f"{len(faults):,} of {counted(len(names), 'image')} cannot be used"
    some_left = len(found) < len(files)
    return offenders(where, what, faults, advice([remedy for _, _, remedy, _ in found], some_left))


def _usual(layout: Layout, count: int, others: Sequence[Layout]) -> Layout:
    """Returns the most frequent layout. `count` images have `layout`. `others` holds the layouts of the other readable images."""
    ((best, most),) = Counter(others).most_common(1) or [(layout, count)]
    return best if most > count else layout


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Converts Pillow's warnings of huge images into errors. Ignores all other warnings of Pillow, such as those of odd metadata.

    Allows MAX_TEXT bytes of text in a PNG. By default, Pillow refuses a text of more than 1 MB.
    """
    from PIL import Image, PngImagePlugin

    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT, MAX_TEXT
        try:
            yield
        finally:
            PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits


def _picture(read: Read, channels: int | None, background: Colour | None) -> Image.Image:
    """Reads and decodes an image, upright, in mode L or RGB. Raises _Refused."""
    try:
        content = read()
        if not content:
            raise _Refused("empty file")
        return _decoded(content, channels, background)
    except _Refused:
        raise
    except Exception as error:  # Pillow and zipfile raise a dozen types on damaged data
        raise _Refused(_reason(error)) from error


def _decoded(content: bytes, channels: int | None, background: Colour | None) -> Image.Image:
    image = _opened(content, PLAIN if background is None else PLAIN | OTHERS)
    _check(image, content, channels, background is not None)
    image.load()
    turn = _turn(image)
    if background is not None:
        image = _flat(_eight_bit(image, _is_sixteen_bit(image, content)), background)
    elif image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise _Refused("transparent pixels", CONVERT)
    if turn is not None:
        image = image.transpose(turn)
    return image if channels is None else image.convert("L" if channels == 1 else "RGB")


def _opened(content: bytes, formats: Mapping[str, Any]) -> Image.Image:
    """Reads the header of an image. Raises _Refused if the image has none of the formats."""
    from PIL import Image, UnidentifiedImageError

    for tried in (formats, PLAIN | OTHERS):
        try:
            image = Image.open(io.BytesIO(content), formats=tuple(tried))
        except UnidentifiedImageError:
            continue
        if tried is formats:
            return image
        raise _Refused(f"no PNG or JPEG image, but {image.format}", _remedy(image.mode))
    raise _Refused(f"no {_either(formats)} image, or damaged")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Returns the transposition that sets an image upright.

    ImageOps.exif_transpose would also rewrite all other tags, and would fail at tags that Pillow cannot write.
    """
    from PIL import Image

    if "exif" not in image.info or image.format == "TIFF":  # Pillow turns a TIFF upright when it loads the file
        return None
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return turns.get(image.getexif().get(ORIENTATION, 1))


def _eight_bit(image: Image.Image, sixteen: bool) -> Image.Image:
    """Keeps the upper 8 of 16 bits per channel. Pillow does this for pixels, but not for the colour marked as transparent."""
    from PIL import Image

    if not sixteen:
        return image
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if clear is not None:
        image.info["transparency"] = tuple(value >> 8 for value in clear) if isinstance(clear, tuple) else clear >> 8
    return image


def _flat(image: Image.Image, background: Colour) -> Image.Image:
    """Returns an opaque image in mode L or RGB. Lays transparent pixels on the background. Converts CMYK by its profile."""
    from PIL import Image

    if image.mode == "CMYK":
        return _from_cmyk(image)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _from_cmyk(image: Image.Image) -> Image.Image:
    """Converts CMYK to RGB by the embedded profile. Without a usable profile, uses Pillow's own conversion."""
    from PIL import ImageCms

    if profile := image.info.get("icc_profile"):
        with suppress(OSError, ImageCms.PyCMSError):
            inks, screen = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            if converted := ImageCms.profileToProfile(image, inks, screen, outputMode="RGB"):
                return converted
    return image.convert("RGB")


def _check(image: Any, content: bytes, channels: int | None, convert: bool) -> None:
    """Checks the header of an image before decoding. Also checks the checksums of a PNG, which Pillow skips."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _Refused(f"{width}x{height} pixels are too many")
    if not convert:
        _check_plain(image, content, channels)
    elif image.mode not in CONVERTED:
        raise _Refused(f"mode {image.mode}")
    if image.format == "PNG":
        _check_sums(content)


def _is_sixteen_bit(image: Any, content: bytes) -> bool:
    """Returns whether an image has 16 bits per channel. Reads a PNG's header, since Pillow converts some PNGs to 8 bit."""
    return content[24] == 16 if image.format == "PNG" else image.mode.startswith("I;16")


def _check_plain(image: Any, content: bytes, channels: int | None) -> None:
    """Refuses images that can be read only with data.convert: true."""
    if image.format == "PNG" and image.is_animated:
        raise _Refused("animated", CONVERT)
    if _is_sixteen_bit(image, content):
        raise _Refused("16 bit per channel", CONVERT)
    if image.mode not in (("L", "RGB") if channels is None else ("1", "L", "LA", "P", "RGB", "RGBA")):
        raise _Refused(f"mode {image.mode}", _remedy(image.mode))


def _remedy(mode: str) -> str:
    return CONVERT if mode in CONVERTED else REPAIR


def _check_sums(png: bytes) -> None:
    """Checks the CRC of each chunk, in a quarter of the time that Pillow's verify() would take.

    A chunk consists of length, type, data, and the CRC of type and data.
    """
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
    """Checks that no rows are missing: Pillow would leave missing rows black. A row is one filter byte and packed pixels."""
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


def _fitted(picture: Image.Image, sides: tuple[int, int], fit: str, border: tuple[int, ...]) -> Image.Image:
    """Fits a picture to a height and width, `sides`. See Layout.fit and Layout.border. Raises _Refused."""
    from PIL import Image, ImageOps

    width, height = picture.size
    size = sides[::-1]  # width and height, as Pillow takes them
    best = Image.Resampling.LANCZOS
    if fit == "crop":
        return ImageOps.fit(picture, size, best)
    if fit == "pad":
        if min(width, height) * size[0] < width or min(width, height) * size[1] < height:
            into = f"{size[0]}x{size[1]}"
            raise _Refused(f"{width}x{height} is less than a pixel high or wide when it is scaled to fit {into}")
        return ImageOps.pad(picture, size, best, color=border)
    if fit == "resize":
        return picture.resize(size, best)
    raise _Refused(_other_size(picture, sides), FIT)


def _other_size(picture: Image.Image, sides: tuple[int, int]) -> str:
    """Describes the size of a picture and the expected size."""
    (width, height), (high, wide) = picture.size, sides
    return f"{width}x{height} instead of {wide}x{high}"


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
    """Yields each block once its images are read, with the faults found in the block.

    Raises InputError if a worker process was killed.
    """
    # Forked processes inherit `read` with its files and arrays, without pickling.
    context = multiprocessing.get_context("fork")
    before = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, context, _begin, (read, os.getpid()))
    try:
        # Without the mask, a signal between a fork and _begin would run this process's handler in the new process.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
        try:
            waiting = {pool.submit(_run, block): block for block in blocks}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool:
        raise InputError(
            "a process that reads images was killed, probably because the memory was full; free some memory and run this again"
        ) from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - set(before):
            process.terminate()  # otherwise shutdown() waits for the blocks in progress
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(read: _ReadBlock, parent: int) -> None:
    """Prepares a worker process. The worker leaves Ctrl-C to its parent, and ends if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    os.environ[watchdog.VARIABLE] = str(parent)
    watchdog.start()
    _read_block.append(read)


def _run(block: range) -> list[_ImageFault]:
    return _read_block[-1](block)
