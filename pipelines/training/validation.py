"""Bits/dim of validation images by the model's bound, from the EMA weights, while training and at its end.

A model that was trained with labels is told those of the images; the bound is then one of -log2 p(x | c), and called so
where any of them has one.

The images are divided among the ranks by their ids, in fixed-shape batches with noise keyed by id, so that the result
does not depend on how many ranks there are.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddpm_core.denoiser import NO_LABEL, Denoiser
from ddpm_core.likelihood.bounds import Bound, bound_of
from ddpm_core.likelihood.designs import GROUP_SIZE, Design, continuous_design, stratified_design, timestep_proposal
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.intervals import MeanStatistics
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import discrete
from pipelines.cli.console import plus_minus
from pipelines.cli.errors import NonFiniteLossError
from pipelines.data.baselines import training_baselines
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.training.config import HELD_OUT, TrainConfig, ValidationConfig
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports
from pipelines.training.words import bound_in_words


@dataclass(frozen=True)
class BitsPerDim:
    """Mean ELBO terms over the images scored, in bits/dim.

    `standard_error` is of `total` as an estimate for all images like these, from the draws and the choice of images:
    see `MeanStatistics.population`; None for one image, which has no spread. `kl_sum` is what the bound has between
    prior and decoder: the sum of the KLs, or in continuous time its limit, the diffusion term (Kingma 2021, VDM,
    eq. 17). `sigma2` is the bound's name, which is that of its variances alone for all T steps of a table.
    """

    total: float
    standard_error: float | None
    prior: float
    kl_sum: float
    decoder: float
    num_images: int
    sigma2: str

    @property
    def terms(self) -> dict[str, float]:
        """The three parts of `total`, by name."""
        between = "diffusion" if self.sigma2.split(".")[-1] == "continuous" else "kl_sum"
        return {"prior": self.prior, between: self.kl_sum, "decoder": self.decoder}

    def to_json(self) -> dict[str, Any]:
        """The fields by name, `kl_sum` by that in `terms`."""
        values = asdict(self)
        del values["kl_sum"]
        return {**values, **self.terms}


def validated_rows(dataset: PreparedDataset, num_images: int, hold_out: HoldOut | None) -> npt.NDArray[np.int64]:
    """Ids int64 [n] of the images that are scored: the first of `dataset`, or some of the rows that are held out."""
    if hold_out is None:
        return np.arange(min(num_images, dataset.num_rows), dtype=np.int64)
    return hold_out.sample(num_images)


def validate(
    denoiser: Denoiser,
    dataset: PreparedDataset,
    config: ValidationConfig,
    seed: int,
    device: torch.device,
    ranks: Ranks,
    hold_out: HoldOut | None = None,
) -> BitsPerDim:
    """Estimate the bound of `config.num_images` images, given their labels where the model has classes, with stratified
    times (unbiased).

    They are the first of `dataset`, or evenly spread over the rows that `hold_out` names of it.
    """
    chosen = validated_rows(dataset, config.num_images, hold_out)
    num_images = len(chosen)
    starts = range(0, num_images, config.batch_size)
    bound = bound_of(denoiser, config.sigma2, config.num_timesteps)
    rows = []
    for start in starts[ranks.rank :: ranks.world_size]:
        stop = min(start + config.batch_size, num_images)
        ids = chosen[start:stop]
        images, labels = dataset.read_rows(ids)
        label = torch.tensor(labels).to(device)
        if denoiser.num_classes is None:
            label = torch.full_like(label, NO_LABEL)
        levels = torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(device)
        design, of_rows = _design(bound, torch.arange(start, stop), seed, config), torch.tensor(ids).to(device)
        found = elbo(bound.denoiser, levels, of_rows, design, seed, bound.variance, config.batch_size, label)
        total, decoder, kl_sum = found.parts()
        columns = [total, found.prior, kl_sum, decoder, (label != NO_LABEL).to(total), *found.replicates.unbind(1)]
        rows.append((start, torch.stack(columns, 1)))
    table = torch.cat(ranks.gather_in_order(rows))
    if table[:, 4].any():
        bound = bound.given_label
    total, prior, kl_sum, decoder = table[:, :4].mean(0).tolist()
    statistics = MeanStatistics.of(table[:, 5:], GROUP_SIZE)
    error = statistics.population.standard_error if num_images > 1 else None
    return BitsPerDim(total, error, prior, kl_sum, decoder, num_images, bound.name)


def _design(bound: Bound, positions: torch.Tensor, seed: int, config: ValidationConfig) -> Design:
    """The times at which the images at `positions` are evaluated."""
    process, k = bound.denoiser.process, config.timesteps_per_image
    replicates = 2 if k % 2 == 0 else 1  # two tell the error of the draws; an odd number is one replicate
    if isinstance(process, ContinuousProcess):
        return continuous_design(positions, seed, process, k, replicates)
    return stratified_design(positions, seed, timestep_proposal(discrete(process)), k, replicates)


class Validation:
    """The observer that validates.

    Args:
        dataset: The validation images, or the training set where its held-out rows are validated on.
        config: The training's.
        hold_out: What is held out of the training set.
        averaged: Makes the denoiser with the averaged weights.
        device: Where it lies.
        ranks: All that the images are divided among.
        reports: Where the result goes.
    """

    doing = "validating"

    def __init__(
        self,
        dataset: PreparedDataset,
        config: TrainConfig,
        hold_out: HoldOut,
        averaged: Callable[[], Denoiser],
        device: torch.device,
        ranks: Ranks,
        reports: Reports,
    ) -> None:
        self._dataset, self._config, self._averaged = dataset, config, averaged
        self._hold_out = hold_out
        self._held_out = hold_out if config.data.validation == HELD_OUT else None  # what of it is validated on
        self._device, self._ranks, self._reports = device, ranks, reports
        self._last: BitsPerDim | None = None

    def is_due(self, done: int) -> bool:
        """Whether to validate after `done` steps."""
        return self._config.is_due(self._config.validation.every_steps, done)

    def observe(self, done: int) -> None:
        """Validate after `done` steps. A collective.

        Raises:
            NonFiniteLossError: The bits/dim or a part of them are not finite.
        """
        found = validate(
            self._averaged(),
            self._dataset,
            self._config.validation,
            self._config.seed,
            self._device,
            self._ranks,
            self._held_out,
        )
        prefix = f"validation/{found.sigma2}"
        # Once by a name that runs of every kind have, so that their curves meet on one chart.
        values = {"validation/bits_per_dim": found.total, f"{prefix}/bits_per_dim": found.total}
        values |= {f"{prefix}/terms/{name}": value for name, value in found.terms.items()}
        if not np.isfinite(list(values.values())).all():
            raise NonFiniteLossError(
                f"step {done}: validation gives {found.total} bits/dim; nothing after the last checkpoint is kept. "
                "Lower train.learning_rate, or take precision fp32, and start under a new name"
            )
        if found.standard_error is not None:
            values[f"{prefix}/bits_per_dim_standard_error"] = found.standard_error
        self._reports.metrics(done, values)
        self._reports.say(
            f"step {done:,}: validation {plus_minus(found.total, found.standard_error)} bits/dim "
            f"({found.num_images} images; {bound_in_words(found.sigma2, self._config.diffusion.table_length)})"
        )
        self._last = found

    def result(self, trained: PreparedDataset) -> dict[str, Any] | None:
        """The last validation, of which data set it is, and what its images take without a model, as a compressor or
        the histogram of the `trained` images codes them; None before the first."""
        if self._last is None:
            return None
        dataset_id = self._dataset.dataset_id
        ids = validated_rows(self._dataset, self._config.validation.num_images, self._held_out)
        return {
            **self._last.to_json(),
            "dataset_id": self._held_out.name_of(dataset_id) if self._held_out else dataset_id,
            "baselines": training_baselines(trained, self._hold_out, self._dataset, ids),
        }
