"""Features of one of our own models: what the middle of its U-Net says of an image.

A denoiser that has learned to tell images from noise has features of what is in them, best in the middle of the network
and at little noise (Baranchuk 2022, sec. 3; Xiang 2023, sec. 4).
"""

import functools
import math

import torch
from torch import Tensor

from ddpm_core.denoiser import NetworkDenoiser
from ddpm_core.images import to_model_range
from ddpm_core.networks.exact import exact
from ddpm_core.process.base import Process, Time, factor
from ddpm_core.process.continuous import continuous
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.models.kept import load_kept
from pipelines.quality.extractors.request import Extractor, ExtractorRequest
from pipelines.storage.location import Location

LOG_SNR = 4.0
"""Where the features are taken: sigma / alpha = e^-2, noise of 17 levels. Baranchuk 2022 found t = 50 to 250 of the
linear schedule's 1,000 the best, log-SNR 3.5 to -0.2, Xiang 2023 the lower end of that."""


def load(request: ExtractorRequest, directory: Location, threads: int, device: str) -> Extractor:
    """The model that the output keeps."""
    model = load_kept(directory, request.sha256 or "", device)
    return functools.partial(exact, functools.partial(bottleneck_means, model.denoiser), device)


def num_features(denoiser: NetworkDenoiser) -> int:
    """Channels of the middle block."""
    config = denoiser.network.config
    return config.base_channels * config.channel_multipliers[-1]


def bottleneck_means(denoiser: NetworkDenoiser, images: Tensor) -> Tensor:
    """The middle block's output, averaged over places: [B, K] of images uint8 [B, H, W, C].

    At `feature_time`, of the mean of q(z | x_0), alpha x_0: noise would make other features at each call. Without a
    label, in float32.
    """
    x_0 = to_model_range(images).contiguous()
    time = feature_time(denoiser.process).to(images.device).expand(len(images))
    marginal, seen = denoiser.process.at(time), denoiser.process.conditioning(time)
    z = factor(marginal.alpha, x_0) * x_0
    middle = denoiser.network.bottleneck(denoiser.scaled(z, marginal).float(), seen)
    return middle.mean((2, 3))


def feature_time(process: Process) -> Time:
    """The noisiest time at which log-SNR is at least `LOG_SNR`, [1]; the least noisy one where it is below that from
    the beginning."""
    if isinstance(process, DiscreteProcess):
        first: Time = torch.tensor([0])
    else:
        first = torch.tensor([continuous(process).ends[0]], dtype=torch.float64)
    surplus = process.at(first).log_snr.item() - LOG_SNR
    return process.noisier(first, math.exp(max(surplus, 0.0) / 2.0))
