"""Which searches for neighbours a comparison needs, and one block of one of them: what an actor of the job does.

OUTPUT/own/part-00042.parquet        id int64, distance list<double>[K], neighbour list<int64>[K] (-1: none)
OUTPUT/neighbours/part-00042.parquet the same; where balls are counted: inside list<int32>[1 + groups]

`own` are a set's neighbours within itself, from which the radii follow that the others need.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ddpm_core.sets import NUM_GROUPS
from ddpm_core.sets.jackknife import group_of
from ddpm_core.sets.manifolds import list_length, neighbour_groups, radii
from ddpm_core.sets.neighbours import Neighbours
from pipelines.data.dataset import Int64s
from pipelines.outputs.progress import made
from pipelines.outputs.shards import ShardOutput, shard_name
from pipelines.quality.features import FeatureRows, FeatureSet
from pipelines.quality.request import ROLES_OF_MEMORY, QualityRequest, Role, Space
from pipelines.storage.location import Location

Stage = Literal["own", "neighbours"]
OWN: Final = "own"
NEIGHBOURS: Final = "neighbours"
Float64s = npt.NDArray[np.float64]
FeatureSets = Mapping[tuple[Role, Space], FeatureSet]


@dataclass(frozen=True)
class Search:
    """For each image of one role its nearest ones of a role.

    Attributes:
        queries: Whose neighbours are found.
        base: Among which; the same role leaves out the image itself.
        num_queries: How many.
        num_base: Among how many.
        space: Of the distances.
        label: Of the class that is searched by itself; None: all images.
        counts: Whether it is counted in how many balls of the base each query lies.
    """

    queries: Role
    base: Role
    num_queries: int
    num_base: int
    space: Space = "features"
    label: int | None = None
    counts: bool = False

    @property
    def stage(self) -> Stage:
        """Of which it is."""
        return OWN if self.queries == self.base else NEIGHBOURS

    def length(self, neighbours: int) -> int:
        """Of each query's list, for balls that reach to so many `neighbours`."""
        if self.stage == OWN:
            return neighbours
        if self.base == "train":
            return 2  # the nearest, and what it is compared with
        # Coverage asks for the nearest sample, also without a group.
        return list_length(1, NUM_GROUPS) if self.base == "samples" else 1


@lru_cache(maxsize=4)
def searches(request: QualityRequest, stage: Stage) -> tuple[Search, ...]:
    """All of a stage."""
    found: list[Search] = []
    worlds: list[tuple[int | None, int, int]] = [(None, len(request.samples.rows), len(request.reference.rows))]
    worlds += [(each.label, each.num_samples, each.num_reference) for each in request.classes]
    for label, samples, reference in worlds:
        if stage == OWN:
            found.append(Search("samples", "samples", samples, samples, label=label))
            found.append(Search("reference", "reference", reference, reference, label=label))
        else:
            found.append(Search("samples", "reference", samples, reference, label=label, counts=True))
            found.append(Search("reference", "samples", reference, samples, label=label, counts=True))
    if stage == NEIGHBOURS and request.train is not None and request.unseen is not None:
        train, samples, unseen = (len(request.side(role).rows) for role in ROLES_OF_MEMORY)
        for space in request.spaces:
            found.append(Search("samples", "train", samples, train, space))
            found.append(Search("unseen", "train", unseen, train, space))
    return tuple(found)


def search_of(
    request: QualityRequest, queries: Role, base: Role, label: int | None, space: Space = "features"
) -> Search:
    """The search for the neighbours of one role among a role."""
    wanted, found = (queries, base, label, space), searches(request, OWN if queries == base else NEIGHBOURS)
    return next(each for each in found if (each.queries, each.base, each.label, each.space) == wanted)


class Part(NamedTuple):
    """A block of a search: queries start..stop-1 of the role's rows."""

    search: Search
    start: int
    stop: int
    dimensions: int

    @property
    def num_pairs(self) -> int:
        """Distances that are screened."""
        return (self.stop - self.start) * self.search.num_base

    @property
    def multiplications(self) -> float:
        """Of these."""
        return float(self.num_pairs) * self.dimensions


@lru_cache(maxsize=4)
def parts(request: QualityRequest, stage: Stage) -> tuple[Part, ...]:
    """Everything that a stage computes, by index."""
    size = request.block_size
    return tuple(
        Part(search, start, min(start + size, search.num_queries), request.dimensions(search.space))
        for search in searches(request, stage)
        for start in range(0, search.num_queries, size)
    )


class Sides:
    """The rows of every role and class, and their groups; what was asked once is kept."""

    def __init__(self, request: QualityRequest, sets: FeatureSets) -> None:
        self.request, self.sets = request, sets
        self._rows: dict[tuple[Role, int | None], Int64s] = {}
        self._groups: dict[tuple[Role, int | None], Int64s] = {}

    def rows(self, role: Role, label: int | None = None) -> Int64s:
        """Ids of a role's images, of one class if `label` is given, ascending: int64 [n]."""
        if (role, label) not in self._rows:
            rows = self.request.side(role).rows
            if label is not None:
                rows = rows[self.sets[role, "features"].labels[rows] == label]
            self._rows[role, label] = rows
        return self._rows[role, label]

    def groups(self, role: Role, label: int | None = None) -> Int64s:
        """The group of each of `rows`, int64 [n]."""
        if (role, label) not in self._groups:
            self._groups[role, label] = group_of(len(self.rows(role, label)), NUM_GROUPS, f"quality/{role}")
        return self._groups[role, label]

    def read(self, role: Role, space: Space, rows: Int64s) -> Iterator[FeatureRows]:
        """The features of these ids, in blocks."""
        return self.sets[role, space].read(None if len(rows) == self.sets[role, space].num_rows else rows)


