"""The engine of every bulk job: deterministic shards, computed by Ray actors, committed by one manifest.

An output is a directory or prefix:

    OUTPUT/data/part-00042.parquet     one object per shard, named by its index, replaced only by equal bytes
    OUTPUT/_work/request.json          what is being made; a run that asks for something else is refused
    OUTPUT/_work/owner.json            who began it, which the manifest keeps
    OUTPUT/_work/records/data/...json  per finished shard: rows, bytes, sha256 and what the job adds
    OUTPUT/manifest.json               written last and conditionally: it exists if and only if all is there

A shard is a pure function of the request and its index. So a resumed run computes what has no record, two
racing runs write the same bytes, a lost shard of a finished output is made again and must come out equal, and
planning costs O(shards).

An output begins in an empty place. A shard is recorded before it is written, and what is removed at the end is what
was recorded: files that others put in or around an output stay, and one that stands where a shard must be is refused.
"""

import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.cli.config import differences, digest
from pipelines.cli.errors import ConfigError, RequestMismatchError, StorageError
from pipelines.cluster.actor_pool import ActorPool, run_on_actors
from pipelines.outputs.manifest import MANIFEST, read_manifest
from pipelines.outputs.progress import Board, Progress, Tally
from pipelines.outputs.shard_store import (
    RECORD_NAME,
    SHARD_NAME,
    Compute,
    Recompute,
    ShardOutput,
    ShardRecord,
    Store,
    recorded,
    records_of,
    shard_name,
)
from pipelines.storage.location import Location, json_bytes
from pipelines.storage.ownership import (
    OWNER,
    begun_by,
    claim,
    delete_files,
    discard_temporaries,
    first_file,
    owner_of,
    user,
)

__all__ = ["MAX_SHARDS", "Compute", "Progress", "ShardOutput", "ShardRecord", "ShardedOutput", "shard_name"]

# The driver holds the record of every shard.
MAX_SHARDS = 1_000_000
_REQUEST = "request.json"
_RECORD_READERS = 16


def begun_request(location: Location) -> dict[str, Any]:
    """The request of the output at `location`, complete or not; empty where there is none that can be read as one."""
    manifest, begun = location / MANIFEST, location / "_work" / _REQUEST
    if manifest.exists():
        content = manifest.read_json()
        request = content.get("request") if isinstance(content, dict) else None
    else:
        request = begun.read_json() if begun.exists() else None
    return request if isinstance(request, dict) else {}


