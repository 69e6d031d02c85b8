"""Sample sets, as `OutputKind` has them."""

from pipelines.outputs.kept_model import check_model
from pipelines.outputs.kind import Findings, Manifest, OutputKind, dense_ids, size_row
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.shard import SampleShards, decode_shard
from pipelines.storage.location import Location


def _check(location: Location, request: SampleRequest, manifest: Manifest, found: Findings) -> None:
    found.rows += [size_row(manifest), *check_model(location, request.model_id, manifest, found)]


SAMPLE_SET = OutputKind(
    format="ddpm-sample-set",
    version=1,
    title="Sample set",
    request=SampleRequest,
    ids=lambda request, content: (index for index, _ in decode_shard(content, request.format)),
    order=lambda request, manifest: dense_ids(manifest),
    check=_check,
    factory=lambda location, request, manifest, threads: SampleShards(location, request, threads),
)
