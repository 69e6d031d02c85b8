"""What an evaluation measures before its terms: the histogram baseline's counts, and importance over time.

OUTPUT/first_pass/part-00000.npz    counts uint32 [D, 256] of the training images' levels; empty without them
OUTPUT/first_pass/part-00001.npz    proposal float64 [T-1], of continuous time [S] over equal bins of gamma; of the
                                    importance estimator only
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddpm_core.counter_random import permutation
from ddpm_core.likelihood.designs import importance_density, importance_proposal
from ddpm_core.model import Model
from ddpm_core.process.continuous import continuous
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.data.baselines import HISTOGRAM_IMAGES, level_counts
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.terms import bound_for, evaluate_images, stratified_over
from pipelines.models.kept import load_kept
from pipelines.outputs.shards import ShardOutput, shard_name
from pipelines.storage.location import Location

DIRECTORY = "first_pass"
SUFFIX = ".npz"
_SMALL_BYTES = 256 * 2**20
_PILOT_IMAGES, _PILOT_TIMESTEPS = 64, 32
PILOT_EVALUATIONS = _PILOT_IMAGES * (_PILOT_TIMESTEPS + 2)
# The first pass's noise must not be the noise of what it leads to.
_PILOT_SEED_OFFSET = 1 << 32


@dataclass(frozen=True)
class FirstPass:
    """Computes part 0, the histogram, and part 1, the proposal; arguments as of `evaluation.shard.TermShards`."""

    location: Location
    request: EvaluateRequest
    data: PreparedDataset
    train: PreparedDataset | None
    threads: int

    @property
    def num_parts(self) -> int:
        """1 or 2."""
        return 2 if self.request.estimator == "importance" else 1

    @property
    def is_small(self) -> bool:
        """Whether it takes less time than starting an actor: no network, and few bytes to count."""
        if self.num_parts > 1 or self.train is None:
            return self.num_parts == 1
        return min(self.train.num_rows, HISTOGRAM_IMAGES) * int(np.prod(self.train.image_shape)) <= _SMALL_BYTES

    @property
    def _hold_out(self) -> HoldOut | None:
        """Which rows of the training data are evaluated: the histogram must not have seen them either."""
        if self.train is None or self.train.dataset_id != self.data.dataset_id:
            return None
        return self.request.hold_out

    def __call__(self) -> Callable[[int], ShardOutput]:
        """The engine calls this once per actor."""
        torch.set_num_threads(self.threads)
        return self._compute

    def _compute(self, index: int) -> ShardOutput:
        if index == 0:
            none = np.zeros((0, 256), np.uint32)
            counts = none if self.train is None else level_counts(self.train, hold_out=self._hold_out)
            return ShardOutput(_npz(counts=counts), rows=1)
        model = load_kept(self.location / "model", self.request.model_id, self.request.device)
        return ShardOutput(_npz(proposal=measured_proposal(model, self.data, self.request)), rows=1)


def read_first_pass(location: Location, index: int) -> npt.NDArray[Any]:
    """The array of one part."""
    content = (location / DIRECTORY / shard_name(index, SUFFIX)).read_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        (name,) = arrays.files
        array: npt.NDArray[Any] = arrays[name]
        return array


def measured_proposal(model: Model, data: PreparedDataset, request: EvaluateRequest) -> npt.NDArray[np.float64]:
    """`importance_proposal`, or `importance_density`, from a first, stratified pass over some images, with noise of its
    own."""
    pilot, bound = replace(request, seed=request.seed + _PILOT_SEED_OFFSET), bound_for(request, model)
    process = bound.denoiser.process
    ids = permutation(0, "first-pass", 0, data.num_rows)[:_PILOT_IMAGES]
    images, labels = data.read_rows(ids)
    label = torch.tensor(labels) if request.told_labels else None
    k = _PILOT_TIMESTEPS
    if isinstance(process, DiscreteProcess):
        k = min(k, (process.num_timesteps - 1) // 2 * 2)
    design = stratified_over(process, torch.arange(len(ids)), pilot.seed, k)
    found = evaluate_images(bound, images, torch.tensor(ids), design, pilot, label)
    if isinstance(process, DiscreteProcess):
        return np.asarray(importance_proposal(process, design.t.reshape(-1), found.terms.reshape(-1)).numpy())
    gamma, terms = (values[:, ~design.first].reshape(-1) for values in (design.t, found.terms))
    return np.asarray(importance_density(continuous(process), gamma, terms).numpy())


def _npz(**arrays: npt.NDArray[Any]) -> bytes:
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)  # type: ignore[arg-type]
    return sink.getvalue()
