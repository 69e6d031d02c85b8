"""The Hugging Face Hub's cache: `datasets--OWNER--NAME/snapshots/REVISION/...` are links to its `blobs/DIGEST`."""

import os
import re
from pathlib import Path

from pipelines.cli.errors import DataError
from pipelines.data.ingest.recognise import LeftOut

_INSIDE = re.compile(r"(.*/(?:datasets|models|spaces)--[^/]+)/(snapshots|blobs|refs|\.no_exist)/([^/]+)")


def blob_size(link: str) -> int | None:
    """Bytes of the blob that a link in a snapshot leads to; None for a link that leads anywhere else."""
    folder = os.path.realpath(os.path.dirname(link))  # noqa: PTH120
    inside = _INSIDE.match(f"{folder}/{os.path.basename(link)}")  # noqa: PTH119
    if inside is None or inside[2] != "snapshots":
        return None
    target = Path(os.path.realpath(link))  # does not raise on links in a circle
    return target.stat().st_size if target.parent == Path(inside[1], "blobs") and target.is_file() else None


def without_internals(where: str, base: str, files: list[str], left_out: LeftOut) -> list[str]:
    """The files without the blobs and notes of caches, which are read by their names in a snapshot.

    Raises:
        DataError: They are those of several snapshots, which mostly hold the same; the message begins with `where`.
    """
    kept, snapshots = [], set()
    for file in files:
        path = f"{base}/{file}"
        inside = _INSIDE.match(path) if "s--" in path else None
        if inside is not None and inside[2] == "snapshots":
            snapshots.add(f"{inside[1]}/snapshots/{inside[3]}")
        elif inside is not None and not f"{base}/".startswith(f"{inside[1]}/{inside[2]}/"):
            left_out.add("of the Hub's cache, read by its name in snapshots/", file)
            continue
        kept.append(file)
    if len(snapshots) > 1:
        raise DataError(f"{where}: holds {len(snapshots)} snapshots of the Hub's; name one, such as {max(snapshots)}")
    return kept
