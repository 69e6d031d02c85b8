"""Deterministic samplers run backwards: from an image to the noise that it would be sampled from."""

import torch

from ddpm_core.denoiser import Denoiser, Labels, check_label
from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Images, Process, Step, Time, factor
from ddpm_core.samplers.base import STATIC_CLIP, Clip, OnStep, Predictor, Sampler, reached, take_steps


@torch.no_grad()
def encode(
    denoiser: Denoiser,
    sampler: Sampler,
    x_0: Images,
    clip: Clip | None = STATIC_CLIP,
    label: Labels | None = None,
    on_step: OnStep | None = None,
) -> Images:
    """z_T of images [B, C, H, W] in model range, by the probability-flow ODE along the sampler's times (Song 2021,
    DDIM, sec. 5.4): from z = alpha x_0 at the least noisy time, which is where the flow's likelihood begins, too (see
    `ddpm_core.likelihood.ode`), to the noisiest.

    `sample` with `start` = z_T leads back. `clip`, `label` and `on_step` as there. Raises ConfigError for a sampler
    that draws noise, for a process that ends at SNR 0, where images leave no trace, for one time alone, and for labels
    that do not fit.
    """
    check_label(denoiser, label)
    process = denoiser.process
    times = encoding_times(process, sampler)
    now, then = times[:-1], times[1:]
    steps = Step.between(now, then, process.at(now), process.at(then)).to(x_0.device)
    z = factor(steps.now.alpha[:1], x_0) * x_0
    return take_steps(sampler, steps, z, Predictor(denoiser, label, clip), lambda k: _no_noise, on_step)


def encoding_times(process: Process, sampler: Sampler) -> Time:
    """All times of the way, the least noisy first. Raises ConfigError, see `encode`."""
    if not sampler.is_deterministic:
        raise ConfigError("sampler: it draws noise, and no way leads back; take ddim with eta = 0, dpmpp_2m, dpmpp_3m")
    if process.prior_signal == 0.0:
        raise ConfigError("schedule.zero_terminal_snr: True leaves nothing of an image in z_T; take another model")
    times = sampler.times(process)
    times = torch.cat([times[:1], reached(process, times)])
    if len(times) < 2:
        raise ConfigError("steps: 1 is from the noisiest time to the image at once; take at least 2")
    return times.flip(0)


def _no_noise() -> Images:
    raise AssertionError("a deterministic sampler draws none")
