"""Pixels and model range, in float32, as networks take them; likelihoods have theirs in float64 (`x_0_of`).

Shape legend of the whole package: B images, C channels, H rows, W columns, T time steps.
A uint8 level k is x_0 = k / 127.5 - 1, so level 0 is -1 and level 255 is +1 (Ho 2020, sec. 3.3).
"""

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor


def to_model_range(images: UInt8[Tensor, "B H W C"]) -> Float32[Tensor, "B C H W"]:
    """x_0 = k / 127.5 - 1 in [-1, 1].

    The result is a permuted view of the stored HWC order, so it already has the channels-last
    memory format and no transposing copy is made.
    """
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def to_levels(x: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
    """The nearest level, k = round((x + 1) * 127.5), clamped to 0..255 (rounded, not truncated)."""
    return x.to(torch.float32).add(1.0).mul(127.5).round().clamp(0.0, 255.0).to(torch.uint8)


def to_uint8(x: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B H W C"]:
    """`to_levels`, with channels last."""
    return to_levels(x).permute(0, 2, 3, 1).contiguous()
