"""Resizing images before features are taken, by one kernel whose name is part of every number's protocol."""

import numpy as np
from PIL import Image

from pipelines.data.dataset import UInt8s

KERNEL = "bicubic-antialias of Pillow"
"""Keys' cubic with a = -0.5, widened by the factor of a reduction, on each channel by itself. Pillow computes levels in
whole numbers, so every machine gives the same."""


def resize(images: UInt8s, size: tuple[int, int]) -> UInt8s:
    """Images uint8 [B, H, W, C] at `size` (H, W), rounded to levels; those of that size as they are.

    Without antialiasing, pixels between the sampled ones are dropped, which alone can move an FID by several points
    (Parmar 2022, On Aliased Resizing and Surprising Subtleties in GAN Evaluation).
    """
    if images.shape[1:3] == size:
        return images
    height, width = size
    resized = np.empty((len(images), height, width, images.shape[3]), np.uint8)
    for row, image in enumerate(images):
        for channel in range(images.shape[3]):
            # By channels: Pillow would weight the colours of four channels by the last.
            plane = Image.fromarray(np.ascontiguousarray(image[:, :, channel]))
            resized[row, :, :, channel] = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
    return resized
