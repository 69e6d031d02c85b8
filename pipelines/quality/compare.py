"""Two comparisons side by side, if they were made in the same way."""

import math
from collections.abc import Mapping
from typing import Any

from pipelines.cli.config import differences
from pipelines.cli.console import with_interval
from pipelines.cli.errors import DataError
from pipelines.outputs.manifest import MANIFEST, read_manifest
from pipelines.quality.kind import QUALITY
from pipelines.quality.names import NUMBERS, title_of
from pipelines.quality.request import QualityRequest
from pipelines.storage.location import Location


def check_comparable(uri: str, request: QualityRequest) -> Mapping[str, Any]:
    """The results of the finished comparison at `uri`.

    Raises:
        DataError: It is none, or was measured in another way than `request` asks for; what differs is named.
        StorageError: It cannot be read.
    """
    location = Location.parse(uri)
    manifest = read_manifest(location)
    if manifest.get("format") != QUALITY.format:
        raise DataError(f"compare_with = {uri}: is no output of jobs/quality.py; name one")
    other = QUALITY.request.from_json(manifest["request"], location / MANIFEST)
    if differing := differences(other.protocol, request.protocol):
        raise DataError(
            f"compare_with = {uri}: was measured in another way ({'; '.join(differing)}), so its numbers do not "
            "compare; measure it in this way, or leave it out"
        )
    results: Mapping[str, Any] = manifest["results"]
    return results


def comparison_rows(uri: str, request: QualityRequest, measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """For each number by how much it differs from the one at `uri`, and whether beyond doubt.

    Both are of samples of their own and share the reference, which makes the interval of the difference a little too
    wide: their errors are added as if it were not shared.
    """
    other, rows = check_comparable(uri, request)["all"]["numbers"], []
    for name, found in measured["all"]["numbers"].items():
        if name not in other:
            continue
        before, difference = other[name], found["value"] - other[name]["value"]
        half = math.hypot((found["high"] - found["low"]) / 2, (before["high"] - before["low"]) / 2)
        told = {"value": difference, "low": difference - half, "high": difference + half}
        better = (difference < 0) == NUMBERS[name].lower_is_better
        verdict = "no clear difference" if abs(difference) <= half else "better" if better else "worse"
        told_in_words = f"{title_of(name, request)} {with_interval(told)}"
        rows.append((f"against {Location.parse(uri).name}", f"{told_in_words}: {verdict}"))
    return rows
