"""How close samples from the EMA weights are to the validation images, by features, while training and at its end.

RUN/quality/reference.parquet    id int64, feature float32 [64]: those of the validation images, made once

Samples and images are divided among the ranks in batches that are the same for any number of ranks, with noise keyed by
id, so that the result does not depend on it. The numbers are those that jobs/quality.py computes of the same
images.
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ddpm_core.denoiser import Denoiser, Labels
from ddpm_core.networks.exact import exact
from ddpm_core.networks.random_conv import RandomConv
from ddpm_core.sets import NUM_GROUPS
from ddpm_core.sets.distances import frechet_estimates, kernel_estimate
from ddpm_core.sets.jackknife import Estimate, group_of
from ddpm_core.sets.moments import Moments
from pipelines.cli.config import digest
from pipelines.data.dataset import Int64s, PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.storage.location import Location
from pipelines.training.config import HELD_OUT, QUALITY_FEATURES, TrainConfig
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports
from pipelines.training.samples import SAMPLER, sample_batches
from pipelines.training.words import quality_in_words

Float32s = npt.NDArray[np.float32]
EXTRACTOR = f"random_conv_{QUALITY_FEATURES}"
"""What numbers of its features are called."""
_REFERENCE = "quality/reference.parquet"
_MOST_REFERENCE = 10_000
# Validation images in one call of the extractor: the unit that is divided among the ranks.
_BATCH = 128
# Raised when other numbers come out of the same features.
_METHOD = 1


def reference_rows(dataset: PreparedDataset, hold_out: HoldOut | None) -> Int64s:
    """Ids int64 [n], ascending, of at most 10,000 images, evenly spread over `dataset` or what is held out of it."""
    if hold_out is not None:
        return hold_out.sample(_MOST_REFERENCE)
    count = min(dataset.num_rows, _MOST_REFERENCE)
    return np.arange(count, dtype=np.int64) * dataset.num_rows // max(count, 1)


def compared(samples: Float32s, reference: Float32s) -> dict[str, Estimate]:
    """How far features float32 [n, d] are from those float32 [m, d] of a reference.

    `fd`: the Fréchet distance (Heusel 2017, eq. 6), `fd_limit`: its limit for many images (Chong & Forsyth 2020), both
    with the jackknife's interval; `kid`: the kernel distance (Bińkowski 2018), with that of independent blocks.
    """
    distance, limit = frechet_estimates(_by_group(samples, "samples"), _by_group(reference, "reference"))
    kid = kernel_estimate(samples, reference, "quality/samples/blocks", "quality/reference/blocks")
    return {"fd": distance, "fd_limit": limit, "kid": kid}


def _by_group(features: Float32s, role: str) -> list[Moments]:
    groups = group_of(len(features), NUM_GROUPS, f"quality/{role}")
    return [Moments.of(features[groups == group]) for group in range(NUM_GROUPS)]


class Quality:
    """The observer that draws samples and compares them.

    Args:
        run: The run directory.
        dataset: The validation images, or the training set where its held-out rows are validated on.
        config: The training's.
        hold_out: What is held out of the training set.
        averaged: Makes the denoiser with the averaged weights.
        device: Where it lies.
        ranks: All that samples and images are divided among; rank 0 reads and writes the features of the images.
        reports: Where the result goes.
    """

    doing = "measuring the quality of samples"

    def __init__(
        self,
        run: Location,
        dataset: PreparedDataset,
        config: TrainConfig,
        hold_out: HoldOut,
        averaged: Callable[[], Denoiser],
        device: torch.device,
        ranks: Ranks,
        reports: Reports,
    ) -> None:
        self._path, self._dataset, self._config, self._averaged = run / _REFERENCE, dataset, config, averaged
        self._device, self._ranks, self._reports = device, ranks, reports
        held_out = hold_out if config.data.validation == HELD_OUT else None
        self._rows = reference_rows(dataset, held_out)
        self._extractor = RandomConv(dataset.image_shape, QUALITY_FEATURES).to(device)
        self._made_of = {
            "extractor": {"name": EXTRACTOR, "sha256": self._extractor.sha256(), "image_shape": dataset.image_shape},
            "reference_id": held_out.name_of(dataset.dataset_id) if held_out else dataset.dataset_id,
        }
        self._reference: Float32s | None = None  # known from the first measurement on
        self._last: dict[str, Any] | None = None

    def is_due(self, done: int) -> bool:
        """Whether to measure after `done` steps."""
        return self._config.is_due(self._config.quality.every_steps, done)

    def observe(self, done: int) -> None:
        """Measure after `done` steps. A collective."""
        if self._reference is None:
            self._reference = self._features_of_reference()
        found = compared(self._features_of_samples(), self._reference)
        stamp, values = digest(self._protocol)[:8], {}
        for name, estimate in found.items():
            for end, value in (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high)):
                values[f"quality/{name}{end}.{EXTRACTOR}.{stamp}"] = value
        self._last = {
            **self._protocol,
            "stamp": stamp,
            "numbers": {name: asdict(estimate) for name, estimate in found.items()},
        }
        self._reports.metrics(done, values)
        self._reports.say(f"step {done:,}: quality: {quality_in_words(self._last)}")

    def result(self) -> dict[str, Any] | None:
        """The last numbers with their intervals, and how they were measured; None before the first."""
        return self._last

    @property
    def _protocol(self) -> dict[str, Any]:
        """How the numbers are measured: two are comparable where all of this is the same."""
        return {
            **self._made_of,
            "method": _METHOD,
            "num_samples": self._config.quality.num_images,
            "num_reference": len(self._rows),
            "sampler": SAMPLER,
            "sampler_steps": self._config.quality.sampler_steps,
        }

    def _features(self, images: npt.NDArray[np.uint8]) -> Float32s:
        return exact(self._extractor, self._device, images)

    def _features_of_samples(self) -> Float32s:
        """float32 [n, d] of the samples, in the order of their ids; with classes these have each in turn."""
        denoiser, config = self._averaged(), self._config.quality

        def labels(ids: torch.Tensor) -> Labels | None:
            return None if denoiser.num_classes is None else ids % denoiser.num_classes

        batches = sample_batches(
            denoiser, config.num_images, config.sampler_steps, self._config.seed, self._device, self._ranks, labels
        )
        own = [(start, self._features(images)) for start, images in batches]
        return np.concatenate(self._ranks.gather_in_order(own))[: config.num_images]

    def _features_of_reference(self) -> Float32s:
        """float32 [n, d] of the validation images: those that the run has stored, or else made, and stored."""
        stored: Float32s | None = self._ranks.broadcast(self._stored() if self._ranks.rank == 0 else None)
        if stored is not None:
            return stored
        starts = range(0, len(self._rows), _BATCH)[self._ranks.rank :: self._ranks.world_size]
        own = [(s, self._features(self._dataset.read_rows(self._rows[s : s + _BATCH])[0])) for s in starts]
        features = np.concatenate(self._ranks.gather_in_order(own))
        if self._ranks.rank == 0:
            self._store(features)
        return features

    @property
    def _schema(self) -> pa.Schema:
        """Of the stored features; its metadata say what they are of."""
        fields = [("id", pa.int64()), ("feature", pa.list_(pa.float32(), QUALITY_FEATURES))]
        return pa.schema(fields, {"made_of": json.dumps(self._made_of, sort_keys=True)})

    def _store(self, features: Float32s) -> None:
        column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), QUALITY_FEATURES)
        table = pa.Table.from_arrays([pa.array(self._rows), column], schema=self._schema)
        sink = io.BytesIO()
        pq.write_table(table, sink, use_dictionary=False, write_page_checksum=True)
        self._path.write_bytes(sink.getvalue())

    def _stored(self) -> Float32s | None:
        """What `_store` has left; None where that is nothing, damaged, or of other images or another network.

        Raises:
            StorageError: It cannot be read now.
        """
        if not self._path.exists():
            return None
        content = self._path.read_bytes()
        try:
            table = pq.read_table(io.BytesIO(content), use_threads=False, page_checksum_verification=True)
        except (pa.ArrowException, OSError):
            return None
        is_ours = table.schema.equals(self._schema) and table.schema.metadata == self._schema.metadata
        if not is_ours or not np.array_equal(table["id"].to_numpy(), self._rows):
            return None
        features: Float32s = table["feature"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        whole = features.size == len(self._rows) * QUALITY_FEATURES and np.isfinite(features).all()
        return features.reshape(-1, QUALITY_FEATURES) if whole else None
