"""What a sampling job would do and how long it would take, without doing it."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ddpm_core.guidance import Guided
from ddpm_core.model import model_from_bytes
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
from pipelines.sampling.shard import Source, denoiser_of, sample_batch
from pipelines.storage.location import Location

_CALIBRATION_STEPS = 10


@dataclass(frozen=True)
class Calibration:
    """Measured on one actor: seconds per call of the network (one batch, one step), PNG bytes per image."""

    seconds_per_call: float
    bytes_per_image: float


@dataclass(frozen=True)
class _Calibrate:
    """Samples one batch in few steps, without guidance and labels, after a first one that loads kernels."""

    files: Mapping[str, bytes]
    request: SampleRequest
    threads: int

    def __call__(self, index: int) -> Calibration:
        torch.set_num_threads(self.threads)
        source = Source(model_from_bytes(self.files, self.request.device))
        ids = torch.arange(self.request.batch_size)
        steps = min(_CALIBRATION_STEPS, self.request.steps)
        plain = replace(self.request, guidance_scale=None, guidance_interval=None, guidance_model_id=None)
        sample_batch(replace(plain, sampler=DDIM(1)), source, ids)
        start = time.perf_counter()
        images = sample_batch(replace(plain, sampler=DDIM(steps)), source, ids)
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
    """What making shards takes: images kept, calls of the network with a batch, those of the weaker model's network,
    and the `pixel_weights` in all of them."""

    images: int
    calls: int
    weaker_calls: int
    weights: float


def work_of(request: SampleRequest, used: UsedModel, weaker: UsedModel | None, shards_left: Sequence[int]) -> Work:
    """What the shards take."""
    shard_size, batch_size, num_images = request.shard_size, request.batch_size, request.num_images
    sizes = [min(shard_size, num_images - index * shard_size) for index in shards_left]
    batches = sum(-(-size // batch_size) for size in sizes)
    own, other = request.steps, 0
    denoiser = denoiser_of(request, used.model, weaker.model if weaker else None)
    if isinstance(denoiser, Guided):
        own, other = denoiser.calls(request.sampler.times(denoiser.process))
    networks = [used.model.denoiser.network, (weaker or used).model.denoiser.network]
    weights = [float(pixel_weights(network)) for network in networks]
    total = (own * weights[0] + other * weights[1]) * batches * batch_size
    if weaker is None:
        own, other = own + other, 0
    return Work(sum(sizes), batches * own, batches * other, total)


def plan(
    output: Location,
    request: SampleRequest,
    used: UsedModel,
    weaker: UsedModel | None,
    shards_left: Sequence[int],
    cluster: GpuClusterConfig,
) -> list[tuple[str, str]]:
    """(name, value) rows: what is left to do, and what it takes by a calibration on one actor."""
    batch_size, work = request.batch_size, work_of(request, used, weaker, shards_left)
    images, calls = work.images, work.calls + work.weaker_calls
    height, width, channels = used.image_shape
    of_weaker = f", {work.weaker_calls:,} of the calls by the weaker model" if weaker else ""
    rows = [
        ("shards", f"{len(shards_left):,} of {request.num_shards:,} to do, up to {request.shard_size:,} images each"),
        ("images", f"{images:,} of {request.num_images:,} to do, {height}x{width}x{channels}"),
        ("sampler", request.described_sampler),
        *([("guidance", request.described_guidance)] if request.described_guidance else []),
        ("network", f"{calls:,} calls with {batch_size} images = {calls * batch_size:,} evaluations{of_weaker}"),
        ("model", used.described),
        *([("weaker model", weaker.described)] if weaker else []),
    ]
    if not shards_left:
        return rows
    pool = ActorPool.of(cluster)
    found = [used.found, *([weaker.found] if weaker else [])]
    try:
        if connection.is_named(cluster.address) or pool.num_gpus:
            connection.connect(cluster.address)
            with waiting("measuring on one worker"):
                measured = [calibrate(model, request, pool, cluster.threads) for model in found]
            import ray

            _, high = pool.bounds(ray.cluster_resources())
        else:  # the workers will be this machine's: it can be measured without starting Ray
            with waiting("measuring"):
                measured = [calibrate(model, request, None, cluster.threads) for model in found]
            _, high = pool.bounds({"CPU": os.cpu_count() or 1})
    finally:
        connection.disconnect()
    workers = max(1, min(high, len(shards_left)))
    seconds = work.calls * measured[0].seconds_per_call + work.weaker_calls * measured[-1].seconds_per_call
    per_call = " and ".join(f"{each.seconds_per_call * 1000:,.1f} ms" for each in measured)
    return [
        *rows,
        ("output", f"about {images * measured[0].bytes_per_image / 2**20:,.1f} MiB in {output / 'data'}"),
        ("measured", f"{per_call} per call on one worker"),
        ("time", f"about {clock(seconds / workers)} on {workers} worker(s), after their start"),
    ]
