"""The numbers of an evaluation, from its stored rows alone: means with intervals, curves over time, what else follows.

Nothing here calls the network. The rows are read shard by shard, so memory does not grow with the lists in them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from scipy.stats import t as student_t
from torch import Tensor

from ddpm_core.likelihood import GIVEN_LABEL, untold_name
from ddpm_core.likelihood.bounds import Bound
from ddpm_core.likelihood.curves import (
    kl_from_eps_mse,
    optimal_variance,
    steps_from_continuous,
    subsequence_kl,
)
from ddpm_core.likelihood.designs import Design
from ddpm_core.likelihood.intervals import MeanStatistics, Variance
from ddpm_core.process.base import Process
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess, discrete
from ddpm_core.process.variances import variance_named
from pipelines.evaluation.classified import class_rows, classification
from pipelines.evaluation.curves import Curve, Floats, OverTime
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.shard import DIRECTORY, read_terms, suffix_of
from pipelines.storage.location import Location

# Places in `decoder_variances`.
DECODERS = {"beta": 0, "beta_tilde": 1}
SUBSEQUENCES = (10, 25, 50, 100, 250, 500)
# Of a model whose own time is continuous.
_NUMBERS_OF_STEPS = (*SUBSEQUENCES, 1000)
# Of the predictions for sub-sequences, in log-SNR, where the time steps are drawn.
BANDWIDTH = 0.2
_BASELINES = ("png", "webp", "histogram")


@dataclass(frozen=True)
class Evaluation:
    """Everything that is reported.

    Attributes:
        summary: JSON: `means` by name, each with its 95% intervals, counts, the bound's T and decoder; stored in the
            manifest.
        ids: int64 [N], of the images in the order of evaluation.
        bits_per_dim: float64 [N], their headline values.
        curve: Means over time of the bound's terms.
    """

    summary: dict[str, Any]
    ids: npt.NDArray[np.int64]
    bits_per_dim: Floats
    curve: Curve


class _Means:
    """Mean statistics by name, over all shards."""

    def __init__(self, size: int) -> None:
        self.by_name: dict[str, MeanStatistics] = {}
        self._group_size = size

    def add(self, name: str, values: Tensor) -> None:
        """`values` [n, R] of one shard's images."""
        if len(values):
            found = MeanStatistics.of(values, self._group_size)
            self.by_name[name] = self.by_name[name].merge(found) if name in self.by_name else found


