"""The noise that samples start from."""

import math

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ddpm_core import counter_random
from ddpm_core.denoiser import Denoiser
from ddpm_core.process.base import Images

STREAM = "sample"


def starting_noise(denoiser: Denoiser, ids: Int64[Tensor, " B"], seed: int) -> Float32[Tensor, "B C H W"]:
    """z_T ~ N(0, V I), V the process's `prior_variance`, keyed by (seed, id); on the device of `ids`."""
    process = denoiser.process
    first, *_ = process.noise_counters(process.grid(1))
    noise = counter_random.normal(seed, STREAM, ids, first, denoiser.image_shape)
    return noise * math.sqrt(process.prior_variance)


def slerp(first: Images, second: Images, share: Float[Tensor, " N"]) -> Float[Tensor, "N C H W"]:
    """Noise on the great circle from one z_T [1, C, H, W] to another, `share` in [0, 1] of the angle between them (Song
    2021, DDIM, eq. 67): on the straight line the noise half-way would be too small."""
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    angle, parts = cosine.clamp(-1.0, 1.0).arccos(), share[:, None, None, None]
    if float(angle) < 1e-6:
        return torch.lerp(first, second, parts)
    return ((1.0 - parts) * angle).sin() / angle.sin() * first + (parts * angle).sin() / angle.sin() * second
