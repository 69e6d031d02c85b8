"""Which rows of a data set are held out of its training, to validate on: a function of how many rows it has."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
# The usual share and number.
_EVERY, _MOST = 20, 10_000
# 2^16 divided by the golden ratio: its multiples modulo 2^16 are spread more evenly than any others.
_TURN, _CIRCLE = 40503, 2**16


@dataclass(frozen=True)
class HoldOut:
    """One row of every `every` neighbours, and so a share of every class of a data set that is sorted by class.

    Its place among them moves from each group to the next, so that data which repeat themselves are held out evenly
    too. Rows after the last whole group are trained on.

    Attributes:
        num_rows: N, rows of the data set.
        every: Rows of a group, at least 2; 0 holds out none.
    """

    num_rows: int
    every: int = 0

    @classmethod
    def usual(cls, num_rows: int) -> "HoldOut":
        """One row of 20, or of more so that at most 10,000 are held out; none of fewer than 20 rows."""
        every = max(_EVERY, -(-num_rows // _MOST))
        return cls(num_rows, every if num_rows >= every else 0)

    @cached_property
    def ids(self) -> Int64s:
        """The rows that are held out, ascending: int64 [num_rows // every]."""
        groups = np.arange(self.num_rows // self.every if self.every else 0, dtype=np.int64)
        return groups * self.every + groups * _TURN % _CIRCLE * self.every // _CIRCLE

    @property
    def num_trained(self) -> int:
        """Rows that are left to train on."""
        return self.num_rows - len(self.ids)

    def trained_below(self, bounds: Int64s) -> Int64s:
        """How many of the rows 0..bound-1 are trained on, for each of `bounds` int64 [n] in 0..N."""
        return bounds - np.searchsorted(self.ids, bounds, side="left") if self.every else bounds

    def is_trained(self, rows: Int64s) -> npt.NDArray[np.bool_]:
        """Whether each of `rows` int64 [n] is trained on."""
        return ~np.isin(rows, self.ids)

    def name_of(self, dataset_id: str) -> str:
        """What to call the held-out rows of that data set: other images than the whole of it."""
        return f"{dataset_id}/held-out/{self.every}"

    def sample(self, count: int) -> Int64s:
        """At most `count` of the held-out rows, evenly spread over them, ascending."""
        count = min(count, len(self.ids))
        return self.ids[np.arange(count) * len(self.ids) // max(count, 1)]
