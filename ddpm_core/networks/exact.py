"""Calling a network of features so that the same batch gives the same ones."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor


def exact(
    network: Callable[[Tensor], Tensor], device: torch.device | str, images: UInt8[np.ndarray, "B H W C"]
) -> Float32[np.ndarray, "B d"]:
    """Features float32 [B, d] of images uint8 [B, H, W, C], by a network that lies on `device`.

    On a GPU without TensorFloat-32, which would round the inputs of convolutions to 10 bits, and by algorithms that are
    deterministic and not chosen by how fast they were just now.
    """
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    owned = images if images.flags.writeable else images.copy()  # torch warns of memory that it could write to
    with torch.inference_mode(), flags:
        found: Float32[np.ndarray, "B d"] = network(torch.from_numpy(owned).to(device)).float().cpu().numpy()
    return found
