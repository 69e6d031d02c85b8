"""Pictures: what is drawn where."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.outputs.pictures import encode_png, grid_png, spread, to_picture


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_an_image_of_any_number_of_channels_survives_png(channels: int, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, channels), np.uint8)
    picture = Image.open(io.BytesIO(encode_png(to_picture(pixels))))
    assert (picture.mode, picture.size) == (mode, (6, 8))
    np.testing.assert_array_equal(np.asarray(picture).reshape(pixels.shape), pixels)


def test_a_grid_of_given_columns() -> None:
    images = np.full((6, 10, 10, 1), 255, np.uint8)
    picture = Image.open(io.BytesIO(grid_png(images, columns=3, min_side=1)))
    assert picture.size == (3 * 11 + 1, 2 * 11 + 1)


@pytest.mark.parametrize(
    ("count", "shape", "columns", "rows"),
    [(1, (8, 8, 1), 1, 1), (5, (8, 8, 1), 3, 2), (64, (8, 8, 3), 8, 8), (7, (16, 4, 3), 3, 3)],
)
def test_a_grid_holds_every_image_in_reading_order(count, shape, columns, rows) -> None:
    images = np.random.default_rng(0).integers(1, 256, (count, *shape), np.uint8)
    picture = Image.open(io.BytesIO(grid_png(images, min_side=512)))
    assert picture.mode == ("L" if shape[2] == 1 else "RGB")
    width, height = columns * (shape[1] + 1) + 1, rows * (shape[0] + 1) + 1
    scale = picture.width // width
    assert picture.size == (width * scale, height * scale)
    assert 256 < max(picture.size) < 1024  # a picture of about min_side
    sheet = np.asarray(picture).reshape(height * scale, width * scale, shape[2])[::scale, ::scale]
    for index, image in enumerate(images):
        top, left = index // columns * (shape[0] + 1) + 1, index % columns * (shape[1] + 1) + 1
        np.testing.assert_array_equal(sheet[top : top + shape[0], left : left + shape[1]], image)
    assert int((sheet > 0).sum()) == images.size  # the rest is black


@pytest.mark.parametrize(("count", "most"), [(1, 16), (16, 16), (17, 16), (1000, 16), (7, 1), (31, 2)])
def test_rows_are_spread_over_all_that_there_are(count: int, most: int) -> None:
    chosen = spread(count, most)
    assert len(chosen) == min(count, most)
    assert chosen[0] == 0
    assert chosen[-1] == (count - 1 if len(chosen) > 1 else 0)
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_large_images_are_not_enlarged() -> None:
    images = np.full((4, 300, 300, 3), 9, np.uint8)
    assert Image.open(io.BytesIO(grid_png(images))).size == (603, 603)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_rows_have_their_names_at_the_left(channels: int) -> None:
    images = np.random.default_rng(0).integers(1, 256, (6, 8, 8, channels), np.uint8)
    names = ["cat", "", "a name that is far too long for the picture " * 10]
    plain = np.asarray(Image.open(io.BytesIO(grid_png(images, columns=2))))
    named = np.asarray(Image.open(io.BytesIO(grid_png(images, columns=2, row_names=names))))
    margin = named.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(named[:, margin:], plain)
    height = plain.shape[0] // 3
    written = [int((named[row * height : (row + 1) * height, :margin] > 0).sum()) for row in range(3)]
    assert written[1] == 0 < written[0] < written[2]
    assert margin <= plain.shape[1] / 2 + 12
    other = np.asarray(Image.open(io.BytesIO(grid_png(images, columns=2, row_names=["dog", *names[1:]]))))
    changed = np.argwhere(named != other)
    assert len(changed) > 0
    assert changed[:, 0].max() < height
    assert changed[:, 1].max() < margin
