"""Checking an output from its bytes: digests, counts, ids, lineage, and that it can be made again."""

import hashlib
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipelines.cli.config import digest
from pipelines.cli.errors import ConfigError, DataError, DDPMError
from pipelines.cluster import connection, demand
from pipelines.cluster.actor_pool import ActorPool
from pipelines.outputs.kind import Findings, Manifest, OutputKind
from pipelines.outputs.manifest import MANIFEST, checked_manifest
from pipelines.outputs.request import Request
from pipelines.outputs.shards import Compute, ShardedOutput
from pipelines.storage.location import Location
from pipelines.training.run_directory import is_run
from pipelines.verify.config import VerifyConfig
from pipelines.verify.kinds import KINDS
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
    if not isinstance(name, str) or name not in KINDS:
        raise DataError(f"{location / MANIFEST}: format {name!r} is not of this software; give an output of its jobs")
    manifest, kind, found = checked_manifest(location / MANIFEST, content), KINDS[name], Findings()
    request = kind.request.from_json(manifest["request"], location / MANIFEST)
    if config.recompute and kind.instead is not None:
        raise ConfigError(f"recompute = {config.recompute}: {kind.instead(request)}")
    try:
        found.problems += _check_shards(location, request, manifest, kind)
        if manifest.get("request_sha256") != digest(manifest["request"]):
            found.problems.append(f"{location / MANIFEST}: the request is not the one whose hash it records")
        kind.check(location, request, manifest, found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{kind.title.lower()} ({type(error).__name__}: {error})"
        raise DataError(
            f"{location / MANIFEST}: does not have the fields of a {what}; restore the file, or delete the output and "
            "make it again"
        ) from error
    if config.recompute and kind.factory is not None:
        factory = kind.factory(location, request, manifest, config.cluster.threads)
        _recompute(config, kind.output(location, request), request, factory, manifest, found)
    return VerifyResult(f"{kind.title} {location}", found.rows, found.problems).conclude()


def _verify_run(config: VerifyConfig, run: Location) -> VerifyResult:
    if config.recompute:
        raise ConfigError(
            f"recompute = {config.recompute}: {run} is a training run; leave it out, no step is made again"
        )
    rows, problems = check_run(run)
    advice = "restore it from a copy, or delete that checkpoint and result.json: training goes on from an intact one"
    return VerifyResult(f"Training run {run}", rows, problems, advice).conclude()


def _check_shards(location: Location, request: Request, manifest: Manifest, kind: OutputKind[Any]) -> list[str]:
    """One line for each shard that is not as the manifest says, and for totals that do not add up."""
    shards, starts, start, directory = manifest["shards"], [], 0, location / kind.directory
    order = kind.order(request, manifest)
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
            ids = list(kind.ids(request, content))
        except (OSError, ValueError, pa.ArrowException) as error:
            return f"{path}: cannot be read ({str(error).splitlines()[0]})"
        if ids != list(order[first : first + shard["rows"]]):
            return f"{path}: does not hold exactly the ids of places {first:,}..{first + shard['rows'] - 1:,} in order"
        return None

    with ThreadPoolExecutor(_READERS) as readers:
        return problems + [problem for problem in readers.map(check, shards, starts) if problem]


def _recompute(
    config: VerifyConfig,
    output: ShardedOutput,
    request: Request,
    factory: Callable[[], Compute],
    manifest: Manifest,
    found: Findings,
) -> None:
    """Make randomly chosen shards again and compare."""
    num_shards = len(manifest["shards"])
    chosen = sorted(random.sample(range(num_shards), max(1, round(config.recompute * num_shards))))
    pool = replace(ActorPool.of(config.cluster), num_gpus=1.0 if request.on_gpu else 0.0)
    cpus = ("cluster.cpus_per_worker", config.cluster.cpus_per_worker)
    fields = {"CPU": cpus, "GPU": ("recompute", config.recompute)}
    demand.check(1, pool.needs, fields, pool.address)
    try:
        connection.connect(pool.address)
        different = [i for i, equal in output.recompute(factory, chosen, manifest, pool=pool) if not equal]
    finally:
        connection.disconnect()
    found.problems += [
        f"{output.shards / manifest['shards'][index]['name']}: comes out different when it is made again (it was "
        f"made with {manifest['made_with']}, code {manifest['code_version']})"
        for index in sorted(different)
    ]
    names = ", ".join(str(index) for index in chosen[:10]) + (", ..." if len(chosen) > 10 else "")
    found.rows.append(("made again", f"{len(chosen):,} shard(s), {len(chosen) - len(different):,} bit-equal ({names})"))
