"""Configuration of the training job; every field is documented and checked before Ray starts."""

import re
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, Literal

from ddpm_core.config import MAX_TIMESTEPS
from ddpm_core.sets import fewest_images
from pipelines.cli.config import as_dict, require, require_place
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.precision import PrecisionField
from pipelines.tracking.config import TrackingConfig
from pipelines.training.diffusion import DiffusionConfig
from pipelines.training.network import NetworkConfig

# Fields that checkpoints of version 1 do not have; their defaults are what those were trained with.
_LATER = {
    "data": ("balance_classes",),
    "network": ("fourier_features", "learned_variance", "num_classes"),
    "diffusion": (
        "zero_terminal_snr", "gamma_min", "gamma_max", "learned_ends", "sigma_min", "sigma_max", "prediction",
    ),
    "train": ("times", "vlb_timesteps", "adam_beta2", "label_dropout"),
}  # fmt: skip
DIGITS, DIGITS_TEST, HELD_OUT = "embedded://digits/train", "embedded://digits/test", "held-out"
QUALITY_FEATURES = 64
"""Numbers of an image that samples are compared by while training."""
FEWEST_QUALITY_IMAGES = fewest_images(QUALITY_FEATURES)
"""Samples, and validation images, that the comparison needs."""


@dataclass(frozen=True)
class DataConfig:
    """Which images are trained on."""

    train: str = DIGITS
    """URI of the prepared data set to train on (made by jobs/ingest.py), or embedded://digits/train."""
    validation: str | None = "auto"
    """URI of the prepared data set that bits/dim are measured on; held-out takes rows of data.train that are never
    trained on, null none, auto embedded://digits/test for the default of data.train and held-out for any other."""
    hold_out: int | None = None
    """One row of every so many is held out of the training; 0: none is. Null: 20, or more so that at most 10,000 are,
    where data.validation takes them; a training that is continued keeps its own."""
    random_flip: bool = False
    """Mirror each image left-right with probability 1/2, drawn anew in each epoch."""
    balance_classes: bool = False
    """Take every class equally often in an epoch: each row at least once, and those of smaller classes again until they
    are as many as those of the largest one."""
    window_mib: int = 64
    """Image bytes (MiB) that one read task reads and shuffles together."""
    reads_ahead: int = 2
    """Windows read at the same time, ahead of the training."""
    cpus_per_read: float = 0.0
    """CPUs that a read task reserves; 0 lets it run beside workers that hold every CPU."""

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", self.train, "must be the URI of a prepared data set")
        require(self.validation != "", "data.validation", "", "must be the URI of a prepared data set, or null")
        holds_out = self.hold_out is None or self.hold_out == 0 or self.hold_out >= 2
        require(holds_out, "data.hold_out", self.hold_out, "must be at least 2, or 0 to hold out none")
        require(self.window_mib >= 1, "data.window_mib", self.window_mib, "must be at least 1")
        require(self.reads_ahead >= 1, "data.reads_ahead", self.reads_ahead, "must be at least 1")
        reads_hold = 0 <= self.cpus_per_read < inf
        require(reads_hold, "data.cpus_per_read", self.cpus_per_read, "must be a number >= 0")


