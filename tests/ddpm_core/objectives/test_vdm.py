"""The bound of continuous time as a loss (Kingma 2021, VDM): its mean, and what learns by which gradient."""

import math

import pytest
import torch
from support.denoisers import GreyWorld

from ddpm_core.config import UNetConfig
from ddpm_core.denoiser import Prediction
from ddpm_core.objectives import objective_named
from ddpm_core.objectives.times import SteppedTimes, UniformTimes
from ddpm_core.objectives.vdm import VdmBound
from ddpm_core.parameterizations import denoiser_named
from ddpm_core.process.continuous import ContinuousProcess

LN2 = math.log(2)
NETWORK = UNetConfig(
    image_size=4, in_channels=1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, num_groups=4,
)  # fmt: skip
WORLD = GreyWorld((0, 60, 128, 255), (0.4, 0.1, 0.2, 0.3), (1, 4, 4))
G = torch.Generator()


def even(n, shift):
    """frac(u + i / B), as training draws them (Kingma 2021, app. I.1)."""
    return (shift + torch.arange(n, dtype=torch.float64) / n) % 1.0


def learned(seed, bend=1.0, **arguments):
    """A gamma of another shape for each seed and size of the hidden weights."""
    torch.manual_seed(seed)
    process = ContinuousProcess.learned(**arguments)
    with torch.no_grad():
        process.schedule.weight_3.mul_(bend)
    return process


SHAPES = {
    "linear": ContinuousProcess.linear(),
    "learned": learned(0),
    "curved": learned(1, 20.0),
    "from-one-unit": learned(2, 0.1),
}


@pytest.mark.parametrize("num_timesteps", [None, 50])
@pytest.mark.parametrize("name", SHAPES)
def test_the_mean_loss_of_the_best_denoiser_is_the_bound(name, num_timesteps, modern_reference):
    """The continuous bound does not depend on the shape of gamma (Kingma 2021, sec. 5.1); that of T steps does, and is
    known for a linear one."""
    process = SHAPES[name]
    cases = {case["T"]: case["diffusion"] for case in modern_reference["vdm_world"]["cases"] if case["g0"] == -13.3}
    if num_timesteps is not None and name != "linear":
        # By quadrature over the noise and the levels, with this gamma's own steps.
        gamma = process.gamma(torch.arange(51, dtype=torch.float64) / 50).detach()
        z = torch.linspace(-8, 8, 801, dtype=torch.float64)
        marginal = process.at(gamma[1:])
        x_0, eps = WORLD.values[:, None, None], z[:, None]
        z_t = marginal.alpha.flatten() * x_0 + marginal.sigma.flatten() * eps
        shaped = z_t.permute(2, 0, 1)[:, None]
        best = WORLD.best_x_0(shaped, marginal)
        error = ((x_0[None, :, :, 0] - best[:, 0]) * (marginal.alpha / marginal.sigma)[:, 0]).square()
        density = (-0.5 * z**2).exp() * (z[1] - z[0]) / (2 * math.pi) ** 0.5
        mse = (error @ density) @ WORLD.probabilities
        expected = float(0.5 * (torch.expm1(gamma.diff()) * mse).sum()) / LN2
    else:
        expected = cases[num_timesteps]
    times = UniformTimes(process, even=True) if num_timesteps is None else SteppedTimes(process, num_timesteps)
    objective, n, means = VdmBound(process, times), 1000, []
    assert objective.even
    for seed in range(12):
        G.manual_seed(seed)
        x_0 = (WORLD.images(n, seed).double() / 127.5 - 1).float()
        eps = torch.randn(x_0.shape, generator=G)
        with torch.no_grad():
            losses = objective(WORLD.denoiser(process), x_0, even(n, seed * 0.618 % 1), eps)
        means.append(float(losses.rows.mean()) / LN2)
    found = torch.tensor(means, dtype=torch.float64)
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / 12**0.5
    assert float(found.std()) / 12**0.5 < 0.01 * expected


def small(process):
    """A denoiser whose output is no longer 0."""
    torch.manual_seed(0)
    denoiser = denoiser_named("residual_eps").build(NETWORK, process)
    for parameter in denoiser.network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return denoiser


class Smooth(torch.nn.Module):
    """A denoiser in float64 whose network is a line in z: finite differences need the digits."""

    def __init__(self, process):
        super().__init__()
        self.process, self.slope = process, torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, z_t, time, label=None):
        wave = 0.2 * torch.sin(time / 3)[:, None, None, None]
        return Prediction.of_eps(z_t, self.process.at(time), self.slope * z_t + wave)


def setting(**arguments):
    process = learned(4, 3.0, **arguments).double()
    G.manual_seed(5)
    x_0 = WORLD.images(16, 5).double() / 127.5 - 1
    eps = torch.randn(x_0.shape, generator=G, dtype=torch.float64)
    return Smooth(process), x_0, eps, even(16, 0.013)


def differences(denoiser, loss, parameter, number=6):
    """d loss / d of the first few values of a parameter, central differences."""
    found = []
    flat = parameter.data.view(-1)
    for index in range(min(number, len(flat))):
        at, width = flat[index].item(), 1e-5
        ends = []
        for value in (at + width, at - width):
            flat[index] = value
            with torch.no_grad():
                ends.append(float(loss(denoiser)))
        flat[index] = at
        found.append((ends[0] - ends[1]) / (2 * width))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("learned_ends", [False, True])
