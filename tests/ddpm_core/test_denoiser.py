"""What a prediction says, in every form: Ho 2020, eqs. 4 and 15; Salimans and Ho 2022 (v)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.denoiser import Prediction
from ddpm_core.process.base import q_sample
from ddpm_core.process.discrete import DiscreteProcess

processes = st.sampled_from(
    [DiscreteProcess.linear(), DiscreteProcess.cosine(100), DiscreteProcess.linear(8, 0.01, 0.3)]
)


@given(processes, st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_eps_x_0_and_v_are_one_prediction(process, seed):
    """Round trips in float64 (Ho 2020, eqs. 4 and 15; Salimans and Ho 2022, app. D)."""
    g = torch.Generator().manual_seed(seed)
    x_0, eps = (torch.randn(5, 2, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    marginal = process.at(torch.randint(0, process.num_timesteps, (5,), generator=g))
    z_t = q_sample(marginal, x_0, eps)
    of_eps, of_x_0 = Prediction.of_eps(z_t, marginal, eps), Prediction.of_x_0(z_t, marginal, x_0)
    # v is the tangent of the circle that (x_0, eps) -> z_t moves on: sqrt(abar) eps - sqrt(1-abar) x_0.
    v = marginal.alpha * eps - marginal.sigma * x_0
    loose, close = {"rtol": 1e-6, "atol": 1e-6}, {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(of_eps.x_0, x_0, **loose)
    torch.testing.assert_close(of_x_0.eps, eps, **close)
    of_v = Prediction.of_v(z_t, marginal, v)
    torch.testing.assert_close(of_v.eps, eps, **loose)
    torch.testing.assert_close(of_v.x_0, x_0, **loose)
    for prediction in (of_eps, of_x_0, of_v):
        torch.testing.assert_close(prediction.v, v, **loose)
