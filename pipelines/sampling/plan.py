"""What a sampling job would do and how long it would take, without doing it."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ddpm_core.guidance import Guided
from ddpm_core.model import model_from_bytes
from ddpm_core.networks.unet import pixel_weights
from ddpm_core.samplers.ddim import DDIM
from pipelines.cli.console import clock, waiting
from pipelines.cluster.actor_pool import ActorPool, one_actor, run_on_actors
from pipelines.cluster.config import GpuClusterConfig
from pipelines.models.kept import FoundModel
from pipelines.models.used import UsedModel
from pipelines.outputs.pictures import encode_png, to_picture
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.sampling.samplers import SAMPLERS, name_of, sampler_asked
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
    """Measure with so many threads, on an actor of the pool or in this process.

    Raises:
        ClusterError: Ray gave up.
    """
    worker = _Calibrate(found.files, request, threads)
    ((_, measured),) = run_on_actors(worker, [0], pool, "calibration")
    return measured  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Work:
    """What making shards takes: images kept, calls of the network with a batch, those of the weaker model's network,
    and the `pixel_weights` in all of them."""

    images: int
    calls: int
    weaker_calls: int
    weights: float


def calls_of(request: SampleRequest, used: UsedModel, weaker: UsedModel | None) -> tuple[int, int]:
    """For one batch: calls of the network with the label, and of what guidance compares with."""
    denoiser = denoiser_of(request, used.model, weaker.model if weaker else None)
    times = request.sampler.calls(denoiser.process)
    return denoiser.calls(times) if isinstance(denoiser, Guided) else (len(times), 0)


def work_of(request: SampleRequest, used: UsedModel, weaker: UsedModel | None, shards_left: Sequence[int]) -> Work:
    """What the shards take."""
    shard_size, batch_size, num_images = request.shard_size, request.batch_size, request.num_images
    sizes = [min(shard_size, num_images - index * shard_size) for index in shards_left]
    batches = sum(-(-size // batch_size) for size in sizes)
    own, other = calls_of(request, used, weaker)
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
        ("sampler", f"{request.described_sampler}: {_per_image(request, used, weaker)}"),
        *([("guidance", request.described_guidance)] if request.described_guidance else []),
        ("network", f"{calls:,} calls with {batch_size} images = {calls * batch_size:,} evaluations{of_weaker}"),
        ("model", used.described),
        *([("weaker model", weaker.described)] if weaker else []),
    ]
    if not shards_left:
        return rows
    pool = ActorPool.of(cluster)
    found = [used.found, *([weaker.found] if weaker else [])]
    with one_actor(pool) as one:
        with waiting("measuring on one worker" if one else "measuring"):
            measured = [calibrate(model, request, one, cluster.threads) for model in found]
        resources: Mapping[str, float] = {"CPU": os.cpu_count() or 1}
        if one:
            import ray

            resources = ray.cluster_resources()
        _, high = pool.bounds(resources)
    workers = max(1, min(high, len(shards_left)))

    def lasts(work: Work) -> str:
        seconds = work.calls * measured[0].seconds_per_call + work.weaker_calls * measured[-1].seconds_per_call
        return clock(seconds / workers)

    others = [
        (f"or {name}", f"{other.steps:,} steps, {_per_image(other, used, weaker)}, about {lasts(taken)}")
        for name, other in _with_other_samplers(request, used).items()
        for taken in [work_of(other, used, weaker, shards_left)]
    ]
    per_call = " and ".join(f"{each.seconds_per_call * 1000:,.1f} ms" for each in measured)
    return [
        *rows,
        ("output", f"about {images * measured[0].bytes_per_image / 2**20:,.1f} MiB in {output / 'data'}"),
        ("measured", f"{per_call} per call on one worker"),
        ("time", f"about {lasts(work)} on {workers} worker(s), after their start"),
        *others,
    ]


def _per_image(request: SampleRequest, used: UsedModel, weaker: UsedModel | None) -> str:
    return f"{sum(calls_of(request, used, weaker)):,} evaluations per image"


def _with_other_samplers(request: SampleRequest, used: UsedModel) -> dict[str, SampleRequest]:
    """The request by each other sampler with its default options, by their names."""
    others = {}
    for name in SAMPLERS:
        if name != name_of(request.sampler):
            sampler, steps = sampler_asked(SamplerConfig(cast(Any, name)), used.model.denoiser)
            others[name] = replace(request, sampler=sampler, steps=steps)
    return others
