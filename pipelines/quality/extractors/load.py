"""The extractors as workers load them, each one entry of `LOADERS`."""

from collections.abc import Callable

import torch

from pipelines.quality.extractors import inception, model, onnx, pixels, random_conv
from pipelines.quality.extractors.request import (
    INCEPTION,
    MODEL,
    ONNX,
    PIXELS,
    RANDOM_CONV,
    Extractor,
    ExtractorRequest,
)
from pipelines.storage.location import Location

LOADERS: dict[str, Callable[[ExtractorRequest, Location, int, str], Extractor]] = {
    RANDOM_CONV: random_conv.load,
    PIXELS: pixels.load,
    INCEPTION: inception.load,
    ONNX: onnx.load,
    MODEL: model.load,
}


def load_extractor(request: ExtractorRequest, directory: Location, threads: int, device: str) -> Extractor:
    """The extractor of a request.

    Args:
        request: As `extractor_asked` gave it.
        directory: Where `Asked.keep` wrote its files.
        threads: CPU threads that it computes with; sets torch's for this process.
        device: 'cpu' or 'cuda'.

    Raises:
        ModelError: A file is another one than the request's, or cannot be used.
        StorageError: A file is missing, or cannot be read.
        ConfigError: A package that it needs is not installed.
    """
    torch.set_num_threads(threads)
    return LOADERS[request.kind](request, directory, threads, device)
