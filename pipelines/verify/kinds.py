"""The kinds of output that there are, by the format that their manifests name."""

from typing import Any

from pipelines.data.ingest.kind import DATA_SET
from pipelines.encoding.kind import ENCODING
from pipelines.evaluation.kind import EVALUATION
from pipelines.outputs.kind import OutputKind
from pipelines.quality.features import FEATURES
from pipelines.quality.kind import QUALITY
from pipelines.sampling.kind import SAMPLE_SET

KINDS: dict[str, OutputKind[Any]] = {
    kind.format: kind for kind in (DATA_SET, SAMPLE_SET, EVALUATION, ENCODING, FEATURES, QUALITY)
}
