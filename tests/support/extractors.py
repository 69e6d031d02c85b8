"""Asking for extractors as the quality job does, and images for them."""

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.quality.extractors.asked import extractor_asked
from pipelines.quality.extractors.asking import Asked
from pipelines.quality.extractors.config import OnnxConfig
from pipelines.quality.extractors.load import load_extractor
from pipelines.quality.extractors.request import Extractor, UInt8s
from pipelines.storage.location import Location


def images_of(count: int, shape: tuple[int, int, int], seed: int = 0) -> UInt8s:
    """Images of independent random levels, uint8 [count, H, W, C]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def asked_for(
    features: str, shape: tuple[int, int, int], directory: Path, any_weights: bool = False, **onnx: Any
) -> Asked:
    """What `--features` with `--onnx.*` stands for; `directory` is where the extractor's files are to be kept."""
    config = OnnxConfig(**onnx)
    return extractor_asked(features, config, shape, None, directory, any_weights)


def kept_and_loaded(asked: Asked, directory: Path) -> Extractor:
    """The extractor as a worker has it, on one thread."""
    asked.keep(Location.parse(directory))
    return load_extractor(asked.request, Location.parse(directory), 1, "cpu")
