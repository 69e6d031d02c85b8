"""Configuration of the evaluation job; every field is documented and checked before anything is started."""

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from ddpm_core.config import MAX_TIMESTEPS
from pipelines.cli.config import require, require_local, require_place
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.precision import PrecisionField
from pipelines.tracking.config import TrackingConfig


@dataclass(frozen=True)
class OdeConfig:
    """The probability-flow ODE's likelihood of the first images of the evaluation."""

    num_images: int = 0
    """How many images; 0 leaves it out. One costs 3 · steps · (1 + 2 · probes) network evaluations, or so."""
    steps: int = 64
    """Steps of Heun's method, an even number; half as many are run too, for the error estimate."""
    probes: int = 4
    """Random vectors of the trace estimate (Hutchinson), at least 2."""

    def __post_init__(self) -> None:
        require(self.num_images >= 0, "ode.num_images", self.num_images, "must not be negative")
        steps_hold = self.steps >= 4 and self.steps % 2 == 0
        require(steps_hold, "ode.steps", self.steps, "must be an even number, at least 4")
        require(2 <= self.probes <= 1000, "ode.probes", self.probes, "must be in 2..1000")


@dataclass(frozen=True)
class ClassifierConfig:
    """Classification by likelihood: how classes are compared, and with how much effort."""

    classes: str | None = None
    """Which classes there are to choose from: names or numbers, as `3,5` or `Shirt,Coat`; null takes all."""
    prior: str = "uniform"
    """Probability of each class before the image is seen: `uniform`; `train_data`, the classes' shares of the images of
    the training data; or a number for each class, as `0.9,0.1`, which sum to 1."""
    timesteps_per_round: int = 6
    """Time steps at which each class is compared in one round, at least 2; L_0 costs one evaluation more."""
    rounds: int = 8
    """Rounds of draws for an image, at most; at least 2, which the error of a difference needs."""
    separation: float | None = 2.0
    """Standard errors by which an image's best class must lead another one for that one to be given up; null gives up
    none: every class gets all rounds."""

    def __post_init__(self) -> None:
        k, separation = self.timesteps_per_round, self.separation
        require(k >= 2, "classifier.timesteps_per_round", k, "must be at least 2")
        require(2 <= self.rounds <= 10_000, "classifier.rounds", self.rounds, "must be in 2..10000")
        positive = separation is None or 0 < separation < inf
        require(positive, "classifier.separation", separation, "must be above 0 and finite, or null")


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model's bits per dimension on a data set."""

    model: str
    """Directory or s3:// prefix of a model or of a training run, models:/NAME@ALIAS, models:/NAME/3, runs:/RUN_ID."""
    data: str
    """URI of a prepared data set (made by jobs/ingest.py), or embedded://digits/test."""
    output: str
    """Directory or s3:// prefix of the evaluation; must be empty, or hold a run of the same request."""
    estimator: Literal["all", "stratified", "importance"] = "stratified"
    """Which time steps each image is evaluated at: all of them; K of them, stratified in log-SNR; K of them, by
    importance as a first pass measures it."""
    timesteps_per_image: int = 48
    """K, of stratified and importance, an even number, at most T - 1; L_0 costs two evaluations more."""
    draws: int = 2
    """Draws of the noise at every time step, of `all`; 1 gives no Monte-Carlo error."""
    sigma2: Literal["auto", "beta", "beta_tilde", "learned"] = "auto"
    """Variance of the reverse steps that the headline is about. auto: what the network has learned, or else beta_tilde,
    which is also that of a VDM's steps. The report has what else follows: the fixed variances and the optimal one."""
    num_timesteps: int | None = None
    """T of the bound: as many steps, evenly spaced over the model's own; null takes all of them, or continuous time
    where the model has it."""
    num_images: int | None = None
    """Images to evaluate, in a fixed pseudo-random order; null takes the whole data set, in its own order."""
    target_halfwidth: float | None = None
    """Bits/dim: stop when the data set's mean is known to this (half of its 95% interval); null evaluates all."""
    seed: int = 0
    """Of all noise: equal seeds meet equal noise, whatever the model."""
    precision: PrecisionField = "auto"
    """Of the network, bf16 by autocast; everything else is float64.
    auto: bf16 on GPUs and where this machine's CPU is faster in it (AMX, AMD's avx512_bf16, Arm's bf16), else
    fp32; an output that is continued keeps its own."""
    labels: Literal["auto", "given", "null", "both"] = "auto"
    """Which bound of a model that was trained with labels: given each image's label, of the null class, or both on the
    same noise, with what the label tells of the image in bits/dim. auto: given, where the data have labels, else
    null."""
    by_label: bool = False
    """Also report each label's mean."""
    classify: bool = False
    """Also classify each image by its bound under every class."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Of `classify`."""
    held_out: bool = False
    """Evaluate only the rows that the model's training held out; `data` must be the data set that it was trained on."""
    train_data: str | None = None
    """Data set that the histogram baseline is fitted on; null takes the one that the model was trained on."""
    ode: OdeConfig = field(default_factory=OdeConfig)
    """Likelihood by the probability-flow ODE."""
    batch_size: int = 64
    """Evaluations in one call of the network; a part of the result's identity, as it may move a last bit."""
    shard_size: int = 128
    """Images in one object, a multiple of 16: what a kill can cost each worker, and how often progress is shown."""
    promote: bool = False
    """Give the model the alias `champion` if its interval is below the champion's on the same data."""
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
        for name, limit in (("draws", 1000), ("batch_size", 2**16)):
            require(1 <= getattr(self, name) <= limit, name, getattr(self, name), f"must be in 1..{limit}")
        k = self.timesteps_per_image
        require(k >= 2 and k % 2 == 0, "timesteps_per_image", k, "must be an even number, at least 2")
        steps, limit = self.num_timesteps, MAX_TIMESTEPS
        require(steps is None or 2 <= steps <= limit, "num_timesteps", steps, f"must be in 2..{limit}, or null")
        shards_hold = 16 <= self.shard_size <= 2**20 and self.shard_size % 16 == 0
        require(shards_hold, "shard_size", self.shard_size, f"must be a multiple of 16, at most {2**20}")
        require(self.num_images is None or self.num_images >= 2, "num_images", self.num_images, "must be at least 2")
        halfwidth = self.target_halfwidth
        halfwidth_holds = halfwidth is None or 0 < halfwidth < inf
        require(halfwidth_holds, "target_halfwidth", halfwidth, "must be above 0 (bits/dim) and finite")
        require_local(self.root)
        measurable = halfwidth is None or self.estimator != "all" or self.draws >= 2
        require(measurable, "draws", self.draws, "must be at least 2 to know the half-width that is the target")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
