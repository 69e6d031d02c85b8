"""One shard: what is computed of it, the record of it, and how both are stored without harm to anything else."""

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipelines.cli.errors import StorageError
from pipelines.outputs.progress import Tell, telling
from pipelines.storage.location import Location, json_bytes

# Full names, as regular expressions.
SHARD_NAME, RECORD_NAME = r"part-\d{5,}\.[a-z]+", r"part-\d{5,}\.json"
_PREFIX = "part-"


@dataclass(frozen=True)
class ShardOutput:
    """What a compute function makes of an index: the object's content, its row count, facts for its record."""

    data: bytes
    rows: int
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard: object `name`, `rows`, `bytes`, `sha256` (hex) and the job's own `extra` facts."""

    name: str
    rows: int
    bytes: int
    sha256: str
    extra: dict[str, Any]

    @classmethod
    def read(cls, location: Location) -> "ShardRecord":
        """The record stored at `location`.

        Raises:
            StorageError: It cannot be read, or is no record.
        """
        content, names = location.read_json(), [found.name for found in fields(cls)]
        if not isinstance(content, dict) or content.keys() != set(names):
            raise StorageError(
                f"{location}: is not the record of a shard, which has {', '.join(names)}; delete it and run again"
            )
        return cls(**content)


Compute = Callable[[int], ShardOutput]


def shard_name(index: int, suffix: str) -> str:
    """Name of a shard's object: `part-00042.parquet`."""
    return f"{_PREFIX}{index:05d}{suffix}"


def records_of(into: str) -> str:
    """Where an output keeps the records of the shards in its directory `into`."""
    return f"_work/records/{into.rsplit('/', 1)[-1]}"


def recorded(path: Location) -> ShardRecord | None:
    """The record at `path`; None where what is there is none, and so nothing of a run's."""
    try:
        record = ShardRecord.read(path)
    except StorageError:
        return None
    named = isinstance(record.name, str) and re.fullmatch(SHARD_NAME, record.name)
    return record if named and record.name.partition(".")[0] == path.name.removesuffix(".json") else None


@dataclass
class Store:
    """Computes and stores one shard, its record first, then the object; returns it and the seconds it took."""

    factory: Callable[[], Compute]
    location: Location
    into: str
    suffix: str
    tell: Tell | None = None
    compute: Compute | None = None

    def __call__(self, index: int) -> tuple[ShardRecord, float]:
        """The record of shard `index`, taken over where it is there already, and the seconds that it took.

        Raises:
            StorageError: A file of somebody else's stands in its place, or the store fails.
            DDPMError: What the compute function raised.
        """
        began = time.monotonic()
        target = self.location / self.into / shard_name(index, self.suffix)
        record_at = self.location / records_of(self.into) / shard_name(index, ".json")
        recorded = record_at.exists()
        if recorded and target.exists():  # a racing run, or this one before its actor was killed
            record = ShardRecord.read(record_at)
            if target.size() == record.bytes:
                return record, 0.0
        self.compute = self.compute or self.factory()
        tell = self.tell
        listener = None if tell is None else lambda rows: tell(index, rows, time.monotonic() - began)
        with telling(listener):
            output = self.compute(index)
        sha256 = hashlib.sha256(output.data).hexdigest()
        record = ShardRecord(target.name, output.rows, len(output.data), sha256, output.extra)
        store = self._replace if recorded else self._claim  # recorded: the object was lost, or cut
        return store(target, record_at, record, output.data), time.monotonic() - began

    def _replace(self, target: Location, record_at: Location, record: ShardRecord, data: bytes) -> ShardRecord:
        record_at.write_json(asdict(record))
        target.write_bytes(data)
        return record

    def _claim(self, target: Location, record_at: Location, record: ShardRecord, data: bytes) -> ShardRecord:
        """Store what no record has named as ours yet: what else stands there is not overwritten."""
        foreign = StorageError(
            f"{target}: stands where this output's shard must be, and is not that shard; move it elsewhere and run "
            "again, or choose another output"
        )
        if target.exists() and target.read_bytes() != data and not record_at.exists():
            raise foreign
        if not record_at.create(json_bytes(asdict(record))):  # a racing run's, which has made other bytes of it
            return self._replace(target, record_at, record, data)
        if target.create(data):
            if self.into.startswith("_work/") and not record_at.exists():
                target.delete()
                raise StorageError(f"{record_at}: was removed by another run of the same request; run again")
            return record
        stored = ShardRecord.read(record_at)
        if stored == record:
            record_at.delete()
            raise foreign
        return stored  # a racing run's, which replaced ours


@dataclass
class Recompute:
    """Computes one shard and compares it with what the manifest says of it."""

    factory: Callable[[], Compute]
    directory: Location
    wanted: Mapping[int, Mapping[str, Any]]
    restore: bool
    compute: Compute | None = None

    def __call__(self, index: int) -> bool:
        """Whether shard `index` came out as the manifest says; raises what the compute function does."""
        self.compute = self.compute or self.factory()
        output, wanted = self.compute(index), self.wanted[index]
        equal = bool(hashlib.sha256(output.data).hexdigest() == wanted["sha256"])
        if equal and self.restore:
            (self.directory / wanted["name"]).write_bytes(output.data)
        return equal
