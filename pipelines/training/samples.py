"""Samples from the EMA weights, while training: drawn by all ranks, and the same on any number of them.

They are divided among the ranks by their ids, in batches of one shape with noise keyed by id.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from ddpm_core.denoiser import Denoiser, Labels
from ddpm_core.images import to_uint8
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.dpm_solver import DPMSolver
from pipelines.training.ranks import Ranks

SAMPLER = "dpmpp_2m_sde"
"""What the sampler of a training is called where samplers are chosen by name."""
# Samples drawn in one network call: the unit that is divided among the ranks.
_BATCH = 32


def sample_batches(
    denoiser: Denoiser,
    num_images: int,
    steps: int,
    seed: int,
    device: torch.device,
    ranks: Ranks,
    labels: Callable[[torch.Tensor], Labels | None],
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """This rank's batches of `num_images` samples: the first id of each, and its images uint8 [B, H, W, C].

    All are of one shape, so the last one may go on beyond `num_images`. `labels` gives the classes of ids int64 [B].

    By DPM-Solver++ 2M with noise: of models in training 25 steps of it look like 50 of ancestral sampling, while what a
    deterministic sampler draws of an early model is strewn with speckles. Even in log-SNR, or in time for
    a process that ends at SNR 0.
    """
    size = min(num_images, _BATCH)
    sampler = DPMSolver(steps, eta=1, spacing="log_snr" if denoiser.process.prior_signal > 0.0 else "time")
    for start in range(0, num_images, size)[ranks.rank :: ranks.world_size]:
        ids = torch.arange(start, start + size, device=device)
        with torch.inference_mode():
            samples = sample(denoiser, sampler, ids, seed, label=labels(ids))
        yield start, to_uint8(samples).cpu().numpy()
