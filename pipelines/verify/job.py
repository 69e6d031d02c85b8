"""Checking an output from its bytes: digests, counts, ids, lineage, and that it can be made again."""

import hashlib
import io
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_core.errors import ConfigError, DataError, DDPMError
from ddpm_core.model import model_from_bytes
from ddpm_core.process.discrete import discrete
from pipelines.cli.config import digest
from pipelines.cluster import connection, demand
from pipelines.cluster.actor_pool import ActorPool
from pipelines.data import dataset
from pipelines.evaluation import first_pass
from pipelines.evaluation import shard as term_shard
from pipelines.evaluation.report import headline_of
from pipelines.evaluation.results import results
from pipelines.models.kept import stored_model
from pipelines.outputs.manifest import MANIFEST, checked_manifest
from pipelines.outputs.shards import Compute, ShardedOutput, ShardRecord
from pipelines.sampling import shard as sample_shard
from pipelines.storage.location import Location
from pipelines.training.run_directory import is_run
from pipelines.verify.config import VerifyConfig
from pipelines.verify.run import check_run

# Shards read at the same time: each is held in memory as a whole.
_READERS = 4


@dataclass
class VerifyResult:
    """What was found: (name, value) rows for a summary, and one line for everything that is off."""

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    advice: str = (
        "restore what is named; of a shard, delete what is left of it and run the command that made it again: it makes "
        "lost shards again"
    )

    def conclude(self) -> "VerifyResult":
        """Add the verdict to the rows."""
        verdict = f"{len(self.problems)} problem(s)" if self.problems else "everything is right"
        self.rows.append(("verdict", verdict))
        return self

    def require_no_problems(self) -> None:
        """Raise a DataError unless nothing is off."""
        if self.problems:
            raise DataError(
                f"{self.title}: {len(self.problems)} thing(s) wrong, the first: {self.problems[0]}; {self.advice}"
            )


def verify(config: VerifyConfig) -> VerifyResult:
    """Read everything that a manifest, or a training's checkpoints, name and compare.

    Raises:
        DataError: There is neither a finished output nor a training run there, or of an unknown kind.
        ConfigError: It cannot be recomputed.
        StorageError: The location cannot be read.
        ClusterError: Ray gave up.
    """
    location = Location.parse(config.uri)
    if not (location / MANIFEST).exists():
        if is_run(location):
            return _verify_run(config, location)
        raise DataError(f"{location}: no finished output (no {MANIFEST}); the job that makes it has not ended yet")
    content = (location / MANIFEST).read_json()
    name = content.get("format") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in _KINDS:
        raise DataError(f"{location / MANIFEST}: format {name!r} is not of this software; give an output of its jobs")
    manifest, kind = checked_manifest(location / MANIFEST, content), _KINDS[name]
    result = VerifyResult(f"{kind.title} {location}")
    if config.recompute and kind.factory is None:
        raise ConfigError(
            f"recompute = {config.recompute}: a data set is made from its source; ingest "
            f"{manifest['request']['source']} into another output and compare the data set ids"
        )
    try:
        result.problems += _check_shards(location, manifest, kind)
        if manifest.get("request_sha256") != digest(manifest["request"]):
            result.problems.append(f"{location / MANIFEST}: the request is not the one whose hash it records")
        kind.check(location, manifest, result)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{kind.title.lower()} ({type(error).__name__}: {error})"
        raise DataError(
            f"{location / MANIFEST}: does not have the fields of a {what}; restore the file, or delete the output and "
            "make it again"
        ) from error
    if config.recompute and kind.factory is not None:
        factory = kind.factory(location, manifest, config.cpus_per_worker)
        _recompute(config, ShardedOutput(location, manifest["request"], kind.directory), factory, manifest, result)
    return result.conclude()


def _verify_run(config: VerifyConfig, run: Location) -> VerifyResult:
    if config.recompute:
        raise ConfigError(
            f"recompute = {config.recompute}: {run} is a training run; leave it out, no step is made again"
        )
    rows, problems = check_run(run)
    advice = "restore it from a copy, or delete that checkpoint and result.json: training goes on from an intact one"
    return VerifyResult(f"Training run {run}", rows, problems, advice).conclude()


