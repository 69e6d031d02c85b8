"""Ho 2020, sec. 3.2: which variances the reverse steps may have."""

import pytest
import torch

from ddpm_core.errors import ConfigError
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import GivenVariance, variance_named, variance_table


def test_variance_tables():
    """beta, beta_tilde (index 0 takes index 1's value), or a table."""
    process = DiscreteProcess.linear(6, 0.1, 0.4)
    assert torch.equal(variance_table(process, variance_named("beta")), process.step_variance)
    tilde = variance_table(process, variance_named("beta_tilde"))
    assert torch.equal(tilde[1:], process.posterior_variance[1:])
    assert tilde[0] == tilde[1]
    table = torch.arange(1.0, 7.0, dtype=torch.float64)
    assert torch.equal(variance_table(process, GivenVariance(table)), table)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.zeros(6), torch.full((6,), float("inf"))])
def test_bad_variances_are_refused(bad):
    with pytest.raises(ConfigError, match="sigma2"):
        variance_table(DiscreteProcess.linear(6), GivenVariance(bad.double()))


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="sigma2: 'given'"):
        variance_named("given")


def test_beta_tilde_needs_a_second_step():
    with pytest.raises(ConfigError, match="num_timesteps >= 2"):
        variance_table(DiscreteProcess.linear(1), variance_named("beta_tilde"))
