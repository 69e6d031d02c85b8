"""Ho 2020, eq. 13: the discretised Gaussian, against reference values and 60-digit arithmetic."""

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.likelihood.decoder import decoder_nll_nats


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
