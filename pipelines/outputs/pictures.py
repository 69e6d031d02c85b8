"""Arrays as pictures: PNG files of single images and of grids."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

MAX_ROWS = 16
"""Rows of a grid that has one for each class."""


def to_picture(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """uint8 [H, W, C] with C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA)."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def encode_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file; equal pictures give equal bytes with the same version of Pillow and zlib."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def spread(count: int, most: int = MAX_ROWS) -> list[int]:
    """At most `most` of 0..count-1, evenly from the first to the last: the rows of a grid that has no room for all.

    >>> spread(3), spread(1000, 4), spread(31, 1)
    ([0, 1, 2], [0, 333, 666, 999], [0])
    """
    chosen: list[int] = np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
    return chosen


def grid_png(
    images: npt.NDArray[np.uint8],
    columns: int | None = None,
    min_side: int = 512,
    row_names: Sequence[str] | None = None,
) -> bytes:
    """A PNG with the images [n, H, W, C] row by row in `columns` (None: a near-square grid).

    Small ones are enlarged without smoothing until the longer side has about `min_side` pixels. `row_names`, one for
    each row, stand at the left of them; one that is too long is cut.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    sheet = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1) + 1, index % columns * (width + 1) + 1
        sheet[top : top + height, left : left + width] = image
    picture = to_picture(sheet)
    scale = max(1, round(min_side / max(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    return encode_png(picture if row_names is None else _named(picture, row_names, (height + 1) * scale))


def _named(picture: Image.Image, names: Sequence[str], row_height: int) -> Image.Image:
    """The picture with white names on black at the left of its rows, each `row_height` high."""
    import matplotlib  # a tenth of a second, for a font with more than English letters

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(path, min(max(row_height * 0.5, 10.0), 28.0))
    names = [_cut(" ".join(name.split()), font, picture.width / 2) for name in names]
    margin = math.ceil(max((font.getlength(name) for name in names), default=0.0)) + 12
    sheet = Image.new(picture.mode, (picture.width + margin, picture.height))
    sheet.paste(picture, (margin, 0))
    draw, white = ImageDraw.Draw(sheet), (255,) * len(picture.getbands())
    for row, name in enumerate(names):
        draw.text((margin - 6, (row + 0.5) * row_height), name, fill=white, font=font, anchor="rm")
    return sheet


def _cut(name: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The name, or as much of its beginning as is at most so many pixels wide with an ellipsis."""
    if font.getlength(name) <= width:
        return name
    shorter = (name[:length] + "…" for length in range(min(len(name), 200) - 1, 0, -1))
    return next((text for text in shorter if font.getlength(text) <= width), "…")
