"""When an evaluation with a `target_halfwidth` stops."""

import math
from collections.abc import Sequence

from ddpm_core.likelihood.intervals import MeanStatistics
from pipelines.evaluation.results import half_width
from pipelines.outputs.shards import ShardRecord

# `target_halfwidth` is looked at after numbers of shards that grow by a tenth: few looks lead to few false stops.
_LOOK_GROWTH = 1.1
_MIN_IMAGES = 256


class Enough:
    """Whether the data set's mean is known to the target: asked of more and more shards.

    Args:
        target: Half of the 95% interval, bits/dim; None is never reached.
        num_rows: Size of the data set, or of the part of it that is evaluated.
    """

    def __init__(self, target: float | None, num_rows: int) -> None:
        self._target, self._num_rows = target, num_rows
        self._statistics: MeanStatistics | None = None
        self._look_at = 1

    @property
    def detail(self) -> str:
        """How well the mean is known so far."""
        if self._statistics is None:
            return ""
        half = half_width(self._statistics.data_set(self._num_rows))
        return f"{self._statistics.mean:.3f}" + ("" if half is None else f"±{half:.3f}")

    def __call__(self, records: Sequence[ShardRecord]) -> bool:
        """Called with the records of shards 0..n-1 for n = 1, 2, ...; one object for one computation."""
        found = MeanStatistics(**records[-1].extra["bits_per_dim"])
        self._statistics = self._statistics.merge(found) if self._statistics and len(records) > 1 else found
        if self._target is None or len(records) < self._look_at or self._statistics.num_images < _MIN_IMAGES:
            return False
        self._look_at = math.ceil(len(records) * _LOOK_GROWTH + 1e-9)
        half = half_width(self._statistics.data_set(self._num_rows))
        return half is not None and half <= self._target
