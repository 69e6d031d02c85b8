"""What the squared errors of eps over t say without the network: other variances, fewer steps."""

import itertools
import math

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import GivenVariance, ReverseVariance, variance_table


def kl_from_eps_mse(
    process: DiscreteProcess, t: Int64[Tensor, "*S"], mse: Float64[Tensor, "*S"], variance: ReverseVariance
) -> Float64[Tensor, "*S"]:
    """The unclipped KL at t >= 1, bits/dim, under any variances, from ||eps - eps_pred||^2 / D alone (Ho 2020, eq. 12,
    with its constant)."""
    sigma2 = variance_table(process, variance)[t]
    ratio = process.posterior_variance[t] / sigma2
    error = process.coef_eps[t].square() * mse / (2.0 * sigma2)
    return (0.5 * (ratio - 1.0 - ratio.log()) + error) / math.log(2.0)


def decoder_variances(process: DiscreteProcess) -> Float64[Tensor, " G"]:
    """Variances for L_0: those of `Beta` and of `BetaTilde` at t = 0, then a grid in steps of sqrt(2) from 1/16 to 4
    times the former, from which the optimum is chosen."""
    beta = process.unit_variance[:1]
    grid = beta * 2.0 ** (torch.arange(-8, 5, dtype=torch.float64) / 2.0)
    return torch.cat([beta, process.posterior_variance_clipped[:1], grid])


def subsequence_kl(
    process: DiscreteProcess,
    steps: list[int],
    t: Int64[Tensor, "*S"],
    mse: Float64[Tensor, "*S"],
    bandwidth: float = 0.0,
) -> Float64[Tensor, "*S"]:
    """Terms, bits/dim, whose weighted sum estimates the sum of the KLs of a sub-sequence `steps` (increasing, 0 first).

    The KL of the step from t to the one before it, s, under that step's posterior variance is
    1/2 (SNR(s) / SNR(t) - 1) ||eps - eps_pred||^2 (Kingma 2021, VDM, eq. 14, with ||x_0 - x_0_pred||^2 =
    ||eps - eps_pred||^2 / SNR(t)). With a bandwidth of 0 it counts at t alone, and the estimate is unbiased; otherwise
    its error is the average over the time steps within `bandwidth` of t in log-SNR, as many below as above: far more
    precise where few steps are drawn, and biased by the curvature of the error over t only.
    """
    factor = torch.zeros(process.num_timesteps, dtype=torch.float64)
    for before, now in itertools.pairwise(steps):
        near = (process.log_snr - process.log_snr[now]).abs() <= bandwidth
        below, above = int(near[1:now].sum()), int(near[now + 1 :].sum())
        reach = min(below, above)
        value = 0.5 * (process.snr[before] / process.snr[now] - 1.0) / (2 * reach + 1)
        factor[now - reach : now + reach + 1] += value
    return factor[t] * mse / math.log(2.0)


def steps_from_continuous(
    process: ContinuousProcess,
    num_timesteps: int,
    gamma: Float64[Tensor, "*S"],
    mse: Float64[Tensor, "*S"],
    bandwidth: float = 0.2,
) -> Float64[Tensor, "*S"]:
    """Terms, bits/dim, whose weighted sum (`continuous_design`) estimates the sum of the KLs of T steps.

    The KL at gamma_i is 1/2 (e^(gamma_i - gamma_{i-1}) - 1) ||eps - eps_pred||^2 (Kingma 2021, VDM, eq. 14); its error
    is the average over the evaluations within `bandwidth` of gamma_i, as far as the ends leave room. The curvature of
    the error over gamma biases it, as in `subsequence_kl`.
    """
    low, high = process.ends
    edges = torch.cat([torch.tensor([low], dtype=torch.float64), process.grid(num_timesteps).detach().cpu().flip(0)])
    times = edges[1:].contiguous()
    width = (times + bandwidth).clamp(max=high) - (times - bandwidth).clamp(min=low)
    value = 0.5 * torch.expm1(edges.diff()) * (high - low) / width
    total = torch.cat([torch.zeros(1, dtype=torch.float64), value.cumsum(0)])
    above = torch.searchsorted(times, gamma + bandwidth, right=True)
    below = torch.searchsorted(times, gamma - bandwidth)
    return (total[above] - total[below]) * mse / math.log(2.0)


def optimal_variance(process: DiscreteProcess, mean_eps_mse: Float[Tensor, " T"]) -> GivenVariance:
    """sigma*_t^2 = beta_tilde_t + coef_eps_t^2 E||eps - eps_pred||^2 / D: minimises the mean KL (Ho 2020, eq. 12, with
    its constant) over isotropic variances (Bao 2022, the optimal covariance with imperfect mean).

    `mean_eps_mse` [T]: the mean of `Elbo.eps_mse` over held-out images, never over those scored. Raises ConfigError.
    """
    mse = mean_eps_mse.to(device="cpu", dtype=torch.float64)
    found = GivenVariance(process.posterior_variance + process.coef_eps**2 * mse)
    found.check(process)
    return found