@dataclass(frozen=True)
class OptimizationConfig:
    """What is minimised and how."""

    steps: int = 1000
    """Optimizer steps of the whole training; raising it and running again trains on."""
    accumulate: int = 1
    """Parts into which a worker cuts its share of a batch, to fit its memory; numbers do not change."""
    loss: Literal["simple", "vlb", "min_snr", "hybrid"] = "simple"
    """simple: the squared error of what the network predicts (Ho et al. 2020 eq. 14); vlb: its expectation is the
    ELBO's; min_snr: Hang 2023; hybrid: simple and a thousandth of vlb, which trains network.learned_variance (Nichol &
    Dhariwal 2021)."""
    min_snr_gamma: float = 5.0
    """γ of min_snr."""
    times: Literal["auto", "uniform", "even", "importance", "log_normal"] = "auto"
    """Which t a step takes: uniform, drawn for each row; even, spread evenly over the global batch from one draw
    (Kingma et al. 2021); importance, more often those with large losses (Nichol & Dhariwal 2021); log_normal, ln σ
    normal (Karras et al. 2022). auto: in continuous time even, log_normal for prediction edm by loss simple; in steps
    uniform, importance for vlb with network.learned_variance."""
    vlb_timesteps: int | None = None
    """T of the bound that vlb trains in continuous time; null: its limit for infinite T."""
    label_dropout: float = 0.1
    """With network.num_classes: probability that a row trains the null class in an epoch and not that of its label, as
    guidance and samples of no class need (Ho & Salimans 2021)."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW with weight_decay."""
    learning_rate: float = 1e-3
    """Step size after the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    adam_beta2: float = 0.999
    """Decay of the mean of squared gradients, of adam and adamw."""
    weight_decay: float = 0.0
    """Decoupled weight decay of adamw, of the network's weights."""
    grad_clip: float | None = 1.0
    """Largest L2 norm of the gradient; larger ones are scaled down. Null (or .inf): none is."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, after its warm-up."""
    compile: bool = False
    """torch.compile the network (pays on GPUs, minutes of start-up on CPUs)."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        steps_hold = self.vlb_timesteps is None or 1 <= self.vlb_timesteps <= MAX_TIMESTEPS
        require(steps_hold, "train.vlb_timesteps", self.vlb_timesteps, f"must be in 1..{MAX_TIMESTEPS}, or null")
        for name in ("learning_rate", "min_snr_gamma"):
            require(0 < getattr(self, name) < inf, f"train.{name}", getattr(self, name), "must be positive and finite")
        if self.grad_clip == inf:
            object.__setattr__(self, "grad_clip", None)  # JSON has no infinity
        clip_holds = self.grad_clip is None or self.grad_clip > 0
        require(clip_holds, "train.grad_clip", self.grad_clip, "must be positive (null clips nothing)")
        require(self.steps <= 10**8, "train.steps", self.steps, f"must be at most {10**8}")
        for name in ("warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must not be negative")
        require(self.weight_decay < inf, "train.weight_decay", self.weight_decay, "must be finite")
        require(0 <= self.label_dropout <= 1, "train.label_dropout", self.label_dropout, "must be in [0, 1]")
        for name in ("ema_decay", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "must be in [0, 1)")


@dataclass(frozen=True)
class CheckpointConfig:
    """Resume state and models kept in the run directory."""

    every_steps: int = 500
    """Steps between checkpoints."""
    keep: int = 3
    """Newest checkpoints kept; at least 2, so that one can be corrupt."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "checkpoint.every_steps", self.every_steps, "must be at least 1")
        require(self.keep >= 2, "checkpoint.keep", self.keep, "must be at least 2")


@dataclass(frozen=True)
class ValidationConfig:
    """Bits/dim of the EMA weights on validation images, while training and at the end."""

    every_steps: int = 1000
    """Steps between validations; the last step is always validated."""
    num_images: int = 256
    """Images scored, the first of the validation set; fewer when it has fewer."""
    timesteps_per_image: int = 16
    """Stratified timesteps drawn for each image."""
    batch_size: int = 64
    """Images in one network call."""
    sigma2: Literal["auto", "beta", "beta_tilde", "learned"] = "auto"
    """Variance of the reverse steps that the ELBO is computed for. auto: learned with network.learned_variance, else
    beta_tilde."""
    num_timesteps: int | None = None
    """T of the ELBO. Null: that of the schedule; in continuous time the bound is the one for infinite T."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "num_images", "timesteps_per_image", "batch_size"):
            require(getattr(self, name) >= 1, f"validation.{name}", getattr(self, name), "must be at least 1")
        steps_hold = self.num_timesteps is None or 2 <= self.num_timesteps <= MAX_TIMESTEPS
        require(steps_hold, "validation.num_timesteps", self.num_timesteps, f"must be in 2..{MAX_TIMESTEPS}, or null")


@dataclass(frozen=True)
class GridConfig:
    """Pictures of samples from the EMA weights, while training and at the end."""

    every_steps: int = 500
    """Steps between grids; the last step always gets one."""
    num_images: int = 64
    """Samples on a grid; with network.num_classes about as many, one row for each class (at most 16)."""
    sampler_steps: int = 25
    """Steps of the sampler, dpmpp_2m_sde (Lu et al. 2022), one evaluation of the network each."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "num_images", "sampler_steps"):
            require(getattr(self, name) >= 1, f"grid.{name}", getattr(self, name), "must be at least 1")


@dataclass(frozen=True)
class QualityConfig:
    """How close samples of the EMA weights are to the validation images, while training and at the end."""

    num_images: int = 0
    """Samples drawn each time and compared with at most 10,000 validation images by 64 features of a fixed random
    network: Fréchet distance and KID; with network.num_classes of each class in turn. 0: off."""
    every_steps: int = 1000
    """Steps between two measurements; the last step always has one."""
    sampler_steps: int = 25
    """Steps of the sampler, dpmpp_2m_sde (Lu et al. 2022), one evaluation of the network each."""

    def __post_init__(self) -> None:
        fewest = FEWEST_QUALITY_IMAGES
        rule = (
            f"must be 0, which turns it off, or at least {fewest}: the covariance of {QUALITY_FEATURES} features must "
            "have full rank, also without a tenth of the samples"
        )
        require(self.num_images == 0 or self.num_images >= fewest, "quality.num_images", self.num_images, rule)
        for name in ("every_steps", "sampler_steps"):
            require(getattr(self, name) >= 1, f"quality.{name}", getattr(self, name), "must be at least 1")


