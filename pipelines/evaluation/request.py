"""What an evaluation answers."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ddpm_core.counter_random import permutation
from ddpm_core.likelihood.designs import GROUP_SIZE
from pipelines.cli.errors import ConfigError
from pipelines.cluster.precision import Dtype
from pipelines.data.dataset import Int64s
from pipelines.data.hold_out import HoldOut
from pipelines.evaluation.config import OdeConfig
from pipelines.outputs.request import Request

Sigma2 = Literal["beta", "beta_tilde", "learned"]
LabelsTold = Literal["given", "null", "both"]


@dataclass(frozen=True)
class ClassifierRequest:
    """How each image is classified.

    Attributes:
        classes: Their numbers in the model, ascending; two or more.
        prior: Of each of them; None: equal ones.
        timesteps_per_round: At least 2; L_0 is evaluated once besides.
        rounds: For an image, at most; 2 or more.
        separation: Standard errors by which a class must be led to be given up; None: never.
    """

    classes: tuple[int, ...]
    timesteps_per_round: int
    rounds: int
    separation: float | None
    prior: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(set(self.classes)) < 2 or tuple(sorted(set(self.classes))) != self.classes:
            raise ConfigError(f"classes = {list(self.classes)}: must be two or more, ascending")
        if self.timesteps_per_round < 2 or self.rounds < 2:
            raise ConfigError("timesteps_per_round and rounds must be at least 2")
        if self.prior is not None and (len(self.prior) != len(self.classes) or min(self.prior) <= 0):
            raise ConfigError(f"prior = {list(self.prior)}: must have a positive number for each class")

    @property
    def log_prior(self) -> npt.NDArray[np.float64]:
        """ln of each class's prior probability, float64 [K]."""
        classes = len(self.classes)
        prior = np.full(classes, 1.0 / classes) if self.prior is None else np.array(self.prior, np.float64)
        return np.asarray(np.log(prior))

    @property
    def evaluations_per_image(self) -> int:
        """Calls of the network where no class is given up."""
        return self.rounds * len(self.classes) * (self.timesteps_per_round + 1)


@dataclass(frozen=True)
class EvaluateRequest(Request):
    """The values that determine every number of an evaluation.

    Attributes:
        model_id: Hash of the model's files.
        dataset_id: Of the images.
        estimator: Which time steps each image is evaluated at.
        timesteps_per_image: K, even; null where the estimator is `all`.
        draws: Of the noise at every time step, where the estimator is `all`; else null.
        sigma2: Variances of the reverse steps, of the headline; beta_tilde, too, where time is continuous.
        num_images: In a fixed pseudo-random order; null for all, in their own order.
        target_halfwidth: Bits/dim, at which the evaluation stops.
        seed: Of all noise.
        dtype: Precision of the network.
        device: What computes.
        by_label: Whether each label's mean is reported.
        train_dataset_id: Of the images of the histogram baseline.
        ode: The probability-flow ODE's likelihood of the first images.
        batch_size: Evaluations in one call of the network.
        shard_size: Images in one object.
        hold_out: Which rows of the data set the model's training held out, if only they are evaluated.
        num_timesteps: T of the bound; null for all steps of the model, or continuous time.
        labels: What a model that was trained with labels is told; null of one that was not.
        classifier: How each image is classified; null where none is.
    """

    model_id: str
    dataset_id: str
    estimator: Literal["all", "stratified", "importance"]
    timesteps_per_image: int | None
    draws: int | None
    sigma2: Sigma2
    num_images: int | None
    target_halfwidth: float | None
    seed: int
    dtype: Dtype
    device: Literal["cpu", "cuda"]
    by_label: bool
    train_dataset_id: str | None
    ode: OdeConfig
    batch_size: int
    shard_size: int
    hold_out: HoldOut | None = None
    num_timesteps: int | None = None
    labels: LabelsTold | None = None
    classifier: ClassifierRequest | None = None

    def __post_init__(self) -> None:
        by_all = self.estimator == "all"
        if (self.draws is not None, self.timesteps_per_image is not None) != (by_all, not by_all):
            raise ConfigError("draws belong to the estimator `all`, timesteps_per_image to the others")

    @property
    def on_gpu(self) -> bool:
        """See `Request`."""
        return self.device == "cuda"

    @property
    def told_labels(self) -> bool:
        """Whether the headline is given each image's label."""
        return self.labels in ("given", "both")

    @property
    def num_bounds(self) -> int:
        """How many bounds are evaluated, with and without the label."""
        return 2 if self.labels == "both" else 1

    @property
    def group_size(self) -> int:
        """Neighbours in the order whose draws depend on each other."""
        return 1 if self.estimator == "all" else GROUP_SIZE

    @property
    def measured_on(self) -> str:
        """What stands for the images that are evaluated, the same only for the same ones."""
        return self.hold_out.name_of(self.dataset_id) if self.hold_out else self.dataset_id

    def order(self, num_rows: int) -> Int64s:
        """Ids in the order of evaluation: the data set's own if all are evaluated, else a fixed pseudo-random one.

        `num_rows` is the size of the data set, or of the part of it that `hold_out` names.
        """
        size = num_rows if self.hold_out is None else len(self.hold_out.ids)
        order = np.arange(size, dtype=np.int64)
        if self.num_images is not None or self.target_halfwidth is not None:
            order = permutation(0, "evaluate/order", 0, size)[: self.num_images]
        return order if self.hold_out is None else self.hold_out.ids[order]

    def evaluations_per_image(self, num_times: int | None) -> int:
        """Evaluations of the network for each image's ELBO, of a bound with `num_times`, those of L_0 among them, or
        None for continuous time."""
        if self.draws is not None:
            assert num_times is not None, "by what the inputs check"
            return self.num_bounds * num_times * self.draws
        assert self.timesteps_per_image is not None, "see __post_init__"
        return self.num_bounds * (self.timesteps_per_image + 2)  # L_0, once in each replicate
