"""Comparisons of two sets, as `OutputKind` has them."""

import math
from typing import Any

import numpy as np

from pipelines.cli.console import with_interval
from pipelines.cli.errors import DataError
from pipelines.outputs.kind import Findings, Manifest, OutputKind, check_parts, parquet_ids, size_row
from pipelines.outputs.manifest import MANIFEST
from pipelines.quality.features import FEATURES, FeatureSet, described
from pipelines.quality.names import title_of
from pipelines.quality.request import QualityRequest, Role, Space
from pipelines.quality.results import results
from pipelines.quality.searches import NEIGHBOURS, OWN, NeighbourShards, Sides, parts
from pipelines.storage.location import Location


def _order(request: QualityRequest, manifest: Manifest) -> list[int]:
    sides = sides_of(request, manifest)
    rows = [
        sides.rows(search.queries, search.label)[start:stop] for search, start, stop, _ in parts(request, NEIGHBOURS)
    ]
    ids: list[int] = np.concatenate(rows).tolist()
    return ids


def feature_key(role: Role, space: Space) -> str:
    """What the features of a role are called in a manifest."""
    return f"{role}.{space}"


def sides_of(request: QualityRequest, manifest: Manifest) -> Sides:
    """The features of a finished comparison, each compared with what the request says.

    Raises:
        DataError: They are others.
        StorageError: They are not there any more, or cannot be read.
    """
    sets = {}
    for role, space in request.feature_sets:
        location = Location.parse(manifest["features"][feature_key(role, space)])
        wanted = FEATURES.output(location, request.features(role, space))
        found = wanted.committed()
        if found is None or wanted.lost(found):
            raise DataError(
                f"{location}: the features of {role} are not there any more, or not all; run the command of "
                "jobs/quality.py that made the comparison again: it makes them again"
            )
        sets[role, space] = FeatureSet.open(location)
    return Sides(request, sets)


def _check(location: Location, request: QualityRequest, manifest: Manifest, found: Findings) -> None:
    """Every number once more from features and neighbours."""
    recorded, rows = manifest["results"], [size_row(manifest)]
    check_parts(location / OWN, manifest[OWN], found)
    if not found.problems:
        again = results(location, request, sides_of(request, manifest))
        different = differing(recorded, again)
        found.problems += [f"{location / MANIFEST}: {name} is not what the rows give" for name in different]
        rows.append(("numbers", "computed again from the features and neighbours"))
    name = request.headline
    found.rows += [
        *rows,
        ("samples", f"{request.samples.dataset_id} ({manifest['sets']['samples']})"),
        ("reference", f"{request.reference.dataset_id} ({manifest['sets']['reference']})"),
        ("features", f"{described(request.extractor)}, protocol {request.stamp}"),
        ("result", f"{title_of(name, request)} {with_interval(recorded['all']['numbers'][name])}"),
        ("code", manifest["code_version"]),
    ]


def differing(recorded: Any, again: Any, prefix: str = "") -> list[str]:
    """The names of the values, in JSON values, that are not the same up to rounding.

    >>> differing({"a": {"b": 1.0, "c": [1]}}, {"a": {"b": 1.0 + 1e-12, "c": [2]}})
    ['a.c.0']
    """
    if isinstance(recorded, dict) and isinstance(again, dict):
        pairs = [(name, recorded.get(name), again.get(name)) for name in sorted(recorded.keys() | again.keys())]
    elif isinstance(recorded, list | tuple) and isinstance(again, list | tuple) and len(recorded) == len(again):
        pairs = [(str(place), *pair) for place, pair in enumerate(zip(recorded, again, strict=True))]
    elif isinstance(recorded, float) and isinstance(again, float):
        return [] if math.isclose(recorded, again, rel_tol=1e-9, abs_tol=1e-12) else [prefix]
    else:
        return [] if recorded == again else [prefix]
    return [found for name, old, new in pairs for found in differing(old, new, f"{prefix}.{name}" if prefix else name)]


def _factory(location: Location, request: QualityRequest, manifest: Manifest, threads: int) -> NeighbourShards:
    return NeighbourShards(location, request, sides_of(request, manifest).sets, NEIGHBOURS, threads)


QUALITY = OutputKind(
    format="ddpm-quality",
    version=1,
    title="Quality",
    request=QualityRequest,
    ids=lambda request, content: parquet_ids(content),
    order=_order,
    check=_check,
    factory=_factory,
    directory=NEIGHBOURS,
    passes=(OWN,),
)