def test_the_interior_learns_by_the_square_and_everything_else_by_the_loss(learned_ends):
    """Kingma 2021, app. I.2: the interior's gradient is that of the mean squared loss, that of the ends and of the
    network that of the mean loss; each against finite differences."""
    denoiser, x_0, eps, uniforms = setting(learned_ends=learned_ends)
    process = denoiser.process
    objective = objective_named("vlb", small(process))
    assert isinstance(objective, VdmBound)

    def rows(denoiser):
        return objective(denoiser, x_0, uniforms, eps).rows.double()

    def diffusion(denoiser):
        gamma, slope = process.schedule(uniforms)
        low, high = process.schedule.ends()
        error = (eps - denoiser(process.at(gamma).alpha * x_0 + process.at(gamma).sigma * eps, gamma).eps).square()
        return 0.5 * (high - low) * slope * error.flatten(1).mean(1)

    rows(denoiser).mean().backward()
    schedule = process.schedule
    for name, parameter in schedule.named_parameters():
        if name in ("low", "high"):
            expected = differences(denoiser, lambda d: rows(d).mean(), parameter)
        else:
            expected = differences(denoiser, lambda d: diffusion(d).square().mean(), parameter)
            plain = differences(denoiser, lambda d: diffusion(d).mean(), parameter)
            assert float((plain - expected).abs().max()) > 0.05 * float(expected.abs().max())  # they are not the same
        found = parameter.grad.view(-1)[: len(expected)]
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5 * float(expected.abs().max()) + 1e-9)
    expected = differences(denoiser, lambda d: rows(d).mean(), denoiser.slope)
    torch.testing.assert_close(denoiser.slope.grad.view(-1), expected, rtol=1e-4, atol=1e-8)


def test_two_batches_before_a_step_keep_their_own_factors():
    """Gradients of parts of a batch add up to those of the whole."""
    denoiser, x_0, eps, uniforms = setting()
    objective = VdmBound(denoiser.process, UniformTimes(denoiser.process, even=True))
    objective(denoiser, x_0, uniforms, eps).rows.mean().backward()
    whole = [p.grad.clone() for p in denoiser.parameters()]
    denoiser.zero_grad()
    for part in (slice(0, 4), slice(4, 16)):
        (objective(denoiser, x_0[part], uniforms[part], eps[part]).rows.sum() / 16).backward()
    for one, two in zip(whole, [p.grad for p in denoiser.parameters()], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


def test_of_t_steps_the_interior_learns_by_the_bound():
    """Which depends on it there."""
    denoiser, x_0, eps, uniforms = setting()
    objective = objective_named("vlb", small(denoiser.process), vlb_timesteps=7)

    def loss(denoiser):
        return objective(denoiser, x_0, uniforms, eps).rows.double().mean()

    loss(denoiser).backward()
    parameter = denoiser.process.schedule.weight_2
    expected = differences(denoiser, loss, parameter)
    torch.testing.assert_close(parameter.grad[:6], expected, rtol=1e-3, atol=1e-9)


def trained(process, steps, learning_rate):
    """Trains the process alone, with the best denoiser of the world: the losses of many draws before and after."""
    denoiser = WORLD.denoiser(process)
    objective = VdmBound(process, UniformTimes(process, even=True))
    optimizer = torch.optim.Adam(process.parameters(), lr=learning_rate)

    def draw(n, seed):
        G.manual_seed(seed)
        x_0 = WORLD.images(n, seed).double() / 127.5 - 1
        u = float(torch.rand(1, generator=G))
        return x_0, even(n, u), torch.randn(x_0.shape, generator=G, dtype=torch.float64)

    def losses():
        with torch.no_grad():
            return objective(denoiser, *draw(4000, 10**6)).rows

    before = losses()
    for step in range(steps):
        optimizer.zero_grad()
        objective(denoiser, *draw(16, step)).rows.mean().backward()
        torch.nn.utils.clip_grad_norm_(process.parameters(), 1.0)
        optimizer.step()
    return before, losses()


def test_pinned_ends_are_exact_after_500_steps_and_the_loss_varies_less():
    """Kingma 2021, app. I.2: what the interior learns is a smaller variance; the mean, the bound, stays."""
    process = learned(0)
    places = torch.linspace(0, 1, 9, dtype=torch.float64)
    shape = process.gamma(places).detach()
    before, after = trained(process, 500, 5e-2)
    gamma = process.gamma(places).detach()
    assert (float(gamma[0]), float(gamma[-1])) == (-13.3, 5.0) == process.ends
    assert float((gamma - shape).abs().max()) > 0.1
    assert bool((gamma.diff() > 0).all())
    assert float(after.var()) < 0.7 * float(before.var())
    error = 4 * ((before.var() + after.var()) / len(before)) ** 0.5
    assert abs(float(after.mean() - before.mean())) < float(error)


def test_learned_ends_move_apart_and_the_bound_falls():
    """From -8 and 2, which cost 2.4 bits of reconstruction and 0.05 of prior: both are part of the loss. The bound can
    not fall below the entropy."""
    process = learned(0, gamma_min=-8.0, gamma_max=2.0, learned_ends=True)
    before, after = trained(process, 100, 5e-2)
    low, high = process.ends
    assert low < -10.0
    assert high > 2.3
    assert float(after.mean()) < float(before.mean()) - 1.0
    assert float(after.mean()) / LN2 > WORLD.entropy - 4 * float(after.std()) / LN2 / len(after) ** 0.5
    gamma = process.gamma(torch.linspace(0, 1, 9, dtype=torch.float64))
    assert (float(gamma[0].detach()), float(gamma[-1].detach())) == (low, high)
