"""Writes the pictures of an emoji font into a folder, one PNG file each.

Debian's package fonts-noto-color-emoji has 3,926 of them, 136x128, with transparency. recipes/emoji.yaml trains on the folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def main(folder: Path, font: Path) -> None:
    if not font.is_file():
        sys.exit(
            f"{font}: no such file; install the Debian package fonts-noto-color-emoji, or name another font with CBDT"
        )
    try:
        (bitmaps,) = TTFont(font)["CBDT"].strikeData
    except (TTLibError, KeyError, ValueError):
        sys.exit(
            f"{font}: not a font with one table CBDT of pictures, as the Debian package fonts-noto-color-emoji has"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, bitmap in bitmaps.items():
        (folder / f"{name}.png").write_bytes(bitmap.imageData)
    print(f"{len(bitmaps):,} pictures written to {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("images/emoji"))
    parser.add_argument("font", nargs="?", type=Path, default=Path(FONT))
    main(**vars(parser.parse_args()))
