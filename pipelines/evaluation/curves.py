"""Means over all evaluations at the same time of the forward process: the curves of the report and of MLflow."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_core.process.base import Process
from ddpm_core.process.continuous import continuous
from ddpm_core.process.discrete import DiscreteProcess

Floats = npt.NDArray[np.float64]
# Of continuous time: equal parts of the range of log-SNR.
NUM_BINS = 64


@dataclass(frozen=True)
class Curve:
    """Over the n times that were evaluated at all.

    Attributes:
        t: int64 [n], time steps; None for continuous time.
        log_snr: float64 [n], at these steps, or in the middle of equal parts of its range.
        count: float64 [n], evaluations.
        kl: float64 [n], mean term, bits/dim: L_0 at t = 0, the KL above it; of continuous time the diffusion term for
            each unit of log-SNR.
        eps_mse: float64 [n], mean ||eps - eps_pred||^2 / D.
    """

    t: npt.NDArray[np.int64] | None
    log_snr: Floats
    count: Floats
    kl: Floats
    eps_mse: Floats

    def eps_mse_by_log_snr(self) -> dict[int, float]:
        """Means of `eps_mse` for log-SNR from k to k + 1, by k: an axis that models of all kinds have in common."""
        finite = np.isfinite(self.log_snr)  # it is -inf where the signal ends
        whole = np.floor(self.log_snr[finite]).astype(int)
        count, mse = self.count[finite], self.eps_mse[finite]
        return {int(k): float(np.average(mse[whole == k], weights=count[whole == k])) for k in np.unique(whole)}


class OverTime:
    """Sums over the evaluations at each of the n places of a process's time axis, for each half of the images."""

    def __init__(self, process: Process) -> None:
        self._process = process
        size = process.num_timesteps if isinstance(process, DiscreteProcess) else NUM_BINS
        self.count, self.kl, self.mse = (np.zeros((2, size)) for _ in range(3))

    def add(self, half: npt.NDArray[np.int64], time: Tensor, first: Tensor, terms: Tensor, mse: Tensor) -> None:
        """`time`, `terms`, `mse` [m, E] of m images, `half` [m] of them 0 or 1; L_0 is in the columns `first` [E], and
        without a place where time is continuous."""
        process, size = self._process, self.count.shape[1]
        if isinstance(process, DiscreteProcess):
            place = time
        else:
            time, terms, mse = (values[:, ~first] for values in (time, terms, mse))
            low, high = continuous(process).ends
            place = ((time - low) * (size / (high - low))).long().clamp(0, size - 1)
            terms = terms / (high - low)
        where = np.repeat(half, place.shape[1]) * size + place.reshape(-1).numpy()
        for total, values in ((self.count, torch.ones_like(mse)), (self.kl, terms), (self.mse, mse)):
            total += np.bincount(where, values.reshape(-1).numpy(), total.size).reshape(total.shape)

    def mean_eps_mse(self, half: int) -> Tensor | None:
        """[n], over one half of the images; where it has no evaluation, between the neighbouring places."""
        known = self.count[half].nonzero()[0]
        if len(known) == 0:
            return None
        values = self.mse[half, known] / self.count[half, known]
        return torch.tensor(np.interp(np.arange(self.count.shape[1]), known, values))

    @property
    def curve(self) -> Curve:
        """Over all images."""
        count, process = self.count.sum(0), self._process
        known = count.nonzero()[0]
        if isinstance(process, DiscreteProcess):
            t, log_snr = known, process.log_snr.numpy()[known]
        else:
            low, high = continuous(process).ends
            t, log_snr = None, -(low + (known + 0.5) * (high - low) / len(count))
        kl, mse = (total.sum(0)[known] / count[known] for total in (self.kl, self.mse))
        return Curve(t, log_snr, count[known], kl, mse)
