"""What an evaluation reads, whether it fits together, and the request that follows."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ddpm_core.likelihood.bounds import Bound, bound_of, settled_sigma2
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.cli.config import require
from pipelines.cli.console import event
from pipelines.cli.errors import ConfigError, DataError, DDPMError
from pipelines.cluster.precision import DTYPE_OF
from pipelines.data.dataset import PreparedDataset
from pipelines.data.fit import check_images
from pipelines.data.hold_out import HoldOut
from pipelines.data.opening import open_dataset
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.labels import asked_of_labels
from pipelines.evaluation.request import EvaluateRequest, Sigma2
from pipelines.models.used import UsedModel
from pipelines.storage.location import Location


@dataclass(frozen=True)
class Inputs:
    """The model, the data set, the training data of the histogram baseline, if known, and which rows the model's
    training held out, if only they are asked for."""

    model: UsedModel
    data: PreparedDataset
    train: PreparedDataset | None
    hold_out: HoldOut | None = None

    @property
    def num_rows(self) -> int:
        """Of the data set, or of the part of it that is asked for."""
        return len(self.hold_out.ids) if self.hold_out else self.data.num_rows


def fitting_inputs(config: EvaluateConfig, model: UsedModel, data: PreparedDataset, root: Path) -> Inputs:
    """All that the evaluation of `model` on `data` reads; says what the user should know of it.

    Raises:
        ConfigError: A field does not fit the model or the data.
        DataError: The data do not fit the model; there are no `train_data`.
    """
    hold_out = hold_out_of(config, model, data)
    check_fit(config, model, data, len(hold_out.ids) if hold_out else data.num_rows)
    return Inputs(model, data, _training_data(config, model, root), hold_out)


def hold_out_of(config: EvaluateConfig, model: UsedModel, data: PreparedDataset) -> HoldOut | None:
    """The rows that are asked for by `held_out`; says so if others are that the model has been trained on."""
    trained_on, every = model.trained_on, model.held_out_every
    same = trained_on.get("id") == data.dataset_id
    if config.held_out:
        require(same, "held_out", True, f"needs the data set that the model was trained on, {trained_on.get('uri')}")
        require(every > 0, "held_out", True, "the model's training held out no rows; leave it out")
        return HoldOut(data.num_rows, every)
    if same:
        rest = "; --held_out evaluates the rows that it was not trained on" if every else ""
        event(f"data = {config.data}: the model was trained on these images, which flatters it{rest}")
    return None


def check_fit(config: EvaluateConfig, model: UsedModel, data: PreparedDataset, num_rows: int) -> None:
    """Refuse what the model cannot be evaluated on, before anything is started; `num_rows` of `data` are asked for."""
    check_images("data", config.data, data, model.image_shape)
    part = ", held-out rows" if config.held_out else ""
    if num_rows < 2:
        raise DataError(f"data = {config.data}{part}: holds {num_rows} image(s); an interval needs at least 2")
    if config.num_images is not None and config.num_images > num_rows:
        raise ConfigError(f"num_images = {config.num_images}: {config.data}{part} holds {num_rows:,}; ask for fewer")
    _check_times(config, model)
    if config.by_label and (data.read_labels() < 0).all():
        raise DataError(
            f"data = {config.data}: has no labels, which by_label needs; leave it out, or ingest with labels"
        )


def _check_times(config: EvaluateConfig, model: UsedModel) -> None:
    """That the bound has the times which are asked for, and the flow of the ODE as well."""
    bound = bound_asked(config, model)
    process, own = bound.denoiser.process, model.model.denoiser.process
    if config.estimator == "all" and bound.num_timesteps is None:
        raise ConfigError(
            "estimator = all: continuous time has no T to sum over; take stratified or importance, or give "
            "num_timesteps"
        )
    if config.estimator != "all" and isinstance(process, DiscreteProcess):
        num_kl_terms, whose = process.num_timesteps - 1, f"T = {bound.num_timesteps:,} steps have"
        if own is process:
            whose = "the model has T - 1 ="
        if config.timesteps_per_image > num_kl_terms:
            raise ConfigError(
                f"timesteps_per_image = {config.timesteps_per_image}: {whose} {num_kl_terms} KL terms; take at most as "
                "many, or --estimator all"
            )
    if config.ode.num_images and isinstance(own, DiscreteProcess):
        if config.ode.steps > own.num_timesteps - 1:
            raise ConfigError(
                f"ode.steps = {config.ode.steps}: the model has T - 1 = {own.num_timesteps - 1}; take at most as many"
            )
        if own.prior_signal == 0.0:
            raise ConfigError(
                f"ode.num_images = {config.ode.num_images}: the model's SNR ends at 0, from where no flow leads; leave "
                "it out"
            )


def _training_data(config: EvaluateConfig, model: UsedModel, root: Path) -> PreparedDataset | None:
    """What the histogram baseline is fitted on; None, with a word, if the model's own cannot be read from here."""
    if config.train_data is not None:
        given = open_dataset(Location.parse(root), "train_data", config.train_data)
        if given.image_shape != model.image_shape:
            raise DataError(f"train_data = {config.train_data}: images are {given.image_shape}, not the model's shape")
        return given
    known = model.trained_on
    try:
        trained_on = open_dataset(Location.parse(root), "train_data", known.get("uri") or "")
        if trained_on.dataset_id == known.get("id"):
            return trained_on
    except DDPMError:
        pass  # it was trained elsewhere, or its data are gone
    event("no histogram baseline: the model's training data are not where it says; name them with --train_data")
    return None


def bound_asked(config: EvaluateConfig, model: UsedModel) -> Bound:
    """What is to be estimated. Raises ConfigError for variances or a T that the model does not have."""
    return bound_of(model.model.denoiser, config.sigma2, config.num_timesteps)


def request_of(config: EvaluateConfig, inputs: Inputs) -> EvaluateRequest:
    """The request that a job's fields make of what they name; `precision` has been settled, sigma2 and labels are here.

    Raises ConfigError and DataError for labels, see `asked_of_labels`.
    """
    by_all, bound = config.estimator == "all", bound_asked(config, inputs.model)
    whole = bound.denoiser is inputs.model.model.denoiser  # also where its own T is given
    assert config.precision != "auto"
    labels, classifier = asked_of_labels(config, inputs.model, inputs.data, inputs.train)
    return EvaluateRequest(
        model_id=inputs.model.found.model_id,
        dataset_id=inputs.data.dataset_id,
        estimator=config.estimator,
        timesteps_per_image=None if by_all else config.timesteps_per_image,
        draws=config.draws if by_all else None,
        sigma2=cast(Sigma2, settled_sigma2(config.sigma2, inputs.model.model.denoiser)),
        num_images=config.num_images,
        target_halfwidth=config.target_halfwidth,
        seed=config.seed,
        dtype=DTYPE_OF[config.precision],
        device=config.cluster.device,
        by_label=config.by_label,
        train_dataset_id=inputs.train.dataset_id if inputs.train else None,
        ode=config.ode,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        hold_out=inputs.hold_out,
        num_timesteps=None if whole else config.num_timesteps,
        labels=labels,
        classifier=classifier,
    )
