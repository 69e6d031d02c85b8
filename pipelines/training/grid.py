"""A grid of samples, from the EMA weights, while training and at its end.

The samples are divided among the ranks by their ids, in fixed-shape batches with noise keyed by id, so that they do not
depend on how many ranks there are.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from ddpm_core.denoiser import Denoiser
from ddpm_core.images import to_uint8
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.ddim import DDIM
from pipelines.outputs.pictures import grid_png
from pipelines.storage.location import Location
from pipelines.training.config import GridConfig, TrainConfig
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports

# Samples drawn in one network call: the unit that is divided among the ranks.
_SAMPLE_BATCH = 32


def sample_images(
    denoiser: Denoiser,
    config: GridConfig,
    seed: int,
    device: torch.device,
    ranks: Ranks,
) -> npt.NDArray[np.uint8]:
    """`config.num_images` samples uint8 [n, H, W, C] by DDIM, the same on any number of ranks.

    η is 0, and 1 for a VDM, which makes DDIM its ancestral sampler (Kingma 2021, VDM, app. A.4): in as many steps the
    digits come out with a cleaner background and nearer to real ones.
    """
    size = min(config.num_images, _SAMPLE_BATCH)
    process, parts = denoiser.process, []
    is_vdm = isinstance(process, ContinuousProcess) and process.family == "preserving"
    sampler = DDIM(config.sampler_steps, eta=1.0 if is_vdm else 0.0)
    for start in range(0, config.num_images, size)[ranks.rank :: ranks.world_size]:
        ids = torch.arange(start, start + size, device=device)
        with torch.inference_mode():
            samples = sample(denoiser, sampler, ids, seed)
        parts.append((start, to_uint8(samples).cpu().numpy()))
    return np.concatenate(ranks.gather_in_order(parts))[: config.num_images]


class Grid:
    """The observer that draws a grid.

    Args:
        run: The run directory.
        config: The training's.
        averaged: Makes the denoiser with the averaged weights.
        device: Where it lies.
        ranks: All that the samples are divided among; rank 0 writes the picture.
        reports: Where it is told of.
    """

    doing = "sampling a grid"

    def __init__(
        self,
        run: Location,
        config: TrainConfig,
        averaged: Callable[[], Denoiser],
        device: torch.device,
        ranks: Ranks,
        reports: Reports,
    ) -> None:
        self._run, self._config, self._averaged = run, config, averaged
        self._device, self._ranks, self._reports = device, ranks, reports

    def is_due(self, done: int) -> bool:
        """Whether to draw one after `done` steps."""
        return self._config.is_due(self._config.grid.every_steps, done)

    def observe(self, done: int) -> None:
        """Draw the grid after `done` steps. A collective."""
        images = sample_images(self._averaged(), self._config.grid, self._config.seed, self._device, self._ranks)
        if self._ranks.rank == 0:
            path = self.path(done)
            path.write_bytes(grid_png(images))
            self._reports.record({"kind": "image", "key": "samples", "step": done, "path": path.uri})

    def path(self, done: int) -> Location:
        """Where the grid after `done` steps lies."""
        return self._run / "grids" / f"step-{done:08d}.png"
