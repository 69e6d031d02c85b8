"""Song 2021, score SDE, app. D.2, in worlds whose best eps and whose flow are known in closed form.

x_0 ~ N(m, S): eps = sbar (S + sbar^2 I)^-1 (xbar - m), and the flow scales each principal axis of xbar - m, of
variance l, by sqrt((l + sbar_t^2) / (l + sbar_s^2)).
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.denoisers import FunctionDenoiser, abar

from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.ode import ode_bpd, ode_times
from ddpm_core.process.discrete import DiscreteProcess

SCHEDULES = {
    "linear-1000": DiscreteProcess.linear(1000),
    "cosine-1000": DiscreteProcess.cosine(1000),
    "linear-200": DiscreteProcess.linear(200, 5e-4, 0.1),
}


class GaussianWorld:
    """x_0 ~ N(mean, covariance) with a full covariance [D, D] of the flattened image."""

    def __init__(self, schedule, mean, covariance):
        self.schedule, self.mean = schedule, mean
        self.variances, self.axes = torch.linalg.eigh(covariance)
        self.sbar = (-0.5 * schedule.log_snr).exp()
        self.first = None

    def eps(self, x_t, t):
        share = abar(self.schedule, t).flatten(1)
        xbar = x_t.double().flatten(1) / share.sqrt()
        if self.first is None:
            self.first = xbar.detach()
        sbar = ((1 - share) / share).sqrt()
        along = (xbar - self.mean) @ self.axes * (sbar / (self.variances + sbar**2))
        return (along @ self.axes.T).reshape(x_t.shape).to(x_t.dtype)

    def flow_bpd(self, xbar):
        """Of the exact flow of `eps` from x_{T-1} ~ N(0, I), at xbar_0 [B, D]."""
        start, end = self.variances + self.sbar[0] ** 2, self.variances + self.sbar[-1] ** 2
        xbar_end = self.mean + ((xbar - self.mean) @ self.axes * (end / start).sqrt()) @ self.axes.T
        prior = torch.distributions.Normal(0.0, 1 / self.schedule.alpha[-1])
        return bpd_of(prior.log_prob(xbar_end).sum(1) + 0.5 * (end / start).log().sum(), xbar)

    def data_bpd(self, xbar, blur=0.0):
        """Of N(mean, covariance + blur^2 I) at xbar [B, D]."""
        covariance = self.axes @ torch.diag(self.variances + blur**2) @ self.axes.T
        return bpd_of(torch.distributions.MultivariateNormal(self.mean, covariance).log_prob(xbar), xbar)

    def images(self, n, shape):
        z = torch.randn(n, len(self.variances), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        x_0 = self.mean + z * self.variances.sqrt() @ self.axes.T
        return ((x_0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).reshape(n, *shape)


def bpd_of(nats, xbar):
    return math.log2(127.5) - nats / (xbar.shape[1] * math.log(2))


def isotropic(schedule, variance, size=4, mean=0.2):
    one = torch.ones(size, dtype=torch.float64)
    return GaussianWorld(schedule, mean * one, variance * torch.diag(one))


def mixture_eps(schedule, means, weights, variance):
    """x_0 ~ sum of w_k N(means_k, variance I), `means` [K, D]: the nonlinear eps, by Bayes over the components."""

    def eps(x_t, t):
        share = abar(schedule, t).flatten(1)
        x = x_t.double().flatten(1)
        total = share * variance + 1 - share
        offsets = x[:, None] - share.sqrt()[..., None] * means
        posterior = torch.softmax(weights.log() - offsets.square().sum(-1) / (2 * total), 1)
        mean_offset = (posterior[..., None] * offsets).sum(1)
        return ((1 - share).sqrt() / total * mean_offset).reshape(x_t.shape).to(x_t.dtype)

    return eps


def mixture_log_density(xbar, means, weights, variance):
    distance = (xbar[:, None] - means).square().sum(-1)
    log_normal = -0.5 * (distance / variance + means.shape[1] * math.log(2 * math.pi * variance))
    return torch.logsumexp(weights.log() + log_normal, 1)


def recording(eps_fn, calls):
    def eps(x_t, t):
        calls.append((x_t.detach().clone(), t.clone()))
        return eps_fn(x_t, t)

    return eps


def denoiser(schedule, eps):
    return FunctionDenoiser(eps, schedule)


def toy_eps(x_t, t):
    """Mixes the pixels of an image, never those of two images."""
    return 0.7 * x_t + 0.2 * torch.tanh(x_t.roll(1, 3) * x_t) + 0.1 * torch.sin(t.to(x_t.dtype))[:, None, None, None]


def random_images(n, shape=(3, 4, 4), seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("variance", [1.0, 0.09, 0.003])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_gaussian_world_meets_its_flow_and_its_data(name, variance):
    """The change of variables (Chen 2018, thm. 1) in closed form: 1/2 sum ln((v + sbar_T^2) / (v + sbar_0^2))."""
    schedule, n = SCHEDULES[name], 30
    world = isotropic(schedule, variance)
    images = world.images(n, (1, 2, 2))
    found = ode_bpd(denoiser(schedule, world.eps), images, torch.arange(n), 0, probes=2)
    xbar = world.first
    assert bool((found.trace_error < 1e-12).all())  # v^T (c I) v = c D for every vector of signs
    assert bool(((found.bits_per_dim - world.flow_bpd(xbar)).abs() < found.step_error + 1e-9).all())
    assert float(found.step_error.mean()) < 0.06
    # The flow's marginal is the data blurred by sbar_0, up to the distance of N(0, I) from q(x_{T-1}).
    blur, distance = float(world.sbar[0]), 4e-3
    torch.testing.assert_close(world.flow_bpd(xbar), world.data_bpd(xbar, blur), rtol=0, atol=distance)
    ratio = blur**2 / variance
    squares = (xbar - 0.2).square().mean(1) / variance
    smoothing = 0.5 * (math.log1p(ratio) - squares * ratio / (1 + ratio)) / math.log(2)
    error = (found.bits_per_dim - world.data_bpd(xbar) - smoothing).abs()
    assert bool((error < found.step_error + distance).all())


def test_twice_the_steps_have_a_quarter_of_the_error():
    """Heun's method is of second order, so the real error is a third of |N - N/2|."""
    schedule, n = SCHEDULES["linear-1000"], 20
    world = isotropic(schedule, 0.25)
    images, errors = world.images(n, (1, 2, 2)), []
    for steps in (32, 64, 128):
        found = ode_bpd(denoiser(schedule, world.eps), images, torch.arange(n), 0, steps, 2)
        error = found.bits_per_dim - world.flow_bpd(world.first)
        assert bool((error < 0).all())  # as OdeLikelihood says
        torch.testing.assert_close(-error / found.step_error, torch.full_like(error, 1 / 3), rtol=0.35, atol=0)
        errors.append(float(error.mean()))
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5


