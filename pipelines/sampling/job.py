"""The sampling job's driver: settle what is asked for, let the shard engine do it, show it, commit it.

A sample set is a pure function of its request: model id, seed, sampler and the shape of the network's batches.
So the same request made again finds it, or its finished part, and nothing else can be mixed into it.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ddpm_core.model import Model, model_from_bytes
from pipelines.cli.console import event, waiting
from pipelines.cluster import connection
from pipelines.data.ingest.decode import decode_image
from pipelines.models.find import model_for
from pipelines.models.kept import FoundModel, source_of
from pipelines.outputs.bulk_run import BulkRun, settled_dtype
from pipelines.outputs.pictures import grid_png
from pipelines.outputs.shards import ShardedOutput, begun_request
from pipelines.outputs.version import code_version
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.kind import SAMPLE_SET
from pipelines.sampling.plan import plan, work_of
from pipelines.sampling.request import SampleRequest, request_of
from pipelines.sampling.shard import SUFFIXES, SampleShards, decode_shard
from pipelines.storage.location import Location
from pipelines.storage.ownership import require_apart

_PREVIEW_IMAGES = 64


@dataclass(frozen=True)
class SampleSummary:
    """What became of a request: `rows` are (name, value) pairs for the closing summary."""

    title: str
    rows: list[tuple[str, str]]


def sample(config: SampleConfig) -> SampleSummary:
    """Generate a sample set, or continue to, or find that it is complete.

    Raises:
        ConfigError: A field does not fit the model; the output overlaps it, or holds other files.
        ModelError: There is no such model.
        RequestMismatchError: The output holds samples of another request.
        StorageError: The output cannot be read or written.
        ClusterError: Ray is out of reach, or gave up.
    """
    config = config.with_date()
    location = Location.parse(config.output)
    begun = begun_request(location)
    config = _with_shard_size(config, begun)
    root = Location.parse(config.root).local_path
    with waiting("reading the model"):
        found = model_for(location / "model", config.model, config.tracking_uri, root)
        model = model_from_bytes(found.files, where=found.uri)
    require_apart(location, source_of(found), "the model")
    event(f"model {_described(found, model)}")
    config = replace(config, dtype=settled_dtype(config.dtype, begun, config.gpus_per_worker))
    request = request_of(config, model)
    output = SAMPLE_SET.output(location, request)
    manifest = output.committed()
    lost = output.lost(manifest) if manifest else []
    if config.dry_run:
        left = lost if manifest else _missing(request, output)
        if left:
            config.pool.check()
        return SampleSummary("Plan; nothing was written", plan(output, request, found, model, left, config.pool))
    if manifest is None or lost:
        config.pool.check()
    if manifest is None:
        return _generate(config, request, output, found, model)
    rows = _rows(config, output, _described(found, model), manifest)
    if not lost:
        event(f"{location} is already complete: nothing to do")
        return SampleSummary("Sample set, complete before", rows)
    event(f"{location}: {len(lost)} of {len(manifest['shards'])} shards are lost; making them again")
    pool = config.pool.unless_small(lambda: (len(lost), work_of(request, model, lost).weights))
    try:
        output.restore(SampleShards(location, request, config.cpus_per_worker), lost, manifest, pool)
    finally:
        connection.disconnect()
    return SampleSummary(f"Sample set, {len(lost)} lost shard(s) made again", rows)


def _with_shard_size(config: SampleConfig, begun: Mapping[str, Any]) -> SampleConfig:
    """With a shard size; where none is given, that of the request which the output was begun with, if it was."""
    begun_with = begun.get("shard_size")
    size = begun_with if config.shard_size is None and isinstance(begun_with, int) else config.chosen_shard_size
    return replace(config, shard_size=size)


def _missing(request: SampleRequest, output: ShardedOutput) -> list[int]:
    """Shards that an unfinished sample set lacks."""
    found = output.finished(request.num_shards, suffix=SUFFIXES[request.format])
    return [index for index in range(request.num_shards) if index not in found]


def _work(request: SampleRequest, output: ShardedOutput, model: Model) -> tuple[int, float]:
    """What is left to do, see `ActorPool.unless_small`."""
    missing = _missing(request, output)
    return len(missing), work_of(request, model, missing).weights


def _generate(
    config: SampleConfig, request: SampleRequest, output: ShardedOutput, found: FoundModel, model: Model
) -> SampleSummary:
    output.begin()
    found.keep(output.location / "model")
    run = BulkRun(
        "sample",
        output,
        found,
        experiment=f"{found.name}/samples",
        name=config.name,
        root=Location.parse(config.root).local_path,
        tracking_uri=config.tracking_uri,
    )
    manifest, closing = run.attempt(lambda: _compute(config, request, run, model))
    return SampleSummary("Sample set", [*_rows(config, output, _described(found, model), manifest), *closing])


def _compute(config: SampleConfig, request: SampleRequest, run: BulkRun, model: Model) -> dict[str, Any]:
    """Compute what is missing, commit; returns the manifest."""
    output = run.output
    with waiting("preparing the output"):
        run.announce({"ddpm.dataset_id": (model.extra.get("dataset") or {}).get("id")})
        pool = config.pool.unless_small(lambda: _work(request, output, model))
        where = f"on {connection.connect()}" if pool else "in this process"
    event(f"sampling {config.num_images:,} images {where} into {output.location}")
    records = output.compute(
        SampleShards(output.location, request, config.cpus_per_worker),
        request.num_shards,
        suffix=SUFFIXES[request.format],
        pool=pool,
        on_progress=lambda progress: run.show(progress, config.num_images, "samples"),
    )
    names = [record.name for record in records[: -(-_PREVIEW_IMAGES // config.chosen_shard_size)]]
    (output.location / "preview" / "grid.png").write_bytes(_grid(output, names, request.format))
    fields = {
        "format": SAMPLE_SET.format,
        "version": SAMPLE_SET.version,
        "num_rows": config.num_images,
        "image_shape": [*model.denoiser.image_shape[1:], model.denoiser.image_shape[0]],
        "model": run.found.origin,
        "lineage": _lineage(model),
        "code_version": code_version(),
        "made_with": {name: importlib.metadata.version(name) for name in ("torch", "pillow", "pyarrow")},
    }
    manifest = output.commit(fields, records)
    _record_result(run, request, manifest)
    return manifest


def _record_result(run: BulkRun, request: SampleRequest, manifest: Mapping[str, Any]) -> None:
    preview = run.output.location / "preview"
    for name in ("grid.png", "trajectory.png"):
        run.record("artifact", path=(preview / name).uri, artifact_path="preview")
    run.record(
        "note",
        markdown=f"**{manifest['num_rows']:,} images** ({request.described_sampler}, seed {request.seed}) at "
        f"`{run.output.location}`, by model `{run.found.model_id[:12]}` (`{run.found.uri}`).\n\n"
        "![samples](get-artifact?path=preview/grid.png&run_uuid={run_id})\n\n"
        "From noise to image: x_t above the predicted x_0.\n\n"
        "![trajectory](get-artifact?path=preview/trajectory.png&run_uuid={run_id})",
    )


def _grid(output: ShardedOutput, names: list[str], kind: str) -> bytes:
    """The first images, from the stored shards."""
    pngs: list[bytes] = []
    for name in names:
        content = (output.location / "data" / name).read_bytes()
        pngs += [png for _, png in decode_shard(content, kind)]
    return grid_png(np.stack([decode_image(png, None, None) for png in pngs[:_PREVIEW_IMAGES]]))


def _lineage(model: Model) -> dict[str, Any]:
    """What the model's own config says of its training."""
    extra = model.extra
    return {name: extra.get(name) for name in ("step", "dataset", "code_version")}


def _described(found: FoundModel, model: Model) -> str:
    return found.described(model.extra.get("step"))


def _rows(
    config: SampleConfig, output: ShardedOutput, model: str, manifest: Mapping[str, Any]
) -> list[tuple[str, str]]:
    size = sum(shard["bytes"] for shard in manifest["shards"])
    height, width, channels = manifest["image_shape"]
    return [
        ("images", f"{manifest['num_rows']:,} of {height}x{width}x{channels} (H x W x C), seed {config.seed}"),
        ("shards", f"{len(manifest['shards']):,} in {output.location / 'data'}, {size / 2**20:,.1f} MiB"),
        ("model", model),
        ("preview", (output.location / "preview" / "grid.png").uri),
    ]
