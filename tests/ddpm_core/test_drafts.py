"""What later models need of the core, in drafts that touch nothing else: one class each, beside its entry in a table.

A denoiser with labels and guidance (Ho and Salimans 2021), a second-order multistep sampler (Lu 2022, DPM-Solver++).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.denoisers import FunctionDenoiser

from ddpm_core.config import UNetConfig
from ddpm_core.denoiser import Denoiser, Prediction
from ddpm_core.likelihood.designs import full_design
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.process.base import Process, Step, factor
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import BetaTilde
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.ddim import DDIM

NETWORK = UNetConfig(
    image_size=4, in_channels=1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, num_groups=4,
)  # fmt: skip
VARIANCE_EXPLODING = DiscreteProcess.from_alpha_sigma([1.0] * 400, torch.logspace(-2, 1, 400, dtype=torch.float64))


@dataclass(frozen=True)
class ClassWorld:
    """x_0 ~ N(mean of its class, variance), without a label the mixture of the classes: the exact eps."""

    process: DiscreteProcess
    means: torch.Tensor
    variance: float = 0.01
    image_shape: tuple[int, int, int] = (1, 2, 2)

    def __call__(self, z_t: torch.Tensor, time: torch.Tensor, label: torch.Tensor | None = None) -> Prediction:
        marginal = self.process.at(time)
        alpha, total = marginal.alpha, marginal.alpha.square() * self.variance + marginal.sigma.square()
        if label is None:
            centres = (alpha[:, 0, 0] * self.means)[:, :, None]
            distance = (z_t.double().flatten(1)[:, None] - centres).square().sum(2)
            posterior = torch.softmax(-distance / (2 * total[:, :, 0, 0]), 1)
            mean = (posterior * self.means).sum(1)
        else:
            mean = self.means[label]
        eps = marginal.sigma / total * (z_t - alpha * mean[:, None, None, None])
        return Prediction.of_eps(z_t, marginal, eps.to(z_t.dtype))


@dataclass(frozen=True)
class Guided:
    """eps = eps_0 + w (eps_c - eps_0): w = 0 is unconditional, 1 conditional, above 1 guided (Ho and Salimans 2021)."""

    denoiser: Denoiser
    without: Denoiser
    weight: float

    @property
    def process(self) -> Process:
        return self.denoiser.process

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.denoiser.image_shape

    def __call__(self, z_t: torch.Tensor, time: torch.Tensor, label: torch.Tensor | None = None) -> Prediction:
        plain, conditional = self.without(z_t, time), self.denoiser(z_t, time, label)
        eps = plain.eps + self.weight * (conditional.eps - plain.eps)
        return Prediction.of_eps(z_t, conditional.marginal, eps)


def test_a_guided_denoiser_is_sampled_and_scored_as_any_other() -> None:
    process = DiscreteProcess.cosine(50)
    world = ClassWorld(process, torch.tensor([-0.6, 0.0, 0.6], dtype=torch.float64))
    ids, label = torch.arange(300), torch.arange(300) % 3
    drawn = {w: sample(Guided(world, world, w), DDIM(25), ids, 0, label=label) for w in (0.0, 1.0, 2.0)}
    assert torch.equal(drawn[0.0], sample(world, DDIM(25), ids, 0))
    torch.testing.assert_close(drawn[1.0], sample(world, DDIM(25), ids, 0, label=label), rtol=1e-5, atol=1e-5)
    for index, mean in enumerate(world.means.tolist()):
        assert float(drawn[1.0][label == index].mean()) == pytest.approx(mean, abs=0.05)
    # More guidance leads outer classes further out.
    assert float(drawn[2.0][label == 2].mean()) > float(drawn[1.0][label == 2].mean())
    # The right label codes the images in fewer bits than another one, and than none.
    levels = ((world.means[label] + 1) * 127.5).round().to(torch.uint8)[:, None, None, None].expand(300, 1, 2, 2)
    design = full_design(50, 300)

    def bits(labels: torch.Tensor | None) -> float:
        return float(elbo(world, levels, ids, design, 0, BetaTilde(), batch_size=1500, label=labels).parts()[0].mean())

    assert bits(label) < bits(None) < bits((label + 1) % 3)


@dataclass(frozen=True)
class Multistep2:
    """DPM-Solver++ 2M in lambda = ln(alpha / sigma) (Lu 2022, alg. 2)."""

    steps: int

    def times(self, process: Process) -> torch.Tensor:
        return process.grid(self.steps, "log_snr")

    def step(
        self, step: Step, z: torch.Tensor, prediction: Prediction, noise: Callable[[], torch.Tensor] | None, memory: Any
    ) -> tuple[torch.Tensor, Any]:
        h = (step.then.log_snr - step.now.log_snr) / 2.0
        x_0 = prediction.x_0
        if memory is not None and math.isfinite(float(h)):
            before, width = memory
            r = float(width / h)
            x_0 = x_0 + (x_0 - before) / (2.0 * r)
        ratio = factor(step.then.sigma / step.now.sigma, z)
        return ratio * z - factor(step.then.alpha * torch.expm1(-h), z) * x_0, (prediction.x_0, h)


@pytest.mark.parametrize("process", [DiscreteProcess.cosine(4000), VARIANCE_EXPLODING], ids=["preserving", "exploding"])
def test_a_multistep_sampler_is_of_second_order_where_ddim_is_of_first(process: DiscreteProcess) -> None:
    """Data N(m, s^2): the exact flow maps z_T to z_0 by their standard deviations; errors fall as h^order."""
    mean, variance = 0.3, 0.25

    def eps(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        now = process.at(t)
        total = now.alpha.square() * variance + now.sigma.square()
        return now.sigma / total * (z_t.double() - now.alpha * mean)

    # Between two inner times: the last step, to the image, has no finite h.
    def error(sampler: Any, count: int) -> float:
        times = process.grid(count, "log_snr")
        times = times[(process.log_snr[times] < 5.0) & (process.log_snr[times] > -4.0)]
        steps, denoiser = process.step(times[:-1], times[1:]), FunctionDenoiser(eps, process, (1, 1, 1))
        z, memory = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1), None
        start, end = process.at(times[:1]), process.at(times[-1:])
        spread = [(m.alpha.square() * variance + m.sigma.square()).sqrt() for m in (start, end)]
        exact = end.alpha * mean + (z - start.alpha * mean) * spread[1] / spread[0]
        for k in range(len(times) - 1):
            prediction = denoiser(z, times[k : k + 1].expand(len(z)))
            z, memory = sampler.step(steps[k : k + 1], z, prediction, None, memory)
        return float((z - exact).abs().max())

    order = {
        type(sampler).__name__: math.log2(error(sampler, 40) / error(sampler, 80))
        for sampler in (DDIM(eta=0.0), Multistep2(0))
    }
    assert order["DDIM"] == pytest.approx(1.0, abs=0.3)
    assert order["Multistep2"] == pytest.approx(2.0, abs=0.4)
    whole = sample(FunctionDenoiser(eps, process, (1, 1, 1)), Multistep2(20), torch.arange(2000), 0, clip_x_0=False)
    assert float(whole.mean()) == pytest.approx(mean, abs=0.05)
    assert float(whole.std()) == pytest.approx(variance**0.5, rel=0.1)
