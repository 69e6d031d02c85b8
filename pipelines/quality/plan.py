"""What a comparison would compute, how long it would take and how much memory, without doing it."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ddpm_core.sets import NUM_GROUPS
from ddpm_core.sets.neighbours import Neighbours
from pipelines.cli.console import clock, waiting
from pipelines.cluster.actor_pool import ActorPool, one_actor, run_on_actors
from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import UInt8s
from pipelines.quality.extractors.asking import Asked
from pipelines.quality.extractors.load import load_extractor
from pipelines.quality.feature_job import features_at
from pipelines.quality.features import FEATURES, FeatureRequest, described
from pipelines.quality.inputs import Inputs
from pipelines.quality.request import QualityRequest, Space
from pipelines.quality.resize import resize
from pipelines.quality.searches import NEIGHBOURS, OWN, parts
from pipelines.storage.location import Location

_ROWS = 2048


def plan(
    store: Location, request: QualityRequest, inputs: Inputs, left: Sequence[int], cluster: GpuClusterConfig
) -> list[tuple[str, str]]:
    """(name, value) rows: the features and neighbours that are left to compute, by a calibration on one worker."""
    pool, rows, missing = ActorPool.of(cluster), list[tuple[str, str]](), dict[Space, int]()
    for wanted, (role, space) in {request.features(*each): each for each in request.feature_sets}.items():
        lacking = _missing(features_at(store, wanted), wanted) if left else 0
        missing[space] = missing.get(space, 0) + lacking
        told = f"{lacking:,} of {wanted.num_images:,} images to do" if lacking else "nothing to do"
        size = wanted.num_images * wanted.extractor.num_features * 4 / 2**20
        rows.append((f"{wanted.extractor.name} of {role}", f"{told}; {size:,.0f} MiB"))
    blocks = [parts(request, NEIGHBOURS)[index] for index in left]
    blocks += parts(request, OWN) if left else ()
    pairs = {space: sum(p.num_pairs for p in blocks if p.search.space == space) for space in request.spaces}
    _, images, _ = inputs.sets["samples"].read_images(0, min(request.batch_size, request.samples.num_images))
    seconds = 0.0
    with waiting("measuring on one worker"), one_actor(pool) as actor:
        for space in request.spaces:
            worker = _Calibrate(inputs.extractors[space], images, request.device, cluster.threads)
            ((_, found),) = run_on_actors(worker, [0], actor, "calibration")
            per_image, per_pair = found
            seconds += missing.get(space, 0) * per_image + pairs[space] * per_pair
        resources = {"CPU": float(os.cpu_count() or 1)}
        if actor is not None:
            import ray

            resources = ray.cluster_resources()
    workers = pool.bounds(resources)[1]
    dimensions, largest = (
        max(map(request.dimensions, request.spaces)),
        max(p.search.num_base for p in parts(request, OWN)),
    )
    memory = 4 * dimensions * (request.block_size + request.shard_size) + 8 * (1 + NUM_GROUPS) * largest
    moments = 2 * NUM_GROUPS * 8 * request.extractor.num_features**2
    return [
        ("samples", f"{len(request.samples.rows):,} of {inputs.sets['samples'].location}"),
        ("reference", f"{len(request.reference.rows):,} of {inputs.sets['reference'].location}"),
        ("features", f"{described(request.extractor)}, protocol {request.stamp}"),
        *rows,
        ("neighbours", f"{len(blocks):,} blocks, {sum(pairs.values()):.3g} distances"),
        ("memory", f"about {memory / 2**20:,.0f} MiB for each worker, {moments / 2**20:,.0f} MiB for the moments"),
        ("time", f"about {clock(seconds / max(workers, 1))} on {workers} worker(s), after their start"),
    ]


def _missing(location: Location, wanted: FeatureRequest) -> int:
    """Images whose features are not there."""
    output = FEATURES.output(location, wanted)
    manifest = output.committed()
    if manifest is not None:
        return sum(manifest["shards"][index]["rows"] for index in output.lost(manifest))
    return wanted.num_images - sum(record.rows for record in output.finished(wanted.num_shards).values())


@dataclass(frozen=True)
class _Calibrate:
    """Seconds per image of an extractor, and per distance among its features, on a batch and a block."""

    extractor: Asked
    images: UInt8s
    device: str
    threads: int

    def __call__(self, index: int) -> tuple[float, float]:
        torch.set_num_threads(self.threads)
        request, batch = self.extractor.request, self.images
        with tempfile.TemporaryDirectory(prefix="ddpm-extractor-") as scratch:
            self.extractor.keep(Location(scratch))
            extract = load_extractor(request, Location(scratch), self.threads, self.device)
        size = request.image_shape[0], request.image_shape[1]
        extract(resize(batch, size))  # loads kernels
        began = time.perf_counter()
        extract(resize(batch, size))
        per_image = (time.perf_counter() - began) / len(batch)
        random = np.random.default_rng(0)
        queries, base = (random.normal(size=(_ROWS, request.num_features)).astype(np.float32) for _ in range(2))
        began = time.perf_counter()
        Neighbours(queries, 1).add(np.arange(_ROWS), base)
        return per_image, (time.perf_counter() - began) / _ROWS**2
