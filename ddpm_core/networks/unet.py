"""The epsilon-network: the U-Net of DDPM (Ho 2020, app. B).

Residual blocks of group norm, SiLU and 3x3 convolutions, the time embedding added in every block,
self-attention at chosen resolutions, output convolutions initialised to zero.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_core.config import UNetConfig
from ddpm_core.errors import ConfigError


def timestep_embedding(t: Shaped[Tensor, " B"], channels: int) -> Float[Tensor, "B channels"]:
    """[sin(t w_i), cos(t w_i)], w_i geometric from 1 to 1e-4 (Vaswani 2017, sec. 3.5; Ho 2020, app. B)."""
    half = channels // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / max(half - 1, 1)
    angles = t.to(torch.float32)[:, None] * torch.exp(-math.log(1e4) * exponents)[None]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, channels % 2))


def fourier_features(z: Float[Tensor, "B C H W"], exponents: Sequence[int]) -> Float[Tensor, "B K H W"]:
    """sin(2^n 2 pi z), then cos(2^n 2 pi z), for each n (Kingma 2021, VDM, app. C): what makes one grey level of 256, a
    step of 1/127.5, a large one. In z's precision, also under autocast, whose bfloat16 could not resolve it."""
    angles = torch.cat([z * (2.0**n * 2.0 * math.pi) for n in exponents], 1)
    return torch.cat([angles.sin(), angles.cos()], 1)


def _zero_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """A convolution that starts at zero, so that its residual branch starts as the identity."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class ResBlock(nn.Module):
    """skip(x) + conv(dropout(silu(norm(conv(silu(norm(x))) + time)))).

    `time` [B, out_channels, 1, 1] is this block's share of one projection made for all blocks at once.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, num_groups: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(num_groups, in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = _zero_conv(out_channels, out_channels, 3)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.out_channels = out_channels

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h + time))))
        out: Tensor = self.skip(x) + h
        return out


