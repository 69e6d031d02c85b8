"""The network's fields, and what those are that are not given: chosen for the size of the images."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ddpm_core.config import UNetConfig
from pipelines.cli.config import require

# Where the channels allow them; none depends on the size of the images.
_BASE_CHANNELS, _NUM_RES_BLOCKS, _NUM_HEADS, _NUM_GROUPS = 32, 1, 4, 8
# The shorter side is halved until it is at most this: few enough positions for attention over all of them.
_LOWEST_SIDE = 8


@dataclass(frozen=True)
class NetworkConfig:
    """The network; image size and channels come from the data set. What is not given (null) is chosen for them."""

    base_channels: int | None = None
    """Channels at full resolution. Null: 32."""
    channel_multipliers: tuple[int, ...] | None = None
    """Channels of each resolution as a multiple of base_channels; each further entry halves H and W. Null, by the
    shorter side: 1,2 up to 16 pixels; 1,2,2 up to 32; 1,2,2,2 up to 64; 1,1,2,2,4 up to 128; 1,1,2,2,4,4 up to 256."""
    num_res_blocks: int | None = None
    """Residual blocks at each resolution on the way down (one more on the way up). Null: 1."""
    attention_resolutions: tuple[int, ...] | None = None
    """Heights (pixels) at which blocks are followed by self-attention. They are those of the padded image, whose sides
    are the next multiples of what the levels halve. Null: that of the lowest resolution."""
    num_heads: int | None = None
    """Heads of each self-attention; must divide its channels. Null: 4, or the largest number below that does."""
    num_groups: int | None = None
    """Groups of each group normalisation; must divide its channels. Null: 8, or the largest number below that does."""
    dropout: float = 0.0
    """Dropout probability inside residual blocks."""
    fourier_features: tuple[int, ...] = ()
    """Exponents n, rising, in 0..16: sin and cos of 2^n 2π z_t become input channels of their own (Kingma et al. 2021),
    with which it tells apart the grey levels of nearly noiseless images."""
    learned_variance: bool = False
    """Predict the variances of the reverse steps too, by twice the output channels (Nichol & Dhariwal 2021)."""
    num_classes: int | Literal["auto"] | None = None
    """Number K of classes, whose labels 0..K-1 the network is told beside the image; auto: as many as the labels of the
    data set have names, or else their largest plus 1. Null: it is told no labels."""

    def __post_init__(self) -> None:
        # What does not depend on the images is checked on the smallest that the levels allow.
        side = 2 ** max(len(self.channel_multipliers or ()) - 1, 0)
        classes = 1 if self.num_classes == "auto" else self.num_classes
        known = {**_chosen(asdict(self), side, side), "attention_resolutions": (), "num_classes": classes}
        UNetConfig(image_size=side, **known)

    def for_images(
        self, image_shape: tuple[int, int, int], begun_with: Mapping[str, Any] | None = None
    ) -> "NetworkConfig":
        """The same with every field given, for images of shape (H, W, C).

        `begun_with` holds the fields of the training that is continued: it goes on with them where none is given here.
        `num_classes` stays as it is, as the images do not tell it.
        """
        height, width, _ = image_shape
        values = asdict(self)
        for name, value in (begun_with or {}).items():
            if values.get(name, value) is None and name != "num_classes":
                values[name] = tuple(value) if isinstance(value, list) else value
        return replace(self, **_chosen(values, height, width))

    def unet_config(self, image_shape: tuple[int, int, int]) -> UNetConfig:
        """The full network configuration for images of shape (H, W, C).

        Raises:
            ConfigError: The network cannot take images of that shape.
        """
        height, width, channels = image_shape
        config = UNetConfig(image_size=(height, width), in_channels=channels, **asdict(self.for_images(image_shape)))
        for level, multiplier in enumerate(config.channel_multipliers):
            height, width = (side >> level for side in config.padded_height_width)
            values = config.base_channels * multiplier // config.num_groups * height * width
            rule = f"leaves one value to each group at {height} x {width} pixels, which is normalised to 0; take fewer"
            require(values > 1, "network.num_groups", config.num_groups, rule)
        return config

    def describe(self, image_shape: tuple[int, int, int]) -> str:
        """Its fields and what they were chosen for, in one line."""
        config = self.unet_config(image_shape)
        size, padded = (" x ".join(map(str, sides)) for sides in (config.height_width, config.padded_height_width))
        inside = "" if padded == size else f", padded to {padded} inside the network"
        return (
            f"network for images of {size} pixels{inside}: base_channels {config.base_channels}, channel_multipliers "
            f"{list(config.channel_multipliers)}, num_res_blocks {config.num_res_blocks}, attention_resolutions "
            f"{list(config.attention_resolutions)}, num_heads {config.num_heads}, num_groups {config.num_groups}"
            + (f", num_classes {config.num_classes}" if config.num_classes else "")
        )


def _chosen(values: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """The fields with values for those that are None, for images of that size."""
    multipliers = values["channel_multipliers"]
    if multipliers is None:
        multipliers = _multipliers(min(height, width))
    base = _BASE_CHANNELS if values["base_channels"] is None else values["base_channels"]
    factor = 2 ** max(len(multipliers) - 1, 0)
    height, width = -(-height // factor), -(-width // factor)  # of the lowest level
    channels = math.gcd(*(base * multiplier for multiplier in multipliers))
    chosen = {
        "base_channels": base,
        "channel_multipliers": multipliers,
        "num_res_blocks": _NUM_RES_BLOCKS,
        "attention_resolutions": (height,),
        "num_heads": _divisor(channels, _NUM_HEADS),
        # a group of one value says nothing: it is normalised to 0
        "num_groups": _divisor(channels, min(_NUM_GROUPS, max(1, channels * height * width // 2))),
    }
    return {**values, **{name: value for name, value in chosen.items() if values[name] is None}}


def _multipliers(side: int) -> tuple[int, ...]:
    """As many levels as bring `side` (pixels) down to `_LOWEST_SIDE`, and two of less where it can be halved well."""
    levels = 1 if side < 4 else 2
    while side > _LOWEST_SIDE * 2 ** (levels - 1):
        levels += 1
    return (1, *[2] * (levels - 1)) if levels <= 4 else (1, 1, 2, 2, *[4] * (levels - 4))


def _divisor(channels: int, most: int) -> int:
    """The largest number up to `most` that divides `channels`."""
    return next(number for number in range(most, 0, -1) if channels % number == 0)