def _check_shards(location: Location, manifest: Mapping[str, Any], kind: "_Kind") -> list[str]:
    """One line for each shard that is not as the manifest says, and for totals that do not add up."""
    shards, starts, start, directory = manifest["shards"], [], 0, location / kind.directory
    order = kind.order(manifest)
    for shard in shards:
        starts.append(start)
        start += shard["rows"]
    problems = []
    if start != manifest["num_rows"]:
        problems.append(f"{location / MANIFEST}: its shards hold {start:,} rows, it says {manifest['num_rows']:,}")
    named = {shard["name"] for shard in shards}
    problems += [f"{directory / name}: is not in the manifest" for name in directory.list() if name not in named]

    def check(shard: Mapping[str, Any], first: int) -> str | None:
        path = directory / shard["name"]
        try:
            content = path.read_bytes()
        except DDPMError as error:
            return str(error)
        if len(content) != shard["bytes"]:
            return f"{path}: has {len(content):,} bytes, the manifest records {shard['bytes']:,}"
        if hashlib.sha256(content).hexdigest() != shard["sha256"]:
            return f"{path}: its sha256 is not the recorded one"
        try:
            ids = list(kind.ids(manifest, content))
        except (OSError, ValueError, pa.ArrowException) as error:
            return f"{path}: cannot be read ({str(error).splitlines()[0]})"
        if ids != list(order[first : first + shard["rows"]]):
            return f"{path}: does not hold exactly the ids of places {first:,}..{first + shard['rows'] - 1:,} in order"
        return None

    with ThreadPoolExecutor(_READERS) as readers:
        return problems + [problem for problem in readers.map(check, shards, starts) if problem]


def _parquet_ids(manifest: Mapping[str, Any], content: bytes) -> Iterator[int]:
    yield from pq.read_table(io.BytesIO(content), columns=["id"], use_threads=False)["id"].to_pylist()


def _sample_ids(manifest: Mapping[str, Any], content: bytes) -> Iterator[int]:
    return (index for index, _ in sample_shard.decode_shard(content, manifest["request"]["format"]))


def _dense(manifest: Mapping[str, Any]) -> Sequence[int]:
    return range(sum(shard["rows"] for shard in manifest["shards"]))


def _evaluated(manifest: Mapping[str, Any]) -> Sequence[int]:
    ids: list[int] = term_shard.order_of(manifest["request"], manifest["results"]["data_set_size"]).tolist()
    return ids


def _check_dataset(location: Location, manifest: Mapping[str, Any], result: VerifyResult) -> None:
    records = [ShardRecord(s["name"], s["rows"], s["bytes"], s["sha256"], {}) for s in manifest["shards"]]
    if dataset.dataset_id(tuple(manifest["image_shape"]), records) != manifest["dataset_id"]:
        result.problems.append(f"{location / MANIFEST}: dataset_id is not that of its shards")
    try:
        rejected = pq.read_table(io.BytesIO((location / "rejected.parquet").read_bytes())).num_rows
    except pa.ArrowException as error:
        raise DataError(f"{location / 'rejected.parquet'}: is no Parquet file ({error}); restore it") from error
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
    result.rows += [*_size(manifest), *_check_model(location, manifest, result)]


def _check_evaluation(location: Location, manifest: Mapping[str, Any], result: VerifyResult) -> None:
    """The first pass's digests, and every mean and interval once more from the rows."""
    for part in manifest["first_pass"]:
        path = location / first_pass.DIRECTORY / part["name"]
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != part["sha256"]:
            result.problems.append(f"{path}: is missing, or its sha256 is not the recorded one")
    recorded, names = manifest["results"], [shard["name"] for shard in manifest["shards"]]
    rows = [*_size(manifest), *_check_model(location, manifest, result)]
    if not result.problems:
        found = stored_model(location / "model")
        assert found is not None, "checked above"
        process = discrete(model_from_bytes(found.files).denoiser.process)
        again = results(location, manifest["request"], names, process, recorded["data_set_size"]).summary
        different = _differing_means(recorded["means"], again["means"])
        result.problems += [f"{location / MANIFEST}: {name} is not what the rows give" for name in different]
        rows.append(("means", f"{len(again['means'])} with their intervals, computed again from the rows"))
    data = f"{manifest['request']['dataset_id']} ({manifest['data']})"
    result.rows += [*rows, ("evaluated on", f"data set {data}"), ("result", headline_of(recorded))]


