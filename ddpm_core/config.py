"""What network and schedule may be, apart from both: jobs check it, and show their help, before they load torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from ddpm_core.errors import ConfigError

# A schedule's tables are built in Python; the time embedding tells far fewer steps apart.
MAX_TIMESTEPS = 1_000_000
# The side to which small images may be padded, however little of it they fill; larger ones to less than twice theirs.
_MAX_PADDED = 64
# sin(2^n 2 pi z) of a float32 z up to 4 is still known to 0.03 at n = 16.
_MAX_EXPONENT = 16
_MAX_CLASSES = 1_000_000
RANDOM_CONV_MIN_SIDE = 4
"""Pixels of the shorter side of images that `ddpm_core.networks.random_conv` takes."""
# Left out of a config at their defaults, so that configs of before the fields are what they were.
_LATER = {"fourier_features": (), "learned_variance": False, "num_classes": None}


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a `UNet`. Raises ConfigError where a field does not fit the others.

    `image_size`: (H, W) or one number for both, of any value; where the levels cannot halve it evenly, the
    network pads its input to `padded_height_width` and crops its output.
    `in_channels`: 1..4. `base_channels`: channels of the first level; `channel_multipliers`: one per
    level, times `base_channels`; `num_res_blocks`: per level going down, one more going up.
    `attention_resolutions`: heights of feature maps, of the padded image, that get self-attention. `num_heads` of it.
    `dropout` in [0, 1). `num_groups` of group norm: divides every level's channels.
    `fourier_features`: exponents n, rising in 0..16; sin and cos of 2^n 2 pi z are further channels of the input.
    `learned_variance`: twice the output channels, for the variances of the reverse steps.
    `num_classes`: K of a network that takes labels 0..K-1, or none of them; None: it takes no labels.
    """

    image_size: int | tuple[int, int] = 32
    in_channels: int = 3
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    num_heads: int = 1
    dropout: float = 0.1
    num_groups: int = 32
    fourier_features: tuple[int, ...] = ()
    learned_variance: bool = False
    num_classes: int | None = None

    def __post_init__(self) -> None:
        size = self.image_size
        # Lists come from JSON and YAML; one type inside makes equal configs compare equal.
        object.__setattr__(self, "image_size", (size, size) if isinstance(size, int) else tuple(size))
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        object.__setattr__(self, "fourier_features", tuple(self.fourier_features))
        self._check()

    def _check(self) -> None:
        def refuse(name: str, rule: str) -> NoReturn:
            raise ConfigError(f"network.{name}: {getattr(self, name)!r:.100} {rule}")

        # The limits lie far beyond any network that was ever trained: a mistyped one must not fill the memory.
        for name, limit in (("base_channels", 8192), ("num_res_blocks", 64), ("num_heads", 8192), ("num_groups", 8192)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                refuse(name, f"is not a whole number in 1..{limit}")
        if not 1 <= self.in_channels <= 4:
            refuse("in_channels", "is not in 1..4; images have 1 to 4 channels")
        if not 1 <= len(self.channel_multipliers) <= 16 or not all(1 <= m <= 64 for m in self.channel_multipliers):
            refuse("channel_multipliers", "needs one number in 1..64 for each of 1 to 16 levels")
        if not 0.0 <= self.dropout < 1.0:
            refuse("dropout", "is not in [0, 1)")
        exponents = self.fourier_features
        whole = all(type(n) is int and 0 <= n <= _MAX_EXPONENT for n in exponents)
        if not whole or list(exponents) != sorted(set(exponents)):
            refuse("fourier_features", f"are not rising whole numbers in 0..{_MAX_EXPONENT}; VDM has 6, 7")
        if type(self.learned_variance) is not bool:
            refuse("learned_variance", "is not true or false")
        classes = self.num_classes
        if classes is not None and (type(classes) is not int or not 1 <= classes <= _MAX_CLASSES):
            refuse("num_classes", f"is not a whole number in 1..{_MAX_CLASSES:,}, or null for a network without labels")
        if len(self.height_width) != 2 or any(side < 1 for side in self.height_width):
            refuse("image_size", "is not (H, W), each at least 1 pixel")
        height, width = self.padded_height_width
        if max(height, width) > _MAX_PADDED and max(height, width) >= 2 * max(self.height_width):
            levels = len(self.channel_multipliers)
            refuse("image_size", f"would be padded to {height} x {width} pixels by its {levels} levels; use fewer")
        for multiplier in self.channel_multipliers:
            channels = self.base_channels * multiplier
            if channels % self.num_groups or channels % self.num_heads:
                refuse(
                    "base_channels",
                    f"x {multiplier} is not a multiple of num_groups ({self.num_groups}) "
                    f"and num_heads ({self.num_heads}); change one of them",
                )
        heights = [height >> level for level in range(len(self.channel_multipliers))]
        if not set(self.attention_resolutions) <= set(heights):
            refuse("attention_resolutions", f"has a height that no level has; choose from {heights}")

    @property
    def height_width(self) -> tuple[int, int]:
        """(H, W)."""
        assert isinstance(self.image_size, tuple)
        return self.image_size

    @property
    def padded_height_width(self) -> tuple[int, int]:
        """(H, W) rounded up to what the levels can halve evenly: the size that the network computes at."""
        factor = 2 ** (len(self.channel_multipliers) - 1)
        height, width = (-(-side // factor) * factor for side in self.height_width)
        return height, width

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        values = {k: v for k, v in asdict(self).items() if k not in _LATER or v != _LATER[k]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "UNetConfig":
        """The inverse of `to_dict`. Raises ConfigError for an unknown field."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"network.{unknown[0]}: unknown field; the fields are {sorted(known)}")
        converted: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**converted)
