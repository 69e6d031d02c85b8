"""Arrays as pictures: PNG files of single images and of grids."""

import io
import math

import numpy as np
import numpy.typing as npt
from PIL import Image


def to_picture(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """uint8 [H, W, C] with C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA)."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def encode_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file; equal pictures give equal bytes with the same version of Pillow and zlib."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def grid_png(images: npt.NDArray[np.uint8], columns: int | None = None, min_side: int = 512) -> bytes:
    """A PNG with the images [n, H, W, C] row by row in `columns` (None: a near-square grid).

    Small ones are enlarged without smoothing until the longer side has about `min_side` pixels.
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
    return encode_png(picture)
