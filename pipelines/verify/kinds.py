"""The kinds of output that there are, by the format that their manifests name."""

from typing import Any

from pipelines.data.ingest.kind import DATA_SET
from pipelines.evaluation.kind import EVALUATION
from pipelines.outputs.kind import OutputKind
from pipelines.sampling.kind import SAMPLE_SET

KINDS: dict[str, OutputKind[Any]] = {kind.format: kind for kind in (DATA_SET, SAMPLE_SET, EVALUATION)}
