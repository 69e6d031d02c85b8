"""The flow's likelihood in continuous time, comparable with the bound (Song 2021, score SDE, sec. 4.3; Kingma 2021)."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from support.denoisers import FunctionDenoiser, GaussianWorld, GreyWorld, toy

from ddpm_core.config import UNetConfig
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.bounds import bound_of
from ddpm_core.likelihood.decoder import softmax_nll_nats
from ddpm_core.likelihood.designs import continuous_design
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.ode import ode_bpd, ode_times
from ddpm_core.objectives import objective_named
from ddpm_core.parameterizations import denoiser_named
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess

LN2 = math.log(2)
FACTOR = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [0.0, 0.2, 0.3, 0.0], [0.1, 0.0, 0.2, 0.6]])
WORLD = GaussianWorld(torch.tensor([0.3, -0.2, 0.1, 0.0]), FACTOR @ FACTOR.T, (1, 2, 2))
GREY = GreyWorld((0, 60, 128, 255), (0.4, 0.1, 0.2, 0.3))
torch.manual_seed(0)
PROCESSES = {
    "linear": ContinuousProcess.linear(),
    "learned": ContinuousProcess.learned(-11.0, 4.0),
    "edm": ContinuousProcess.edm(),
}


def gaussian_images(n):
    z = torch.randn(n, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x_0 = WORLD.mean + z * WORLD.variances.sqrt() @ WORLD.axes.T
    return ((x_0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).reshape(n, 1, 2, 2)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_gaussian_world_meets_its_closed_form(name):
    """-ln p(x | z_0) + ln q(xbar_0 | x) - ln p(xbar_0), the last by the exact flow and its determinant."""
    process, n, calls = PROCESSES[name], 40, []
    exact = WORLD.denoiser(process)

    def recording(z_t, gamma):
        calls.append(z_t.detach().clone())
        return exact.function(z_t, gamma)

    images = gaussian_images(n)
    found = ode_bpd(FunctionDenoiser(recording, process, (1, 2, 2)), images, torch.arange(n), 0, 128, 16)
    low, high = (process.at(torch.tensor([end], dtype=torch.float64)) for end in process.ends)
    z_0 = calls[0]
    z_1 = WORLD.flow(z_0, low, high)
    prior = torch.distributions.Normal(0.0, process.prior_variance**0.5).log_prob(z_1).flatten(1).sum(1)
    log_p = prior + 0.5 * (WORLD.spread(high) / WORLD.spread(low)).log().sum()
    x = images.double() / 127.5 - 1
    log_q = torch.distributions.Normal(low.alpha * x, low.sigma).log_prob(z_0).flatten(1).sum(1)
    decoder = softmax_nll_nats(images, z_0 / low.alpha, low.log_snr).flatten(1).sum(1)
    expected = (decoder + log_q - log_p) / (4 * LN2)
    error = (found.bits_per_dim - expected).abs()
    assert bool((error < 5 * found.trace_error + found.step_error + 1e-9).all())
    # The step error is what it says, and small; of EDM's long way a little larger.
    assert float(found.step_error.mean()) < 0.03
    # That z_0 is drawn as the bound draws it.
    eps = (z_0 - low.alpha * x) / low.sigma
    assert abs(float(eps.mean())) < 4 / (4 * n) ** 0.5
    assert float(eps.var()) == pytest.approx(1.0, rel=4 * (2 / (4 * n)) ** 0.5)


def test_the_best_denoisers_flow_is_not_above_its_bound():
    """In the world of grey levels the flow's value is the images' surprise and the decoder's loss: what the bound has
    without the distance of q(z_1) from N(0, I)."""
    process, n = PROCESSES["linear"], 600
    denoiser, images, ids = GREY.denoiser(process), GREY.images(n), torch.arange(n)
    found = ode_bpd(denoiser, images, ids, 0, 128, 2)
    made = bound_of(denoiser)
    design = continuous_design(ids, 0, process, 256)
    bound = elbo(denoiser, images, ids, design, 0, made.variance, batch_size=6000).parts()[0]
    gap = bound - found.bits_per_dim
    error = float(gap.std()) / n**0.5
    assert float(gap.mean()) > -4 * error
    above = found.bits_per_dim - GREY.surprise(images)
    assert abs(float(above.mean()) - 0.00654) < 4 * float(above.std()) / n**0.5 + float(found.step_error.mean())
    assert 4 * error < 0.06


def test_a_trained_vdms_flow_is_not_above_its_bound():
    """On the same weights: a small network after few steps on the digits of scikit-learn, at 8 x 8.

    No theorem orders the two for a network that is no exact score. With Fourier features, whose derivatives the flow
    follows where it has left the data, such a network's flow is the worse of the two; so it has none here.
    """
    digits = torch.from_numpy(load_digits().images) * (255 / 16)
    levels = digits.round().to(torch.uint8)[:, None]
    network = UNetConfig(
        image_size=8, in_channels=1, base_channels=16, channel_multipliers=(1, 1), num_res_blocks=1,
        attention_resolutions=(), dropout=0.0, num_groups=4,
    )  # fmt: skip
    torch.manual_seed(0)
    process = ContinuousProcess.linear()
    denoiser = denoiser_named("residual_eps").build(network, process)
    objective, g = objective_named("vlb", denoiser), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    for _ in range(120):
        x_0 = levels[torch.randint(0, 1600, (32,), generator=g)] / 127.5 - 1
        uniforms = (torch.rand(1, generator=g).double() + torch.arange(32) / 32) % 1
        loss = objective(denoiser, x_0, uniforms, torch.randn(x_0.shape, generator=g)).rows.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    denoiser.eval().requires_grad_(False)
    images, ids = levels[1600:1616], torch.arange(16)
    bound = elbo(
        denoiser, images, ids, continuous_design(ids, 0, process, 64), 0, bound_of(denoiser).variance, batch_size=128
    ).parts()[0]
    found = ode_bpd(denoiser, images, ids, 0, 32, 2)
    gap = bound - found.bits_per_dim
    assert float(gap.mean()) > -2 * float(gap.std()) / 4 - float(found.step_error.mean())
    assert float(bound.mean()) < 9.0  # of 13 and more at the start


def test_an_image_has_its_result_whatever_its_batch():
    denoiser, images = GREY.denoiser(PROCESSES["learned"]), GREY.images(5)
    ids = torch.tensor([7, 3, 2**40, 0, 9])
    full = ode_bpd(denoiser, images, ids, 1, 8, 3)
    part = ode_bpd(denoiser, images[[2, 4]], ids[[2, 4]], 1, 8, 3)
    for field in ("bits_per_dim", "trace_error", "step_error"):
        assert torch.equal(getattr(part, field), getattr(full, field)[[2, 4]]), field


@pytest.mark.parametrize("name", PROCESSES)
def test_its_times_are_even_in_gamma_from_end_to_end(name):
    process = PROCESSES[name]
    for count in (2, 10, 64):
        times = ode_times(process, count).detach()
        assert len(times) == count + 1
        assert (float(times[0]), float(times[-1])) == process.ends
        low, high = process.ends
        torch.testing.assert_close(times.diff(), torch.full((count,), (high - low) / count).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [0, 1, 7, -2])
def test_a_bad_number_of_steps_is_refused(count):
    with pytest.raises(ConfigError, match=rf"^num_steps: {count} is not an even number, at least 2$"):
        ode_times(PROCESSES["linear"], count)


def test_a_process_that_ends_at_snr_0_has_no_flow():
    process = DiscreteProcess.linear(20).rescaled_to_zero_terminal_snr()
    with pytest.raises(ConfigError, match=r"^schedule\.zero_terminal_snr: True has no flow to SNR 0"):
        ode_bpd(toy(process, (1, 2, 2)), GREY.images(2), torch.arange(2), 0, 4, 2)
