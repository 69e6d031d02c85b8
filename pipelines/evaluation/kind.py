"""Evaluations, as `OutputKind` has them."""

import math
from collections.abc import Mapping
from typing import Any

from ddpm_core.model import model_from_bytes
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation import first_pass
from pipelines.evaluation.report import headline_of
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.results import results
from pipelines.evaluation.shard import DIRECTORY, TermShards
from pipelines.evaluation.terms import bound_for
from pipelines.models.kept import stored_model
from pipelines.outputs.kept_model import check_model
from pipelines.outputs.kind import Findings, Manifest, OutputKind, check_parts, parquet_ids, size_row
from pipelines.outputs.manifest import MANIFEST
from pipelines.storage.location import Location


def _order(request: EvaluateRequest, manifest: Manifest) -> list[int]:
    ids: list[int] = request.order(manifest["results"]["data_set_size"]).tolist()
    return ids


def _check(location: Location, request: EvaluateRequest, manifest: Manifest, found: Findings) -> None:
    """The first pass's digests, and every mean and interval once more from the rows."""
    check_parts(location / first_pass.DIRECTORY, manifest["first_pass"], found)
    recorded, names = manifest["results"], [shard["name"] for shard in manifest["shards"]]
    rows = [size_row(manifest), *check_model(location, request.model_id, manifest, found)]
    if not found.problems:
        kept = stored_model(location / "model")
        assert kept is not None, "checked above"
        bound = bound_for(request, model_from_bytes(kept.files))
        again = results(location, request, names, bound, recorded["data_set_size"]).summary
        different = _differing_means(recorded["means"], again["means"])
        if not _equal(recorded.get("classification"), again.get("classification")):
            different.append("classification")
        found.problems += [f"{location / MANIFEST}: {name} is not what the rows give" for name in different]
        rows.append(("means", f"{len(again['means'])} with their intervals, computed again from the rows"))
    data = f"{request.dataset_id} ({manifest['data']})"
    found.rows += [*rows, ("evaluated on", f"data set {data}"), ("result", headline_of(recorded))]


def _differing_means(recorded: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    def numbers(found: Mapping[str, Any] | None) -> list[float]:
        if found is None:
            return []
        kinds = ("given_images", "data_set", "population")
        return [found["mean"], *(end for kind in kinds for end in found[kind] or [])]

    def equal(name: str) -> bool:
        old, new = numbers(recorded.get(name)), numbers(again.get(name))
        return len(old) == len(new) and all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(old, new, strict=True))

    return sorted(name for name in recorded.keys() | again.keys() if not equal(name))


def _equal(recorded: Any, again: Any) -> bool:
    """Whether two JSON values are the same, numbers up to rounding."""
    if isinstance(recorded, dict) and isinstance(again, dict):
        return recorded.keys() == again.keys() and all(_equal(recorded[name], again[name]) for name in recorded)
    if isinstance(recorded, list) and isinstance(again, list):
        return len(recorded) == len(again) and all(_equal(a, b) for a, b in zip(recorded, again, strict=True))
    if isinstance(recorded, float) and isinstance(again, float):
        return math.isclose(recorded, again, rel_tol=1e-9)
    return bool(recorded == again)


def _factory(location: Location, request: EvaluateRequest, manifest: Manifest, threads: int) -> TermShards:
    data = PreparedDataset.reopen(manifest["data"], request.dataset_id, "that was evaluated")
    return TermShards(location, request, data, threads)


EVALUATION = OutputKind(
    format="ddpm-evaluation",
    version=1,
    title="Evaluation",
    request=EvaluateRequest,
    ids=lambda request, content: parquet_ids(content),
    order=_order,
    check=_check,
    factory=_factory,
    directory=DIRECTORY,
    passes=(first_pass.DIRECTORY,),
)
