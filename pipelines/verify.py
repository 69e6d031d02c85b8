"""Checking a finished output from its bytes: digests, counts, ids, lineage, and that it can be made again."""

import hashlib
import io
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_core.errors import ConfigError, DataError, DDPMError
from pipelines import cluster
from pipelines.config import digest, require
from pipelines.data import dataset
from pipelines.engine.actor_pool import ActorPool
from pipelines.engine.shards import MANIFEST, ShardedOutput, ShardRecord
from pipelines.models import stored_model
from pipelines.sampling import shard as sample_shard
from pipelines.storage import Location

# Shards read at the same time: each is held in memory as a whole.
_READERS = 4


@dataclass(frozen=True)
class VerifyConfig:
    """Check an output."""

    uri: str
    """Directory or s3:// prefix of a prepared data set or a sample set; may be given without its name."""
    recompute: float = 0.0
    """Fraction of the shards of a sample set, in [0, 1], to make again and compare bit for bit; at least one."""
    num_workers: int | tuple[int, int] = 0
    """Actors that make them again: a number, [min, max], 0 for as many as the cluster holds now."""
    cpus_per_worker: int = 1
    """CPUs, and threads, of each actor."""

    def __post_init__(self) -> None:
        require(bool(self.uri), "uri", self.uri, "must be a path or a URI")
        require(0 <= self.recompute <= 1, "recompute", self.recompute, "must be in [0, 1]")


@dataclass
class VerifyResult:
    """What was found: (name, value) rows for a summary, and one line for everything that is off."""

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def require_no_problems(self) -> None:
        """Raise a DataError unless nothing is off."""
        if self.problems:
            raise DataError(
                f"{self.title}: {len(self.problems)} thing(s) wrong, the first: {self.problems[0]}; restore what is "
                "named, or delete it and run the job that made it again"
            )


def verify(config: VerifyConfig) -> VerifyResult:
    """Read everything that the manifest names and compare.

    Raises:
        DataError: There is no finished output there, or of an unknown kind.
        ConfigError: It cannot be recomputed.
        StorageError: The location cannot be read.
        ClusterError: Ray gave up.
    """
    location = Location.parse(config.uri)
    if not (location / MANIFEST).exists():
        raise DataError(f"{location}: no finished output (no {MANIFEST}); the job that makes it has not ended yet")
    manifest = (location / MANIFEST).read_json()
    kind = manifest.get("format") if isinstance(manifest, dict) else None
    if kind == dataset.FORMAT:
        result, ids_of, own = VerifyResult(f"Data set {location}"), _dataset_ids, _check_dataset
    elif kind == sample_shard.FORMAT:
        result, ids_of, own = VerifyResult(f"Sample set {location}"), _sample_ids, _check_samples
    else:
        raise DataError(f"{location / MANIFEST}: format {kind!r} is not of this software; give a data or sample set")
    if config.recompute and kind == dataset.FORMAT:
        raise ConfigError(
            f"recompute = {config.recompute}: a data set is made from its source; ingest "
            f"{manifest['request']['source']} into another output and compare the data set ids"
        )
    result.problems += _check_shards(location, manifest, partial(ids_of, manifest))
    if manifest.get("request_sha256") != digest(manifest["request"]):
        result.problems.append(f"{location / MANIFEST}: the request is not the one whose hash it records")
    own(location, manifest, result)
    if config.recompute:
        _recompute(config, location, manifest, result)
    result.rows.append(("verdict", f"{len(result.problems)} problem(s)" if result.problems else "everything is right"))
    return result


def _check_shards(
    location: Location, manifest: Mapping[str, Any], ids_of: Callable[[bytes], Iterator[int]]
) -> list[str]:
    """One line for each shard that is not as the manifest says, and for totals that do not add up."""
    shards, starts, start = manifest["shards"], [], 0
    for shard in shards:
        starts.append(start)
        start += shard["rows"]
    problems = []
    if start != manifest["num_rows"]:
        problems.append(f"{location / MANIFEST}: its shards hold {start:,} rows, it says {manifest['num_rows']:,}")
    named = {shard["name"] for shard in shards}
    problems += [
        f"{location / 'data' / name}: is not in the manifest"
        for name in (location / "data").list()
        if name not in named
    ]

    def check(shard: Mapping[str, Any], first_id: int) -> str | None:
        path = location / "data" / shard["name"]
        try:
            content = path.read_bytes()
        except DDPMError as error:
            return str(error)
        if len(content) != shard["bytes"]:
            return f"{path}: has {len(content):,} bytes, the manifest records {shard['bytes']:,}"
        if hashlib.sha256(content).hexdigest() != shard["sha256"]:
            return f"{path}: its sha256 is not the recorded one"
        try:
            ids = list(ids_of(content))
        except (OSError, ValueError, pa.ArrowException) as error:
            return f"{path}: cannot be read ({str(error).splitlines()[0]})"
        if ids != list(range(first_id, first_id + shard["rows"])):
            return f"{path}: does not hold exactly the ids {first_id:,}..{first_id + shard['rows'] - 1:,} in order"
        return None

    with ThreadPoolExecutor(_READERS) as readers:
        return problems + [problem for problem in readers.map(check, shards, starts) if problem]