def results(
    location: Location, request: EvaluateRequest, shards: Sequence[str], bound: Bound, num_rows: int
) -> Evaluation:
    """Everything that follows from the rows of `shards` (names, in order) of the evaluation at `location`, which is
    about `bound`.

    `num_rows` is the size of the data set that the images are from.
    """
    size, process = request.group_size, bound.denoiser.process
    means, over_time = _Means(size), OverTime(process)
    ids, headline, evaluations, classified = [], [], 0, []
    untold = untold_name(bound.name)
    decoders: list[Tensor] = []
    for rows in _read(location, shards):
        design, mse, prior = rows.design, rows.lists("eps_mse"), rows.tensor("L_T")
        first, nothing = design.first, torch.zeros(len(prior), dtype=torch.float64)
        evaluations += design.t.numel() * request.num_bounds
        ids.append(rows.table["id"].to_numpy())
        headline.append(rows.table[f"bits_per_dim{suffix_of(bound.name)}"].to_numpy())
        means.add("L_T", prior[:, None].expand(-1, design.num_replicates))
        for clipped in (False, True):
            terms = rows.lists(f"term{suffix_of(bound.name, clipped)}")
            name = bound.name + (".clipped" if clipped else "")
            means.add(f"bits_per_dim.{name}", design.replicate_values(prior, terms))
            means.add(f"L_0.{name}", design.replicate_values(nothing, terms * first))
            means.add(f"L_t_sum.{name}", design.replicate_values(nothing, terms * ~first))
        if request.labels == "both":
            told, null = (rows.lists(f"term{suffix_of(name)}") for name in (bound.name, untold))
            means.add(f"bits_per_dim.{untold}", design.replicate_values(prior, null))
            means.add(f"label_tells.{untold}", design.replicate_values(nothing, null - told))
        for name, terms in _following(rows, bound, 0.0 if request.estimator == "all" else BANDWIDTH):
            means.add(f"bits_per_dim.{name}", design.replicate_values(prior, terms))
        for baseline in _BASELINES:
            known = rows.known(f"{baseline}_bits_per_dim")
            means.add(f"bits_per_dim.{baseline}", known.expand(-1, design.num_replicates))  # no draws: no error of them
        for column in ("bits_per_dim", "trace_error", "step_error"):
            means.add(f"ode.{column}" + (".given_label" if request.told_labels else ""), rows.known(f"ode_{column}"))
        if request.by_label:
            labels = rows.table["label"].fill_null(-1).to_numpy()
            values = torch.tensor(headline[-1])
            for label in np.unique(labels):
                means.add(f"by_label.{label}.bits_per_dim.{bound.name}", values[torch.tensor(labels == label)][:, None])
        if request.classifier is not None:
            classified.append(class_rows(rows.table))
        half = rows.half(size)
        over_time.add(half, design.t, first, rows.lists(f"term{suffix_of(bound.name)}"), mse)
        draws = [rows.decoder_draws[half == index].sum((0, 1)) for index in (0, 1)]
        decoders = [a + b for a, b in zip(decoders, draws, strict=True)] if decoders else draws
    if fixed_variances_follow(process):
        _add_optimal(means, over_time, decoders, location, shards, bound, size)
    num_images = means.by_name["L_T"].num_images
    summary = {
        "headline": f"bits_per_dim.{bound.name}",
        "bound": {"num_timesteps": bound.num_timesteps, "decoder": bound.decoder},
        "num_images": num_images,
        "data_set_size": num_rows,
        "network_evaluations": evaluations,
        "network_evaluations_of_full_sum": (
            num_images * process.num_timesteps * request.num_bounds if isinstance(process, DiscreteProcess) else None
        ),
        "means": {name: _intervals(found, num_rows) for name, found in means.by_name.items()},
    }
    if request.labels is not None:
        summary["labels"] = request.labels
    if request.classifier is not None:
        summary["classification"] = classification(classified, request.classifier)
    return Evaluation(summary, np.concatenate(ids), np.concatenate(headline), over_time.curve)


def fixed_variances_follow(process: Process) -> bool:
    """Whether the bound under beta, beta_tilde and the optimal variances follows from the errors of eps.

    There are no such variances in continuous time and for the steps of a VDM; and where the SNR ends at 0, z_T is eps
    itself, whose error says nothing of the step from there.
    """
    return isinstance(process, DiscreteProcess) and process.decoder == "gaussian" and process.prior_signal > 0.0


def _under(bound: Bound, sigma2: str) -> str:
    """The name of the same bound under other variances."""
    before, dot, _ = bound.name.rpartition(".")
    return f"{before}{dot}{sigma2}"


def _following(rows: "_Rows", bound: Bound, bandwidth: float) -> Iterator[tuple[str, Tensor]]:
    """Other bounds, by name, and their terms [n, E], which follow from the errors of eps: other fixed variances, and
    fewer steps with each step's posterior variance.

    Fewer steps are evenly spaced over those of the whole model; of a part of its steps a part would not be.
    """
    process, design, mse = bound.denoiser.process, rows.design, rows.lists("eps_mse")
    told = GIVEN_LABEL if bound.name.startswith(GIVEN_LABEL) else ""
    if isinstance(process, ContinuousProcess):
        for k in _NUMBERS_OF_STEPS:
            kl = steps_from_continuous(process, k, design.t, mse, BANDWIDTH)
            yield f"{told}steps_{k}", torch.where(design.first, rows.decoder(0), kl)
    elif isinstance(process, DiscreteProcess) and fixed_variances_follow(process):
        for other in DECODERS:
            if _under(bound, other) != bound.name:
                yield _under(bound, other), rows.terms_under(process, other)
        for k in SUBSEQUENCES:
            if k < process.num_timesteps and "steps_" not in bound.name:
                kl = subsequence_kl(process, process.grid(k).flip(0).tolist(), design.t, mse, bandwidth)
                yield f"{told}steps_{k}.beta_tilde", torch.where(design.first, rows.decoder(DECODERS["beta_tilde"]), kl)


def half_width(variance: Variance | None) -> float | None:
    """Half of a 95% interval, by Student's t."""
    if variance is None:
        return None
    return float(student_t.ppf(0.975, variance.dof)) * variance.standard_error


