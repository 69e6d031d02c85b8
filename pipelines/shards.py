"""The engine of every bulk job: deterministic shards, computed by Ray actors, committed by one manifest.

An output is a directory or prefix:

    OUTPUT/data/part-00042.parquet     one object per shard, named by its index, replaced only by equal bytes
    OUTPUT/_work/request.json          what is being made; a run that asks for something else is refused
    OUTPUT/_work/records/data/...json  per finished shard: rows, bytes, sha256 and what the job adds
    OUTPUT/manifest.json               written last and conditionally: it exists if and only if all is there

A shard is a pure function of the request and its index. So a resumed run computes what has no record, two
racing runs write the same bytes, and planning costs O(shards).
"""

import hashlib
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from ddpm_core.errors import ClusterError, DDPMError, RequestMismatchError, StorageError
from pipelines.config import differences
from pipelines.storage import Location, json_bytes

MANIFEST = "manifest.json"
# An actor that dies on the same shard this often is killed by the shard (memory), not by its machine.
_MAX_TASK_RETRIES = 5
_RECORD_READERS = 16

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class ShardOutput:
    """What a compute function makes of an index: the object's content, its row count, facts for its record."""

    data: bytes
    rows: int
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: object `name`, `rows`, `bytes`, `sha256` (hex) and the job's own `extra` facts."""

    name: str
    rows: int
    bytes: int
    sha256: str
    extra: dict[str, Any]


@dataclass(frozen=True)
class ActorPool:
    """The Ray actors that compute shards: how many, and what each one needs.

    The size is a number, (min, max) for a pool that follows an autoscaling cluster, or None for as many as
    the CPUs of the cluster hold.
    """

    size: int | tuple[int, int] | None = None
    num_cpus: float = 1
    num_gpus: float = 0


Compute = Callable[[int], ShardOutput]


@dataclass(frozen=True)
class ShardedOutput:
    """An output directory and the request that it answers.

    Attributes:
        location: The directory or prefix.
        request: JSON values that determine every byte of the output. A change of any of them is refused.
    """

    location: Location
    request: Mapping[str, Any]

    @property
    def work(self) -> Location:
        """Where everything lies that is removed after the commit."""
        return self.location / "_work"

    def committed(self) -> dict[str, Any] | None:
        """The manifest if the output is complete, None if it is not.

        Raises:
            RequestMismatchError: It is complete, and answers another request.
        """
        manifest = self.location / MANIFEST
        if not manifest.exists():
            return None
        content: dict[str, Any] = manifest.read_json()
        self._refuse_difference("holds a finished output", content.get("request"), self.request)
        self._clean_up()  # after a run that was killed between its commit and its cleaning up
        return content

    def begin(self, **pinned: Any) -> None:
        """Claim the location for this request, or join an unfinished run of the same request.

        Args:
            pinned: Further JSON values that an unfinished run must agree on, such as a source's fingerprint.

        Raises:
            RequestMismatchError: An unfinished run has another request or other pinned values.
        """
        request = {**self.request, **pinned}
        stored = self.work / "request.json"
        if not stored.create(json_bytes(request)):
            self._refuse_difference("holds an unfinished output", stored.read_json(), request)

    def compute(
        self,
        factory: Callable[[], Compute],
        num_shards: int,
        *,
        into: str = "data",
        suffix: str = ".parquet",
        pool: ActorPool | None = None,
        on_progress: Progress | None = None,
    ) -> list[ShardRecord]:
        """Compute the shards that are not there and return the records of all, in order.

        Args:
            factory: Picklable; called once per actor, gives the function from index to `ShardOutput`.
            num_shards: Indices are 0..num_shards-1.
            into: Directory below the location that takes the shards.
            suffix: Ending of the objects' names.
            pool: The actors; None computes in this process, one shard after the other.
            on_progress: Called with (shards done, shards in all, rows done), first for what was found.

        Raises:
            DDPMError: What the compute function raised: it ends the computation at once.
            ClusterError: Ray gave up.
        """
        found = self._finished(num_shards, into, suffix)
        rows = sum(record.rows for record in found.values())
        missing = [index for index in range(num_shards) if index not in found]
        worker = _ShardWorker(factory, self.location, into, suffix)
        _report(on_progress, len(found), num_shards, rows)
        for index, record in _results(worker, missing, pool):
            found[index] = record
            rows += record.rows
            _report(on_progress, len(found), num_shards, rows)
        return [found[index] for index in range(num_shards)]

    def commit(self, fields: Mapping[str, Any], records: Sequence[ShardRecord]) -> dict[str, Any]:
        """Write the manifest (`fields`, `request`, `shards`), once, and remove the work directory.

        Every `extra` fact of a record becomes a field of its shard's entry.

        Raises:
            StorageError: A racing run of the same request committed other content.
        """
        shards = []
        for record in records:
            entry = asdict(record)
            shards.append({**entry.pop("extra"), **entry})
        manifest = {**fields, "request": dict(self.request), "shards": shards}
        (self.location / "data").discard_temporaries()
        if not (self.location / MANIFEST).create(json_bytes(manifest)):
            raise StorageError(
                f"{self.location / MANIFEST}: another run committed different content at the same time; "
                "are both using the same version of this software? Delete the output to start over"
            )
        self._clean_up()
        return manifest

    def _clean_up(self) -> None:
        """Remove the work directory of a complete output; what cannot be removed now does no harm."""
        with suppress(StorageError):  # a racing run is still writing there, or this user may only read
            self.work.delete_tree()

    def _finished(self, num_shards: int, into: str, suffix: str) -> dict[int, ShardRecord]:
        """Records of the shards whose object is there, with the recorded size; read concurrently."""
        records = _records(self.location, into)
        present = set(records.list())
        indices = [index for index in range(num_shards) if shard_name(index, ".json") in present]
        if not indices:
            return {}
        sizes = (self.location / into).sizes()
        with ThreadPoolExecutor(_RECORD_READERS) as readers:
            read = readers.map(lambda index: (records / shard_name(index, ".json")).read_json(), indices)
            found = {index: ShardRecord(**content) for index, content in zip(indices, read, strict=True)}
        return {index: record for index, record in found.items() if sizes.get(record.name) == record.bytes}

    def _refuse_difference(self, what: str, stored: Any, given: Mapping[str, Any]) -> None:
        differing = differences(stored, dict(given))
        if differing:
            raise RequestMismatchError(
                f"{self.location}: {what} of another request ({'; '.join(differing)}); "
                "ask for the same, choose another output, or delete it to start over"
            )


