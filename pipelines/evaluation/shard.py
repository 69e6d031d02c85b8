"""One shard of an evaluation, as a function of the request and its index: what an actor of the evaluation job does.

OUTPUT/terms/part-00042.parquet   one row per image, see `SCHEMA`
OUTPUT/first_pass/                see `pipelines.evaluation.first_pass`
OUTPUT/model/                     the model evaluated
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddpm_core.likelihood import untold_name
from ddpm_core.likelihood.classify import Classification
from ddpm_core.likelihood.designs import Design, full_design
from ddpm_core.likelihood.elbo import Elbo
from ddpm_core.likelihood.intervals import MeanStatistics
from ddpm_core.likelihood.ode import OdeLikelihood, ode_bpd
from ddpm_core.model import Model
from ddpm_core.process.base import Process
from ddpm_core.process.discrete import discrete
from pipelines.cli.errors import ModelError
from pipelines.cluster.precision import PRECISION_OF
from pipelines.data.baselines import coded_bpd, histogram_bpd
from pipelines.data.dataset import Int64s, PreparedDataset, UInt8s
from pipelines.evaluation.first_pass import read_first_pass
from pipelines.evaluation.request import ClassifierRequest, EvaluateRequest
from pipelines.evaluation.terms import bound_for, classify_images, evaluate_images, levels_of, stratified_over
from pipelines.models.kept import load_kept
from pipelines.outputs.progress import made
from pipelines.outputs.shards import ShardOutput
from pipelines.storage.location import Location

DIRECTORY = "terms"


def design_of(
    request: EvaluateRequest, process: Process, positions: Tensor, proposal: npt.NDArray[np.float64] | None
) -> Design:
    """The evaluations, of a bound on `process`, of the images at `positions` int64 [n] of the order; `proposal` as the
    first pass measured it."""
    if request.draws is not None:
        return full_design(discrete(process).num_timesteps, len(positions), request.draws)
    assert request.timesteps_per_image is not None, "by what the request checks"
    measured = None if proposal is None else torch.tensor(proposal)
    return stratified_over(process, positions, request.seed, request.timesteps_per_image, measured)


@dataclass(frozen=True)
class TermShards:
    """Computes shard `index`: the images at index*shard_size ... of the order.

    Attributes:
        location: The output; its model/ is the model.
        request: The evaluation's.
        data: The data set.
        threads: CPU threads of the network.
    """

    location: Location
    request: EvaluateRequest
    data: PreparedDataset
    threads: int

    def __call__(self) -> Callable[[int], ShardOutput]:
        """Load model and first pass: the engine calls this once per actor."""
        torch.set_num_threads(self.threads)
        model = load_kept(self.location / "model", self.request.model_id, self.request.device)
        counts = read_first_pass(self.location, 0)
        proposal = read_first_pass(self.location, 1) if self.request.estimator == "importance" else None
        order = self.request.order(self.data.num_rows)
        return lambda index: self.compute(model, order, counts, proposal, index)

    def compute(
        self,
        model: Model,
        order: Int64s,
        counts: npt.NDArray[np.uint32],
        proposal: npt.NDArray[np.float64] | None,
        index: int,
    ) -> ShardOutput:
        """Evaluate, score, encode."""
        request, start = self.request, index * self.request.shard_size
        ids = order[start : start + request.shard_size]
        images, labels = self.data.read_rows(ids)
        positions = torch.arange(start, start + len(ids))
        bound = bound_for(request, model)
        design = design_of(request, bound.denoiser.process, positions, proposal)
        rows, label = torch.tensor(ids), torch.tensor(labels) if request.told_labels else None
        stages = _stages(request, len(ids), design.t.shape[1])
        found = evaluate_images(bound, images, rows, design, request, label, next(stages))
        columns: dict[str, Any] = {"id": ids, "position": positions.numpy(), "label": labels}
        columns |= term_columns(bound.name, found)
        finite = found.replicates.isfinite().all(1)
        if request.labels == "both":
            untold = evaluate_images(bound, images, rows, design, request, None, next(stages))
            columns |= null_columns(bound.name, untold)
            finite &= untold.replicates.isfinite().all(1)
        if request.classifier is not None:
            classified = classify_images(bound, images, rows, positions, request, next(stages))
            columns |= class_columns(request.classifier, classified)
            finite &= classified.posterior.isfinite().all(1)
        columns |= baseline_columns(images, counts)
        columns |= self._ode(model, images, ids, start, label)
        if len(bad := ids[~finite.numpy()]):
            raise ModelError(
                f"model: gives no finite bits/dim (NaN or infinite) for {len(bad)} of {len(ids)} images (first ids "
                f"{', '.join(map(str, bad[:3].tolist()))}) in {PRECISION_OF[request.dtype]}; "
                "take precision fp32, or another model"
            )
        extra = {
            "first_position": start,
            "evaluations": design.t.numel() * request.num_bounds,
            "bits_per_dim": asdict(MeanStatistics.of(found.replicates, request.group_size)),
        }
        return ShardOutput(_encode(columns), len(ids), extra)

    def _ode(self, model: Model, images: UInt8s, ids: Int64s, start: int, label: Tensor | None) -> dict[str, Any]:
        """The ODE's columns: of the images at the first `ode.num_images` positions, null for the others."""
        ode, chosen = self.request.ode, max(0, min(len(ids), self.request.ode.num_images - start))
        names = ("bits_per_dim", "trace_error", "step_error")
        denoiser = model.denoiser.in_precision(PRECISION_OF[self.request.dtype])
        columns: dict[str, list[float | None]] = {f"ode_{name}": [None] * len(ids) for name in names}
        for row in range(chosen):  # one by one: all probes of an image fill a batch
            found: OdeLikelihood = ode_bpd(
                denoiser,
                levels_of(images[row : row + 1]).to(denoiser.device),
                torch.tensor(ids[row : row + 1], device=denoiser.device),
                self.request.seed,
                ode.steps,
                ode.probes,
                None if label is None else label[row : row + 1].to(denoiser.device),
            )
            for name in names:
                columns[f"ode_{name}"][row] = float(getattr(found, name))
        return {name: pa.array(values, pa.float64()) for name, values in columns.items()}


