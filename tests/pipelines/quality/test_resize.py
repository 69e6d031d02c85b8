"""The kernel that brings images to another size."""

import numpy as np
import pytest
from PIL import Image

from pipelines.quality.resize import resize


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(5, 9), (32, 7), (64, 64)])
def test_every_channel_is_resized_as_pillow_resizes_a_grey_image(channels: int, size: tuple[int, int]) -> None:
    images = random_images(2, 16, 12, channels)
    resized = resize(images, size)
    assert (resized.shape, resized.dtype) == ((2, *size, channels), np.uint8)
    plane = Image.fromarray(images[1, :, :, channels - 1]).resize(size[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized[1, :, :, channels - 1], np.asarray(plane))


def test_images_of_the_size_are_given_back() -> None:
    images = random_images(2, 6, 5, 3)
    assert resize(images, (6, 5)) is images


def test_a_transparent_pixel_keeps_its_colour() -> None:
    images = np.zeros((1, 8, 8, 4), np.uint8)
    images[..., :3] = 200
    np.testing.assert_array_equal(resize(images, (4, 4))[..., :3], 200)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((1, 64, 64, 1), np.uint8)
    stripes[:, :, ::2] = 255
    shrunk = resize(stripes, (8, 8))[0, :, 1:-1].astype(int)
    assert np.abs(shrunk - 127.5).max() < 4.0


def test_the_same_levels_on_every_machine() -> None:
    ramp = (np.arange(48).reshape(1, 6, 8, 1) * 5).astype(np.uint8)
    assert resize(ramp, (3, 4))[0, :, :, 0].tolist() == [[25, 34, 45, 54], [103, 112, 123, 132], [181, 190, 201, 210]]
