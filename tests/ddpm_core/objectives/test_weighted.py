"""Ho 2020, eqs. 12 and 14; Hang 2023 (min-SNR)."""

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
from ddpm_core.parameterizations import EpsDenoiser
from ddpm_core.process.base import q_sample
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


@pytest.mark.parametrize(
    ("name", "gamma", "match"), [("l2", 5.0, "loss"), ("min_snr", 0.0, "gamma"), ("min_snr", math.nan, "gamma")]
)
def test_bad_losses_are_refused(name, gamma, match):
    with pytest.raises(ConfigError, match=match):
        objective_named(name, DENOISER, gamma)
