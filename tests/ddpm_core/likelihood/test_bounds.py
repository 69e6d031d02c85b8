"""Which bound a number is about: its name, variances, decoder and steps; and that a sub-sequence's bound is its own."""

import math

import pytest
import torch
from support.denoisers import FOUR_PIXELS, toy
from support.processes import PROCESSES

from ddpm_core.config import UNetConfig
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.bounds import Respaced, bound_of
from ddpm_core.likelihood.curves import subsequence_kl
from ddpm_core.likelihood.designs import Design, full_design
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.parameterizations import denoiser_named
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, BetaTilde, Learned, variance_table

NETWORK = UNetConfig(
    image_size=2, in_channels=1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, num_groups=4, learned_variance=True,
)  # fmt: skip
TABLE = DiscreteProcess.linear(20, 0.01, 0.3)
PLAIN, VDM = toy(TABLE, (1, 2, 2)), toy(ContinuousProcess.linear(), (1, 2, 2))


def learning():
    torch.manual_seed(0)
    denoiser = denoiser_named("eps").build(NETWORK, TABLE)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser.eval()


LEARNING = learning()


@pytest.mark.parametrize(
    ("denoiser", "sigma2", "num_timesteps", "name", "variance", "decoder", "steps"),
    [
        (PLAIN, "auto", None, "beta_tilde", BetaTilde, "gaussian", 20),
        (PLAIN, "beta", None, "beta", Beta, "gaussian", 20),
        (PLAIN, "beta", 20, "beta", Beta, "gaussian", 20),
        (PLAIN, "beta", 7, "steps_7.beta", Beta, "gaussian", 7),
        (LEARNING, "auto", None, "learned", Learned, "gaussian", 20),
        (LEARNING, "beta_tilde", None, "beta_tilde", BetaTilde, "gaussian", 20),
        (LEARNING, "auto", 5, "steps_5.learned", Learned, "gaussian", 5),
        (VDM, "auto", None, "continuous", BetaTilde, "softmax", None),
        (VDM, "beta_tilde", 1000, "steps_1000", BetaTilde, "softmax", 1000),
        (VDM, "auto", 1, "steps_1", BetaTilde, "softmax", 1),
    ],
)
def test_names_say_variances_and_steps(denoiser, sigma2, num_timesteps, name, variance, decoder, steps):
    found = bound_of(denoiser, sigma2, num_timesteps)
    assert (found.name, found.decoder, found.num_timesteps) == (name, decoder, steps)
    assert isinstance(found.variance, variance)
    whole = (num_timesteps in (None, 20) and denoiser is not VDM) or (denoiser is VDM and num_timesteps is None)
    assert isinstance(found.denoiser, Respaced) == (not whole)


