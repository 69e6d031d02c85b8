"""One kind of output: what it is called, where its shards lie, and how it is checked from its bytes."""

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pyarrow.parquet as pq

from pipelines.outputs.request import Request
from pipelines.outputs.shards import Compute, ShardedOutput
from pipelines.storage.location import Location

R = TypeVar("R", bound=Request)
Manifest = Mapping[str, Any]


@dataclass
class Findings:
    """What a check finds: (name, value) rows for a summary, and one line for everything that is off."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OutputKind(Generic[R]):
    """How one kind of output is named, read, checked and made again.

    Attributes:
        format: Names the kind in manifests.
        version: Of the format, in new manifests.
        title: For a person.
        request: What it answers.
        ids: Of one shard's rows, from the shard's content.
        order: Which ids all shards together must hold.
        check: Adds what this kind has beside its shards.
        factory: Makes shards again, with so many CPU threads each; None where a shard alone cannot be.
        instead: Where there is no factory, how the user compares an output with its source.
        directory: Takes the shards.
        passes: Further directories of shards, see `ShardedOutput`.
        scratch: Further files, see `ShardedOutput`.
    """

    format: str
    version: int
    title: str
    request: type[R]
    ids: Callable[[R, bytes], Iterable[int]]
    order: Callable[[R, Manifest], Sequence[int]]
    check: Callable[[Location, R, Manifest, Findings], None]
    factory: Callable[[Location, R, Manifest, int], Callable[[], Compute]] | None = None
    instead: Callable[[R], str] | None = None
    directory: str = "data"
    passes: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()

    def output(self, location: Location, request: R) -> ShardedOutput:
        """The output of this kind at `location` that answers `request`."""
        return ShardedOutput(location, request.to_json(), self.directory, self.passes, self.scratch)


def parquet_ids(content: bytes) -> list[int]:
    """The column `id` of a shard."""
    ids: list[int] = pq.read_table(io.BytesIO(content), columns=["id"], use_threads=False)["id"].to_pylist()
    return ids


def dense_ids(manifest: Manifest) -> range:
    """0, 1, ..., one for each row of the shards."""
    return range(sum(shard["rows"] for shard in manifest["shards"]))


def check_parts(directory: Location, parts: Iterable[Mapping[str, Any]], found: Findings) -> None:
    """Whether the objects that a manifest lists beside the shards are there with their recorded sha256."""
    for part in parts:
        path = directory / part["name"]
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != part["sha256"]:
            found.problems.append(f"{path}: is missing, or its sha256 is not the recorded one")


def size_row(manifest: Manifest) -> tuple[str, str]:
    """How much was checked."""
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 2**20
    return "checked", f"{manifest['num_rows']:,} images in {len(manifest['shards']):,} shards, {size:,.1f} MiB"
