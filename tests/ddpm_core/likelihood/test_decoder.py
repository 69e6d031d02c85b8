"""Ho 2020, eq. 13, the discretised Gaussian, and Kingma 2021, VDM, eq. 8, the softmax: 60-digit arithmetic."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.likelihood.decoder import decoder_nll_nats, softmax_nll_nats


def test_decoder_equals_the_reference(reference):
    """Ho 2020, eq. 13, in the middle, at the open ends and where a float32 CDF difference is 0."""
    for case in reference["decoder"]:
        level = torch.tensor([case["level"]], dtype=torch.uint8)
        mean = torch.tensor([case["mean"]], dtype=torch.float64)
        assert float(decoder_nll_nats(level, mean, case["sigma"])) == pytest.approx(case["nll_nats"], rel=1e-9)


@given(st.integers(0, 255), st.floats(-1.5, 1.5), st.floats(1e-3, 1.0))
@settings(max_examples=200, deadline=None)
def test_decoder_equals_60_digit_arithmetic(level, mean, sigma):
    with mpmath.workdps(60):
        x, half = mpmath.mpf(level) / mpmath.mpf("127.5") - 1, mpmath.mpf(1) / 255

        def upper_tail(z):
            return mpmath.erfc(z / mpmath.sqrt(2)) / 2

        below = (x - half - mpmath.mpf(mean)) / mpmath.mpf(sigma)
        above = (x + half - mpmath.mpf(mean)) / mpmath.mpf(sigma)
        if level == 0:
            mass = upper_tail(-above)
        elif level == 255:
            mass = upper_tail(below)
        else:
            mass = upper_tail(below) - upper_tail(above) if below > 0 else upper_tail(-above) - upper_tail(-below)
        expected = float(-mpmath.log(mass))
    found = decoder_nll_nats(torch.tensor([level], dtype=torch.uint8), torch.tensor([mean], dtype=torch.float64), sigma)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(st.floats(-1.2, 1.2), st.floats(1e-3, 2.0))
@settings(max_examples=50, deadline=None)
def test_decoder_masses_sum_to_one(mean, sigma):
    levels = torch.arange(256).to(torch.uint8)
    nll = decoder_nll_nats(levels, torch.full((256,), mean, dtype=torch.float64), sigma)
    assert float((-nll).exp().sum()) == pytest.approx(1.0, abs=1e-12)


def softmax_nll_by_hand(level, xbar, log_snr):
    """-ln of exp(-(xbar - x_k)^2 SNR / 2) over the sum of all 256, in 60 digits."""
    with mpmath.workdps(60):
        snr = mpmath.exp(log_snr)
        exponents = [-((xbar - (mpmath.mpf(k) / mpmath.mpf("127.5") - 1)) ** 2) * snr / 2 for k in range(256)]
        return float(mpmath.log(mpmath.fsum(mpmath.exp(e - exponents[level]) for e in exponents)))


@given(st.integers(0, 255), st.floats(-3.0, 3.0), st.floats(-5.0, 20.0))
@settings(max_examples=25, deadline=None)
def test_the_softmax_decoder_is_exact(level, noise, log_snr):
    """Kingma 2021, VDM, eq. 8, at z_0 / alpha_0 = x + noise / sqrt(SNR): from one that knows nothing to one that cannot
    err, where the likelihood's few digits after 1 count."""
    x = level / 127.5 - 1.0
    xbar = torch.tensor([x + noise * math.exp(-log_snr / 2)], dtype=torch.float64)
    found = softmax_nll_nats(
        torch.tensor([level], dtype=torch.uint8), xbar, torch.tensor([log_snr], dtype=torch.float64)
    )
    expected = softmax_nll_by_hand(level, float(xbar), log_snr)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_the_softmax_decoders_probabilities_add_up_to_1():
    levels = torch.arange(256).to(torch.uint8)
    for log_snr in (-5.0, 5.0, 8.0, 13.3):
        for at in (-1.4, -1.0, -0.377, 0.001, 0.5, 1.0, 3.0):
            xbar = torch.full((256,), at, dtype=torch.float64)
            nll = softmax_nll_nats(levels, xbar, torch.tensor(log_snr, dtype=torch.float64))
            assert float((-nll).exp().sum()) == pytest.approx(1.0, rel=1e-9)
            assert int(nll.argmin()) == min(255, max(0, round((at + 1) * 127.5)))


def test_the_softmax_decoders_gradient_is_that_of_finite_differences():
    """Learned ends train by it."""
    levels = torch.tensor([0, 3, 128, 255], dtype=torch.uint8)
    xbar = torch.tensor([-1.01, -0.96, 0.02, 0.99], dtype=torch.float64, requires_grad=True)
    log_snr = torch.tensor([9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: softmax_nll_nats(levels, a, b), (xbar, log_snr), atol=1e-5)


def test_a_softmax_of_nan_is_nan_and_no_error_of_another_kind():
    """A training whose weights are no numbers ends by its loss, which says so."""
    levels, log_snr = torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([5.0], dtype=torch.float64)
    found = softmax_nll_nats(levels, torch.tensor([-1.1, torch.nan], dtype=torch.float64), log_snr)
    assert found.isnan().tolist() == [False, True]
    assert softmax_nll_nats(levels, torch.zeros(2, dtype=torch.float64), log_snr * torch.nan).isnan().all()
