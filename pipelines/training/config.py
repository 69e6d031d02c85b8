"""Configuration of the training job; every field is documented and checked before Ray starts."""

import re
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Literal

from ddpm_core.config import MAX_TIMESTEPS
from pipelines.cli.config import as_dict, require, require_place
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.precision import PrecisionField
from pipelines.tracking.config import TrackingConfig
from pipelines.training.network import NetworkConfig

if TYPE_CHECKING:
    from ddpm_core.process.discrete import DiscreteProcess


DIGITS, DIGITS_TEST, HELD_OUT = "embedded://digits/train", "embedded://digits/test", "held-out"


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
class DiffusionConfig:
    """The forward process."""

    schedule: Literal["linear", "cosine"] = "linear"
    """linear: betas from beta_start to beta_end (Ho et al. 2020); cosine (Nichol & Dhariwal 2021)."""
    num_timesteps: int = 1000
    """T, the number of diffusion steps."""
    beta_start: float = 1e-4
    """First beta of the linear schedule."""
    beta_end: float = 0.02
    """Last beta of the linear schedule."""
    betas: tuple[float, ...] | None = None
    """A table of betas, each in (0, 1); when given it replaces the schedule and num_timesteps."""

    def __post_init__(self) -> None:
        steps_hold = 2 <= self.num_timesteps <= MAX_TIMESTEPS
        require(steps_hold, "diffusion.num_timesteps", self.num_timesteps, f"must be in 2..{MAX_TIMESTEPS}")
        for name in ("beta_start", "beta_end"):
            require(0 < getattr(self, name) < 1, f"diffusion.{name}", getattr(self, name), "must be in (0, 1)")
        require(self.beta_start <= self.beta_end, "diffusion.beta_start", self.beta_start, "must not exceed beta_end")
        if self.betas is not None:
            require(len(self.betas) >= 2, "diffusion.betas", self.betas, "must hold at least 2 numbers")
            for index, beta in enumerate(self.betas):
                require(0 < beta < 1, f"diffusion.betas[{index}]", beta, "must be in (0, 1)")

    @property
    def table_length(self) -> int:
        """T of the schedule that results."""
        return self.num_timesteps if self.betas is None else len(self.betas)

    def process(self) -> "DiscreteProcess":
        """The process with its tables."""
        from ddpm_core.process.discrete import (
            DiscreteProcess,  # here: fields are checked and --help is shown without torch
        )

        if self.betas is not None:
            return DiscreteProcess.from_betas(self.betas)
        if self.schedule == "cosine":
            return DiscreteProcess.cosine(self.num_timesteps)
        return DiscreteProcess.linear(self.num_timesteps, self.beta_start, self.beta_end)


@dataclass(frozen=True)
class OptimizationConfig:
    """What is minimised and how."""

    steps: int = 1000
    """Optimizer steps of the whole training; raising it and running again trains on."""
    accumulate: int = 1
    """Parts into which a worker cuts its share of a batch, to fit its memory; numbers do not change."""
    loss: Literal["simple", "vlb", "min_snr"] = "simple"
    """simple: Ho et al. 2020 eq. 14; vlb: weighted so that its expectation is the ELBO's; min_snr: Hang 2023."""
    min_snr_gamma: float = 5.0
    """γ of min_snr."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW with weight_decay."""
    learning_rate: float = 1e-3
    """Step size after the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of adamw."""
    grad_clip: float | None = 1.0
    """Largest L2 norm of the gradient; larger ones are scaled down. Null (or .inf): none is."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, after its warm-up."""
    compile: bool = False
    """torch.compile the network (pays on GPUs, minutes of start-up on CPUs)."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
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
        require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "must be in [0, 1)")


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
    sigma2: Literal["beta", "beta_tilde"] = "beta_tilde"
    """Variance of the reverse steps that the ELBO is computed for."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "num_images", "timesteps_per_image", "batch_size"):
            require(getattr(self, name) >= 1, f"validation.{name}", getattr(self, name), "must be at least 1")


@dataclass(frozen=True)
class GridConfig:
    """Pictures of samples from the EMA weights, while training and at the end."""

    every_steps: int = 500
    """Steps between grids; the last step always gets one."""
    num_images: int = 64
    """Samples on a grid."""
    sampler_steps: int = 50
    """DDIM steps (η = 0)."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "num_images", "sampler_steps"):
            require(getattr(self, name) >= 1, f"grid.{name}", getattr(self, name), "must be at least 1")


@dataclass(frozen=True)
class TrainClusterConfig(GpuClusterConfig):
    """Where it runs."""

    num_workers: int | tuple[int, int] = 1
    """DDP workers: a number, or [min, max] to shrink and grow with the cluster."""
    cpus_per_worker: float = 1.0
    """CPUs that each worker reserves; a fraction shares a CPU."""
    threads_per_worker: int = 0
    """CPU threads of each worker's tensor operations; 0 divides the machine's cores among its workers."""
    gpus_per_worker: float = 0.0
    """GPUs that each worker reserves, a whole number; it computes on the first of them. 0 trains on CPUs."""
    max_failures: int = 10
    """Worker losses after which the job gives up."""

    def __post_init__(self) -> None:
        low, high = self.worker_range
        require(
            1 <= low <= high, "cluster.num_workers", self.num_workers, "must be >= 1, or [min, max] with min <= max"
        )
        gpus = self.gpus_per_worker
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

    def __post_init__(self) -> None:
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
    """Of everything random: initial weights, row order, t, ε, flips, dropout."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The ε-network."""
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
        high, num_timesteps = self.cluster.worker_range[1], self.diffusion.table_length
        require(
            self.batch_size >= high * self.train.accumulate,
            "batch_size",
            self.batch_size,
            f"must be at least workers x accumulate = {high * self.train.accumulate}",
        )
        require(
            self.validation.timesteps_per_image < num_timesteps,
            "validation.timesteps_per_image",
            self.validation.timesteps_per_image,
            f"must be below the number of diffusion steps = {num_timesteps}",
        )
        require(
            self.grid.sampler_steps <= num_timesteps,
            "grid.sampler_steps",
            self.grid.sampler_steps,
            f"must be at most the number of diffusion steps = {num_timesteps}",
        )

    def is_due(self, every: int, done: int) -> bool:
        """Whether what happens every so many steps, and after the last, happens after `done` steps."""
        return done % every == 0 or done == self.train.steps

    def semantic(self) -> dict[str, Any]:
        """The fields that decide what is learned: a checkpoint made under others is refused.

        In the sections that checkpoints of every version have: `batch_size`, `precision` and `seed` in `train`.

        Left out: `train.steps` (more of the same training), where it runs, what is reported, and how the
        numbers are computed without changing which they are (accumulate, compile).
        """
        values = {key: as_dict(getattr(self, key)) for key in ("data", "network", "diffusion", "train")}
        for name in ("steps", "accumulate", "compile"):
            del values["train"][name]
        values["train"] |= {"batch_size": self.batch_size, "precision": self.precision, "seed": self.seed}
        for name in ("train", "validation", "reads_ahead", "cpus_per_read"):  # the data set's id says more
            del values["data"][name]
        if not values["data"]["hold_out"]:  # also in checkpoints made before it could be anything else
            del values["data"]["hold_out"]
        return values


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs to know; `run`, `train` and `validation` are URIs."""

    config: TrainConfig
    run: str
    train: str
    validation: str | None
    code_version: str
