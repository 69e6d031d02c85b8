"""Kingma 2021 (VDM), secs. 3.2 and 5.1, apps. H and I.2: gamma linear, and gamma learned with pinned ends."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.errors import ConfigError
from ddpm_core.process.gamma import LearnedGamma, LinearGamma

U = torch.linspace(0, 1, 33, dtype=torch.float64)


def learned(seed=0, **arguments):
    torch.manual_seed(seed)
    return LearnedGamma(**{"gamma_min": -13.3, "gamma_max": 5.0, **arguments})


def by_hand(schedule, u):
    """l_1(u) + l_3(2 sigmoid(l_2(2u - 1)) - 1) / width with weights |w|, pinned, in numpy (Kingma 2021, app. H)."""
    w1, w2, b2, w3 = (p.detach().double().numpy() for n, p in schedule.named_parameters() if n not in ("low", "high"))

    def f(at):
        hidden = 2 / (1 + np.exp(-(np.abs(w2) * (2 * at - 1) + b2))) - 1
        return float(np.abs(w1[0]) * at + (np.abs(w3) * hidden).sum() / len(w3))

    return np.array([-13.3 + 18.3 * (f(at) - f(0.0)) / (f(1.0) - f(0.0)) for at in u.tolist()])


def test_linear_gamma_is_uniform_in_log_snr():
    gamma, slope = LinearGamma(-13.3, 5.0)(U)
    torch.testing.assert_close(gamma, -13.3 + 18.3 * U, rtol=0, atol=1e-14)
    assert gamma[0] == -13.3
    assert gamma[-1] == 5.0
    assert torch.equal(slope, torch.ones_like(U))


def test_learned_gamma_is_the_pinned_monotone_network():
    schedule = learned()
    gamma, slope = schedule(U)
    np.testing.assert_allclose(gamma.detach().numpy(), by_hand(schedule, U), rtol=1e-12, atol=1e-12)
    # The normalised derivative, of which the integral over [0, 1] is 1 whatever the weights.
    inner = U[1:-1].clone().requires_grad_()
    (of_autograd,) = torch.autograd.grad(schedule(inner)[0].sum(), inner)
    torch.testing.assert_close(slope[1:-1] * 18.3, of_autograd, rtol=1e-10, atol=0)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    at = torch.tensor(nodes / 2 + 0.5)
    assert float((schedule(at)[1].detach() * torch.tensor(weights / 2)).sum()) == pytest.approx(1.0, abs=1e-9)


@given(
    st.integers(0, 10**6), st.floats(0.0, 6.0), st.floats(-3.0, 1.0), st.floats(-60.0, 20.0), st.floats(0.1, 40.0),
    st.integers(1, 70),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_snr_strictly_falls_and_the_ends_are_exact_for_any_weights(seed, size, log_first, low, span, count):
    """Kingma 2021, sec. 3.2: gamma rises strictly, from gamma_0 == gamma(0) to gamma_1 == gamma(1), in any batch."""
    schedule = learned(seed, gamma_min=low, gamma_max=low + span)
    with torch.no_grad():
        schedule.weight_1.fill_(-(10.0**log_first))  # a sign does not matter
        for parameter in (schedule.weight_2, schedule.bias_2, schedule.weight_3):
            parameter.mul_(size)
    u = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    gamma, slope = schedule(u)
    assert gamma[0] == low
    assert gamma[-1] == low + span
    assert bool((gamma.diff() > 0).all())
    assert bool((slope > 0).all())
    # An end alone is what it is among others.
    assert schedule(u[-1:])[0] == low + span
    assert schedule(u[:1])[0] == low


@pytest.mark.parametrize("learned_ends", [False, True])
def test_pinned_ends_stay_exact_while_the_interior_learns(learned_ends):
    """500 steps of Adam on whatever moves the shape; the published code, not pinned, drifts."""
    schedule = learned(learned_ends=learned_ends)
    before = schedule(U)[0].detach()
    ends = [float(end.detach()) for end in schedule.ends()]
    optimizer = torch.optim.Adam([p for n, p in schedule.named_parameters() if n not in ("low", "high")], lr=1e-2)
    wanted = -13.3 + 18.3 * U**2
    for _ in range(500):
        gamma, _ = schedule(U)
        optimizer.zero_grad()
        (gamma - wanted).square().mean().backward()
        optimizer.step()
    gamma = schedule(U)[0].detach()
    assert [float(gamma[0]), float(gamma[-1])] == ends
    assert float((gamma - wanted).abs().max()) < 0.3 * float((before - wanted).abs().max())
    assert bool((gamma.diff() > 0).all())


def test_ends_are_parameters_only_where_they_are_learned():
    assert {name for name, _ in learned().named_parameters()} == {"weight_1", "weight_2", "bias_2", "weight_3"}
    schedule = learned(learned_ends=True)
    assert {"low", "high"} <= {name for name, _ in schedule.named_parameters()}
    gamma, _ = schedule(torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    # d gamma / d gamma_0 = 1 - s, d gamma / d gamma_1 = s.
    s = float(schedule.shape(torch.tensor([0.25], dtype=torch.float64))[0])
    gamma[1].backward()
    assert float(schedule.low.grad) == pytest.approx(1 - s, rel=1e-6)
    assert float(schedule.high.grad) == pytest.approx(s, rel=1e-6)


@pytest.mark.parametrize("kind", [LinearGamma, LearnedGamma])
@pytest.mark.parametrize(
    ("low", "high", "match"),
    [
        (5.0, -13.3, r"^schedule\.gamma_min: 5\.0 is not below gamma_max = -13\.3"),
        (1.0, 1.0, r"^schedule\.gamma_min: 1\.0 is not below"),
        (-81.0, 5.0, r"^schedule\.gamma_min: -81\.0 is not in"),
        (-13.3, math.inf, r"^schedule\.gamma_max: inf is not in"),
        (math.nan, 5.0, r"^schedule\.gamma_min: nan is not in"),
    ],
)
def test_bad_ends_are_refused(kind, low, high, match):
    with pytest.raises(ConfigError, match=match):
        kind(low, high)
