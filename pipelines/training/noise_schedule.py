"""Pictures of the learned noise schedule, gamma = -ln SNR over t, of the EMA weights, while training and at its end."""

import io
import math
from collections.abc import Callable

import numpy as np
import torch

from ddpm_core.denoiser import Denoiser
from ddpm_core.process.continuous import ContinuousProcess, continuous
from pipelines.storage.location import Location
from pipelines.training.config import TrainConfig
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports

_DECADE = math.log(10.0)  # of gamma, over which the SNR falls to a tenth
_PLACES = 201  # of t at which the curves are drawn


class NoiseSchedule:
    """The observer that draws the schedule, as often as a grid of samples.

    Args:
        run: The run directory.
        config: The training's.
        averaged: Makes the denoiser with the averaged weights; its process has a gamma that is learned.
        ranks: All that train; rank 0 draws.
        reports: Where the picture, and the ends of gamma where they are learned, are told of.
    """

    doing = "drawing the noise schedule"

    def __init__(
        self, run: Location, config: TrainConfig, averaged: Callable[[], Denoiser], ranks: Ranks, reports: Reports
    ) -> None:
        self._run, self._config, self._averaged, self._ranks, self._reports = run, config, averaged, ranks, reports

    def is_due(self, done: int) -> bool:
        """Whether to draw it after `done` steps."""
        return self._config.is_due(self._config.grid.every_steps, done)

    def observe(self, done: int) -> None:
        """Draw the schedule after `done` steps."""
        if self._ranks.rank != 0:
            return
        process, path = continuous(self._averaged().process), self.path(done)
        if self._config.diffusion.learned_ends:
            self._reports.metrics(done, dict(zip(("gamma_0", "gamma_1"), process.ends, strict=True)))
        path.write_bytes(schedule_png(process))
        self._reports.record({"kind": "image", "key": "noise_schedule", "step": done, "path": path.uri})

    def path(self, done: int) -> Location:
        """Where the picture after `done` steps lies."""
        return self._run / "noise_schedules" / f"step-{done:08d}.png"


@torch.no_grad()
def schedule_png(process: ContinuousProcess) -> bytes:
    """A PNG of gamma over t in [0, 1], on a scale of SNR = e^-gamma too, and of how far it is from the straight line
    between its ends, which is what has been learned."""
    from matplotlib.figure import Figure  # half a second, and only where something is drawn

    t = torch.linspace(0.0, 1.0, _PLACES, dtype=torch.float64)
    gamma, straight = process.gamma(t.to(process.device)).cpu().numpy(), np.linspace(*process.ends, _PLACES)
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(t, straight, color="0.7", linestyle="--", label="straight line")
    left.plot(t, gamma, label="learned")
    left.legend(fontsize=8)
    left.set_ylabel("γ(t) = -ln SNR")
    decades = left.secondary_yaxis("right", functions=(lambda gamma: -gamma / _DECADE, lambda power: -power * _DECADE))
    decades.set_ylabel("log₁₀ SNR")
    right.axhline(0.0, color="0.7", linestyle="--")
    right.plot(t, gamma - straight)
    right.set_ylabel("γ(t) above the straight line")
    for axes in (left, right):
        axes.set_xlabel("t (0: data, 1: noise)")
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()
