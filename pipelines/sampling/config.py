"""Configuration of the sampling job; every field is documented and checked before anything is started."""

import math
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Literal

from pipelines.cli.config import require, require_local, require_place
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.precision import PrecisionField
from pipelines.outputs.shards import MAX_SHARDS
from pipelines.sampling.labels import AskedLabels
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.tracking.config import TrackingConfig

_SHARDS, _MAX_SHARD = 16, 1024


@dataclass(frozen=True)
class GuidanceConfig:
    """Leads images towards their class, or away from a weaker model."""

    scale: float = 1.0
    """w of ε = ε_0 + w (ε_c - ε_0), ε_c being predicted with the label and ε_0 without it, or by the weaker model:
    w = 0 is ε_0 alone, 1 ε_c alone, above 1 guided (the w of Ho and Salimans 2021 is this one minus 1)."""
    interval: tuple[float, float] | None = None
    """[low, high] in noise levels σ/α: guides only where low < σ/α <= high, elsewhere w is 1 (Kynkäänniemi 2024).
    Null guides everywhere."""
    model: str | None = None
    """Autoguidance: a weaker model for ε_0, with the same label, such as an earlier checkpoint of the run (Karras
    2024); named as `model` is. It needs no labels."""

    def __post_init__(self) -> None:
        require(math.isfinite(self.scale), "guidance.scale", self.scale, "must be finite; 1 does not guide")
        low, high = self.interval or (0.0, 1.0)
        holds = 0.0 <= low < high < math.inf
        require(holds, "guidance.interval", self.interval, "must be two noise levels σ/α, 0 <= low < high, finite")
        named = self.model is None or bool(self.model)
        require(named, "guidance.model", self.model, "must be a directory, a URI or models:/NAME@ALIAS")

    @property
    def is_default(self) -> bool:
        """Whether nothing is asked for."""
        return self == GuidanceConfig()


@dataclass(frozen=True)
class SampleConfig:
    """Generate images with a model."""

    model: str
    """Directory or s3:// prefix of a model or of a training run, models:/NAME@ALIAS, models:/NAME/3, runs:/RUN_ID."""
    output: str
    """Directory or s3:// prefix of the sample set; {date} in it becomes `date`;
    must be empty, or hold a run of the same request."""
    num_images: int | None = None
    """How many images; their ids are 0..num_images-1. Null where `labels` tells."""
    seed: int | str = 0
    """Of all noise: an image depends on (model, seed, id). '{date}' takes `date` as a number, such as 20261121."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """What turns noise into images."""
    clip_x_0: bool = True
    """Clamp every predicted x_0 to the range of pixels."""
    dynamic_threshold: float | None = None
    """Percentile, in (0, 100], of |x_0|: where it is above 1, the predicted x_0 is clamped to it and divided by it, and
    not clamped to the range of pixels (Saharia et al. 2022, who take 99.5). For strong guidance."""
    labels: str | None = None
    """Classes of a model that was trained with labels. all: num_images divided among them, one class after another;
    all:100: so many of each; 3,5 or 3:100,5:50: these, by name or index; balanced: in turn, 0, 1, ..., K-1, 0, ...;
    from:DATASET: the labels of the first rows of a prepared data set. Null: images of no class. A recipe needs quotes
    around numbers."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Leads images towards their class, or away from a weaker model."""
    precision: PrecisionField = "auto"
    """Of the network, bf16 by autocast; the sampler's own arithmetic is float32.
    auto: bf16 on GPUs and where this machine's CPU is faster in it (AMX, AMD's avx512_bf16, Arm's bf16), else
    fp32; an output that is continued keeps its own."""
    interpolate: tuple[int, int] | None = None
    """Two ids: the preview shows images between them, too, from noise that turns from the one's to the other's."""
    batch_size: int = 64
    """Images in one call of the network; a part of the result's identity, as it may move a last bit."""
    shard_size: int | None = None
    """Images in one object: what a kill can cost each worker. Null takes a sixteenth of all, in whole batches, at most
    1,024 (and at least a batch); where the output was begun before, what it was begun with."""
    format: Literal["parquet", "webdataset"] = "parquet"
    """parquet: id and image as Hugging Face's data sets have them; webdataset: tar files of PNG files."""
    date: str | None = None
    """What {date} stands for, as 2026-11-21; null for today (UTC). Schedulers give the date of the schedule."""
    dry_run: bool = False
    """Print what would be done and how long it would take, from a short calibration; write nothing."""
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
        require_place("output", self.output)
        asked = self.asked_labels
        told = self.num_images is not None or (asked is not None and asked.tells_number)
        require(told, "num_images", self.num_images, "must be given; only labels with counts, or from:DATASET, tell it")
        require(self.num_images is None or self.num_images >= 1, "num_images", self.num_images, "must be at least 1")
        guided = asked is not None or self.guidance.model is not None or self.guidance.is_default
        rule = "needs labels, or a weaker model (guidance.model)"
        field_given = "scale" if self.guidance.scale != 1.0 else "interval"
        require(guided, f"guidance.{field_given}", getattr(self.guidance, field_given), rule)
        percentile = self.dynamic_threshold
        holds = percentile is None or 0 < percentile <= 100
        require(holds, "dynamic_threshold", percentile, "must be a percentile in (0, 100], such as 99.5")
        clipped = percentile is None or self.clip_x_0
        require(clipped, "dynamic_threshold", percentile, "is a way of clipping; leave clip_x_0 true")
        if self.interpolate is not None:
            require(min(self.interpolate) >= 0, "interpolate", self.interpolate, "must be two ids of the images")
            rule = "needs a sampler without noise, such as dpmpp_2m"
            require(not self.sampler.draws_noise, "interpolate", self.interpolate, rule)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        require(self.batch_size <= 2**16, "batch_size", self.batch_size, f"must be at most {2**16}")
        if self.shard_size is not None:
            require(self.shard_size >= 1, "shard_size", self.shard_size, "must be at least 1")
            require(self.shard_size <= 2**20, "shard_size", self.shard_size, f"must be at most {2**20}")
        shards_hold = self.num_images is None or self.num_images <= MAX_SHARDS * self.chosen_shard_size
        require(shards_hold, "num_images", self.num_images, f"must be at most {MAX_SHARDS} x shard_size")
        require_local(self.root)
        seed_holds = self.seed == "{date}" or (isinstance(self.seed, int) and self.seed >= 0)
        require(seed_holds, "seed", self.seed, "must be a number >= 0, or '{date}'")
        if self.date is not None:
            try:
                date.fromisoformat(self.date)
            except ValueError:
                require(False, "date", self.date, "must be a date such as 2026-11-21")

    def with_date(self) -> "SampleConfig":
        """The same with every {date} replaced."""
        day = date.fromisoformat(self.date) if self.date else datetime.now(UTC).date()
        seed = int(day.strftime("%Y%m%d")) if self.seed == "{date}" else self.seed
        return replace(self, output=self.output.replace("{date}", day.isoformat()), seed=seed, date=day.isoformat())

    @property
    def asked_labels(self) -> AskedLabels | None:
        """`labels`, taken apart."""
        return None if self.labels is None else AskedLabels.parse(self.labels)

    @property
    def chosen_shard_size(self) -> int:
        """`shard_size`, or what null stands for: shards of whole batches, for all workers to have some of a request."""
        if self.shard_size is not None:
            return self.shard_size
        assert self.num_images is not None, "settled"
        batches = -(-self.num_images // self.batch_size)
        return max(self.batch_size, min(-(-batches // _SHARDS), _MAX_SHARD // self.batch_size) * self.batch_size)
