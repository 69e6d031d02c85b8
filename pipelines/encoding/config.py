"""Configuration of the encoding job; every field is documented and checked before anything is started."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.cli.config import require, require_local, require_place
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.precision import PrecisionField
from pipelines.outputs.shards import MAX_SHARDS
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.tracking.config import TrackingConfig


@dataclass(frozen=True)
class EncodeConfig:
    """Encode images: run a deterministic sampler backwards, from each image to the noise that leads to it."""

    model: str
    """Directory or s3:// prefix of a model or of a training run, models:/NAME@ALIAS, models:/NAME/3, runs:/RUN_ID."""
    data: str
    """URI of a prepared data set (made by jobs/ingest.py), or embedded://digits/test."""
    output: str
    """Directory or s3:// prefix of the encodings; must be empty, or hold a run of the same request."""
    num_images: int | None = None
    """Encode the first so many rows of the data set; null takes all."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(name="dpmpp_2m", spacing="log_snr"))
    """What is run backwards: a sampler that draws no noise. With steps even in log-SNR it leads back best."""
    clip_x_0: bool = False
    """Clamp every predicted x_0 to the range of pixels, on both ways. Pixels at the end of the range then get no noise:
    what is clamped there is the pixel itself."""
    labels: Literal["auto", "given", "null"] = "auto"
    """What a model that was trained with labels is told: each image's label, or none. auto: given, where the data have
    labels, else null."""
    precision: PrecisionField = "auto"
    """Of the network, bf16 by autocast; the sampler's own arithmetic is float32.
    auto: bf16 on GPUs and where this machine's CPU is faster in it (AMX, AMD's avx512_bf16, Arm's bf16), else
    fp32; an output that is continued keeps its own."""
    batch_size: int = 64
    """Images in one call of the network; a part of the result's identity, as it may move a last bit."""
    shard_size: int = 128
    """Images in one object: what a kill can cost each worker. Batches do not reach beyond it: take a multiple of
    batch_size."""
    name: str | None = None
    """Name of the run in MLflow; null takes the last part of `output`."""
    root: str = "~/ddpm"
    """Local directory of the MLflow database, when no server is named, and of records not sent yet."""
    cluster: GpuClusterConfig = field(default_factory=GpuClusterConfig)
    """Where it runs."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        require(bool(self.model), "model", self.model, "must be a directory, a URI or models:/NAME@ALIAS")
        require(bool(self.data), "data", self.data, "must be the URI of a prepared data set")
        require_place("output", self.output)
        asked = self.sampler
        draws = "eta" if asked.eta > 0 else "churn" if asked.churn > 0 else "name"
        no_way = "draws noise, and no way leads back; take a sampler that draws none, such as dpmpp_2m or ddim"
        require(not asked.draws_noise, f"sampler.{draws}", getattr(asked, draws), no_way)
        no_search = "is for sampling; give sampler.steps, and see the round trip"
        require(asked.tolerance is None, "sampler.tolerance", asked.tolerance, no_search)
        require(self.num_images is None or self.num_images >= 1, "num_images", self.num_images, "must be at least 1")
        for name, limit in (("batch_size", 2**16), ("shard_size", 2**20)):
            require(1 <= getattr(self, name) <= limit, name, getattr(self, name), f"must be in 1..{limit}")
        most = MAX_SHARDS * self.shard_size
        shards_hold = self.num_images is None or self.num_images <= most
        require(shards_hold, "num_images", self.num_images, f"must be at most {MAX_SHARDS} x shard_size")
        require_local(self.root)
