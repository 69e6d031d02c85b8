"""Counter-based random numbers: every draw is a pure function of (seed, stream, id, t, position).

The generator is Philox4x32-10 (Salmon 2011, sec. 3.3 and table 2), written in plain integer tensor
operations, so one implementation gives the same words on any device, in any batch composition, on
any number of workers. The 64-bit key is the SHA-256 of the stream's name and the seed, so streams
never overlap; the 128-bit counter is (block, id low, id high, t), each block giving four words.
"""

import functools
import hashlib
import math

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ddpm_core.errors import ConfigError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_PERMUTATION_CHUNK = 1 << 18


@functools.lru_cache(maxsize=1024)
def stream_key(seed: int, stream: str) -> tuple[int, int]:
    """The two 32-bit key words of a stream: the first 8 bytes of SHA-256 of its name and the seed."""
    digest = hashlib.sha256(f"{stream}\0{seed}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon 2011): four uint32 words, held in int64, for every counter.

    `counter`: four broadcastable int64 tensors of values in [0, 2^32). The 64-bit products wrap in
    two's complement, which leaves the two 32-bit halves that the round needs exact after masking.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIERS[0]
        product_1 = c2 * _MULTIPLIERS[1]
        c0 = (product_1 >> 32).bitwise_and_(_MASK).bitwise_xor(c1).bitwise_xor_(k0)
        c2 = (product_0 >> 32).bitwise_and_(_MASK).bitwise_xor(c3).bitwise_xor_(k1)
        c1 = product_1.bitwise_and_(_MASK)
        c3 = product_0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(
    seed: int,
    stream: str,
    ids: Int64[Tensor, " B"],
    t: int | Int64[Tensor, " B"],
    n: int,
    device: torch.device | str | None = None,
) -> Int64[Tensor, "B n"]:
    """`n` uint32 words (held in int64) for each row, from the row's id and `t` only.

    `ids` >= 0; `t` (a time step, an epoch or a draw number) in [0, 2^32), one for all rows or one
    each. The result lies on `device`, by default that of `ids`.
    """
    ids = ids.to(device=device or ids.device, dtype=torch.int64).reshape(-1, 1)
    t = torch.as_tensor(t, dtype=torch.int64, device=ids.device).reshape(-1, 1)
    blocks = torch.arange((n + 3) // 4, device=ids.device)
    words = philox4x32((blocks, ids & _MASK, (ids >> 32) & _MASK, t & _MASK), stream_key(seed, stream))
    return torch.stack(words, dim=-1).reshape(ids.shape[0], -1)[:, :n]


def normal(
    seed: int,
    stream: str,
    ids: Int64[Tensor, " B"],
    t: int | Int64[Tensor, " B"],
    shape: tuple[int, ...],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B ..."]:
    """Standard normal noise [B, *shape] by Box and Muller (1958): sqrt(-2 ln u) (cos, sin)(2 pi v).

    u and v are the mid-points (w + 1/2) / 2^32, so u is never 0 and |noise| reaches 6.7. Computed
    in float64 and rounded to `dtype`: the float32 noise is the float64 noise, rounded.
    """
    size = math.prod(shape)
    words = random_words(seed, stream, ids, t, size + size % 2, device)
    uniforms = words.to(torch.float64).add_(0.5).mul_(2.0**-32).reshape(words.shape[0], -1, 2)
    radius = uniforms[..., 0].log().mul_(-2.0).sqrt_()
    angle = uniforms[..., 1].mul(2.0 * math.pi)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pairs.reshape(words.shape[0], -1)[:, :size].to(dtype).reshape(-1, *shape)


def uniform(
    seed: int,
    stream: str,
    ids: Int64[Tensor, " B"],
    t: int | Int64[Tensor, " B"],
    n: int,
    device: torch.device | str | None = None,
) -> Float64[Tensor, "B n"]:
    """`n` uniform numbers in [0, 1) for each row, all 53 bits of a float64 random."""
    words = random_words(seed, stream, ids, t, 2 * n, device).reshape(-1, n, 2)
    return ((words[..., 0] >> 5) * 2**26 + (words[..., 1] >> 6)).to(torch.float64) * 2.0**-53


def randint(
    seed: int,
    stream: str,
    ids: Int64[Tensor, " B"],
    t: int | Int64[Tensor, " B"],
    high: int,
    device: torch.device | str | None = None,
) -> Int64[Tensor, " B"]:
    """One uniform integer in 0..high-1 for each row; its bias is below high / 2^64.

    Raises ConfigError unless 1 <= high <= 2^30.
    """
    if not 1 <= high <= 2**30:
        raise ConfigError(f"high: {high} is not in 1..2^30; pass the number of values to draw from")
    words = random_words(seed, stream, ids, t, 2, device)
    # floor(high * w / 2^64) of the 64-bit word w, in integers: every product stays below 2^62.
    return (words[:, 0] * high + ((words[:, 1] * high) >> 32)) >> 32


def permutation(seed: int, stream: str, epoch: int, n: int) -> np.ndarray:
    """A uniformly random permutation of 0..n-1 (int64), a function of (seed, stream, epoch, n) only.

    Position i gets a 64-bit Philox key and the keys are sorted stably, so the order depends on no
    library's shuffling algorithm and never changes with a version.
    """
    keys = np.empty(n, dtype=np.uint64)
    for start in range(0, n, _PERMUTATION_CHUNK):
        ids = torch.arange(start, min(start + _PERMUTATION_CHUNK, n))
        words = random_words(seed, stream, ids, epoch, 2).numpy().astype(np.uint64)
        keys[start : start + len(ids)] = (words[:, 0] << np.uint64(32)) | words[:, 1]
    return np.argsort(keys, kind="stable").astype(np.int64)
