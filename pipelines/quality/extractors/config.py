"""How a user says what an ONNX model takes."""

from dataclasses import dataclass

from pipelines.cli.config import require
from pipelines.quality.extractors.request import Range


@dataclass(frozen=True)
class OnnxConfig:
    """What the ONNX model of `onnx:FILE` takes: float32 images [B, C, H, W], which its file does not fully describe.

    Attributes:
        size: Height and width that images are resized to; empty for what the file says, or else the images' own.
        range: What the levels 0 to 255 become: 0..1, 0..255, or -1..1 (as --onnx.range=-1..1).
        mean: Is then subtracted from each channel; empty for nothing.
        std: Is what each channel is then divided by; empty for nothing.
        output: Name of the output that is the features, [B, d] or [B, d, 1, 1]; not needed where there is one.
    """

    size: tuple[int, ...] = ()
    range: Range = "0..1"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        whole = len(self.size) in (0, 1, 2) and all(1 <= side <= 4096 for side in self.size)
        require(whole, "onnx.size", list(self.size), "must be [SIDE] or [HEIGHT, WIDTH], each in 1..4096")
        require(all(value > 0 for value in self.std), "onnx.std", list(self.std), "must be above 0")
