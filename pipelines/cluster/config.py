"""The section `cluster` of every job: which Ray it uses, and how many workers of which size.

A job has those fields that mean something to it, always under these names.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from pipelines.cli.config import require


@dataclass(frozen=True)
class ClusterConfig:
    """Where it runs."""

    address: str | None = None
    """Ray address, such as HOST:6379; null takes RAY_ADDRESS (set by `ray job submit`), else starts a private local
    Ray, as `local` always does."""
    num_workers: int | tuple[int, int] = 0
    """Actors of one CPU each: a number, [min, max] on an autoscaling cluster, 0 for as many as the cluster holds
    now."""

    def __post_init__(self) -> None:
        low, high = self.worker_range
        pool_holds = low == high == 0 or 1 <= low <= high
        require(pool_holds, "cluster.num_workers", self.num_workers, "must be 0, a positive number, or [min, max]")

    @property
    def worker_range(self) -> tuple[int, int]:
        """(min, max) number of workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def needs(self) -> dict[str, float]:
        """What one worker needs, by Ray's names."""
        return {"CPU": 1.0, "GPU": 0.0}


@dataclass(frozen=True)
class CpuClusterConfig(ClusterConfig):
    """Where it runs, for workers that compute on tensors."""

    num_workers: int | tuple[int, int] = 0
    """Actors: a number, [min, max] on an autoscaling cluster, 0 for as many as the cluster holds now."""
    cpus_per_worker: float = 1.0
    """CPUs that each actor reserves; a fraction shares a CPU."""
    threads_per_worker: int = 0
    """CPU threads of each actor's tensor operations; 0 takes as many as cpus_per_worker, at least one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cpus_hold = 0 < self.cpus_per_worker < inf
        require(cpus_hold, "cluster.cpus_per_worker", self.cpus_per_worker, "must be positive and finite")
        require(self.threads_per_worker >= 0, "cluster.threads_per_worker", self.threads_per_worker, "must be >= 0")

    @property
    def needs(self) -> dict[str, float]:
        """What one worker needs, by Ray's names."""
        return {"CPU": self.cpus_per_worker, "GPU": 0.0}

    @property
    def threads(self) -> int:
        """`threads_per_worker`, or what 0 stands for in an actor."""
        return self.threads_per_worker or max(1, int(self.cpus_per_worker))


@dataclass(frozen=True)
class GpuClusterConfig(CpuClusterConfig):
    """Where it runs, for workers that may have GPUs."""

    num_workers: int | tuple[int, int] = 0
    """Actors: a number, [min, max] on an autoscaling cluster, 0 for as many as the cluster holds now; 0 without a
    cluster and with one shard or less than about a minute of work: none, this process does it."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs that each actor reserves; 0 computes on CPUs, a fraction shares a GPU;
    auto: one if the cluster, or else this machine, has any or can start any, else 0; what is continued keeps what it
    was begun with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        gpus = self.gpus
        gpus_hold = gpus >= 0 and (gpus < 1 or gpus % 1 == 0)
        require(gpus_hold, "cluster.gpus_per_worker", gpus, "must be in [0, 1) or whole")

    @property
    def gpus(self) -> float:
        """`gpus_per_worker`; `auto` has none until `pipelines.cluster.gpus` has settled it."""
        return 0.0 if isinstance(self.gpus_per_worker, str) else self.gpus_per_worker

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What the workers compute on, as requests record it."""
        return "cuda" if self.gpus else "cpu"

    @property
    def needs(self) -> dict[str, float]:
        """What one worker needs, by Ray's names."""
        return {"CPU": self.cpus_per_worker, "GPU": self.gpus}
