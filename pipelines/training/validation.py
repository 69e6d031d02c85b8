"""What training measures on itself: bits/dim of validation images and a grid of samples, from the EMA weights.

Both are divided among the ranks by image id, in fixed-shape batches with noise keyed by id, so their results
do not depend on how many ranks there are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_core.images import to_uint8
from ddpm_core.likelihood import estimate_bpd
from ddpm_core.sampling import sample_ddim
from ddpm_core.schedule import NoiseSchedule
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.training.config import GridConfig, ValidationConfig

EpsFn = Callable[[Tensor, Tensor], Tensor]
# Samples drawn in one network call: the unit that is divided among the ranks.
_SAMPLE_BATCH = 32


@dataclass(frozen=True)
class Ranks:
    """This rank's place among all of them."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@dataclass(frozen=True)
class BitsPerDim:
    """Mean ELBO terms over the images scored, in bits/dim.

    `standard_error` is of `total` over images: the Monte-Carlo error of each image's estimate and the spread
    over images together; None for one image, which has no spread.
    """

    total: float
    standard_error: float | None
    prior: float
    kl_sum: float
    decoder: float
    num_images: int
    sigma2: str


def validated_rows(dataset: PreparedDataset, num_images: int, hold_out: HoldOut | None) -> npt.NDArray[np.int64]:
    """Ids int64 [n] of the images that are scored: the first of `dataset`, or some of the rows that are held out."""
    if hold_out is None:
        return np.arange(min(num_images, dataset.num_rows), dtype=np.int64)
    return hold_out.sample(num_images)


def validate(
    eps_fn: EpsFn,
    schedule: NoiseSchedule,
    dataset: PreparedDataset,
    config: ValidationConfig,
    seed: int,
    device: torch.device,
    ranks: Ranks,
    hold_out: HoldOut | None = None,
) -> BitsPerDim:
    """Estimate the ELBO of `config.num_images` images with stratified timesteps (unbiased).

    They are the first of `dataset`, or evenly spread over the rows that `hold_out` names of it.
    """
    chosen = validated_rows(dataset, config.num_images, hold_out)
    num_images = len(chosen)
    starts = range(0, num_images, config.batch_size)
    rows = []
    for start in starts[ranks.rank :: ranks.world_size]:
        stop = min(start + config.batch_size, num_images)
        ids = chosen[start:stop]
        images, _ = dataset.read_rows(ids)
        # every call of the network has the same shape; what pads the last batch is not counted
        padding = np.arange(config.batch_size) % (stop - start)
        pixels = torch.tensor(images[padding]).permute(0, 3, 1, 2).to(device)
        terms = estimate_bpd(
            schedule,
            eps_fn,
            pixels,
            torch.tensor(ids[padding]).to(device),
            seed,
            config.timesteps_per_image,
            sigma2=config.sigma2,
        )
        columns = torch.stack([terms.total, terms.prior, terms.kl_sum, terms.decoder], dim=1)
        rows.append((start, columns[: stop - start].cpu().numpy()))
    gathered = sorted((row for part in ranks.gather(rows) for row in part), key=lambda row: row[0])
    table = np.concatenate([values for _, values in gathered])
    total, prior, kl_sum, decoder = table.mean(axis=0).tolist()
    error = float(table[:, 0].std(ddof=1)) / math.sqrt(num_images) if num_images > 1 else None
    return BitsPerDim(total, error, prior, kl_sum, decoder, num_images, config.sigma2)


def sample_images(
    eps_fn: EpsFn,
    schedule: NoiseSchedule,
    image_shape: tuple[int, int, int],
    config: GridConfig,
    seed: int,
    device: torch.device,
    ranks: Ranks,
) -> npt.NDArray[np.uint8]:
    """`config.num_images` samples uint8 [n, H, W, C] by DDIM (η = 0), the same on any number of ranks."""
    height, width, channels = image_shape
    size = min(config.num_images, _SAMPLE_BATCH)
    parts = []
    for start in range(0, config.num_images, size)[ranks.rank :: ranks.world_size]:
        ids = torch.arange(start, start + size, device=device)
        samples = sample_ddim(
            schedule, eps_fn, ids, (channels, height, width), seed, num_steps=config.sampler_steps, device=device
        )
        parts.append((start, to_uint8(samples).cpu().numpy()))
    gathered = sorted((row for part in ranks.gather(parts) for row in part), key=lambda row: row[0])
    return np.concatenate([images for _, images in gathered])[: config.num_images]