def test_random_traces_are_unbiased_and_their_error_is_calibrated():
    """Hutchinson 1990 in a world of strongly correlated pixels: E[v^T J v] = tr J, and trace_error is its sd."""
    schedule, n, size = SCHEDULES["linear-1000"], 400, 12
    index = torch.arange(size, dtype=torch.float64)
    world = GaussianWorld(schedule, 0.1 * index.sin(), 0.09 * 0.9 ** (index - index[:, None]).abs())
    images = world.images(n, (3, 2, 2))
    found = ode_bpd(denoiser(schedule, world.eps), images, torch.arange(n), 0, 128, 4)
    error = found.bits_per_dim - world.flow_bpd(world.first)
    assert abs(float(error.mean())) < 4 * float(error.std()) / n**0.5 + float(found.step_error.mean())
    assert float(found.step_error.mean()) < 0.1 * float(found.trace_error.mean())
    # Var(error) = E[trace_error^2]; the ratio of the two estimates has a relative sd near sqrt(2 / n) = 0.07.
    assert 0.75 < float(error.var() / found.trace_error.square().mean()) < 1.33


def test_more_probes_give_a_smaller_error_around_the_same_value():
    schedule, n = SCHEDULES["linear-200"], 100
    index = torch.arange(12, dtype=torch.float64)
    world = GaussianWorld(schedule, 0 * index, 0.09 * 0.9 ** (index - index[:, None]).abs())
    images = world.images(n, (3, 2, 2))
    few, many = (ode_bpd(denoiser(schedule, world.eps), images, torch.arange(n), 0, 16, p) for p in (4, 16))
    ratio = few.trace_error.square().mean() / many.trace_error.square().mean()
    assert float(ratio) == pytest.approx(4.0, rel=0.3)