@dataclass(frozen=True)
class NeighbourShards:
    """Computes part `index` of a stage.

    Attributes:
        location: The output; where balls are counted, its own/ has the neighbours from which their radii follow.
        request: The comparison's.
        sets: The features.
        stage: Whose parts.
        threads: CPU threads of an actor.
    """

    location: Location
    request: QualityRequest
    sets: FeatureSets
    stage: Stage
    threads: int

    def __call__(self) -> Callable[[int], ShardOutput]:
        """The engine calls this once per actor."""
        torch.set_num_threads(self.threads)
        todo, sides = parts(self.request, self.stage), Sides(self.request, self.sets)
        radii_of = lru_cache(maxsize=1)(partial(radii_in, self.location, self.request, sides))
        return lambda index: self.compute(sides, radii_of, todo[index])

    def compute(self, sides: Sides, radii_of: Callable[[Role, int | None], Float64s], part: Part) -> ShardOutput:
        """Search the base, block by block."""
        search = part.search
        ids = sides.rows(search.queries, search.label)[part.start : part.stop]
        base = sides.rows(search.base, search.label)
        queries = np.concatenate([block.features for block in sides.read(search.queries, search.space, ids)])
        own_ids, length = ids if search.stage == OWN else None, search.length(self.request.neighbours)
        found = Neighbours(queries, length, own_ids, 1 + NUM_GROUPS if search.counts else 0)
        balls, done = radii_of(search.base, search.label) if search.counts else None, 0
        for block in sides.read(search.base, search.space, base):
            found.add(block.ids, block.features, None if balls is None else balls[done : done + len(block.ids)])
            done += len(block.ids)
            made(len(ids) * done / len(base))
        columns = {"id": ids, "distance": _lists(found.distances), "neighbour": _lists(found.ids)}
        if search.counts:
            columns["inside"] = _lists(found.inside)
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink, compression="zstd")
        return ShardOutput(sink.getvalue(), len(ids), {"search": described(search), "start": part.start})


def described(search: Search) -> str:
    """For a person.

    >>> described(Search("samples", "train", 10, 20, "pixels")), described(Search("samples", "samples", 5, 5, label=3))
    ('samples among train in pixels', 'samples among samples of label 3')
    """
    where = "" if search.space == "features" else f" in {search.space}"
    label = "" if search.label is None else f" of label {search.label}"
    return f"{search.queries} among {search.base}{label}{where}"


@dataclass(frozen=True)
class Found:
    """What a search has found: `ids` int64 [n] of the queries, `distances` float64 [n, K] ascending (inf: no more),
    `neighbours` int64 [n, K] their ids (-1: no more), `inside` int32 [n, 1 + groups] where balls are counted."""

    ids: Int64s
    distances: Float64s
    neighbours: Int64s
    inside: npt.NDArray[np.int32] | None


def found_by(location: Location, request: QualityRequest, search: Search) -> Iterator[Found]:
    """Part by part, what the output has of a search."""
    for index, part in enumerate(parts(request, search.stage)):
        if part.search == search:
            content = (location / search.stage / shard_name(index, ".parquet")).read_bytes()
            table = pq.read_table(io.BytesIO(content), use_threads=False)
            inside = _rows_of(table["inside"]) if search.counts else None
            yield Found(table["id"].to_numpy(), _rows_of(table["distance"]), _rows_of(table["neighbour"]), inside)


@dataclass(frozen=True)
class Lists:
    """All of a search: ids int64 [n], distances float64 [n, K], neighbours int64 [n, K]."""

    ids: Int64s
    distances: Float64s
    neighbours: Int64s


def lists_of(location: Location, request: QualityRequest, search: Search) -> Lists:
    """What a search has found, all of its parts."""
    found = list(found_by(location, request, search))
    ids, distances, neighbours = (
        np.concatenate([getattr(part, name) for part in found]) for name in ("ids", "distances", "neighbours")
    )
    return Lists(ids, distances, neighbours)


def radii_in(location: Location, request: QualityRequest, sides: Sides, role: Role, label: int | None) -> Float64s:
    """Of the balls around a role's images, float64 [n, 1 + groups], see `ddpm_core.sets.manifolds.radii`."""
    found = lists_of(location, request, search_of(request, role, role, label))
    return radii(found.distances, sides.groups(role, label), request.neighbours, NUM_GROUPS)


def group_of_ids(ids: Int64s, rows: Int64s, groups: Int64s) -> Int64s:
    """The groups of ids among `rows`, ascending, whose groups are given; -1 where the id is."""
    return neighbour_groups(np.where(ids < 0, -1, np.searchsorted(rows, ids)), groups)


def _lists(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """[n, K] as a column of lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _rows_of(column: pa.ChunkedArray) -> Any:
    """A column of lists as [n, K]."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