def _differing_means(recorded: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    def numbers(found: Mapping[str, Any] | None) -> list[float]:
        if found is None:
            return []
        kinds = ("given_images", "data_set", "population")
        return [found["mean"], *(end for kind in kinds for end in found[kind] or [])]

    def equal(name: str) -> bool:
        old, new = numbers(recorded.get(name)), numbers(again.get(name))
        return len(old) == len(new) and all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(old, new, strict=True))

    return sorted(name for name in recorded.keys() | again.keys() if not equal(name))


def _check_model(location: Location, manifest: Mapping[str, Any], result: VerifyResult) -> list[tuple[str, str]]:
    """Whether the model is the request's; rows that say where it came from."""
    model_id, lineage = manifest["request"]["model_id"], manifest["lineage"]
    try:
        stored = stored_model(location / "model")
        stored_id = stored.model_id if stored else "missing"
    except DDPMError as error:
        stored_id = str(error)
    if stored_id != model_id:
        result.problems.append(f"{location / 'model'}: is not the model {model_id[:12]} of the request ({stored_id})")
    data = lineage["dataset"] or {}
    return [
        ("model", f"{model_id} ({manifest['model']['uri']}, step {lineage['step']})"),
        ("trained on", f"data set {data.get('id')} ({data.get('uri')})"),
        ("code", f"{manifest['code_version']}; the model was trained by {lineage['code_version']}"),
    ]


def _size(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 2**20
    return [("checked", f"{manifest['num_rows']:,} images in {len(manifest['shards']):,} shards, {size:,.1f} MiB")]


def _sample_factory(location: Location, manifest: Mapping[str, Any], threads: int) -> sample_shard.SampleShards:
    return sample_shard.SampleShards(location, manifest["request"], threads)


def _term_factory(location: Location, manifest: Mapping[str, Any], threads: int) -> term_shard.TermShards:
    data, request = dataset.PreparedDataset.open(manifest["data"]), manifest["request"]
    if data.dataset_id != request["dataset_id"]:
        raise DataError(
            f"{manifest['data']}: is not the data set {request['dataset_id'][:12]} that was evaluated; restore it"
        )
    return term_shard.TermShards(location, request, data, threads)


def _recompute(
    config: VerifyConfig,
    output: ShardedOutput,
    factory: Callable[[], Compute],
    manifest: Mapping[str, Any],
    result: VerifyResult,
) -> None:
    """Make randomly chosen shards again and compare."""
    num_shards = len(manifest["shards"])
    chosen = sorted(random.sample(range(num_shards), max(1, round(config.recompute * num_shards))))
    gpus = 1.0 if manifest["request"]["device"] == "cuda" else 0.0
    pool = ActorPool.of(config.num_workers, config.cpus_per_worker, gpus)
    fields = {"CPU": ("cpus_per_worker", config.cpus_per_worker), "GPU": ("recompute", config.recompute)}
    demand.check(1, pool.needs, fields)
    try:
        connection.connect()
        different = [i for i, equal in output.recompute(factory, chosen, manifest, pool=pool) if not equal]
    finally:
        connection.disconnect()
    result.problems += [
        f"{output.shards / manifest['shards'][index]['name']}: comes out different when it is made again (it was "
        f"made with {manifest['made_with']}, code {manifest['code_version']})"
        for index in sorted(different)
    ]
    names = ", ".join(str(index) for index in chosen[:10]) + (", ..." if len(chosen) > 10 else "")
    result.rows.append(
        ("made again", f"{len(chosen):,} shard(s), {len(chosen) - len(different):,} bit-equal ({names})")
    )


@dataclass(frozen=True)
class _Kind:
    """How one kind of output is checked."""

    title: str
    directory: str
    ids: Callable[[Mapping[str, Any], bytes], Iterator[int]]
    """Of one shard's rows."""
    order: Callable[[Mapping[str, Any]], Sequence[int]]
    """Which ids all shards together must hold."""
    check: Callable[[Location, Mapping[str, Any], VerifyResult], None]
    """What this kind has besides shards."""
    factory: Callable[[Location, Mapping[str, Any], int], Callable[[], Compute]] | None
    """What makes a shard again; None where nothing can."""


_KINDS = {
    dataset.FORMAT: _Kind("Data set", "data", _parquet_ids, _dense, _check_dataset, None),
    sample_shard.FORMAT: _Kind("Sample set", "data", _sample_ids, _dense, _check_samples, _sample_factory),
    term_shard.FORMAT: _Kind(
        "Evaluation", term_shard.DIRECTORY, _parquet_ids, _evaluated, _check_evaluation, _term_factory
    ),
}
