"""Prepared data sets, as `OutputKind` has them."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cli.errors import DataError
from pipelines.data.dataset import FORMAT, FORMAT_VERSION, dataset_id
from pipelines.data.ingest.request import IngestRequest
from pipelines.outputs.kind import Findings, Manifest, OutputKind, dense_ids, parquet_ids, size_row
from pipelines.outputs.manifest import MANIFEST
from pipelines.outputs.shards import ShardRecord
from pipelines.storage.location import Location


def _check(location: Location, request: IngestRequest, manifest: Manifest, found: Findings) -> None:
    """The data set's id and the list of rejected images."""
    records = [ShardRecord(s["name"], s["rows"], s["bytes"], s["sha256"], {}) for s in manifest["shards"]]
    if dataset_id(tuple(manifest["image_shape"]), records) != manifest["dataset_id"]:
        found.problems.append(f"{location / MANIFEST}: dataset_id is not that of its shards")
    path = location / "rejected.parquet"
    try:
        rejected = pq.read_table(io.BytesIO(path.read_bytes())).num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path}: is no Parquet file ({error}); restore it") from error
    if rejected != manifest["rejected"]:
        found.problems.append(f"{path}: lists {rejected:,} images, the manifest {manifest['rejected']:,}")
    found.rows += [
        size_row(manifest),
        ("rejected", f"{rejected:,}"),
        ("data set id", manifest["dataset_id"]),
        ("source", f"{request.source} (content {manifest['source_content'][:12]})"),
        ("code", manifest["code_version"]),
    ]


DATA_SET = OutputKind(
    format=FORMAT,
    version=FORMAT_VERSION,
    title="Data set",
    request=IngestRequest,
    ids=lambda request, content: parquet_ids(content),
    order=lambda request, manifest: dense_ids(manifest),
    check=_check,
    instead=lambda request: (
        f"a data set is made from its source; ingest {request.source} into another output and compare the data set ids"
    ),
    passes=("_work/decoded",),
    scratch=("units.parquet",),
)
