"""Configuration of the verify job; checked before anything else is loaded."""

from dataclasses import dataclass

from pipelines.cli.config import require
from pipelines.cluster.actor_pool import ActorPool


@dataclass(frozen=True)
class VerifyConfig:
    """Check an output."""

    uri: str
    """Directory or s3:// prefix of a run, data set, sample set or evaluation; may be given without its name."""
    recompute: float = 0.0
    """Fraction of the shards, in [0, 1], to make again and compare bit for bit; at least one."""
    num_workers: int | tuple[int, int] = 0
    """Actors that make them again: a number, [min, max], 0 for as many as the cluster holds now."""
    cpus_per_worker: int = 1
    """CPUs, and threads, of each actor."""

    def __post_init__(self) -> None:
        require(bool(self.uri), "uri", self.uri, "must be a path or a URI")
        require(0 <= self.recompute <= 1, "recompute", self.recompute, "must be in [0, 1]")
        ActorPool.of(self.num_workers, self.cpus_per_worker, gpus_per_worker=0)  # checks both
