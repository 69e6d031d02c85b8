"""How many steps a sampler needs: the fewest for which half as many change little."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ddpm_core.model import model_from_bytes
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.cli.config import require
from pipelines.cluster.actor_pool import ActorPool, one_actor, run_on_actors
from pipelines.cluster.config import GpuClusterConfig
from pipelines.models.used import UsedModel
from pipelines.sampling.labels import SampleLabels
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.shard import Source, draw

IMAGES = 64
_FIRST, _MOST = 6, 1000


@dataclass(frozen=True)
class Found:
    """`steps`, half of which move the images by `distance`, a root mean square over pixels in [-1, 1]."""

    steps: int
    distance: float


def fewest_steps(tolerance: float, images: Callable[[int], Tensor], most: int) -> Found:
    """The least even number of steps N, from 6 on, with rms(images(N) - images(N / 2)) < `tolerance`, found by doubling
    and then by bisection, so the least where that distance falls with N; or the largest even number up to `most`, where
    none keeps it.

    `images(steps)`: [B, C, H, W] from the same noise for any number of steps.
    """

    @cache
    def drawn(steps: int) -> Tensor:
        return images(steps)

    def distance(steps: int) -> float:
        return float((drawn(steps) - drawn(steps // 2)).double().square().mean().sqrt())

    most -= most % 2
    low, high = 0, min(_FIRST, most)
    while (reached := distance(high)) >= tolerance:
        if high == most:
            return Found(high, reached)
        low, high = high, min(2 * high, most)
    while low and high - low > 2:
        middle = (low + high) // 4 * 2
        at_middle = distance(middle)
        if at_middle < tolerance:
            high, reached = middle, at_middle
        else:
            low = middle
    return Found(high, reached)


@dataclass(frozen=True)
class _Search:
    """Runs `fewest_steps` on an actor, or in this process."""

    files: Mapping[str, bytes]
    weaker_files: Mapping[str, bytes] | None
    labels: SampleLabels | None
    request: SampleRequest
    tolerance: float
    threads: int

    def __call__(self, index: int) -> Found:
        torch.set_num_threads(self.threads)
        device, size = self.request.device, min(self.request.batch_size, IMAGES)
        weaker = model_from_bytes(self.weaker_files, device) if self.weaker_files else None
        source = Source(model_from_bytes(self.files, device), weaker, self.labels)

        def images(steps: int) -> Tensor:
            request = self.request.with_steps(steps)
            batches = [draw(request, source, torch.arange(first, first + size)) for first in range(0, IMAGES, size)]
            return torch.cat(batches)[:IMAGES]

        process = source.model.denoiser.process
        most = min(_MOST, process.num_timesteps) if isinstance(process, DiscreteProcess) else _MOST
        require(
            most >= 2, "sampler.tolerance", self.tolerance, "needs a model of more than one step; give sampler.steps"
        )
        return fewest_steps(self.tolerance, images, most)


def steps_within(
    tolerance: float,
    request: SampleRequest,
    model: UsedModel,
    weaker: UsedModel | None,
    labels: SampleLabels | None,
    cluster: GpuClusterConfig,
) -> Found:
    """The steps with which the request's sampler keeps the tolerance, measured on its first 64 images, on an actor of
    the cluster if one is named or GPUs are, else in this process.

    Raises:
        ConfigError: No number of steps that the model has keeps it.
        ClusterError: Ray gave up.
    """
    files = weaker.found.files if weaker else None
    search = _Search(model.found.files, files, labels, request, tolerance, cluster.threads)
    with one_actor(ActorPool.of(cluster)) as pool:
        ((_, found),) = run_on_actors(search, [0], pool, "tolerance")
    rule = f"is not kept by {found.steps:,} steps, which move images by {found.distance:.3g}; raise it"
    require(found.distance < tolerance, "sampler.tolerance", tolerance, rule)
    return found  # type: ignore[no-any-return]