@pytest.mark.parametrize(
    ("denoiser", "sigma2", "num_timesteps", "match"),
    [
        (PLAIN, "learned", None, r"^sigma2: 'learned' needs a model that predicts its variances"),
        (VDM, "beta", None, r"^sigma2: 'beta' is no variance of a continuous process"),
        (VDM, "learned", None, r"^sigma2: 'learned' is no variance of a continuous process"),
        (VDM, "beta", 50, r"^sigma2: 'beta' is no variance of a continuous process"),
        (PLAIN, "optimal", None, r"^sigma2: 'optimal' is not one of"),
        (PLAIN, "auto", 21, r"^num_timesteps: 21 is above the model's 20 time steps"),
        (PLAIN, "auto", 0, r"0 is not in 1\.\.20"),
        (PLAIN, "beta_tilde", 1, r"num_timesteps >= 2"),
        (VDM, "auto", 0, r"0 is not >= 1"),
        (VDM, "auto", -3, r"-3 is not >= 1"),
    ],
)
def test_what_a_model_does_not_have_is_refused(denoiser, sigma2, num_timesteps, match):
    with pytest.raises(ConfigError, match=match):
        bound_of(denoiser, sigma2, num_timesteps)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_sub_sequence_is_a_process_of_its_own(name):
    """Its marginals are the model's at its times, its steps those between them (Nichol and Dhariwal 2021, sec. 4)."""
    process = PROCESSES[name]
    respaced = Respaced.of(toy(process), 9)
    times, own = respaced.times, respaced.process
    assert times.tolist() == process.grid(9).flip(0).tolist()
    assert own.num_timesteps == 9
    ours, theirs = own.step(torch.arange(1, 9), torch.arange(8)), process.step(times[1:], times[:-1])
    for field in ("alpha", "variance", "unit_variance", "posterior_variance", "posterior_coef_x_0", "coef_eps"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-9, atol=1e-14, msg=field)
    z = torch.randn(9, 2, 3, 3, dtype=torch.float64)
    assert torch.equal(respaced(z, torch.arange(9)).eps, toy(process)(z, times).eps)
    assert respaced.image_shape == (2, 3, 3)


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde", "learned"])
def test_learned_variances_of_a_sub_sequence_are_between_its_own(sigma2):
    made = bound_of(LEARNING, sigma2, 6)
    process, t = made.denoiser.process, torch.arange(6)
    z = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        prediction = made.denoiser(z, t)
    found = made.variance.of(process.step(t, t - 1), prediction)
    high, low = (variance_table(process, v)[:, None, None, None] for v in (Beta(), BetaTilde()))
    if sigma2 == "learned":
        f = prediction.variance_fraction
        torch.testing.assert_close(found.log(), f * high.log() + (1 - f) * low.log())
    else:
        torch.testing.assert_close(found, high if sigma2 == "beta" else low)
    # Wider steps than the model's own.
    assert bool((high[1:, 0, 0, 0] > 2 * variance_table(TABLE, Beta())[made.denoiser.times[1:]]).all())


def test_the_bound_of_a_sub_sequence_is_what_the_errors_say_of_it():
    """Its KLs from the model's errors at its own times (`subsequence_kl`), its decoder from index 0."""
    denoiser, n = FOUR_PIXELS.denoiser(TABLE), 40
    images = torch.randint(60, 200, (n, 1, 2, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    made = bound_of(denoiser, "beta_tilde", 5)
    found = elbo(made.denoiser, images, torch.arange(n), full_design(5, n), 0, made.variance)
    times = made.denoiser.times
    expected = subsequence_kl(TABLE, times.tolist(), times.expand(n, -1), found.eps_mse)
    torch.testing.assert_close(found.terms[:, 1:], expected[:, 1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.parts()[2], expected[:, 1:].sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_timesteps", [1, 2, 8])
def test_a_continuous_models_steps_are_kingmas(num_timesteps):
    """Kingma 2021, eq. 13-14: 1/2 expm1(gamma_i - gamma_{i-1}) ||eps - eps_pred||^2 at every i, in either family."""
    for process in (ContinuousProcess.linear(), ContinuousProcess.edm()):
        made, n = bound_of(toy(process, (1, 2, 2)), "auto", num_timesteps), 3
        images = torch.arange(n * 4).reshape(n, 1, 2, 2).to(torch.uint8) * 20
        found = elbo(made.denoiser, images, torch.arange(n), full_design(num_timesteps + 1, n), 0, made.variance)
        gamma = process.gamma(torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps)
        torch.testing.assert_close(made.denoiser.times, gamma, rtol=0, atol=1e-12)
        expected = 0.5 * torch.expm1(gamma.diff()) * found.eps_mse[:, 1:] / math.log(2)
        torch.testing.assert_close(found.terms[:, 1:], expected, rtol=1e-9, atol=0)
        # From the same noise, the decoder is the one of continuous time.
        whole = bound_of(toy(process, (1, 2, 2)))
        from_gamma_0 = elbo(whole.denoiser, images, torch.arange(n), only_first(process, n), 0, whole.variance)
        torch.testing.assert_close(from_gamma_0.terms[:, 0], found.terms[:, 0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(from_gamma_0.prior, found.prior, rtol=1e-9, atol=0)


def only_first(process, n):
    t = torch.full((n, 1), process.ends[0], dtype=torch.float64)
    return Design(t, torch.ones_like(t), torch.zeros(1, dtype=torch.int64))
