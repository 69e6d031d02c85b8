"""What training measures on itself: bits/dim of validation images and a grid of samples, from the EMA weights.

Both are divided among the ranks by image id, in fixed-shape batches with noise keyed by id, so their results
do not depend on how many ranks there are.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ddpm_core.denoiser import Denoiser
from ddpm_core.images import to_uint8
from ddpm_core.likelihood.designs import stratified_design, timestep_proposal
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.process.discrete import discrete
from ddpm_core.process.variances import variance_named
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.ddim import DDIM
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.training.config import GridConfig, ValidationConfig

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
    denoiser: Denoiser,
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
    proposal, variance = timestep_proposal(discrete(denoiser.process)), variance_named(config.sigma2)
    rows = []
    for start in starts[ranks.rank :: ranks.world_size]:
        stop = min(start + config.batch_size, num_images)
        ids = chosen[start:stop]
        images, _ = dataset.read_rows(ids)
        levels = torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(device)
        k = config.timesteps_per_image
        design = stratified_design(torch.arange(start, stop), seed, proposal, k, replicates=1)
        found = elbo(denoiser, levels, torch.tensor(ids).to(device), design, seed, variance, config.batch_size)
        total, decoder, kl_sum = found.parts()
        rows.append((start, torch.stack([total, found.prior, kl_sum, decoder], dim=1).numpy()))
    gathered = sorted((row for part in ranks.gather(rows) for row in part), key=lambda row: row[0])
    table = np.concatenate([values for _, values in gathered])
    total, prior, kl_sum, decoder = table.mean(axis=0).tolist()
    error = float(table[:, 0].std(ddof=1)) / math.sqrt(num_images) if num_images > 1 else None
    return BitsPerDim(total, error, prior, kl_sum, decoder, num_images, config.sigma2)


def sample_images(
    denoiser: Denoiser,
    config: GridConfig,
    seed: int,
    device: torch.device,
    ranks: Ranks,
) -> npt.NDArray[np.uint8]:
    """`config.num_images` samples uint8 [n, H, W, C] by DDIM (η = 0), the same on any number of ranks."""
    size = min(config.num_images, _SAMPLE_BATCH)
    parts = []
    for start in range(0, config.num_images, size)[ranks.rank :: ranks.world_size]:
        ids = torch.arange(start, start + size, device=device)
        with torch.inference_mode():
            samples = sample(denoiser, DDIM(config.sampler_steps), ids, seed)
        parts.append((start, to_uint8(samples).cpu().numpy()))
    gathered = sorted((row for part in ranks.gather(parts) for row in part), key=lambda row: row[0])
    return np.concatenate([images for _, images in gathered])[: config.num_images]
