"""What an output stores of its feature extractor: all that decides its numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.cli.config import require

UInt8s = npt.NDArray[np.uint8]
Float32s = npt.NDArray[np.float32]
Extractor = Callable[[UInt8s], Float32s]
"""Images uint8 [B, H, W, C] to features float32 [B, d]. An image's features do not depend on the others of the batch;
batches of one shape give the same bits again."""
Range = Literal["0..1", "-1..1", "0..255"]

RANDOM_CONV, PIXELS, INCEPTION, ONNX, MODEL = "random_conv", "pixels", "inception", "onnx", "model"
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of `weights-inception-2015-12-05-6726825d.pth`, the Inception network of 2015, as torch-fidelity and pytorch-fid
publish it."""
_KINDS = (RANDOM_CONV, PIXELS, INCEPTION, ONNX, MODEL)


@dataclass(frozen=True)
class OnnxRequest:
    """How images become the input of an ONNX model, and where its features are.

    Attributes:
        size: (H, W) that images are resized to.
        channels: Of the input; images of one channel are repeated to three.
        range: Of the levels, before mean and std.
        mean: Subtracted from each channel; empty: nothing is.
        std: What each channel is then divided by; empty: by nothing.
        input: Its name in the model.
        output: Its name in the model.
    """

    size: tuple[int, ...]
    channels: int
    range: Range
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input: str
    output: str

    def __post_init__(self) -> None:
        require(len(self.size) == 2 and min(self.size) >= 1, "size", self.size, "must be [H, W], each at least 1")


@dataclass(frozen=True)
class ExtractorRequest:
    """The identity of an extractor.

    Attributes:
        name: What its numbers are called: `random_conv_64`, `random_conv_512`, `pixels`, `inception`,
            `inception_<sha256's first 8 digits>` for other weights than the FID's, `onnx`, `model`.
        sha256: Of what computes: the weights' file, random_conv's generated weights; of a model its id; None of pixels.
        num_features: d.
        image_shape: (H, W, C) of the images that it is given.
        preprocessing: What happens between the levels and the network, in words.
        onnx: How an ONNX model is called.
    """

    name: str
    sha256: str | None
    num_features: int
    image_shape: tuple[int, ...]
    preprocessing: str
    onnx: OnnxRequest | None = None

    def __post_init__(self) -> None:
        known = any(self.name == kind or self.name.startswith(f"{kind}_") for kind in _KINDS)
        require(known, "name", self.name, f"must be of {', '.join(_KINDS)}")
        require(self.num_features >= 1, "num_features", self.num_features, "must be at least 1")
        whole = len(self.image_shape) == 3 and min(self.image_shape) >= 1
        require(whole, "image_shape", self.image_shape, "must be [H, W, C], each at least 1")
        require((self.sha256 is None) == (self.kind == PIXELS), "sha256", self.sha256, "must be there, but for pixels")
        fid = self.name != INCEPTION or self.sha256 == FID_SHA256
        require(fid, "sha256", self.sha256, f"must be that of the FID's weights for {INCEPTION}, {FID_SHA256[:12]}...")
        require((self.onnx is None) == (self.kind != ONNX), "onnx", self.onnx, "must be there for onnx, and only there")

    @property
    def kind(self) -> str:
        """`random_conv`, `pixels`, `inception`, `onnx` or `model`."""
        return next(kind for kind in _KINDS if self.name == kind or self.name.startswith(f"{kind}_"))

    @property
    def is_fid(self) -> bool:
        """Whether a Fréchet distance of its features is the FID (Heusel 2017)."""
        return self.name == INCEPTION