@dataclass(frozen=True)
class TrainClusterConfig(GpuClusterConfig):
    """Where it runs."""

    num_workers: int | tuple[int, int] = 1
    """DDP workers: a number, or [min, max] to shrink and grow with the cluster."""
    cpus_per_worker: float = 1.0
    """CPUs that each worker reserves; a fraction shares a CPU."""
    threads_per_worker: int = 0
    """CPU threads of each worker's tensor operations; 0 divides the machine's cores among its workers."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs that each worker reserves, a whole number; it computes on the first of them. 0 trains on CPUs;
    auto: one if the cluster, or else this machine, has any or can start any, else 0; a run that is continued keeps
    what it had."""
    max_failures: int = 10
    """Worker losses after which the job gives up."""

    def __post_init__(self) -> None:
        low, high = self.worker_range
        require(
            1 <= low <= high, "cluster.num_workers", self.num_workers, "must be >= 1, or [min, max] with min <= max"
        )
        gpus = self.gpus
        gpus_rule = "must be 0 or a whole number: workers of one training cannot share a GPU"
        require(gpus >= 0 and gpus % 1 == 0, "cluster.gpus_per_worker", gpus, gpus_rule)
        require(self.max_failures >= 0, "cluster.max_failures", self.max_failures, "must not be negative")
        super().__post_init__()


