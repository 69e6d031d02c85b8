"""Loss and its variance over the batch, gradient norm and learning rate of every step; the rate between two reports."""

import time
from collections.abc import Callable

import numpy as np
import torch

from pipelines.cli.errors import NonFiniteLossError
from pipelines.training.config import TrainConfig
from pipelines.training.learner import StepResult
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports


class StepMetrics:
    """What steps have given, kept on the device until it is asked for, so that no step waits for it.

    Args:
        config: The training's.
        epoch_rows: Rows of an epoch.
        learning_rate: That of the step after so many steps.
        device: Where the steps run.
        ranks: All that train.
        reports: Where the metrics go.
    """

    def __init__(
        self,
        config: TrainConfig,
        epoch_rows: int,
        learning_rate: Callable[[int], float],
        device: torch.device,
        ranks: Ranks,
        reports: Reports,
    ) -> None:
        self._config, self._epoch_rows, self._learning_rate = config, epoch_rows, learning_rate
        self._device, self._ranks, self._reports = device, ranks, reports
        self._results: list[tuple[StepResult, float]] = []  # of the steps not yet collected, with their times
        self._began, self._began_at, self._waited = 0.0, 0, 0.0

    def start_clock(self, done: int) -> None:
        """The next rate is that of the steps from now on, after `done` steps."""
        self._began, self._began_at, self._waited = time.perf_counter(), done, 0.0

    def leave_out(self, seconds: float) -> None:
        """Time since the clock was started that is none of the steps'."""
        self._began += seconds

    def add_wait(self, seconds: float) -> None:
        """Time that a step waited for its batch."""
        self._waited += seconds

    def add(self, result: StepResult) -> None:
        """Take what a step has given."""
        self._results.append((result, time.time()))

    def is_due(self, done: int) -> bool:
        """Whether the steps are to be collected after `done` of them."""
        return self._config.is_due(self._config.tracking.every_steps, done)

    def collect(self, done: int) -> None:
        """Report the steps since the last collection, if there are any. A collective.

        Raises:
            NonFiniteLossError: A loss or a gradient norm is not finite.
        """
        if not self._results:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._began
        losses = torch.stack([result.loss for result, _ in self._results]).double()
        norms = torch.stack([result.grad_norm for result, _ in self._results]).double()
        moments = torch.stack([result.moments for result, _ in self._results])
        sums = torch.cat([losses[:, None], moments], 1)
        self._ranks.add_up(sums)
        loss_sums, mean, square = sums.unbind(1)
        table = torch.stack([loss_sums, norms, (square - mean.square()).clamp(min=0.0)]).cpu().numpy()
        first = done - len(self._results)
        _require_finite(table[:2], first)
        for offset, (loss, norm, variance) in enumerate(table.T.tolist()):
            values = {
                "train/loss": loss,
                "train/loss_variance": variance,
                "grad_norm": norm,
                "learning_rate": self._learning_rate(first + offset),
            }
            self._reports.metrics(first + offset + 1, values, self._results[offset][1])
        batch_size = self._config.batch_size
        values = {
            "epoch": done * batch_size / self._epoch_rows,
            "images_per_second": (done - self._began_at) * batch_size / seconds,
            "data_wait_seconds": self._waited,
            "data_wait_fraction": self._waited / seconds,
            "workers": self._ranks.world_size,
        }
        self._reports.metrics(done, values)
        self._results.clear()


def _require_finite(table: np.ndarray, first: int) -> None:
    """Refuse losses and gradient norms [2, n] of the steps after `first` that are not finite."""
    bad = np.flatnonzero(~np.isfinite(table).all(axis=0))
    if len(bad):
        loss, norm = table[:, bad[0]]
        raise NonFiniteLossError(
            f"step {first + int(bad[0]) + 1}: loss = {loss}, gradient norm = {norm}; nothing after the last "
            "checkpoint is kept. Lower train.learning_rate or train.grad_clip and start under a new name"
        )
