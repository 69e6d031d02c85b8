"""The pixels themselves as features: what random networks and trained ones have to be better than."""

import numpy as np

from pipelines.quality.extractors.asking import Asked, Asking
from pipelines.quality.extractors.request import PIXELS, Extractor, ExtractorRequest, Float32s, UInt8s
from pipelines.storage.location import Location


def ask(asking: Asking) -> Asked:
    """`pixels`, which takes no FILE."""
    asking.refuse_rest("pixels")
    height, width, channels = asking.image_shape
    return Asked(
        ExtractorRequest(PIXELS, None, height * width * channels, asking.image_shape, "levels / 255, flattened as HWC"),
        without_gpu="features of pixels need none",
    )


def load(request: ExtractorRequest, directory: Location, threads: int, device: str) -> Extractor:
    """Levels / 255."""

    def extract(images: UInt8s) -> Float32s:
        return np.divide(images.reshape(len(images), -1), np.float32(255.0), dtype=np.float32)

    return extract
