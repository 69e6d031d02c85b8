"""Processes of every kind, for laws that hold under any (alpha, sigma)."""

import torch
from hypothesis import strategies as st

from ddpm_core.process.discrete import DiscreteProcess

T = 60
_LINEAR = DiscreteProcess.linear(T, 1e-3, 0.25)
_SHARE = torch.linspace(0.005, 0.98, T, dtype=torch.float64)
PROCESSES = {
    "preserving": DiscreteProcess.from_alpha_sigma(_LINEAR.alpha, _LINEAR.sigma),
    # Song 2021, score SDE, sec. 3.4.
    "exploding": DiscreteProcess.from_alpha_sigma(
        torch.ones(T, dtype=torch.float64), torch.logspace(-2, 1, T, dtype=torch.float64)
    ),
    # Straight from the image to the noise (Lipman 2023, flow matching, eq. 22): neither.
    "straight": DiscreteProcess.from_alpha_sigma(1 - _SHARE, _SHARE),
}
# By which the tests that z_t's unit does not matter multiply it, t by t.
SCALES = 0.5 + 2.0 * torch.rand(T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rescaled(process: DiscreteProcess) -> DiscreteProcess:
    """The same process of T steps with z_t times SCALES[t]."""
    return DiscreteProcess.from_alpha_sigma(process.alpha * SCALES, process.sigma * SCALES)


@st.composite
def random_tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of 3..12 times, each time with any alpha and a log-SNR below the one before."""
    gaps = draw(st.lists(st.floats(1e-3, 4.0), min_size=3, max_size=12))
    log_snr = draw(st.floats(-2.0, 12.0)) - torch.tensor(gaps, dtype=torch.float64).cumsum(0)
    sizes = st.lists(st.floats(0.05, 20.0), min_size=len(gaps), max_size=len(gaps))
    alpha = torch.tensor(draw(sizes), dtype=torch.float64)
    return alpha, alpha * (-0.5 * log_snr).exp()