def suffix_of(bound: str, clipped: bool = False) -> str:
    """What the columns of a bound's numbers end in.

    >>> suffix_of("beta_tilde"), suffix_of("steps_50.beta_tilde", clipped=True)
    ('_beta_tilde', '_steps_50_beta_tilde_clipped')
    """
    return f"_{bound.replace('.', '_')}" + ("_clipped" if clipped else "")


def term_columns(bound: str, found: Elbo) -> dict[str, Any]:
    """Each image's ELBO and its parts in bits/dim, and every evaluation.

    L_T + sum(weight * term) is the image's estimate; the numbers are named by the bound and by whether the predicted
    x_0 was clipped. In continuous time there is `gamma` = -log SNR in the place of t.
    """
    design = found.design
    columns: dict[str, Any] = {"L_T": found.prior.numpy()}
    for clipped in (False, True):
        suffix, (total, decoder, kl_sum) = suffix_of(bound, clipped), found.parts(clipped)
        columns[f"bits_per_dim{suffix}"] = total.numpy()
        columns[f"L_0{suffix}"] = decoder.numpy()
        columns[f"L_t_sum{suffix}"] = kl_sum.numpy()
    in_steps = not design.t.is_floating_point()
    columns["t" if in_steps else "gamma"] = _lists(design.t.to(torch.int32) if in_steps else design.t)
    columns["replicate"] = _lists(design.replicate.to(torch.int8).expand_as(design.t))
    columns["weight"] = _lists(design.weight)
    columns["eps_mse"] = _lists(found.eps_mse)
    columns[f"term{suffix_of(bound)}"] = _lists(found.terms)
    columns[f"term{suffix_of(bound, clipped=True)}"] = _lists(found.terms_clipped)
    # L_0 of each evaluation at t = 0 under each of `decoder_variances`, which the term's own sigma^2 does not tell; one
    # number of a softmax decoder.
    columns["L_0_draws"] = _lists(found.decoder_draws.flatten(1))
    return columns


def null_columns(bound: str, found: Elbo) -> dict[str, Any]:
    """The same images' bound by the same evaluations, where the model is not told the label; `bound` is the name of the
    one where it is."""
    suffix = suffix_of(untold_name(bound))
    return {f"bits_per_dim{suffix}": found.parts()[0].numpy(), f"term{suffix}": _lists(found.terms)}


def class_columns(asked: ClassifierRequest, found: Classification) -> dict[str, Any]:
    """How each image is classified: the class that is predicted, by its number, the lists in the order of
    `asked.classes`."""
    return {
        "class_bits_per_dim": _lists(found.bits_per_dim),
        "posterior": _lists(found.posterior),
        "predicted": torch.tensor(asked.classes)[found.predicted].numpy(),
        "margin": found.margin.numpy(),
        "margin_error": found.margin_error.numpy(),
        "class_evaluations": found.evaluations.numpy(),
    }


def _stages(request: EvaluateRequest, num_images: int, each: int) -> Iterator[Callable[[float], None]]:
    """What tells how far each part of a shard's work is, which has `each` evaluations of an image for its bound."""
    parts = [each] * request.num_bounds
    parts += [request.classifier.evaluations_per_image] if request.classifier else []
    done = 0.0
    for part in parts:
        share = part / sum(parts)
        yield partial(_tell, done * num_images, share)
        done += share


def _tell(before: float, share: float, images: float) -> None:
    made(before + share * images)


def baseline_columns(images: UInt8s, counts: npt.NDArray[np.uint32]) -> dict[str, Any]:
    """Bits/dim of the same images by lossless coders (whole files, as a user would store them) and by the histogram
    of the training images; null without training images."""
    columns: dict[str, Any] = {f"{coder}_bits_per_dim": coded_bpd(images, coder) for coder in ("png", "webp")}
    known = histogram_bpd(counts, images).tolist() if len(counts) else [None] * len(images)
    return {**columns, "histogram_bits_per_dim": pa.array(known, pa.float64())}


def read_terms(content: bytes, columns: list[str] | None = None) -> pa.Table:
    """A shard's rows."""
    return pq.read_table(io.BytesIO(content), columns=columns, use_threads=False)


def _lists(values: Tensor) -> pa.ListArray:
    """[n, E] as a column of lists."""
    rows, columns = values.shape
    offsets = np.arange(0, rows * columns + 1, columns, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.contiguous().reshape(-1).numpy()))


def _encode(columns: Mapping[str, Any]) -> bytes:
    labels = np.asarray(columns["label"])
    table = pa.table({**columns, "label": pa.array(labels, mask=labels < 0)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