@dataclass(frozen=True)
class TrainTrackingConfig(TrackingConfig):
    """MLflow."""

    model_name: str | None = None
    """Name in the model registry; null takes the run's name."""
    every_steps: int = 20
    """Steps between reports; every step's loss is recorded all the same."""
    parent: str | None = None
    """Id of the MLflow run below which this one is shown, as jobs/sweep.py gives it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name_holds = self.model_name is None or re.fullmatch(r"[^/:@]+", self.model_name) is not None
        require(name_holds, "tracking.model_name", self.model_name, "must not be empty, nor have one of / : @")
        require(self.every_steps >= 1, "tracking.every_steps", self.every_steps, "must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """Train a DDPM."""

    name: str = "digits"
    """The run's name: its directory under `root`/runs, its MLflow experiment and registered model."""
    root: str = "~/ddpm"
    """Directory or s3:// prefix under which everything is stored; shared by all nodes of a cluster."""
    precision: PrecisionField = "auto"
    """bf16: activations in bfloat16, weights, tables and loss in float32;
    auto: bf16 on GPUs and where this machine's CPU is faster in it (AMX, AMD's avx512_bf16, Arm's bf16), else fp32; a
    run that is continued keeps its own."""
    batch_size: int = 64
    """Images in a global batch, divided among the workers."""
    seed: int = 0
    """Of everything random: initial weights, row order, t, ε, flips, which labels are dropped, dropout."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The network."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The forward process."""
    train: OptimizationConfig = field(default_factory=OptimizationConfig)
    """What is minimised and how."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Resume state and models."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Bits/dim while training."""
    grid: GridConfig = field(default_factory=GridConfig)
    """Sample pictures while training."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    """Quality of samples while training."""
    cluster: TrainClusterConfig = field(default_factory=TrainClusterConfig)
    """Where it runs."""
    tracking: TrainTrackingConfig = field(default_factory=TrainTrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        plain = self.name.replace("-", "").replace("_", "").replace(".", "")
        name_holds = plain.isalnum() and len(self.name.encode()) <= 200
        require(name_holds, "name", self.name, "must consist of letters, digits, '.', '-' and '_', at most 200 bytes")
        require_place("root", self.root, "must be a directory or an s3:// prefix")
        require(1 <= self.batch_size <= 2**20, "batch_size", self.batch_size, f"must be in 1..{2**20}")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        high = self.cluster.worker_range[1]
        require(
            self.batch_size >= high * self.train.accumulate,
            "batch_size",
            self.batch_size,
            f"must be at least workers x accumulate = {high * self.train.accumulate}",
        )
        dropout = self.train.label_dropout
        drops = self.network.num_classes is not None or dropout == OptimizationConfig.label_dropout
        rule = "must be left out without network.num_classes: there is no label to drop"
        require(drops, "train.label_dropout", dropout, rule)
        self._check_objective()
        self._check_times()

    def _check_objective(self) -> None:
        """Refuse a loss, its times or a variance that the process or the network does not have."""
        diffusion, train, learned = self.diffusion, self.train, self.network.learned_variance
        loss, name, table = train.loss, f"schedule {diffusion.schedule}", not diffusion.is_continuous
        if learned:
            rule = f"must be false with {name}, which has no betas to learn variances between"
            require(table, "network.learned_variance", learned, rule)
            rule = f"must be false with train.loss {loss}, which does not train the variances; take hybrid or vlb"
            require(loss in ("vlb", "hybrid"), "network.learned_variance", learned, rule)
        rule = "must be vlb with schedule gamma_learned: no other loss trains γ"
        require(diffusion.schedule != "gamma_learned" or loss == "vlb", "train.loss", loss, rule)
        rule = "must not be hybrid without network.learned_variance: there is no variance to train"
        require(learned or loss != "hybrid", "train.loss", loss, rule)
        rule = f"must not be importance with {name}, which has no table of time steps to count losses in"
        require(table or train.times != "importance", "train.times", train.times, rule)
        given = f"{name}, prediction {diffusion.prediction} and loss {loss}"
        rule = f"must not be log_normal with {given}; it is for edm by simple in continuous time"
        is_edm = diffusion.prediction == "edm" and loss == "simple" and not table
        require(is_edm or train.times != "log_normal", "train.times", train.times, rule)
        rule = f"must be null with {name} and train.loss {loss}; vlb in continuous time has it"
        has_bound = loss == "vlb" and not table
        require(has_bound or train.vlb_timesteps is None, "train.vlb_timesteps", train.vlb_timesteps, rule)
        sigma2 = self.validation.sigma2
        rule = f"must be auto or beta_tilde with {name}: continuous time has the posterior's variance only"
        require(table or sigma2 in ("auto", "beta_tilde"), "validation.sigma2", sigma2, rule)
        rule = "must not be learned without network.learned_variance"
        require(learned or sigma2 != "learned", "validation.sigma2", sigma2, rule)

    def _check_times(self) -> None:
        """Refuse more time steps than there are; continuous time has as many as are asked for."""
        limit, steps = self.diffusion.table_length, self.validation.num_timesteps
        if limit is not None:
            rule = f"must be at most the number of diffusion steps = {limit}"
            require(steps is None or steps <= limit, "validation.num_timesteps", steps, rule)
            require(self.grid.sampler_steps <= limit, "grid.sampler_steps", self.grid.sampler_steps, rule)
            steps_hold = self.quality.num_images == 0 or self.quality.sampler_steps <= limit
            require(steps_hold, "quality.sampler_steps", self.quality.sampler_steps, rule)
        steps = steps or limit
        if steps is not None:
            count, rule = self.validation.timesteps_per_image, f"must be below the number of diffusion steps = {steps}"
            require(count < steps, "validation.timesteps_per_image", count, rule)

    def is_due(self, every: int, done: int) -> bool:
        """Whether what happens every so many steps, and after the last, happens after `done` steps."""
        return done % every == 0 or done == self.train.steps

    def semantic(self) -> dict[str, Any]:
        """The fields that decide what is learned: a checkpoint made under others is refused.

        In the sections that checkpoints of every version have: `batch_size`, `precision` and `seed` in `train`.

        Left out: `train.steps` (more of the same training), where it runs, what is reported, how the numbers are
        computed without changing which they are (accumulate, compile), and at their defaults the fields that
        checkpoints of before them do not have (`_LATER`).
        """
        values = {key: as_dict(getattr(self, key)) for key in ("data", "network", "diffusion", "train")}
        for name in ("steps", "accumulate", "compile"):
            del values["train"][name]
        values["train"] |= {"batch_size": self.batch_size, "precision": self.precision, "seed": self.seed}
        for name in ("train", "validation", "reads_ahead", "cpus_per_read"):  # the data set's id says more
            del values["data"][name]
        if not values["data"]["hold_out"]:  # also in checkpoints made before it could be anything else
            del values["data"]["hold_out"]
        for section, names in _LATER.items():
            defaults = {each.name: each.default for each in fields(getattr(self, section))}
            for name in names:
                if getattr(getattr(self, section), name) == defaults[name]:
                    del values[section][name]
        return values


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs to know; `run`, `train` and `validation` are URIs."""

    config: TrainConfig
    run: str
    train: str
    validation: str | None
    code_version: str