def _dataset_ids(manifest: Mapping[str, Any], content: bytes) -> Iterator[int]:
    yield from pq.read_table(io.BytesIO(content), columns=["id"], use_threads=False)["id"].to_pylist()


def _sample_ids(manifest: Mapping[str, Any], content: bytes) -> Iterator[int]:
    return (index for index, _ in sample_shard.decode_shard(content, manifest["request"]["format"]))


def _check_dataset(location: Location, manifest: Mapping[str, Any], result: VerifyResult) -> None:
    records = [ShardRecord(s["name"], s["rows"], s["bytes"], s["sha256"], {}) for s in manifest["shards"]]
    if dataset.dataset_id(tuple(manifest["image_shape"]), records) != manifest["dataset_id"]:
        result.problems.append(f"{location / MANIFEST}: dataset_id is not that of its shards")
    rejected = pq.read_table(io.BytesIO((location / "rejected.parquet").read_bytes())).num_rows
    if rejected != manifest["rejected"]:
        result.problems.append(
            f"{location / 'rejected.parquet'}: lists {rejected:,} images, the manifest {manifest['rejected']:,}"
        )
    result.rows += [
        *_size(manifest),
        ("rejected", f"{rejected:,}"),
        ("data set id", manifest["dataset_id"]),
        ("source", f"{manifest['request']['source']} (content {manifest['source_content'][:12]})"),
        ("code", manifest["code_version"]),
    ]


def _check_samples(location: Location, manifest: Mapping[str, Any], result: VerifyResult) -> None:
    model_id, lineage = manifest["request"]["model_id"], manifest["lineage"]
    try:
        stored = stored_model(location / "model")
        stored_id = stored.model_id if stored else "missing"
    except DDPMError as error:
        stored_id = str(error)
    if stored_id != model_id:
        result.problems.append(f"{location / 'model'}: is not the model {model_id[:12]} of the request ({stored_id})")
    data = lineage["dataset"] or {}
    result.rows += [
        *_size(manifest),
        ("model", f"{model_id} ({manifest['model']['uri']}, step {lineage['step']})"),
        ("trained on", f"data set {data.get('id')} ({data.get('uri')})"),
        ("code", f"{manifest['code_version']}; the model was trained by {lineage['code_version']}"),
    ]


def _size(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 2**20
    return [("checked", f"{manifest['num_rows']:,} images in {len(manifest['shards']):,} shards, {size:,.1f} MiB")]


def _recompute(config: VerifyConfig, location: Location, manifest: Mapping[str, Any], result: VerifyResult) -> None:
    """Make randomly chosen shards again and compare."""
    request, num_shards = manifest["request"], len(manifest["shards"])
    chosen = sorted(random.sample(range(num_shards), max(1, round(config.recompute * num_shards))))
    factory = sample_shard.SampleShards(location, request, config.cpus_per_worker)
    pool = ActorPool(config.num_workers or None, config.cpus_per_worker, 1.0 if request["device"] == "cuda" else 0.0)
    output = ShardedOutput(location, request)
    try:
        cluster.connect()
        different = [i for i, equal in output.recompute(factory, chosen, manifest, pool=pool) if not equal]
    finally:
        cluster.disconnect()
    result.problems += [
        f"{location / 'data' / manifest['shards'][index]['name']}: comes out different when it is made again (it was "
        f"made with {manifest['made_with']}, code {manifest['code_version']})"
        for index in sorted(different)
    ]
    names = ", ".join(str(index) for index in chosen[:10]) + (", ..." if len(chosen) > 10 else "")
    result.rows.append(
        ("made again", f"{len(chosen):,} shard(s), {len(chosen) - len(different):,} bit-equal ({names})")
    )