@dataclass(frozen=True)
class ShardedOutput:
    """An output directory and the request that it answers.

    Attributes:
        location: The directory or prefix.
        request: JSON values that determine every byte of the output. A change of any of them is refused.
        directory: Name of the directory in it that takes the shards.
        passes: Further directories that `compute` fills; those in `_work/` are removed after the commit.
        scratch: Names of the job's own files in `_work/`, removed after the commit.
    """

    location: Location
    request: Mapping[str, Any]
    directory: str = "data"
    passes: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()

    @property
    def shards(self) -> Location:
        """Where the shards lie."""
        return self.location / self.directory

    @property
    def work(self) -> Location:
        """Where the records lie, and what else is of no use after the commit."""
        return self.location / "_work"

    def committed(self) -> dict[str, Any] | None:
        """The manifest if the output is complete, None if it is not.

        Raises:
            ConfigError: There are files, and neither a finished output nor an unfinished one.
            RequestMismatchError: What is there, complete or not, answers another request.
        """
        manifest, begun = self.location / MANIFEST, self.work / _REQUEST
        if not manifest.exists():
            if begun.exists():
                stored = begun.read_json()
                asked = {name: stored.get(name) for name in self.request} if isinstance(stored, dict) else stored
                self._refuse_difference("holds an unfinished output", asked, self.request, owner_of(self.work))
            else:
                self._refuse_foreign_files()
            return None
        content = read_manifest(self.location)
        self._refuse_difference("holds a finished output", content["request"], self.request, content.get("owner"))
        # after a run that was killed between its commit and its cleaning up
        with suppress(StorageError):
            discard_temporaries(self.location, re.escape(MANIFEST))
        self._clean_up({shard["name"] for shard in content["shards"]})
        return content

    def begin(self, **pinned: Any) -> None:
        """Claim the location for this request, or join an unfinished run of the same request.

        Args:
            pinned: Further JSON values that an unfinished run must agree on, such as a source's fingerprint.

        Raises:
            ConfigError: The location holds files, and no run has begun there.
            RequestMismatchError: An unfinished run has another request or other pinned values.
        """
        request = {**self.request, **pinned}
        stored = self.work / _REQUEST
        if not stored.exists():
            self._refuse_foreign_files()
        if not stored.create(json_bytes(request)):
            self._refuse_difference("holds an unfinished output", stored.read_json(), request, owner_of(self.work))
        claim(self.work)

    def _refuse_foreign_files(self) -> None:
        name = first_file(self.location, f"{self.work.name}/{_REQUEST}")
        # Looked at again: another run of the request may have begun, or ended, meanwhile.
        if name is not None and not (self.work / _REQUEST).exists() and not (self.location / MANIFEST).exists():
            raise ConfigError(
                f"output = {self.location}: must be empty, or hold an unfinished run of the same request; it holds "
                f"{name!r}, which is of none; choose another place, such as a new directory in it"
            )

    def compute(
        self,
        factory: Callable[[], Compute],
        num_shards: int,
        *,
        into: str | None = None,
        suffix: str = ".parquet",
        pool: ActorPool | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        enough: Callable[[Sequence[ShardRecord]], bool] = lambda records: False,
    ) -> list[ShardRecord]:
        """Compute the shards that are not there and return the records of all, in order.

        With `enough`, the fewest that are: it is asked of the records 0..n-1 for n = 1, 2, ... as they come to be
        there, so that where it ends depends on no order of completion.

        Args:
            factory: Picklable; called once per actor, gives the function from index to `ShardOutput`.
            num_shards: Indices are 0..num_shards-1.
            into: Directory below the location that takes the shards, one of `passes`; None for `directory`.
            suffix: Ending of the objects' names.
            pool: The actors; None computes in this process, one shard after the other.
            on_progress: Called first for what was found, then as shards are made and finished; in one thread at a time.
            enough: Whether the first n records are all that is needed; shards beyond them are left to `commit`.

        Raises:
            DDPMError: What the compute function raised: it ends the computation at once.
            ClusterError: Ray gave up.
        """
        into = into or self.directory
        assert into in (self.directory, *self.passes), "what is not declared would not be removed"
        found = self.finished(num_shards, into=into, suffix=suffix)
        missing = [index for index in range(num_shards) if index not in found]
        tally = Tally(len(found), sum(record.rows for record in found.values()), num_shards, on_progress)
        board = None if pool is None else Board(uuid.uuid4().hex)
        first: list[ShardRecord] = []

        def settled() -> bool:
            while len(first) in found:
                first.append(found[len(first)])
                if enough(first):
                    return True
            return False

        if settled():
            return first
        store = Store(factory, self.location, into, suffix, board.post if board else tally.making)
        stored = run_on_actors(store, missing, pool, self.location.uri)
        with closing(stored), board.read_into(tally) if board else nullcontext():
            for index, (record, seconds) in stored:
                found[index] = record
                tally.finished(index, record.rows, seconds)
                if settled():
                    break
        return first

    def lost(self, manifest: Mapping[str, Any]) -> list[int]:
        """Indices of the shards of a complete output whose object is missing or has another size than recorded."""
        sizes = self.shards.sizes()
        return [index for index, shard in enumerate(manifest["shards"]) if sizes.get(shard["name"]) != shard["bytes"]]

    def recompute(
        self,
        factory: Callable[[], Compute],
        indices: Sequence[int],
        manifest: Mapping[str, Any],
        pool: ActorPool | None = None,
        *,
        restore: bool = False,
    ) -> Iterator[tuple[int, bool]]:
        """Compute shards of a complete output once more: yields each index and whether its bytes are the recorded ones.

        Args:
            factory: As for `compute`.
            indices: The shards.
            manifest: Of the output.
            pool: As for `compute`.
            restore: Write every shard that came out equal.

        Raises:
            DDPMError: What the compute function raised.
            ClusterError: Ray gave up.
        """
        wanted = {index: manifest["shards"][index] for index in indices}
        recomputed = Recompute(factory, self.shards, wanted, restore)
        yield from run_on_actors(recomputed, indices, pool, self.location.uri)

    def restore(
        self,
        factory: Callable[[], Compute],
        indices: Sequence[int],
        manifest: Mapping[str, Any],
        pool: ActorPool | None = None,
    ) -> None:
        """Make lost shards of a complete output again; arguments as of `recompute`.

        The manifest tells, in `made_with` (of data sets `decoded_by`) and `code_version`, what made them.

        Raises:
            StorageError: One came out different from what the manifest records.
            DDPMError: What the compute function raised.
            ClusterError: Ray gave up.
        """
        for index, equal in self.recompute(factory, indices, manifest, pool, restore=True):
            if not equal:
                path = self.shards / manifest["shards"][index]["name"]
                versions = manifest["made_with"] if "made_with" in manifest else manifest["decoded_by"]
                made_with = f"it was made with {versions}, code {manifest['code_version']}"
                raise StorageError(
                    f"{path}: is lost, and came out different when it was made again ({made_with}); use those "
                    "versions, the same input and the same kind of hardware, or another output"
                )

    def commit(self, fields: Mapping[str, Any], records: Sequence[ShardRecord]) -> dict[str, Any]:
        """Write the manifest (`fields`, `request`, `request_sha256`, `owner`, `shards`), once, and remove the work
        directory and shards that are not in it.

        Every `extra` fact of a record becomes a field of its shard's entry.

        Raises:
            StorageError: A racing run of the same request committed other content.
        """
        shards = []
        for record in records:
            entry = asdict(record)
            shards.append({**entry.pop("extra"), **entry})
        request, kept = dict(self.request), {record.name for record in records}
        given = {"request": request, "request_sha256": digest(request), "owner": self._owner()}
        manifest = {**fields, **given, "shards": shards}
        self._remove_objects(self.directory, kept)  # computed beyond what was enough
        if not (self.location / MANIFEST).create(json_bytes(manifest)):
            raise StorageError(
                f"{self.location / MANIFEST}: another run committed different content at the same time; "
                "are both using the same version of this software? Delete the output to start over"
            )
        self._clean_up(kept)
        return manifest

    def _owner(self) -> str:
        """Who began the output: of racing runs all say the same, also when another one has finished it."""
        owner = owner_of(self.work)
        if owner is None and (self.location / MANIFEST).exists():
            owner = read_manifest(self.location).get("owner")
        return owner or user()

    def _clean_up(self, kept: Collection[str]) -> None:
        """Remove what the runs of a complete output recorded or left beside its shards, named `kept`.

        What cannot be removed now does no harm.
        """
        with suppress(StorageError):  # a racing run is still writing there, or this user may only read
            if not self.work.exists():
                return
            records = self._remove_objects(self.directory, kept)
            for into in self.passes:
                if into.startswith(f"{self.work.name}/"):
                    records += self._remove_objects(into, ())
                else:
                    records += [f"{records_of(into)}/{name}" for name in self._record_names(into)]
            for into in (self.directory, *self.passes):  # only now: a racing run's are not missed any more
                discard_temporaries(self.location / into, SHARD_NAME)
                discard_temporaries(self.location / records_of(into), RECORD_NAME)
            names = (*self.scratch, OWNER, _REQUEST)
            own = [f"{self.work.name}/{name}" for name in names]
            discard_temporaries(self.work, "|".join(map(re.escape, names)))
            delete_files(self.location, [*records, *own])

    def _record_names(self, into: str) -> list[str]:
        return [name for name in (self.location / records_of(into)).list() if re.fullmatch(RECORD_NAME, name)]

    def _remove_objects(self, into: str, kept: Collection[str]) -> list[str]:
        """Remove the recorded objects in the directory `into` that are not `kept`; returns the records' paths.

        An object that is not as it was recorded is not the run's.
        """
        directory, records = self.location / into, self.location / records_of(into)
        stems = {name.partition(".")[0] for name in kept}
        names = self._record_names(into)
        unneeded = {name for name in names if name.partition(".")[0] not in stems}
        with ThreadPoolExecutor(_RECORD_READERS) as readers:
            read = dict(zip(unneeded, readers.map(lambda name: recorded(records / name), unneeded), strict=True))
        sizes = directory.sizes() if read else {}
        ours = [f"{into}/{found.name}" for found in read.values() if found and sizes.get(found.name) == found.bytes]
        delete_files(self.location, ours)
        return [f"{records_of(into)}/{name}" for name in names if name not in unneeded or read[name]]

    def finished(self, num_shards: int, *, into: str | None = None, suffix: str = ".parquet") -> dict[int, ShardRecord]:
        """Records of the shards of an unfinished output whose object is there, with the recorded size."""
        into = into or self.directory
        records = self.location / records_of(into)
        present = set(records.list())
        indices = [index for index in range(num_shards) if shard_name(index, ".json") in present]
        if not indices:
            return {}
        sizes = (self.location / into).sizes()
        with ThreadPoolExecutor(_RECORD_READERS) as readers:
            read = readers.map(lambda index: ShardRecord.read(records / shard_name(index, ".json")), indices)
            found = dict(zip(indices, read, strict=True))
        return {index: record for index, record in found.items() if sizes.get(record.name) == record.bytes}

    def kept(self) -> str:
        """What an interrupted run of this request leaves for the next, as the end of a line for its user."""
        try:
            if (self.location / MANIFEST).exists():
                return "everything had been finished"
            shards = 0
            for into in (self.directory, *self.passes):
                stored = {name.partition(".")[0] for name in (self.location / into).list()}
                shards += sum(name.partition(".")[0] in stored for name in self._record_names(into))
        except StorageError:
            return "run the same command to continue"
        if not shards:
            return "nothing had been saved yet, run the same command to start again"
        return f"{shards:,} finished shard(s) are kept, run the same command to continue"

    def _refuse_difference(self, what: str, stored: Any, given: Mapping[str, Any], owner: object) -> None:
        differing = differences(stored, dict(given))
        if differing:
            raise RequestMismatchError(
                f"{self.location}: {what} of another request ({'; '.join(differing)}){begun_by(owner)}; "
                "ask for the same, choose another output, or delete it to start over"
            )
