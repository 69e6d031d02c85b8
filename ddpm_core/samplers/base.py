"""One loop for every sampler, in both directions.

A sample depends on (seed, id) only: the starting noise and the noise of every step are drawn from
`counter_random.normal` keyed by (seed, id, counter), whatever else is in the batch. The denoiser is always called
with the whole batch, so equal batch shapes give bit-equal samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from ddpm_core import counter_random
from ddpm_core.denoiser import Denoiser, Labels, Prediction, check_label
from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Images, Process, Step, Time, factor
from ddpm_core.samplers.start import STREAM, starting_noise

OnStep = Callable[[int, Tensor, Tensor], None]
Noise = Callable[[], Images]


@dataclass(frozen=True)
class Clip:
    """Keeps predicted images in the range of pixels, whichever sampler asks.

    Attributes:
        percentile: None: x_0 is clamped to [-1, 1]. Else x_0 is clamped to [-s, s] and divided by s, which is this
            percentile, in (0, 100], of the |x_0| of its image, at least 1 (Saharia 2022, Imagen, sec. 2.3, dynamic
            thresholding). Raises ConfigError for any other number.
    """

    percentile: float | None = None

    def __post_init__(self) -> None:
        if self.percentile is not None and not 0.0 < self.percentile <= 100.0:
            raise ConfigError(f"percentile: {self.percentile} is not in (0, 100]; Imagen uses 99.5")

    def __call__(self, prediction: Prediction) -> Prediction:
        """With x_0 clipped, and eps in agreement with it."""
        if self.percentile is None:
            return prediction.clipped()
        sizes = prediction.x_0.abs().flatten(1)
        rank = math.ceil(self.percentile / 100.0 * sizes.shape[1])  # torch.quantile takes no large images
        limit = sizes.kthvalue(rank, dim=1).values.clamp(min=1.0)[:, None, None, None]
        return prediction.with_x_0(prediction.x_0.clamp(-limit, limit) / limit)


STATIC_CLIP = Clip()


@dataclass
class Predictor:
    """What a sampler asks: the denoiser, told the labels, its predictions clipped.

    Attributes:
        denoiser: What predicts.
        label: What it is told of each image.
        clip: Of its predictions; None leaves them.
        watch: Called with z_t and the predicted x_0 of every call.
    """

    denoiser: Denoiser
    label: Labels | None
    clip: Clip | None
    watch: Callable[[Images, Images], None] | None = None

    @property
    def process(self) -> Process:
        """Of the denoiser."""
        return self.denoiser.process

    def __call__(self, z: Images, time: Tensor) -> Prediction:
        """What z [B, C, H, W] consists of at `time` [1]."""
        prediction = self.denoiser(z, time.expand(len(z)), self.label)
        if self.clip is not None:
            prediction = self.clip(prediction)
        if self.watch is not None:
            self.watch(z, prediction.x_0)
        return prediction


@runtime_checkable
class Sampler(Protocol):
    """How z_s follows from z_t and what the denoiser says of it. A frozen dataclass: its fields are its options."""

    @property
    def is_deterministic(self) -> bool:
        """Whether no step draws noise: it then solves the probability-flow ODE, in either direction."""
        ...

    def times(self, process: Process) -> Time:
        """[K], the noisiest first: where the steps begin. Raises ConfigError for options that do not fit."""
        ...

    def calls(self, process: Process) -> Time:
        """The time of every call of the denoiser, in order."""
        ...

    def step(self, step: Step, z: Images, denoise: Predictor, noise: Noise | None, memory: Any) -> tuple[Images, Any]:
        """z_s, and what the next step is to remember.

        Args:
            step: Its coefficients, each [1, 1, 1, 1].
            z: z_t.
            denoise: Predicts; the first call is at `step.time`, or at a noisier time that noise was added up to.
            noise: Draws this step's standard normal noise [B, C, H, W]; None where s is the image, which gets none.
            memory: What the step before returned; None in the first.
        """
        ...


def steps_between(process: Process, times: Time) -> Step:
    """The K steps from `times` [K], the last to the data, or to gamma_0 of continuous time."""
    return process.step(times, process.after(times))


def reached(process: Process, times: Time) -> Tensor:
    """Where the steps from `times` [K] lead, without the data, of which no denoiser is asked: [K] or [K - 1]."""
    steps = steps_between(process, times)
    return steps.time_then[steps.then.sigma[:, 0, 0, 0] > 0.0]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    sampler: Sampler,
    ids: Int64[Tensor, " B"],
    seed: int,
    clip: Clip | None = STATIC_CLIP,
    label: Labels | None = None,
    on_step: OnStep | None = None,
    start: Images | None = None,
) -> Images:
    """Images in model range, from the prior's noise at the noisiest time to x_0, or to z_0 / alpha_0 of continuous
    time, whose nearest level is the most probable one of the softmax decoder.

    `ids`: on the device that computes. `clip`: of every predicted x_0; None leaves it. `label`: what the denoiser is
    told of each image; None: nothing. `on_step(k, z_t, x_0)` is shown the input and the prediction of the first call of
    every step k = 0..K-1. `start`: z_T in place of the noise keyed by (seed, id), in the precision to
    compute in, which is else float32; the steps' noise stays that of `ids`. Raises ConfigError for a sampler or labels
    that do not fit.
    """
    check_label(denoiser, label)
    process, shape = denoiser.process, denoiser.image_shape
    times = sampler.times(process)
    steps = steps_between(process, times).to(ids.device)
    _, *counters = process.noise_counters(times)
    z = starting_noise(denoiser, ids, seed) if start is None else start
    is_to_data = (steps.then.sigma[:, 0, 0, 0] == 0.0).tolist()

    def noise_of(k: int) -> Noise | None:
        # A step to the image itself adds none; one to z_0 of continuous time does.
        return None if is_to_data[k] else partial(counter_random.normal, seed, STREAM, ids, counters[k], shape)

    z = take_steps(sampler, steps, z, Predictor(denoiser, label, clip), noise_of, on_step)
    return z / factor(steps.then.alpha[-1:], z)


def take_steps(
    sampler: Sampler,
    steps: Step,
    z: Images,
    denoise: Predictor,
    noise_of: Callable[[int], Noise | None],
    on_step: OnStep | None,
) -> Images:
    """Where z [B, C, H, W] is after all K `steps`, in order; `noise_of(k)` draws the noise of step k, `on_step` as of
    `sample`."""
    memory = None
    for k in range(len(steps.time)):

        def watch(z: Images, x_0: Images, k: int = k) -> None:
            denoise.watch = None
            if on_step is not None:
                on_step(k, z, x_0)

        denoise.watch = watch
        z, memory = sampler.step(steps[k : k + 1], z, denoise, noise_of(k), memory)
    return z