class Attention(nn.Module):
    """x + project(softmax(q k^T / sqrt(d)) v) over all H x W positions (Vaswani 2017, eq. 1)."""

    def __init__(self, channels: int, num_heads: int, num_groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(num_groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = _zero_conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same shape."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.num_heads, channels // self.num_heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        out: Tensor = self.project(h.reshape(batch, channels, height, width))
        return x + out


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution, as one transposed convolution.

    Each pixel of the doubled image lies next to copies of itself, so the 3x3 kernel meets only 2x2
    different pixels. Adding up the weights that meet the same pixel gives a 4x4 transposed kernel of
    stride 2: the same function with 4 products per output instead of 9, and no doubled image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, channels, 2H, 2W]."""
        flipped = self.conv.weight.flip(2, 3)
        kernel = F.avg_pool2d(flipped, 2, stride=1, padding=1, divisor_override=1).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class Stage(nn.Module):
    """A residual block, then self-attention where this resolution has it."""

    def __init__(self, block: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]."""
        h: Tensor = self.block(x, time)
        if self.attention is not None:
            h = self.attention(h)
        return h


class UNet(nn.Module):
    """eps_theta(x_t, t) (Ho 2020, app. B): x_t [B, C, H, W] in model range, t [B] as `Process.conditioning` gives it.

    With `num_classes` it is eps_theta(x_t, t, c) (Ho and Salimans 2021): label [B] in 0..K-1, or -1 for the null class,
    has a learned vector, which is added to the embedding of the time (Dhariwal and Nichol 2021, sec. 3).

    Returns the predicted noise, or whatever it is trained to predict, float32 [B, K, H, W] (also under autocast); K =
    C, and 2 C with `learned_variance`. Raises ConfigError for an x_t of another shape than the configuration's.

    Sides that the levels cannot halve are padded inside, with zeros, as every convolution pads its own input, and
    the output is cropped: the function is one of the image's own pixels, and so is every likelihood computed with it.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        base, groups = config.base_channels, config.num_groups
        widths = [base * m for m in config.channel_multipliers]
        height = config.padded_height_width[0]
        res_blocks: list[ResBlock] = []

        def res_block(in_channels: int, out_channels: int) -> ResBlock:
            res_blocks.append(ResBlock(in_channels, out_channels, config.dropout, groups))
            return res_blocks[-1]

        def stage(in_channels: int, level: int) -> Stage:
            width = widths[level]
            has_attention = height >> level in config.attention_resolutions
            attention = Attention(width, config.num_heads, groups) if has_attention else None
            return Stage(res_block(in_channels, width), attention)

        features = 2 * len(config.fourier_features)
        self.conv_in = nn.Conv2d(config.in_channels * (1 + features), base, 3, padding=1)
        channels, skips = base, [base]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(stage(channels, level))
                channels = width
                skips.append(channels)
            if level + 1 < len(widths):
                self.down.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
        self.middle_1 = Stage(res_block(channels, channels), Attention(channels, config.num_heads, groups))
        self.middle_2 = res_block(channels, channels)
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.up.append(stage(channels + skips.pop(), level))
                channels = width
            if level > 0:
                self.up.append(Upsample(channels))
        self.norm_out = nn.GroupNorm(groups, channels)
        self.conv_out = _zero_conv(channels, config.in_channels * (2 if config.learned_variance else 1), 3)

        time_channels = 4 * base
        self.time_mlp = nn.Sequential(
            nn.Linear(base, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels), nn.SiLU()
        )
        # One matrix product for all blocks, instead of one small one in each.
        self.time_splits = [block.out_channels for block in res_blocks]
        self.time_projection = nn.Linear(time_channels, sum(self.time_splits))
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_classes + 1, time_channels)  # the null class is the last

    def forward(
        self, x_t: Float[Tensor, "B C H W"], t: Shaped[Tensor, " B"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B K H W"]:
        """See the class."""
        h, skips, times = self._down(x_t, t, label)
        for module in self.up:
            if isinstance(module, Stage):
                h = module(torch.cat([h, skips.pop()], dim=1), next(times))
            else:
                h = module(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        (top, left), (height, width) = self._corner, self.config.height_width
        if self.config.padded_height_width != self.config.height_width:
            out = out[:, :, top : top + height, left : left + width].contiguous()
        return out.to(torch.float32)

    def bottleneck(
        self, x_t: Float[Tensor, "B C H W"], t: Shaped[Tensor, " B"], label: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B K h w"]:
        """What the middle blocks give, K channels at the coarsest level; arguments and errors are those of the call."""
        return self._down(x_t, t, label)[0]

    def _down(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> tuple[Tensor, list[Tensor], Iterator[Tensor]]:
        """The bottleneck, and what the way up takes: the skips, and each remaining block's share of the time."""
        expected = (self.config.in_channels, *self.config.height_width)
        if tuple(x_t.shape[1:]) != expected:
            shape = ", ".join(map(str, expected))
            raise ConfigError(f"x_t: shape {tuple(x_t.shape)} is not [B, {shape}], the network's")
        time: Tensor = self.time_projection(self._condition(t, label))
        times = iter(torch.split(time[:, :, None, None], self.time_splits, dim=1))

        if self.config.fourier_features:
            x_t = torch.cat([x_t, fourier_features(x_t, self.config.fourier_features)], 1)
        (top, left), (height, width) = self._corner, self.config.height_width
        padded_height, padded_width = self.config.padded_height_width
        if (padded_height, padded_width) != (height, width):
            x_t = F.pad(x_t, (left, padded_width - width - left, top, padded_height - height - top))
        # On the CPU the channels-last group norm is many times slower than what its convolutions gain.
        h: Tensor = self.conv_in(x_t.contiguous() if x_t.device.type == "cpu" else x_t)
        skips = [h]
        for module in self.down:
            h = module(h, next(times)) if isinstance(module, Stage) else module(h)
            skips.append(h)
        return self.middle_2(self.middle_1(h, next(times)), next(times)), skips, times

    @property
    def _corner(self) -> tuple[int, int]:
        """Where the image begins in its padding, (rows, columns)."""
        (height, width), (padded_height, padded_width) = self.config.height_width, self.config.padded_height_width
        return (padded_height - height) // 2, (padded_width - width) // 2

    def _condition(self, t: Tensor, label: Tensor | None) -> Tensor:
        """What every block is told of time and class, [B, time channels]."""
        embedded, classes = timestep_embedding(t, self.config.base_channels), self.config.num_classes
        if classes is None:
            told: Tensor = self.time_mlp(embedded)
            return told
        label = torch.full_like(t, -1, dtype=torch.int64) if label is None else label
        of_class = self.class_embedding(torch.where(label < 0, classes, label))
        *before, last = self.time_mlp
        for layer in before:
            embedded = layer(embedded)
        told = last(embedded + of_class)
        return told


def count_parameters(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def pixel_weights(unet: UNet) -> int:
    """Weights times pixels: at most so many multiply-adds for one image, as a weight meets each pixel at most once
    (attention apart). Known at once, where `forward_flops` takes a second to start."""
    height, width = unet.config.height_width
    return height * width * sum(parameter.numel() for parameter in unet.parameters())


def forward_flops(config: UNetConfig) -> int:
    """Floating-point operations of one forward pass for one image (a multiply-add is two); a training
    step needs about three times as many. Counted on shapes alone, without computing."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(config)(torch.empty(1, config.in_channels, *config.height_width), torch.zeros(1, dtype=torch.int64))
    return int(counter.get_total_flops())
