"""Lin 2024, alg. 1: the rescaling after which nothing of the image is left at the last time step."""

import json

import pytest
import torch

from ddpm_core.denoiser import Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.process import process_from_config
from ddpm_core.process.base import q_sample
from ddpm_core.process.discrete import DiscreteProcess

PLAIN = {
    "linear": DiscreteProcess.linear(),
    "cosine": DiscreteProcess.cosine(50),
    "table": DiscreteProcess.from_betas([0.1, 0.3, 0.2, 0.4]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_last_alpha_is_0_and_the_first_unchanged(name):
    """As alg. 1 does it, in its own terms."""
    plain = PLAIN[name]
    process = plain.rescaled_to_zero_terminal_snr()
    alpha_bar_sqrt = (1.0 - plain.step_variance).cumprod(0).sqrt()
    first, last = alpha_bar_sqrt[0].clone(), alpha_bar_sqrt[-1].clone()
    expected = (alpha_bar_sqrt - last) * (first / (first - last))
    torch.testing.assert_close(process.alpha, expected, rtol=1e-9, atol=1e-15)
    assert float(process.alpha[-1]) == 0.0
    assert float(process.sigma[-1]) == 1.0
    assert float(process.snr[-1]) == 0.0
    assert float(process.alpha[0]) == pytest.approx(float(plain.alpha[0]), rel=1e-15)
    assert bool((process.alpha.diff() < 0).all())
    torch.testing.assert_close(process.alpha2 + process.sigma2, torch.ones_like(process.alpha2))
    # The betas that lead there: their products are alpha^2 again, the last is 1.
    torch.testing.assert_close((1.0 - process.step_variance).cumprod(0), process.alpha2, rtol=1e-9, atol=1e-15)
    assert float(process.step_variance[-1]) == 1.0
    assert process.prior_variance == 1.0
    assert process.prior_signal == 0.0


@pytest.mark.parametrize("name", PLAIN)
def test_steps_from_the_last_time_are_finite_but_for_eps(name):
    """q(z_s | z_T, x_0) = q(z_s | x_0): z_T says nothing. x_0 and v lead there, eps cannot."""
    process = PLAIN[name].rescaled_to_zero_terminal_snr()
    last = process.num_timesteps - 1
    x_0 = torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(1, 1, 2, 2)
    noise = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64).reshape(1, 1, 2, 2)
    t = torch.tensor([last])
    z = q_sample(process.at(t), x_0, noise)
    assert torch.equal(z, noise)
    for s in (last - 1, 0):
        step = process.step(t, torch.tensor([s]))
        posterior = step.posterior(z, x_0)
        torch.testing.assert_close(posterior.mean, process.alpha[s] * x_0)
        torch.testing.assert_close(posterior.variance.flatten(), process.sigma2[s : s + 1])
        # v = eps alpha - x_0 sigma = -x_0.
        of_v = Prediction.of_v(z, step.now, -x_0)
        assert torch.equal(of_v.x_0, x_0)
        torch.testing.assert_close(of_v.posterior_mean(step), process.alpha[s] * x_0)
        assert torch.equal(of_v.eps, z)
        assert torch.equal(of_v.clipped().x_0, x_0)


@pytest.mark.parametrize("name", PLAIN)
def test_the_description_says_so(name):
    process = PLAIN[name].rescaled_to_zero_terminal_snr()
    config = json.loads(json.dumps(process.to_config()))
    assert config == {**PLAIN[name].to_config(), "zero_terminal_snr": True}
    again = process_from_config(config)
    assert torch.equal(again.alpha, process.alpha)
    assert again.to_config() == config
    assert "zero_terminal_snr" not in PLAIN[name].to_config()
    assert torch.equal(process_from_config({**config, "zero_terminal_snr": False}).alpha, PLAIN[name].alpha)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"^schedule\.zero_terminal_snr: .*num_timesteps >= 2"):
        DiscreteProcess.linear(1).rescaled_to_zero_terminal_snr()
    with pytest.raises(ConfigError, match=r"^schedule\.zero_terminal_snr: 'yes' is not true or false"):
        process_from_config({**PLAIN["linear"].to_config(), "zero_terminal_snr": "yes"})
    for config in (
        {"name": "alpha_sigma", "alpha": [1.0, 0.9], "sigma": [0.1, 0.2]},
        {"name": "gamma_linear", "gamma_min": -13.3, "gamma_max": 5.0},
    ):
        with pytest.raises(ConfigError, match="zero_terminal_snr"):
            process_from_config({**config, "zero_terminal_snr": True})
