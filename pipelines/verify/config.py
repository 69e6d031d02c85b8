"""Configuration of the verify job; checked before anything else is loaded."""

from dataclasses import dataclass, field

from pipelines.cli.config import require
from pipelines.cluster.config import CpuClusterConfig


@dataclass(frozen=True)
class VerifyConfig:
    """Check an output."""

    uri: str
    """Directory or s3:// prefix of a run, data set, sample set or evaluation; may be given without its name."""
    recompute: float = 0.0
    """Fraction of the shards, in [0, 1], to make again and compare bit for bit; at least one."""
    cluster: CpuClusterConfig = field(default_factory=CpuClusterConfig)
    """Where shards are made again, if they are."""

    def __post_init__(self) -> None:
        require(bool(self.uri), "uri", self.uri, "must be a path or a URI")
        require(0 <= self.recompute <= 1, "recompute", self.recompute, "must be in [0, 1]")
