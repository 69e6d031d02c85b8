"""What a sampling job would do and how long it would take, without doing it."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ddpm_core.model import Model, model_from_bytes
from ddpm_core.networks.unet import pixel_weights
from ddpm_core.samplers.ddim import DDIM
from pipelines.cli.console import clock, waiting
from pipelines.cluster import connection
from pipelines.cluster.actor_pool import ActorPool, run_on_actors
from pipelines.cluster.config import GpuClusterConfig
from pipelines.models.kept import FoundModel
from pipelines.models.used import UsedModel
from pipelines.outputs.pictures import encode_png, to_picture
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.shard import sample_batch
from pipelines.storage.location import Location

_CALIBRATION_STEPS = 10


@dataclass(frozen=True)
class Calibration:
    """Measured on one actor: seconds per call of the network (one batch, one step), PNG bytes per image."""

    seconds_per_call: float
    bytes_per_image: float


@dataclass(frozen=True)
class _Calibrate:
    """Samples one batch in few steps, after a first one that loads kernels."""

    files: Mapping[str, bytes]
    request: SampleRequest
    threads: int

    def __call__(self, index: int) -> Calibration:
        torch.set_num_threads(self.threads)
        model = model_from_bytes(self.files, self.request.device)
        ids = torch.arange(self.request.batch_size)
        steps = min(_CALIBRATION_STEPS, self.request.steps)
        sample_batch(replace(self.request, sampler=DDIM(1)), model, ids)
        start = time.perf_counter()
        images = sample_batch(replace(self.request, sampler=DDIM(steps)), model, ids)
        seconds = (time.perf_counter() - start) / steps
        return Calibration(seconds, sum(len(encode_png(to_picture(image))) for image in images) / len(images))


def calibrate(found: FoundModel, request: SampleRequest, pool: ActorPool | None, threads: int) -> Calibration:
    """Measure with so many threads, on one actor of the pool's kind or in this process.

    Raises:
        ClusterError: Ray gave up.
    """
    one = replace(pool, size=1) if pool else None
    worker = _Calibrate(found.files, request, threads)
    ((_, measured),) = run_on_actors(worker, [0], one, "calibration")
    return measured  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Work:
    """What making shards takes: images kept, calls of the network with a batch, its `pixel_weights` in all of them."""

    images: int
    calls: int
    weights: float


def work_of(request: SampleRequest, model: Model, shards_left: Sequence[int]) -> Work:
    """What the shards take."""
    shard_size, batch_size, num_images = request.shard_size, request.batch_size, request.num_images
    sizes = [min(shard_size, num_images - index * shard_size) for index in shards_left]
    calls = sum(-(-size // batch_size) for size in sizes) * request.steps
    return Work(sum(sizes), calls, float(calls) * batch_size * pixel_weights(model.denoiser.network))


def plan(
    output: Location, request: SampleRequest, used: UsedModel, shards_left: Sequence[int], cluster: GpuClusterConfig
) -> list[tuple[str, str]]:
    """(name, value) rows: what is left to do, and what it takes by a calibration on one actor."""
    batch_size, work = request.batch_size, work_of(request, used.model, shards_left)
    images, calls = work.images, work.calls
    height, width, channels = used.image_shape
    rows = [
        ("shards", f"{len(shards_left):,} of {request.num_shards:,} to do, up to {request.shard_size:,} images each"),
        ("images", f"{images:,} of {request.num_images:,} to do, {height}x{width}x{channels}"),
        ("sampler", request.described_sampler),
        ("network", f"{calls:,} calls with {batch_size} images = {calls * batch_size:,} evaluations"),
        ("model", used.described),
    ]
    if not shards_left:
        return rows
    pool = ActorPool.of(cluster)
    try:
        if connection.is_named(cluster.address) or pool.num_gpus:
            connection.connect(cluster.address)
            with waiting("measuring on one worker"):
                measured = calibrate(used.found, request, pool, cluster.threads)
            import ray

            _, high = pool.bounds(ray.cluster_resources())
        else:  # the workers will be this machine's: it can be measured without starting Ray
            with waiting("measuring"):
                measured = calibrate(used.found, request, None, cluster.threads)
            _, high = pool.bounds({"CPU": os.cpu_count() or 1})
    finally:
        connection.disconnect()
    workers = max(1, min(high, len(shards_left)))
    seconds = calls * measured.seconds_per_call / workers
    return [
        *rows,
        ("output", f"about {images * measured.bytes_per_image / 2**20:,.1f} MiB in {output / 'data'}"),
        ("measured", f"{measured.seconds_per_call * 1000:,.1f} ms per call on one worker"),
        ("time", f"about {clock(seconds)} on {workers} worker(s), after their start"),
    ]
