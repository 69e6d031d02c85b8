"""The numbers of an evaluation, from its stored rows alone: means with intervals, curves over t, what else follows.

Nothing here calls the network. The rows are read shard by shard, so memory does not grow with the lists in them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from scipy.stats import t as student_t
from torch import Tensor

from ddpm_core.likelihood.curves import decoder_variances, kl_from_eps_mse, optimal_variance, subsequence_kl
from ddpm_core.likelihood.designs import Design
from ddpm_core.likelihood.intervals import MeanStatistics, Variance
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import variance_named
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.shard import DIRECTORY, read_terms
from pipelines.storage.location import Location

# Places in `decoder_variances`.
DECODERS = {"beta": 0, "beta_tilde": 1}
SUBSEQUENCES = (10, 25, 50, 100, 250, 500)
# Of the predictions for sub-sequences, in log-SNR, where the time steps are drawn.
BANDWIDTH = 0.2
_BASELINES = ("png", "webp", "histogram")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Everything that is reported.

    Attributes:
        summary: JSON: `means` by name, each with its 95% intervals, and counts; stored in the manifest.
        ids: int64 [N], of the images in the order of evaluation.
        bits_per_dim: float64 [N], their headline values.
        t: int64 [n], the time steps that were evaluated at all.
        kl_by_t: float64 [n], mean term over the evaluations at t (L_0 at t = 0), bits/dim, under `request.sigma2`.
        eps_mse_by_t: float64 [n], mean ||eps - eps_pred||^2 / D.
    """

    summary: dict[str, Any]
    ids: npt.NDArray[np.int64]
    bits_per_dim: Floats
    t: npt.NDArray[np.int64]
    kl_by_t: Floats
    eps_mse_by_t: Floats


