"""Configuration of the quality job; every field is documented and checked before anything is started."""

from dataclasses import dataclass, field

from pipelines.cli.config import require, require_local, require_place
from pipelines.cluster.config import GpuClusterConfig
from pipelines.outputs.shards import MAX_SHARDS
from pipelines.quality.extractors.config import OnnxConfig
from pipelines.tracking.config import TrackingConfig


@dataclass(frozen=True)
class MemorisationConfig:
    """Whether samples are closer to training images than unseen images are."""

    enabled: bool = True
    """Whether it is looked for, where training images and unseen ones are known."""
    train_data: str | None = None
    """The images that the model was trained on; null takes those that the samples' model names, if they can be read."""
    unseen_data: str | None = None
    """Images that the model was not trained on, for calibration; null takes the rows that its training held out or, if
    it held out none, the reference, if that is another data set."""


@dataclass(frozen=True)
class QualityConfig:
    """Compare a set of images with a reference: how good are the samples?"""

    samples: str
    """Directory or s3:// prefix of a sample set (made by jobs/sample.py), of a prepared data set, or a source that
    jobs/ingest.py reads."""
    reference: str
    """What the samples should look like: as `samples`, or embedded://digits/test."""
    output: str
    """Directory or s3:// prefix of the result; must be empty, or hold a run of the same request."""
    features: str = "random_conv"
    """What is compared of the images: random_conv or random_conv:512 (64 or 512 numbers of a fixed random network),
    pixels, inception:FILE (the 2015 Inception weights: only their distance is called FID), onnx:FILE (any network, see
    section onnx), model:MODEL (one of your own diffusion models)."""
    any_weights: bool = False
    """Take an inception:FILE that is not the published one; its numbers are then called by its sha256, not FID."""
    onnx: OnnxConfig = field(default_factory=OnnxConfig)
    """What an onnx:FILE expects."""
    resize: int | None = None
    """Resize all images to this side in pixels (bicubic, antialiased) before features are taken; null compares them as
    they are, and refuses sides of different shapes."""
    neighbours: int = 5
    """k of precision, recall, density and coverage: a ball around an image reaches to its k-th neighbour."""
    by_label: bool = True
    """Also compare each class by itself, where both sides have labels and images enough of it."""
    memorisation: MemorisationConfig = field(default_factory=MemorisationConfig)
    """Memorisation."""
    compare_with: str | None = None
    """Another finished output of this job: says by how much this one differs; refused where the two were not measured
    in the same way, of which the differing fields are named."""
    promote: bool = False
    """Give the model that made the samples the alias `champion` if the interval of its distance is below that of the
    champion's, measured in the same way."""
    store: str | None = None
    """Directory or s3:// prefix that takes the features of each side, to be used again; null takes `features` beside
    `output`."""
    batch_size: int = 64
    """Images in one call of the feature extractor; a part of the features' identity, as it may move a last bit."""
    shard_size: int = 1024
    """Images in one object of features."""
    block_size: int = 4096
    """Images whose nearest neighbours are searched at a time: what a kill can cost each worker."""
    dry_run: bool = False
    """Say what would be computed, how long it would take and how much memory, and write nothing."""
    name: str | None = None
    """Name of the run in MLflow; null takes the last part of `output`."""
    root: str = "~/ddpm"
    """Local directory of the MLflow database, when no server is named, and of records not sent yet."""
    cluster: GpuClusterConfig = field(default_factory=GpuClusterConfig)
    """Where it runs; GPUs compute features."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        for name in ("samples", "reference"):
            rule = "must be the URI of a sample set, of a prepared data set, or of a source of images"
            require(bool(getattr(self, name)), name, getattr(self, name), rule)
        require_place("output", self.output)
        if self.store is not None:
            require_place("store", self.store)
        size_holds = self.resize is None or 4 <= self.resize <= 4096
        require(size_holds, "resize", self.resize, "must be in 4..4096, or null to keep the size")
        require(1 <= self.neighbours <= 100, "neighbours", self.neighbours, "must be in 1..100")
        for name, low, limit in (("batch_size", 1, 2**16), ("shard_size", 1, 2**20), ("block_size", 16, 2**20)):
            value = getattr(self, name)
            require(low <= value <= limit, name, value, f"must be in {low}..{limit}")
        require_local(self.root)


def check_size(field: str, uri: str, num_rows: int, shard_size: int) -> None:
    """Refuse a side that would have too many shards of features."""
    holds = num_rows <= MAX_SHARDS * shard_size
    require(holds, field, uri, f"holds {num_rows:,} images, more than {MAX_SHARDS} x shard_size; raise shard_size")
