"""Which times training draws: Nichol and Dhariwal 2021, sec. 3.3 (importance); Kingma 2021, VDM, app. I.1 (even);
Karras 2022, EDM, table 1 (log-normal)."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ddpm_core.errors import ConfigError
from ddpm_core.objectives.times import HISTORY, ImportanceTimes, LogNormalTimes, SteppedTimes, UniformTimes
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess

T = 6
PROCESS = DiscreteProcess.linear(T, 0.05, 0.3)
VDM = ContinuousProcess.linear()
EVEN = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096


def taught(batches):
    times = ImportanceTimes(PROCESS)
    for t, values in batches:
        times.observe(torch.tensor(t), torch.tensor(values, dtype=torch.float32))
    return times


def full(levels):
    """Each t has ten losses, of the given size and alternating around it by a tenth."""
    return taught([(list(range(T)), [v * (1 + 0.1 * (-1) ** k) for v in levels]) for k in range(HISTORY)])


def test_uniform_until_every_t_has_ten_losses():
    assert HISTORY == 10
    nearly = [(list(range(T)), [5.0] * T)] * 9 + [(list(range(T - 1)), [9.0] * (T - 1))]
    times = taught(nearly)
    for found in (ImportanceTimes(PROCESS), times):
        assert torch.equal(found.probabilities, torch.full((T,), 1 / T, dtype=torch.float64))
        t, weight = found.draw(EVEN)
        assert t.bincount(minlength=T).tolist() == pytest.approx([4096 / T] * T, abs=1)
        torch.testing.assert_close(weight, torch.ones_like(weight))
    times.observe(torch.tensor([T - 1]), torch.tensor([90.0]))
    assert not torch.equal(times.probabilities, torch.full((T,), 1 / T, dtype=torch.float64))


def test_then_in_proportion_to_the_root_mean_square_with_a_floor():
    """Nichol and Dhariwal 2021, eq. 18, mixed with 0.001 uniform."""
    levels = [0.0, 1.0, 2.0, 3.0, 4.0, 10.0]
    times = full(levels)
    squares = [sum((v * (1 + 0.1 * (-1) ** k)) ** 2 for k in range(10)) / 10 for v in levels]
    total = sum(s**0.5 for s in squares)
    expected = [0.999 * s**0.5 / total + 0.001 / T for s in squares]
    assert times.probabilities.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(times.probabilities.sum()) == pytest.approx(1.0)
    t, weight = times.draw(EVEN)
    assert t.bincount(minlength=T).tolist() == pytest.approx([4096 * p for p in expected], abs=1.5)
    # A t whose losses were 0 is drawn one time in 6000, and counts 1000 times.
    t, weight = times.draw(torch.tensor([1e-9], dtype=torch.float64))
    assert (int(t), float(weight)) == (0, pytest.approx(1000.0))


@given(st.lists(st.floats(0, 1e4), min_size=T, max_size=T))
@settings(max_examples=40, deadline=None)
def test_weights_make_the_mean_that_of_uniform_times(levels):
    """sum_t p_t w_t loss_t = mean_t loss_t, for any losses; no weight is above 1000, however small its p_t."""
    times = full(levels)
    p = times.probabilities
    inner = (p.cumsum(0) - p / 2).clamp(max=1 - 1e-12)
    t, weight = times.draw(inner)
    assert t.tolist() == list(range(T))
    loss = torch.linspace(1, 7, T, dtype=torch.float64).square()
    assert float((p * weight.double() * loss).sum()) == pytest.approx(float(loss.mean()), rel=1e-6)
    assert float(p.min()) >= 0.001 / T * (1 - 1e-12)
    assert float(weight.max()) <= 1000.001


@given(st.lists(st.lists(st.tuples(st.integers(0, T - 1), st.floats(0, 100, width=32)), max_size=25), max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_history_is_of_the_last_ten_in_the_order_of_the_rows(batches):
    times, last = ImportanceTimes(PROCESS), defaultdict(list)
    for batch in batches:
        if not batch:
            continue
        times.observe(torch.tensor([t for t, _ in batch]), torch.tensor([v for _, v in batch], dtype=torch.float32))
        for t, value in batch:
            last[t] = [*last[t], value][-HISTORY:]
    assert times.count.tolist() == [len(last[t]) for t in range(T)]
    for t in range(T):
        assert times.history[t].tolist() == [0.0] * (HISTORY - len(last[t])) + last[t]


def test_the_history_is_the_state():
    """Restored, it draws the same bits; without it, other times: a resume that began anew would show."""
    times, again = full([1.0, 2.0, 3.0, 1.0, 8.0, 2.0]), ImportanceTimes(PROCESS)
    assert set(times.state_dict()) == {"history", "count"}
    again.load_state_dict({name: value.clone() for name, value in times.state_dict().items()})
    for found in (times, again):
        found.observe(torch.tensor([4, 0, 4]), torch.tensor([1.5, 0.5, 2.5]))
    assert torch.equal(again.history, times.history)
    (t, weight), (t_again, weight_again) = times.draw(EVEN), again.draw(EVEN)
    assert torch.equal(t, t_again)
    assert torch.equal(weight, weight_again)
    assert not torch.equal(t, ImportanceTimes(PROCESS).draw(EVEN)[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        ImportanceTimes(DiscreteProcess.linear(T + 1)).load_state_dict(times.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        UniformTimes(PROCESS).load_state_dict(times.state_dict())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_no_number_makes_no_probability_one(value):
    times = full([1.0] * T)
    times.observe(torch.tensor([2]), torch.tensor([value]))
    assert torch.equal(times.probabilities, torch.full((T,), 1 / T, dtype=torch.float64))
    assert bool(times.draw(EVEN)[1].isfinite().all())
    # It is forgotten with the others.
    times.observe(torch.tensor([2] * HISTORY), torch.ones(HISTORY))
    assert bool(times.probabilities.isfinite().all())
    assert not times.draw(EVEN)[0].eq(2).all()


def test_uniform_times_are_those_of_the_process():
    t, weight = UniformTimes(PROCESS).draw(EVEN)
    assert torch.equal(t, PROCESS.draw(EVEN))
    assert weight is None
    assert not UniformTimes(PROCESS).even
    assert UniformTimes(VDM, even=True).even
    for kind in (UniformTimes(PROCESS), UniformTimes(VDM)):
        assert not kind.state_dict()
        assert not kind.remembers


def test_over_a_learned_gamma_uniform_times_are_weighted_back_to_uniform_in_gamma():
    """E_u[gamma'(u) f(gamma(u))] = integral of f over gamma, whatever the shape (Kingma 2021, eq. 17)."""
    torch.manual_seed(3)
    gamma, weight = UniformTimes(ContinuousProcess.learned(-3.0, 5.0)).draw(EVEN)
    found = float((weight * torch.sin(gamma)).mean().detach())
    assert found == pytest.approx((math.cos(-3.0) - math.cos(5.0)) / 8, abs=1e-5)


@pytest.mark.parametrize("num_timesteps", [1, 7, 50])
def test_stepped_times_are_the_bound_of_t_steps(num_timesteps):
    """Kingma 2021, eq. 14: T / 2 expm1(gamma_i - gamma_{i-1}) at gamma(i / T), i uniform in 1..T."""
    torch.manual_seed(1)
    for process in (VDM, ContinuousProcess.learned(-13.3, 5.0)):
        times = SteppedTimes(process, num_timesteps)
        places = (torch.arange(num_timesteps, dtype=torch.float64) + 0.3) / num_timesteps
        gamma, weight = times.draw(places)
        edges = process.gamma(torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps)
        torch.testing.assert_close(gamma, edges[1:])
        expected = num_timesteps * torch.expm1(edges.diff()) / 18.3
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=0)
        assert float(gamma[-1]) == 5.0
    assert float(SteppedTimes(VDM, 1).draw(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))[0][1]) == 5.0
    with pytest.raises(ConfigError, match=r"^vlb_timesteps: 0 is not >= 1"):
        SteppedTimes(VDM, 0)


@pytest.mark.parametrize("process", [ContinuousProcess.edm(), VDM], ids=["edm", "vdm"])
def test_log_normal_times_have_the_quantiles_of_table_1(process):
    """Karras 2022, table 1: ln sigma ~ N(-1.2, 1.2^2) of sigma / alpha, kept between the ends of the process."""
    gamma, weight = LogNormalTimes(process).draw(EVEN)
    assert weight is None
    marginal = process.at(gamma)
    log_sigma = (marginal.sigma / marginal.alpha).log().flatten()
    low, high = (end / 2 for end in process.ends)
    expected = torch.tensor(stats.norm.ppf(EVEN.numpy(), -1.2, 1.2)).clamp(low, high)
    torch.testing.assert_close(log_sigma, expected, rtol=1e-9, atol=1e-9)
    extreme, _ = LogNormalTimes(process).draw(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert (float(extreme[0]), float(extreme[1])) == process.ends or float(extreme[1]) == pytest.approx(17.4, abs=0.3)