@dataclass
class _OverT:
    """Sums over the evaluations at each t, for all images and for each half of them."""

    num_timesteps: int
    count: Floats = field(init=False)
    kl: Floats = field(init=False)
    mse: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.count, self.kl, self.mse = (np.zeros((2, self.num_timesteps)) for _ in range(3))

    def add(self, half: npt.NDArray[np.int64], t: Tensor, kl: Tensor, mse: Tensor) -> None:
        where = np.repeat(half, t.shape[1]) * self.num_timesteps + t.reshape(-1).numpy()
        for total, values in ((self.count, np.ones(where.shape)), (self.kl, kl.numpy()), (self.mse, mse.numpy())):
            total += np.bincount(where, values.reshape(-1), total.size).reshape(total.shape)

    def mean_eps_mse(self, half: int) -> Tensor | None:
        """[T], over one half of the images; where it has no evaluation, between the neighbouring t."""
        known = self.count[half].nonzero()[0]
        if len(known) == 0:
            return None
        values = self.mse[half, known] / self.count[half, known]
        return torch.tensor(np.interp(np.arange(self.num_timesteps), known, values))


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
    location: Location, request: EvaluateRequest, shards: Sequence[str], process: DiscreteProcess, num_rows: int
) -> Evaluation:
    """Everything that follows from the rows of `shards` (names, in order) of the evaluation at `location`.

    `num_rows` is the size of the data set that the images are from.
    """
    sigma2, size = request.sigma2, request.group_size
    means, over_t = _Means(size), _OverT(process.num_timesteps)
    bandwidth = 0.0 if request.estimator == "all" else BANDWIDTH
    subsequences = {k: process.grid(k).flip(0).tolist() for k in SUBSEQUENCES if k < process.num_timesteps}
    ids, headline, evaluations = [], [], 0
    decoders = [torch.zeros(len(decoder_variances(process)), dtype=torch.float64) for _ in range(2)]
    for rows in _read(location, shards):
        design, mse, prior = rows.design, rows.lists("eps_mse"), rows.tensor("L_T")
        first, nothing = design.t == 0, torch.zeros(len(prior), dtype=torch.float64)
        evaluations += design.t.numel()
        ids.append(rows.table["id"].to_numpy())
        headline.append(rows.table[f"bits_per_dim_{sigma2}"].to_numpy())
        means.add("L_T", prior[:, None].expand(-1, design.num_replicates))
        for suffix in ("", "_clipped"):
            terms, name = rows.lists(f"term_{sigma2}{suffix}"), f"{sigma2}{suffix.replace('_', '.')}"
            means.add(f"bits_per_dim.{name}", design.replicate_values(prior, terms))
            means.add(f"L_0.{name}", design.replicate_values(nothing, terms * first))
            means.add(f"L_t_sum.{name}", design.replicate_values(nothing, terms * ~first))
        for other in DECODERS:
            if other != sigma2:
                means.add(f"bits_per_dim.{other}", design.replicate_values(prior, rows.terms_under(process, other)))
        for k, steps in subsequences.items():
            terms = torch.where(first, rows.decoder(1), subsequence_kl(process, steps, design.t, mse, bandwidth))
            means.add(f"bits_per_dim.steps_{k}.beta_tilde", design.replicate_values(prior, terms))
        for baseline in _BASELINES:
            known = rows.known(f"{baseline}_bits_per_dim")
            means.add(f"bits_per_dim.{baseline}", known.expand(-1, design.num_replicates))  # no draws: no error of them
        for column in ("bits_per_dim", "trace_error", "step_error"):
            means.add(f"ode.{column}", rows.known(f"ode_{column}"))
        if request.by_label:
            labels = rows.table["label"].to_numpy()
            values = rows.tensor(f"bits_per_dim_{sigma2}")
            for label in np.unique(labels):
                means.add(f"by_label.{label}.bits_per_dim.{sigma2}", values[torch.tensor(labels == label)][:, None])
        half = rows.half(size)
        over_t.add(half, design.t, rows.lists(f"term_{sigma2}"), mse)
        for index in (0, 1):
            decoders[index] += rows.decoder_draws[half == index].sum((0, 1))
    _add_optimal(means, over_t, decoders, location, shards, process, size)
    count = over_t.count.sum(0)
    known = count.nonzero()[0]
    num_images = means.by_name["L_T"].num_images
    summary = {
        "headline": f"bits_per_dim.{sigma2}",
        "num_images": num_images,
        "data_set_size": num_rows,
        "network_evaluations": evaluations,
        "network_evaluations_of_full_sum": num_images * process.num_timesteps,
        "means": {name: _intervals(found, num_rows) for name, found in means.by_name.items()},
    }
    return Evaluation(
        summary,
        np.concatenate(ids),
        np.concatenate(headline),
        known,
        over_t.kl.sum(0)[known] / count[known],
        over_t.mse.sum(0)[known] / count[known],
    )


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
    over_t: _OverT,
    decoders: Sequence[Tensor],
    location: Location,
    shards: Sequence[str],
    process: DiscreteProcess,
    size: int,
) -> None:
    """The ELBO under the optimal variances, which each half of the images gets from the other (Bao 2022).

    L_0 takes the best of `decoder_variances`: `decoders` are the sums over each half of what is stored of it.
    """
    tables = [over_t.mean_eps_mse(1 - half) for half in (0, 1)]
    if tables[0] is None or tables[1] is None:
        return  # fewer images than two groups
    variances = [optimal_variance(process, table) for table in tables if table is not None]
    for rows in _read(location, shards):
        design, mse, half = rows.design, rows.lists("eps_mse"), torch.tensor(rows.half(size))
        later = design.t.clamp(min=1)
        kl = [kl_from_eps_mse(process, later, mse, variance) for variance in variances]
        first = [rows.decoder(int(decoders[1 - index].argmin())) for index in (0, 1)]
        chosen = [torch.where(design.t == 0, first[index], kl[index]) for index in (0, 1)]
        terms = torch.where(half[:, None] == 0, chosen[0], chosen[1])
        means.add("bits_per_dim.optimal", design.replicate_values(rows.tensor("L_T"), terms))


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

    @property
    def design(self) -> Design:
        return Design(self.lists("t").long(), self.lists("weight"), self.lists("replicate")[0].long())

    @property
    def decoder_draws(self) -> Tensor:
        """L_0 at the F evaluations with t = 0 under each of `decoder_variances`: float64 [n, F, G]."""
        first = int((self.lists("t")[0] == 0).sum())
        return self.lists("L_0_draws").reshape(len(self.table), first, -1)

    def decoder(self, variance: int) -> Tensor:
        """L_0 under one of `decoder_variances` at the evaluations with t = 0, 0 elsewhere: float64 [n, E]."""
        t = self.lists("t")
        terms = torch.zeros(t.shape, dtype=torch.float64)
        terms[t == 0] = self.decoder_draws[:, :, variance].reshape(-1)
        return terms

    def terms_under(self, process: DiscreteProcess, sigma2: str) -> Tensor:
        """The unclipped terms under `sigma2`: float64 [n, E]."""
        t = self.lists("t").long()
        kl = kl_from_eps_mse(process, t.clamp(min=1), self.lists("eps_mse"), variance_named(sigma2))
        return torch.where(t == 0, self.decoder(DECODERS[sigma2]), kl)

    def half(self, size: int) -> npt.NDArray[np.int64]:
        """Which half of the images each row belongs to: neighbouring groups of the order alternate."""
        return np.asarray(self.table["position"].to_numpy() // size % 2)


def _read(location: Location, shards: Sequence[str]) -> Iterator[_Rows]:
    for name in shards:
        yield _Rows(read_terms((location / DIRECTORY / name).read_bytes()))
