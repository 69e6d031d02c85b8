"""The way of every bulk job: look what is there, begin or continue it, compute, report, commit.

A job says what is its own (`BulkJob`); what it makes is a pure function of its request, so the same request made again
finds its output, or the finished part of it, and nothing else can be mixed into it.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pipelines.cli.console import event, waiting
from pipelines.cluster import connection, gpus
from pipelines.cluster.actor_pool import ActorPool
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.precision import PRECISION_OF, PrecisionField, settle
from pipelines.outputs.attempt import Attempt
from pipelines.outputs.bulk_job import BulkJob, Rows
from pipelines.outputs.shards import ShardedOutput
from pipelines.outputs.version import code_version
from pipelines.storage.location import Location


@dataclass(frozen=True)
class Standing:
    """What there is of a job's output before it runs.

    Attributes:
        job: The job.
        output: Its output.
        manifest: Of a complete output; None for any other.
        lost: Indices of the shards that a complete output has lost.
    """

    job: BulkJob
    output: ShardedOutput
    manifest: dict[str, Any] | None
    lost: list[int]

    @cached_property
    def left(self) -> list[int]:
        """Indices of the shards to make: those that are lost, or that an unfinished output lacks."""
        if self.manifest is not None:
            return self.lost
        found = self.output.finished(self.job.num_shards, suffix=self.job.suffix)
        return [index for index in range(self.job.num_shards) if index not in found]

    def pool(self) -> ActorPool | None:
        """The actors for what is left; None where this process does it."""
        return ActorPool.of(self.job.config.cluster).unless_small(lambda: (len(self.left), self.job.weights(self.left)))


@dataclass(frozen=True)
class BulkResult:
    """What became of a job: title and rows of the closing summary, and the manifest."""

    title: str
    rows: Rows
    manifest: dict[str, Any]


def look(job: BulkJob) -> Standing:
    """See what there is, before anything is written.

    Raises:
        ConfigError: There are files of something else.
        RequestMismatchError: The output answers another request.
        StorageError: The output cannot be read.
        ClusterError: Something is left to make, and Ray can never start the actors for it.
    """
    output = job.kind.output(job.location, job.request)
    manifest = output.committed()
    lost = [] if manifest is None else output.lost(manifest)
    if manifest is None or lost:
        ActorPool.of(job.config.cluster).check()
    return Standing(job, output, manifest, lost)


def run_bulk(standing: Standing) -> BulkResult:
    """Make what is left of a job's output.

    Raises:
        RequestMismatchError: Another run has begun there for another request.
        StorageError: The output cannot be read or written; a lost shard came out different.
        ClusterError: Ray is out of reach, or gave up.
        DDPMError: What the job raises.
    """
    job, output, manifest, lost = standing.job, standing.output, standing.manifest, standing.lost
    title = job.kind.title
    if manifest is None:
        manifest, closing = _make(standing)
        return BulkResult(title, job.rows(manifest) + closing, manifest)
    if not lost:
        event(f"{output.location} is already complete: nothing to do")
        return BulkResult(f"{title}, complete before", job.rows(manifest), manifest)
    event(f"{output.location}: {len(lost)} of {len(manifest['shards'])} shards are lost; making them again")
    try:
        output.restore(job.factory(), lost, manifest, standing.pool())
    finally:
        connection.disconnect()
    return BulkResult(f"{title}, {len(lost)} lost shard(s) made again", job.rows(manifest), manifest)


def _make(standing: Standing) -> tuple[dict[str, Any], Rows]:
    """Begin, or join, and commit; returns the manifest and closing rows."""
    job, output = standing.job, standing.output
    output.begin()
    if job.model is not None:
        job.model.found.keep(output.location / "model")
    for directory, used in job.further_models().items():
        used.found.keep(output.location / directory)
    attempt = Attempt(
        job.job,
        output,
        experiment=job.experiment,
        name=job.run_name,
        root=Location.parse(job.config.root).local_path,
        tracking_uri=job.config.tracking.uri,
    )
    return attempt.run(lambda: _compute(standing, attempt))


def _compute(standing: Standing, attempt: Attempt) -> dict[str, Any]:
    """Compute what is left, commit; returns the manifest."""
    job, output = standing.job, standing.output
    found = job.model.found if job.model else None
    with waiting("preparing the output"):
        attempt.announce(found, job.tags(), job.reads())
        pool = standing.pool()
        where = f"on {connection.connect(pool.address)}" if pool else "in this process"
    event(f"{job.doing} {job.num_images:,} images {where} into {output.location}")
    passes: dict[str, Any] = {}
    for part in job.passes():
        with waiting(part.waiting):
            of_pass = output.compute(
                part.factory,
                part.num_parts,
                into=part.directory,
                suffix=part.suffix,
                pool=None if part.is_small else pool,
            )
        passes[part.directory] = [asdict(record) for record in of_pass]
    records = output.compute(
        job.factory(),
        job.num_shards,
        suffix=job.suffix,
        pool=pool,
        on_progress=lambda progress: attempt.show(progress, job.num_images, job.counted, job.detail),
        enough=job.enough,
    )
    attempt.leave_ray()
    finished = job.finish(output, records)
    fields = {
        "format": job.kind.format,
        "version": job.kind.version,
        "num_rows": sum(record.rows for record in records),
        "code_version": code_version(),
        "made_with": {name: importlib.metadata.version(name) for name in ("torch", "pillow", "pyarrow")},
        **({"model": job.model.found.origin, "lineage": job.model.lineage} if job.model else {}),
        **passes,
        **finished.fields,
    }
    manifest = output.commit(fields, records)
    for record in finished.records:
        attempt.record(record.kind, **record.payload)
    return manifest


def settled_gpus(cluster: GpuClusterConfig, begun: Mapping[str, Any], unusable: str | None = None) -> GpuClusterConfig:
    """A job's section `cluster` with the `auto` of its GPUs replaced, which is said; see `pipelines.cluster.gpus`."""
    cluster, line = gpus.settle(cluster, begun.get("device"), unusable)
    if line:
        event(line)
    return cluster


def settled_precision(asked: PrecisionField, begun: Mapping[str, Any], gpus_per_worker: float) -> PrecisionField:
    """A job's `precision` with `auto` replaced, which is said: by that of the request `begun` if there is one."""
    value, line = settle(asked, PRECISION_OF.get(str(begun.get("dtype"))), gpus_per_worker > 0)
    if line:
        event(line)
    return value
