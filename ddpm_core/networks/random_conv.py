"""A convolutional network with fixed random weights, as a feature extractor of images of any kind.

Its layers are those of a scattering transform (Bruna and Mallat 2013): filter, modulus, average. The filters are random
instead of wavelets: features of random networks tell sets of images apart where those of a network trained on
photographs fit badly (Naeem 2020, sec. 3.3).
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ddpm_core.config import RANDOM_CONV_MIN_SIDE as MIN_SIDE
from ddpm_core.counter_random import normal
from ddpm_core.errors import ConfigError
from ddpm_core.images import to_model_range

NUM_FEATURES = (64, 512)
_STREAM = "random_conv"
_WIDTHS = (16, 32)
_GRID = 2
# How much of a random filter's mean the first layer's keep.
_MEAN_SHARE = 0.3
_BIAS = 0.25
_GAIN = math.sqrt(2.0)


class RandomConv(nn.Module):
    """Images to `num_features` numbers: 3x3 filters, modulus and 2x2 means until the shorter side is 4 to 7 pixels,
    then filters, modulus and the means of the four quarters.

    Every filter has norm sqrt(2) and a bias from N(0, 1/16); without the biases an image and its negative would be the
    same. The first layer's filters keep three tenths of their mean: else the brightness of an image, most of what
    images differ in, would be nearly all that any feature says.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_features: int = 64) -> None:
        """`image_shape`: (H, W, C), sides of at least 4, C in 1..4. Raises ConfigError for others."""
        super().__init__()
        height, width, channels = image_shape
        if min(height, width) < MIN_SIDE:
            raise ConfigError(f"image_shape: {height} x {width} pixels are fewer than {MIN_SIDE} x {MIN_SIDE}")
        if not 1 <= channels <= 4:
            raise ConfigError(f"image_shape: {channels} channels are not 1 to 4")
        if num_features not in NUM_FEATURES:
            raise ConfigError(f"num_features: {num_features} is not one of {', '.join(map(str, NUM_FEATURES))}")
        self.image_shape = image_shape
        self.num_halvings = (min(height, width) // MIN_SIDE).bit_length() - 1
        num_before = max(self.num_halvings, 1)
        widths = [*_WIDTHS[:num_before], *_WIDTHS[-1:] * (num_before - len(_WIDTHS)), num_features // _GRID**2]
        self.layers = nn.ModuleList()
        for layer, out_channels in enumerate(widths):
            self.layers.append(_layer(layer, channels, out_channels))
            channels = out_channels
        self.requires_grad_(False)

    def forward(self, images: UInt8[Tensor, "B H W C"]) -> Float[Tensor, "B d"]:
        """Features, float32; place q of the 2x2 grid and filter k give number 4 k + q."""
        h = to_model_range(images).contiguous()
        for layer, conv in enumerate(self.layers):
            h = conv(F.pad(h, (1, 1, 1, 1), mode="replicate")).abs()
            if layer < self.num_halvings:
                h = F.avg_pool2d(h, 2, ceil_mode=True)
        return F.adaptive_avg_pool2d(h, _GRID).flatten(1)

    def sha256(self) -> str:
        """Hex digest of all weights and biases, little-endian float32, in the order of the layers."""
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()


def _layer(layer: int, in_channels: int, out_channels: int) -> nn.Conv2d:
    """A layer's convolution; filter k is a function of (layer, k) and the number of its inputs only."""
    conv = nn.Conv2d(in_channels, out_channels, 3)
    ids = torch.arange(out_channels)
    drawn = normal(0, _STREAM, ids, layer, (9 * in_channels + 1,), dtype=torch.float64)
    filters, bias = drawn[:, :-1], drawn[:, -1]
    if layer == 0:
        filters = filters - (1.0 - _MEAN_SHARE) * filters.mean(1, keepdim=True)
    filters = filters * (_GAIN / filters.norm(dim=1, keepdim=True))
    with torch.no_grad():
        conv.weight.copy_(filters.reshape(conv.weight.shape))
        assert conv.bias is not None
        conv.bias.copy_(_BIAS * bias)
    return conv