def shard_name(index: int, suffix: str) -> str:
    """Name of a shard's object: `part-00042.parquet`."""
    return f"part-{index:05d}{suffix}"


def _records(location: Location, into: str) -> Location:
    return location / "_work" / "records" / into.rsplit("/", 1)[-1]


def _report(on_progress: Progress | None, done: int, total: int, rows: int) -> None:
    if on_progress is not None:
        on_progress(done, total, rows)


@dataclass
class _ShardWorker:
    """Computes and stores one shard: the object first, its record when the object is there."""

    factory: Callable[[], Compute]
    location: Location
    into: str
    suffix: str
    compute: Compute | None = None

    def __call__(self, index: int) -> ShardRecord:
        if self.compute is None:
            self.compute = self.factory()
        output = self.compute(index)
        name = shard_name(index, self.suffix)
        sha256 = hashlib.sha256(output.data).hexdigest()
        record = ShardRecord(name, output.rows, len(output.data), sha256, output.extra)
        (self.location / self.into / name).write_bytes(output.data)
        (_records(self.location, self.into) / shard_name(index, ".json")).write_json(asdict(record))
        return record


class _ShardActor:
    """What Ray Data runs. An exception travels as a value, so that it arrives unchanged and is not retried."""

    def __init__(self, worker: _ShardWorker) -> None:
        self._worker = worker

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        results = []
        for index in batch["item"]:
            try:
                result: Any = (int(index), self._worker(int(index)))
            except DDPMError as error:
                result = error
            except Exception as error:  # noqa: BLE001  a defect: reported by the driver with its trace
                trace = "".join(traceback.format_exception(error))
                result = RuntimeError(f"{type(error).__name__} in shard {index}: {error}\n{trace}")
            results.append(pickle.dumps(result))
        return {"result": results}


def _results(worker: _ShardWorker, missing: list[int], pool: ActorPool | None) -> Iterator[tuple[int, ShardRecord]]:
    """Index and record of each missing shard, in the order of completion."""
    if not missing:
        return
    if pool is None:
        for index in missing:
            yield index, worker(index)
        return
    import ray.data  # here: a run with nothing to compute, or in-process, must not pay seconds for it
    from ray.exceptions import RayError

    from pipelines.cluster import connect

    if not ray.is_initialized():
        connect()
    size = pool.size or max(1, int(ray.cluster_resources().get("CPU", 1) // max(pool.num_cpus, 1)))
    low, high = size if isinstance(size, tuple) else (size, size)
    high = min(high, len(missing))
    # One block per shard: a block is what Ray schedules, retries and counts against its back-pressure.
    shards = ray.data.from_items(missing, override_num_blocks=len(missing))
    shards.context.enable_progress_bars = False
    shards.context.print_on_execution_start = False
    with warnings.catch_warnings():
        # Ray 2.60 announces another spelling of max_task_retries but has none yet.
        warnings.filterwarnings("ignore", message=".*ray_remote_args", category=DeprecationWarning)
        computed = shards.map_batches(
            _ShardActor,
            fn_constructor_args=(worker,),
            batch_size=1,
            concurrency=(min(low, high), high),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            max_task_retries=_MAX_TASK_RETRIES,
        )
    try:
        batch: Any
        for batch in computed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for pickled in batch["result"].to_pylist():
                # Written by our own actor a moment ago, over Ray's authenticated channels.
                result = pickle.loads(pickled)
                if isinstance(result, Exception):
                    raise result
                yield result
    except RayError as error:
        raise ClusterError(
            f"{worker.location}: Ray gave up computing shards ({_ray_reason(error)}); "
            "look for workers killed by the memory limit, then run again: finished shards are kept"
        ) from error


def _ray_reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
