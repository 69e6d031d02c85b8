"""Ho 2020, eqs. 12 and 14; Hang 2023 (min-SNR); Salimans and Ho 2022 and Karras 2022: weights in SNR."""

import math

import pytest
import torch

from ddpm_core.config import UNetConfig
from ddpm_core.denoiser import Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.terms import kl_bpd, squared_error, x_0_of
from ddpm_core.objectives import objective_named
from ddpm_core.objectives.times import UniformTimes
from ddpm_core.objectives.weighted import WeightedError, min_snr_weight, vlb_weight
from ddpm_core.parameterizations import DENOISERS, EpsDenoiser
from ddpm_core.process.base import q_sample
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, BetaTilde, GivenVariance

PROCESS = DiscreteProcess.linear(12, 0.01, 0.3)
NETWORK = UNetConfig(
    image_size=4, in_channels=2, base_channels=4, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, num_groups=1,
)  # fmt: skip
DENOISER = EpsDenoiser.build(NETWORK, PROCESS)
VARIANCES = {"beta": Beta(), "beta_tilde": BetaTilde(), "table": GivenVariance(PROCESS.step_variance * 0.9)}


def draw(batch):
    g = torch.Generator().manual_seed(0)
    eps, eps_pred = (torch.randn(batch, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    return eps, eps_pred


def rows(objective, eps, eps_pred, t):
    """Each row's loss, of a denoiser that predicts `eps_pred`."""

    def denoise(z_t, time, label=None):
        return Prediction.of_eps(z_t, objective.process.at(time), eps_pred)

    return objective.at(denoise, torch.zeros_like(eps), t, eps)


def test_the_squared_error_is_per_image_and_never_half():
    eps, eps_pred = draw(3)
    expected = torch.stack([((a - b) ** 2).mean() for a, b in zip(eps, eps_pred, strict=True)])
    torch.testing.assert_close(squared_error(eps, eps_pred), expected)
    assert squared_error(eps.float(), eps_pred.bfloat16()).dtype == torch.float32


def test_l_simple_is_the_plain_squared_error():
    eps, eps_pred = draw(4)
    found = rows(objective_named("simple", DENOISER), eps, eps_pred, torch.tensor([0, 3, 3, 11]))
    torch.testing.assert_close(found.mean(), torch.nn.functional.mse_loss(eps_pred, eps))


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde", "table"])
def test_l_vlb_over_uniform_t_is_the_elbos_terms(sigma2):
    """Ho 2020, eq. 12: the mean over t of T L_{t-1} is their sum, in nats per dimension, but for the part
    that no network changes (0 for beta_tilde)."""
    variance = VARIANCES[sigma2]
    weights = vlb_weight(PROCESS, variance)
    levels = torch.randint(0, 256, (12, 2, 3, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    x_0, t = x_0_of(levels), torch.arange(12)
    eps, noise = draw(12)
    z_t, step = q_sample(PROCESS.at(t), x_0, eps), PROCESS.step(t, t - 1)
    eps_pred = eps + 0.1 * noise * z_t

    def kl(predicted):
        prediction, rows = Prediction.of_eps(z_t, PROCESS.at(t), predicted), slice(1, None)
        return kl_bpd(step[rows], x_0[rows], eps[rows], prediction[t[rows]], variance.of(step)[rows]) * math.log(2)

    terms, constants = kl(eps_pred), kl(eps)
    # All t once, as the mean over uniform t; index 0 is weighted out of both sides.
    weights = torch.cat([torch.zeros(1, dtype=torch.float64), weights[1:]])
    found = (weights * squared_error(eps, eps_pred)).mean()
    torch.testing.assert_close(found, (terms - constants).sum(), rtol=1e-9, atol=0.0)
    if sigma2 == "beta_tilde":
        assert float(constants.abs().max()) < 1e-12


def test_l_vlb_at_index_0_is_the_gaussian_stand_in():
    weights = vlb_weight(PROCESS, Beta())
    beta = float(PROCESS.step_variance[0])
    assert float(weights[0]) == pytest.approx(12 * beta / (2 * (1 - beta) * beta), rel=1e-12)


def test_min_snr():
    """Hang 2023: min(SNR, gamma) / SNR; 1 where the SNR is below gamma."""
    weights = min_snr_weight(PROCESS, 2.0)
    expected = [min(snr, 2.0) / snr for snr in PROCESS.snr.tolist()]
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert float(weights[-1]) == 1.0
    assert float(weights[0]) < 0.1


def test_the_loss_sends_gradients_to_the_prediction_only_by_its_weight():
    eps, eps_pred = draw(2)
    eps_pred.requires_grad_()
    weights = torch.tensor([0.0, 3.0], dtype=torch.float64)
    process = DiscreteProcess.linear(2, 0.01, 0.3)
    rows(WeightedError(process, UniformTimes(process), weights), eps, eps_pred, torch.tensor([0, 1])).mean().backward()
    assert float(eps_pred.grad[0].abs().max()) == 0.0
    torch.testing.assert_close(eps_pred.grad[1], 3.0 * (eps_pred - eps)[1].detach() / 18)


def said(kind, z, marginal, x_0):
    """The network's output of each kind that says `x_0` of z, in the terms of its paper."""
    eps = (z - marginal.alpha * x_0) / marginal.sigma
    if kind == "edm":  # Karras 2022, table 1, at sigma_data = 0.5
        y, sigma = z / marginal.alpha, marginal.sigma / marginal.alpha
        return (x_0 - 0.25 / (sigma**2 + 0.25) * y) * (sigma**2 + 0.25).sqrt() / (0.5 * sigma)
    v = marginal.alpha * eps - marginal.sigma * x_0
    return {"eps": eps, "residual_eps": eps - z, "x_0": x_0, "v": v}[kind]


@pytest.mark.parametrize("process", [PROCESS, ContinuousProcess.linear()], ids=["steps", "continuous"])
@pytest.mark.parametrize("kind", sorted(DENOISERS))
def test_losses_are_weights_in_snr(kind, process):
    """Of one prediction said in five ways. simple is the error of what was said: Ho 2020, eq. 14, of eps, (SNR + 1) on
    x_0 of v (Salimans and Ho 2022, sec. 4), (sigma^2 + d^2) / (sigma d)^2 on x_0 of EDM (Karras 2022, table 1). min_snr
    is min(SNR, gamma) on x_0 of all (Hang 2023, sec. 3.4); and the bound does not depend on how it was said."""
    denoiser, g = DENOISERS[kind].build(NETWORK, process), torch.Generator().manual_seed(0)
    time = torch.tensor([1, 3, 6, 11]) if process is PROCESS else process.grid(4)
    marginal = process.at(time)
    x_0, eps, error = torch.randn(3, 4, 2, 3, 3, generator=g, dtype=torch.float64)
    z = q_sample(marginal, x_0, eps)
    predicted = x_0 + 0.3 * error

    def denoise(z_t, time, label=None):
        return denoiser.read(z_t, marginal, said(kind, z_t, marginal, predicted))

    def loss(name):
        return objective_named(name, denoiser, 2.0).at(denoise, x_0, time, eps).double()

    snr = (marginal.alpha**2 / marginal.sigma**2).flatten()
    on_x_0 = (0.3 * error).square().flatten(1).mean(1)
    weight = {
        "eps": snr,
        "residual_eps": snr,
        "x_0": torch.ones_like(snr),
        "v": snr + 1,
        "edm": (1 / snr + 0.25) / (0.25 / snr),
    }[kind]
    close = {"rtol": 1e-5, "atol": 0.0}  # weights are kept in float32
    direct = (said(kind, z, marginal, x_0) - said(kind, z, marginal, predicted)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss("simple"), direct, **close)
    torch.testing.assert_close(loss("simple"), weight * on_x_0, **close)
    torch.testing.assert_close(loss("min_snr"), snr.clamp(max=2.0) * on_x_0, **close)
    if process is PROCESS:  # with sigma^2 = beta, of Ho 2020, eq. 8: ||mu_tilde - mu||^2 / (2 beta)
        coefficient = process.posterior_coef_x_0[time] ** 2 / (2 * process.step_variance[time])
        torch.testing.assert_close(loss("vlb"), 12 * coefficient * on_x_0, **close)
    else:
        torch.testing.assert_close(loss("vlb"), 0.5 * 18.3 * snr * on_x_0, **close)


@pytest.mark.parametrize(
    ("name", "gamma", "match"), [("l2", 5.0, "loss"), ("min_snr", 0.0, "gamma"), ("min_snr", math.nan, "gamma")]
)
def test_bad_losses_are_refused(name, gamma, match):
    with pytest.raises(ConfigError, match=match):
        objective_named(name, DENOISER, gamma)
