"""Pixels to model range and back (Ho 2020, sec. 3.3)."""

import torch

from ddpm_core.images import to_model_range, to_uint8


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    x = to_model_range(levels)
    torch.testing.assert_close(x.flatten(), torch.arange(256) / 127.5 - 1.0, rtol=0.0, atol=1e-6)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), levels)


def test_images_become_channels_last_without_changing_the_stored_ones():
    images = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    before = images.clone()
    x = to_model_range(images)
    assert x.shape == (2, 3, 4, 6)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    assert torch.equal(x[1, 2, 3, 5], images[1, 3, 5, 2] / 127.5 - 1.0)


def test_levels_are_rounded_to_the_nearest_and_clamped():
    x = torch.tensor([-3.0, -1.0 + 0.49 / 127.5, -1.0 + 0.51 / 127.5, 0.999, 1.7]).reshape(1, 1, 1, 5)
    assert to_uint8(x).flatten().tolist() == [0, 0, 1, 255, 255]