def test_a_nonlinear_world_meets_its_density():
    """A mixture of Gaussians in 6 dimensions: J is neither constant, nor diagonal; the score is exact, so the flow's
    marginal at index 0 is the mixture blurred by sbar_0 (Song 2021, score SDE, eq. 13)."""
    schedule, n, variance = SCHEDULES["linear-1000"], 200, 0.01
    g = torch.Generator().manual_seed(4)
    means = torch.rand(5, 6, generator=g, dtype=torch.float64) * 1.2 - 0.6
    weights = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
    x_0 = means[torch.multinomial(weights, n, replacement=True, generator=g)]
    x_0 = x_0 + variance**0.5 * torch.randn(n, 6, generator=g, dtype=torch.float64)
    images = ((x_0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).reshape(n, 1, 2, 3)
    calls = []
    eps_fn = recording(mixture_eps(schedule, means, weights, variance), calls)
    found = ode_bpd(denoiser(schedule, eps_fn), images, torch.arange(n), 0, 128, 4)
    xbar = calls[0][0].flatten(1) / schedule.alpha[0]
    blurred = variance + float(1 / schedule.snr[0])
    error = found.bits_per_dim - bpd_of(mixture_log_density(xbar, means, weights, blurred), xbar)
    assert abs(float(error.mean())) < 4 * float(error.std()) / n**0.5 + float(found.step_error.mean())
    assert float(error.std()) == pytest.approx(float(found.trace_error.square().mean().sqrt()), rel=0.3)


def test_the_density_integrates_to_one():
    """1 dimension, three grey levels: the trapezoid rule over the 256 bins, 8 random points in each."""
    schedule, variance = SCHEDULES["linear-1000"], 0.05**2
    means = torch.tensor([[-0.5], [0.0], [0.6]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    images = torch.arange(256).to(torch.uint8).repeat(8).reshape(-1, 1, 1, 1)
    calls = []
    eps_fn = recording(mixture_eps(schedule, means, weights, variance), calls)
    found = ode_bpd(denoiser(schedule, eps_fn), images, torch.arange(len(images)), 0, 128, 2)
    xbar = calls[0][0].flatten() / schedule.alpha[0]
    density = 2 ** (math.log2(127.5) - found.bits_per_dim)
    order = xbar.argsort()
    assert float(torch.trapezoid(density[order], xbar[order])) == pytest.approx(1.0, abs=3e-3)
    # In bits over the bins: the masses that E_u[2^-bits] gives to the 256 levels add up to 1 as well.
    assert float((2**-found.bits_per_dim).mean() * 256) == pytest.approx(1.0, abs=1e-2)


def test_the_data_point_lies_uniformly_in_its_bin():
    """xbar_0 = (k + u - 1/2) / 127.5 - 1: centred on x_0 = k / 127.5 - 1, for every level."""
    schedule, calls = DiscreteProcess.linear(6, 0.05, 0.3), []
    images = torch.arange(256).to(torch.uint8).repeat(4, 1).reshape(4, 1, 16, 16)
    ode_bpd(denoiser(schedule, recording(toy_eps, calls)), images, torch.arange(4), 0, 2, 2)
    u = ((calls[0][0] / schedule.alpha[0] + 1) * 127.5 - images + 0.5).flatten()
    assert float(u.min()) >= -1e-9
    assert float(u.max()) <= 1 + 1e-9
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / len(u)) ** 0.5
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.1)


def test_an_image_has_its_result_whatever_its_batch():
    schedule, images, ids = SCHEDULES["linear-200"], random_images(5), torch.tensor([7, 3, 2**40, 0, 9])
    full = ode_bpd(denoiser(schedule, toy_eps), images, ids, 1, 8, 3)
    for row in range(5):
        alone = ode_bpd(denoiser(schedule, toy_eps), images[row : row + 1], ids[row : row + 1], 1, 8, 3)
        for field in ("bits_per_dim", "trace_error", "step_error"):
            assert torch.equal(getattr(alone, field), getattr(full, field)[row : row + 1]), field


def test_the_draws_are_keyed_by_seed_and_id():
    schedule, calls = SCHEDULES["linear-200"], []
    images = random_images(1).expand(4, -1, -1, -1)
    ids = torch.tensor([5, 6, 5, 2**33 + 5])
    found = ode_bpd(denoiser(schedule, recording(toy_eps, calls)), images, ids, 1, 4, 2)
    bpd, start = found.bits_per_dim, calls[0][0]
    assert bpd[0] == bpd[2]
    assert len(bpd.unique()) == 3
    assert torch.equal(start[0], start[2])
    assert not bool((start[0] == start[1]).any())
    again = ode_bpd(denoiser(schedule, toy_eps), images, ids, 1, 4, 2)
    other = ode_bpd(denoiser(schedule, toy_eps), images, ids, 2, 4, 2)
    assert torch.equal(again.bits_per_dim, bpd)
    assert not bool((other.bits_per_dim == bpd).any())
    # With one u for all, the probes still differ: a trace that is random has another value for another id.
    assert len(found.trace_error.unique()) == 3


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
def test_the_network_is_called_3_n_times_whatever_the_probes_and_the_callers_gradients(outer):
    schedule, calls = SCHEDULES["linear-200"], []
    weight = torch.nn.Parameter(torch.tensor(0.5))
    with outer():
        watched = denoiser(schedule, recording(lambda x, t: weight * toy_eps(x, t), calls))
        found = ode_bpd(watched, random_images(2), torch.arange(2), 0, 6, 5)
    fine = ode_times(schedule, 6).tolist()
    visited = [int(t[0]) for _, t in calls]
    expected = [t for steps in (fine, fine[::2]) for pair in itertools.pairwise(steps) for t in pair]
    assert visited == expected
    assert len(visited) == 18
    assert {(tuple(x.shape), x.dtype, tuple(t.shape)) for x, t in calls} == {((2, 3, 4, 4), torch.float64, (2,))}
    assert weight.grad is None
    assert not found.bits_per_dim.requires_grad


def test_float32_networks_give_the_float64_value():
    schedule, images, ids = SCHEDULES["cosine-1000"], random_images(3), torch.arange(3)
    world = isotropic(schedule, 0.2, 48)
    single, double = (
        ode_bpd(denoiser(schedule, eps), images, ids, 0, 32, 2)
        for eps in (lambda z_t, t: world.eps(z_t.float(), t), world.eps)
    )
    torch.testing.assert_close(single.bits_per_dim, double.bits_per_dim, rtol=0, atol=1e-5)


@given(st.integers(3, 60), st.integers(0, 10**6), st.data())
@settings(max_examples=150, deadline=None)
def test_the_grid_is_distinct_integers_from_end_to_end(num_timesteps, seed, data):
    steps = 2 * data.draw(st.integers(1, (num_timesteps - 1) // 2))
    betas = 0.5 * torch.rand(num_timesteps, generator=torch.Generator().manual_seed(seed)).double() ** 4 + 1e-6
    grid = ode_times(DiscreteProcess.from_betas(betas), steps).tolist()
    assert len(grid) == steps + 1
    assert (grid[0], grid[-1]) == (0, num_timesteps - 1)
    assert all(a < b for a, b in itertools.pairwise(grid))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_grid_is_uniform_in_log_snr_where_integers_allow(name):
    log_snr = SCHEDULES[name].log_snr.numpy()
    grid = ode_times(SCHEDULES[name], 64).tolist()
    widths = -np.diff(log_snr[grid])
    whole = np.diff(grid) == 1
    one = -np.diff(log_snr)
    # Rounding moves either end of an interval by half an integer step at most.
    slack = np.array([one[max(s - 1, 0) : t + 1].max() for s, t in itertools.pairwise(grid)])
    typical = np.median(widths[~whole])
    assert bool((np.abs(widths - typical)[~whole] <= slack[~whole]).all())
    assert bool((widths[whole] > 0.4 * typical).all())


def test_all_time_steps_are_the_finest_grid():
    assert ode_times(DiscreteProcess.cosine(21), 20).tolist() == list(range(21))
    constant = DiscreteProcess.from_betas([0.2] * 11)
    assert ode_times(constant, 10).tolist() == list(range(11))
    assert ode_times(DiscreteProcess.linear(1000), 2).tolist()[::2] == [0, 999]


@pytest.mark.parametrize("num_steps", [0, 1, 7, 20, -2])
def test_a_bad_number_of_steps_is_refused(num_steps):
    schedule = DiscreteProcess.linear(20)
    for call in (
        lambda: ode_times(schedule, num_steps),
        lambda: ode_bpd(denoiser(schedule, toy_eps), random_images(1), torch.arange(1), 0, num_steps),
    ):
        with pytest.raises(ConfigError, match=rf"^num_steps: {num_steps} is not an even number in 2\.\.19\b.*$"):
            call()


@pytest.mark.parametrize("probes", [1, 0, -1])
def test_too_few_probes_are_refused(probes):
    with pytest.raises(ConfigError, match=rf"^probes: {probes} is not >= 2.*$"):
        ode_bpd(denoiser(SCHEDULES["linear-200"], toy_eps), random_images(1), torch.arange(1), 0, 4, probes)


def test_a_denoiser_without_gradients_is_an_error_not_a_trace_of_zero():
    with pytest.raises(RuntimeError, match="does not require grad"):
        ode_bpd(denoiser(SCHEDULES["linear-200"], torch.no_grad()(toy_eps)), random_images(1), torch.arange(1), 0, 4, 2)
