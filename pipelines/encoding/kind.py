"""Encodings, as `OutputKind` has them."""

import math
from collections.abc import Sequence

import numpy as np

from pipelines.data.dataset import PreparedDataset
from pipelines.encoding.request import EncodeRequest
from pipelines.encoding.shard import EncodeShards, read_round_trips
from pipelines.outputs.kept_model import check_model
from pipelines.outputs.kind import Findings, Manifest, OutputKind, dense_ids, parquet_ids, size_row
from pipelines.outputs.manifest import MANIFEST
from pipelines.storage.location import Location


def round_trip(shards: Location, names: Sequence[str]) -> dict[str, float | int]:
    """The mean, the median and the largest `round_trip_rms` of all images, in grey levels, and the id of the last."""
    rms = read_round_trips(shards, names)
    worst = int(rms.argmax())
    return {
        "mean_rms": math.fsum(rms) / len(rms),
        "median_rms": float(np.median(rms)),
        "worst_rms": float(rms[worst]),
        "worst_id": worst,
    }


def in_words(found: dict[str, float | int]) -> str:
    """What `round_trip` gives, for a person."""
    return (
        f"rms {found['mean_rms']:.3f} grey levels of 255 on average, {found['median_rms']:.3f} median, "
        f"{found['worst_rms']:.3f} worst (id {found['worst_id']})"
    )


def _check(location: Location, request: EncodeRequest, manifest: Manifest, found: Findings) -> None:
    """The round trip once more from the rows."""
    recorded, names = manifest["round_trip"], [shard["name"] for shard in manifest["shards"]]
    rows = [size_row(manifest), *check_model(location, request.model_id, manifest, found)]
    if not found.problems and round_trip(location / ENCODING.directory, names) != recorded:
        found.problems.append(f"{location / MANIFEST}: round_trip is not what the rows give")
    data = f"data set {request.dataset_id} ({manifest['data']})"
    found.rows += [*rows, ("images", data), ("round trip", in_words(recorded))]


def _factory(location: Location, request: EncodeRequest, manifest: Manifest, threads: int) -> EncodeShards:
    data = PreparedDataset.reopen(manifest["data"], request.dataset_id, "that was encoded")
    return EncodeShards(location, request, data, threads)


ENCODING = OutputKind(
    format="ddpm-encoding",
    version=1,
    title="Encoding",
    request=EncodeRequest,
    ids=lambda request, content: parquet_ids(content),
    order=lambda request, manifest: dense_ids(manifest),
    check=_check,
    factory=_factory,
)
