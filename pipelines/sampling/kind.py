"""Sample sets, as `OutputKind` has them."""

from collections.abc import Iterable

import numpy as np

from pipelines.data.dataset import PreparedDataset
from pipelines.outputs.kept_model import check_kept, check_model
from pipelines.outputs.kind import Findings, Manifest, OutputKind, dense_ids, size_row
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.shard import GUIDANCE_MODEL, SampleShards, decode_rows
from pipelines.storage.location import Location


def _ids(request: SampleRequest, content: bytes) -> Iterable[int]:
    """Of a shard's rows, whose labels are the request's where it tells them by itself."""
    ids, labels = [], []
    for row in decode_rows(content, request.format):
        ids.append(row.id)
        labels.append(row.label)
    if request.label_classes is not None:
        known = request.labels(None)
        assert known is not None
        different = np.flatnonzero(known.of(np.array(ids, np.int64)) != labels)
        if len(different):
            raise ValueError(f"image {ids[different[0]]} has label {labels[different[0]]}, not the request's")
    return ids


def _check(location: Location, request: SampleRequest, manifest: Manifest, found: Findings) -> None:
    found.rows += [size_row(manifest), *check_model(location, request.model_id, manifest, found)]
    if request.has_labels:
        of_data = f"of {manifest['label_data']}" if request.label_dataset_id else "as requested"
        found.rows.append(("labels", of_data))
    if request.guidance_scale is not None:
        found.rows.append(("guidance", request.described_guidance))
    if request.guidance_model_id is not None:
        weaker = manifest["guidance_model"]
        directory, step = location / GUIDANCE_MODEL, weaker["lineage"]["step"]
        found.rows.append(
            ("weaker model", check_kept(directory, request.guidance_model_id, weaker["uri"], step, found))
        )


def _factory(location: Location, request: SampleRequest, manifest: Manifest, threads: int) -> SampleShards:
    if request.label_dataset_id is None:
        return SampleShards(location, request, threads)
    data = PreparedDataset.reopen(manifest["label_data"], request.label_dataset_id, "whose labels were taken")
    return SampleShards(location, request, threads, data)


SAMPLE_SET = OutputKind(
    format="ddpm-sample-set",
    version=1,
    title="Sample set",
    request=SampleRequest,
    ids=_ids,
    order=lambda request, manifest: dense_ids(manifest),
    check=_check,
    factory=_factory,
)
