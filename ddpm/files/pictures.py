"""Writes images as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ddpm.files import atomic, paths
from ddpm.files.arrays import Images

# Images.


def grid(images: Images, columns: int | None = None) -> Images:
    """uint8 N,C,H,W -> one uint8 C,H',W' picture, images side by side with a pixel between, small ones enlarged."""
    count, channels, height, width = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    scale = max(1, 64 // max(height, width))
    picture = np.full((channels, rows * (height * scale + 1) + 1, columns * (width * scale + 1) + 1), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = 1 + row * (height * scale + 1), 1 + column * (width * scale + 1)
        large = image.repeat(scale, axis=1).repeat(scale, axis=2)
        picture[:, top : top + height * scale, left : left + width * scale] = large
    return picture


def preview(samples: Images) -> Images:
    """The first PREVIEW samples as one picture."""
    return grid(samples[: paths.PREVIEW])


def write_png(path: Path, picture: Images) -> None:
    """uint8 C,H,W with one or three channels."""
    from PIL import Image

    pixels = picture[0] if picture.shape[0] == 1 else picture.transpose(1, 2, 0)
    with atomic.replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG", optimize=False)
