"""A rank's place among all of them, and what the ranks tell each other.

Every method is a collective: all ranks call it, in the same order, or all of them wait for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This rank's place among all of them: `rank` in 0..world_size-1. One rank alone needs no process group."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_in_order(self, parts: Sequence[tuple[int, T]]) -> list[T]:
        """The values of every rank's (place, value) pairs, in the order of their places, on every rank."""
        pairs = (pair for of_rank in self.gather(parts) for pair in of_rank)
        return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def add_up(self, values: Tensor) -> None:
        """Replace `values`, on every rank, by their sum over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)


ALONE = Ranks(0, 1)
