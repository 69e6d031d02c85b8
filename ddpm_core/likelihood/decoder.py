"""The decoder p(x_0 | z_0): the discretised Gaussian of DDPM (Ho 2020, sec. 3.3), the softmax of VDM (Kingma 2021)."""

import math

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

PerImage = Float64[Tensor, " B"]
UInt8Images = UInt8[Tensor, "B C H W"]


def bits_per_dim(nats: Tensor) -> PerImage:
    """Sum of nats over the dimensions of each image, divided by D ln 2."""
    return nats.flatten(1).mean(1) / math.log(2.0)


def decoder_nll_nats(
    levels: UInt8[Tensor, "*S"], mean: Float[Tensor, "*S"], sigma: Float[Tensor, "..."] | float
) -> Float64[Tensor, "*S"]:
    """-ln of the discretised Gaussian's mass of each level, elementwise (Ho 2020, eq. 13).

    The bin of level k is [x - 1/255, x + 1/255] around x = k / 127.5 - 1, open below at k = 0 and
    above at k = 255. `sigma` > 0 broadcasts against `mean`. Exact into the far tails: the difference
    of two CDFs is taken between logarithms, in the tail where they are small.
    """
    x = levels.to(torch.float64) / 127.5 - 1.0
    mean = mean.to(torch.float64)
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=mean.device)
    lower = torch.where(levels == 0, -math.inf, (x - 1.0 / 255.0 - mean) / sigma)
    upper = torch.where(levels == 255, math.inf, (x + 1.0 / 255.0 - mean) / sigma)
    # Reflect bins above the mean: Phi(b) - Phi(a) = Phi(-a) - Phi(-b) keeps both logs resolvable.
    above = lower > 0.0
    lower, upper = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    log_upper: Tensor = torch.special.log_ndtr(upper)
    log_ratio: Tensor = torch.special.log_ndtr(lower) - log_upper
    return -(log_upper + torch.log(-torch.expm1(log_ratio)))


def decoder_bpd(levels: UInt8Images, mean: Float[Tensor, "B C H W"], sigma: Tensor | float) -> PerImage:
    """L_0 = -log p_theta(x_0 | z_0) of the discretised Gaussian (Ho 2020, eq. 13); see `decoder_nll_nats`."""
    return bits_per_dim(decoder_nll_nats(levels, mean, sigma))


def softmax_nll_nats(
    levels: UInt8[Tensor, "*S"], xbar: Float64[Tensor, "*S"], log_snr: Float64[Tensor, "..."]
) -> Float64[Tensor, "*S"]:
    """-ln p(k | z_0), elementwise: a softmax of -(z_0 / alpha_0 - x_k)^2 SNR_0 / 2 over the 256 levels k (Kingma 2021,
    VDM, eq. 8 and app. E).

    `xbar` = z_0 / alpha_0. Level k stands at -SNR_0 (x_k - x) ((x_k + x) / 2 - xbar) relative to the level itself, at
    x, which rounds no difference of large squares. Those below -40 are left out: together they change less than the
    last digits of a float64.
    """
    x = levels.to(torch.float64) / 127.5 - 1.0
    snr, off = log_snr.exp(), xbar - x
    # -snr (a^2 / 2 - a |off|) >= -40 needs |a| <= |off| + sqrt(off^2 + 80 / snr).
    distance = off.detach().abs()
    reach = float((distance + (distance.square() + 80.0 / snr.detach()).sqrt()).max()) * 127.5
    total = torch.zeros_like(off)
    for offset in range(1, (int(reach) if reach < 255.0 else 255) + 1):  # 255 for NaN, too
        for away in (-offset, offset):
            inside = (levels >= -away) if away < 0 else (levels <= 255 - away)
            exponent = snr * (away / 127.5) * (off - 0.5 * away / 127.5)
            total = torch.logaddexp(total, torch.where(inside, exponent, -math.inf))
    return total