def _intervals(found: MeanStatistics, num_rows: int) -> dict[str, Any]:
    """A mean and its 95% intervals; null where they are not known."""

    def interval(variance: Variance | None) -> list[float] | None:
        half = half_width(variance)
        return None if half is None else [found.mean - half, found.mean + half]

    several = found.num_images > 1
    whole = found.num_images == num_rows
    return {
        "mean": found.mean,
        "num_images": found.num_images,
        "given_images": interval(found.given_images),
        "data_set": interval(found.data_set(num_rows)) if several or whole else None,
        "population": interval(found.population) if several else None,
    }


def _add_optimal(
    means: _Means,
    over_time: OverTime,
    decoders: Sequence[Tensor],
    location: Location,
    shards: Sequence[str],
    bound: Bound,
    size: int,
) -> None:
    """The ELBO under the optimal variances, which each half of the images gets from the other (Bao 2022).

    L_0 takes the best of `decoder_variances`: `decoders` are the sums over each half of what is stored of it.
    """
    process, name = discrete(bound.denoiser.process), f"bits_per_dim.{_under(bound, 'optimal')}"
    tables = [over_time.mean_eps_mse(1 - half) for half in (0, 1)]
    if tables[0] is None or tables[1] is None:
        return  # fewer images than two groups
    variances = [optimal_variance(process, table) for table in tables if table is not None]
    for rows in _read(location, shards):
        design, mse, half = rows.design, rows.lists("eps_mse"), torch.tensor(rows.half(size))
        later = design.t.clamp(min=1)
        kl = [kl_from_eps_mse(process, later, mse, variance) for variance in variances]
        first = [rows.decoder(int(decoders[1 - index].argmin())) for index in (0, 1)]
        chosen = [torch.where(design.first, first[index], kl[index]) for index in (0, 1)]
        terms = torch.where(half[:, None] == 0, chosen[0], chosen[1])
        means.add(name, design.replicate_values(rows.tensor("L_T"), terms))


@dataclass
class _Rows:
    """One shard's table as tensors."""

    table: pa.Table

    def tensor(self, name: str) -> Tensor:
        """A column of numbers, float64 [n]."""
        return torch.tensor(self.table[name].to_numpy(), dtype=torch.float64)

    def known(self, name: str) -> Tensor:
        """The values of a column that are not null, float64 [m, 1]."""
        return torch.tensor(self.table[name].drop_null().to_numpy(), dtype=torch.float64)[:, None]

    def lists(self, name: str) -> Tensor:
        """A column of equally long lists, [n, E]."""
        flat = self.table[name].combine_chunks().flatten()
        return torch.tensor(flat.to_numpy()).reshape(len(self.table), -1)

    @cached_property
    def design(self) -> Design:
        time = self.lists("gamma") if "gamma" in self.table.column_names else self.lists("t").long()
        return Design(time, self.lists("weight"), self.lists("replicate")[0].long())

    @property
    def decoder_draws(self) -> Tensor:
        """L_0 at each image's F evaluations of it under each of `decoder_variances`, or one decoder: float64 [n, F,
        G]."""
        return self.lists("L_0_draws").reshape(len(self.table), int(self.design.first.sum()), -1)

    def decoder(self, variance: int) -> Tensor:
        """L_0 under one of `decoder_variances` at the evaluations of it, 0 elsewhere: float64 [n, E]."""
        first = self.design.first
        terms = torch.zeros(len(self.table), len(first), dtype=torch.float64)
        terms[:, first] = self.decoder_draws[:, :, variance]
        return terms

    def terms_under(self, process: DiscreteProcess, sigma2: str) -> Tensor:
        """The unclipped terms under `sigma2`: float64 [n, E]."""
        design = self.design
        kl = kl_from_eps_mse(process, design.t.clamp(min=1), self.lists("eps_mse"), variance_named(sigma2))
        return torch.where(design.first, self.decoder(DECODERS[sigma2]), kl)

    def half(self, size: int) -> npt.NDArray[np.int64]:
        """Which half of the images each row belongs to: neighbouring groups of the order alternate."""
        return np.asarray(self.table["position"].to_numpy() // size % 2)


def _read(location: Location, shards: Sequence[str]) -> Iterator[_Rows]:
    for name in shards:
        yield _Rows(read_terms((location / DIRECTORY / name).read_bytes()))
