"""Features of a network with fixed random weights (ddpm_core/networks/random_conv.py): no file, any images."""

import functools

import torch

from ddpm_core.config import RANDOM_CONV_MIN_SIDE as MIN_SIDE
from ddpm_core.networks.exact import exact
from ddpm_core.networks.random_conv import NUM_FEATURES, RandomConv
from pipelines.cli.config import require
from pipelines.cli.errors import ModelError
from pipelines.quality.extractors.asking import Asked, Asking
from pipelines.quality.extractors.request import RANDOM_CONV, Extractor, ExtractorRequest
from pipelines.storage.location import Location

_PREPROCESSING = "levels / 127.5 - 1, edges repeated by every filter"


def ask(asking: Asking) -> Asked:
    """`random_conv`, `random_conv:64` or `random_conv:512`; 64 features are the default: their covariance is of full
    rank from 73 images on, without any tenth of them, and of 512 from 570."""
    allowed = " or ".join(f"random_conv:{number}" for number in NUM_FEATURES)
    number = asking.rest or str(NUM_FEATURES[0])
    require(number in map(str, NUM_FEATURES), asking.field, asking.features, f"must be random_conv, {allowed}")
    height, width, channels = asking.image_shape
    require(
        min(height, width) >= MIN_SIDE and channels <= 4,
        asking.field,
        asking.features,
        f"the images have {height} x {width} pixels and {channels} channels, and it needs {MIN_SIDE} x {MIN_SIDE} and "
        "1 to 4 channels; take pixels",
    )
    network = RandomConv(asking.image_shape, int(number))
    name, shape = f"{RANDOM_CONV}_{number}", asking.image_shape
    return Asked(ExtractorRequest(name, network.sha256(), int(number), shape, _PREPROCESSING))


def load(request: ExtractorRequest, directory: Location, threads: int, device: str) -> Extractor:
    """The network, made again; raises ModelError where this version or machine makes other weights."""
    height, width, channels = request.image_shape
    network = RandomConv((height, width, channels), request.num_features)
    if network.sha256() != request.sha256:
        raise ModelError(
            f"{request.name}: its weights come out as {network.sha256()[:12]} here, those of the output are "
            f"{(request.sha256 or '')[:12]}; use the version of the output, or another output"
        )
    return functools.partial(exact, network.to(torch.device(device)), device)
