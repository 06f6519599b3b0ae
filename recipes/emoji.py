"""Writes the pictures of an emoji font into a folder, one PNG file each: python recipes/emoji.py [FOLDER [FONT]]

Debian's package fonts-noto-color-emoji has 3,926 of them, 136x128, with transparency. recipes/emoji.yaml trains on the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fontTools.ttLib import TTFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def main(folder: str = "images/emoji", font: str = FONT) -> None:
    if not Path(font).is_file():
        sys.exit(
            f"{font}: no such file; install the Debian package fonts-noto-color-emoji, or name another font with CBDT"
        )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (bitmaps,) = TTFont(font)["CBDT"].strikeData
    for name, bitmap in bitmaps.items():
        (target / f"{name}.png").write_bytes(bitmap.imageData)
    print(f"{len(bitmaps):,} pictures written to {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
