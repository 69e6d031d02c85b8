"""One loop for every sampler.

A sample depends on (seed, id) only: the starting noise and the noise of every step are drawn from
`counter_random.normal` keyed by (seed, id, counter), whatever else is in the batch. The denoiser is always called
with the whole batch, so equal batch shapes give bit-equal samples.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ddpm_core import counter_random
from ddpm_core.denoiser import Denoiser, Labels, Prediction, check_label
from ddpm_core.process.base import Images, Process, Step, Time, factor

OnStep = Callable[[int, Tensor, Tensor], None]
STREAM = "sample"


@runtime_checkable
class Sampler(Protocol):
    """How z_s follows from z_t and what the denoiser says of it. A frozen dataclass: its fields are its options."""

    def times(self, process: Process) -> Time:
        """[K], the noisiest first: when the denoiser is called. Raises ConfigError for options that do not fit."""
        ...

    def step(
        self, step: Step, z: Images, prediction: Prediction, noise: Callable[[], Images] | None, memory: Any
    ) -> tuple[Images, Any]:
        """z_s, and what the next step is to remember.

        Args:
            step: Its coefficients, each [1, 1, 1, 1].
            z: z_t.
            prediction: Of z_t.
            noise: Draws this step's standard normal noise [B, C, H, W]; None where s is the image, which gets none.
            memory: What the step before returned; None in the first.
        """
        ...


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    sampler: Sampler,
    ids: Int64[Tensor, " B"],
    seed: int,
    clip_x_0: bool = True,
    label: Labels | None = None,
    on_step: OnStep | None = None,
) -> Float32[Tensor, "B C H W"]:
    """Images in model range, from the prior's noise at the noisiest time to x_0, or to z_0 / alpha_0 of continuous
    time, whose nearest level is the most probable one of the softmax decoder.

    `ids`: on the device that computes. `clip_x_0` clamps every predicted x_0 to [-1, 1]. `label`: what the denoiser is
    told of each image; None: nothing. `on_step(k, z_t, x_0)` is shown the input and the prediction of every step
    k = 0..K-1. Raises ConfigError for a sampler or labels that do not fit.
    """
    check_label(denoiser, label)
    process, shape = denoiser.process, denoiser.image_shape
    times = sampler.times(process)
    steps = process.step(times, process.after(times)).to(ids.device)
    start, *counters = process.noise_counters(times)
    z = counter_random.normal(seed, STREAM, ids, start, shape) * math.sqrt(process.prior_variance)
    is_to_data = (steps.then.sigma[:, 0, 0, 0] == 0.0).tolist()
    memory = None
    for k, counter in enumerate(counters):
        step = steps[k : k + 1]
        prediction = denoiser(z, step.time.expand(len(ids)), label)
        if clip_x_0:
            prediction = prediction.clipped()
        if on_step is not None:
            on_step(k, z, prediction.x_0)

        def noise(counter: int = counter) -> Images:
            return counter_random.normal(seed, STREAM, ids, counter, shape)

        # A step to the image itself adds none; one to z_0 of continuous time does.
        z, memory = sampler.step(step, z, prediction, None if is_to_data[k] else noise, memory)
    return z / factor(steps.then.alpha[-1:], z)
