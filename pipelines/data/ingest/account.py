"""The account of an ingest: what became of everything that the source holds, and whether the source is still the same.

In the manifest:

    account        found = used + rejected + label_files + the counts of left_out, in files, members of tar files and
                   rows of tables; what the labels came from, and how many of the used images have none
    source_files   number of the files that were read, and a digest of their names and sizes
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipelines.cli.errors import DataError, StorageError
from pipelines.data.ingest.formats import Options, Scan
from pipelines.data.ingest.recognise import LeftOut
from pipelines.data.ingest.sources import Source, open_source

# Reasons that the closing summary names.
_SHOWN = 8


def account_of(scan: Scan, left_out: LeftOut, used: int, rejected: int, unlabelled: int) -> dict[str, Any]:
    """The manifest's `account`; `left_out` is what was left out before the scan, `unlabelled` are those of `used`."""
    rest = LeftOut()
    rest.include(left_out)
    rest.include(scan.left_out)
    return {
        "found": used + rejected + scan.label_files + rest.count,
        "used": used,
        "rejected": rejected,
        "label_files": scan.label_files,
        "left_out": [
            {"reason": reason, "count": count, "first": first} for reason, (count, first) in rest.reasons.items()
        ],
        "labels_from": scan.labels_from,
        "unlabelled": unlabelled,
    }


def account_rows(account: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the closing summary: what was found, what was left out and why, and what labels came from."""
    left_out = account["left_out"]
    parts = {
        "used": account["used"],
        "rejected": account["rejected"],
        "for labels": account["label_files"],
        "left out": sum(entry["count"] for entry in left_out),
    }
    told = " + ".join(f"{count:,} {name}" for name, count in parts.items() if count or name == "used")
    rows = [("found", f"{account['found']:,} = {told}")]
    for entry in left_out[:_SHOWN]:
        first = "it is" if entry["count"] == 1 else "first:"
        rows.append(("left out", f"{entry['count']:,} {entry['reason']} ({first} {entry['first']})"))
    if len(left_out) > _SHOWN:
        rows.append(("left out", f"more, for {len(left_out) - _SHOWN} other reasons, all in manifest.json"))
    without = f" ({account['unlabelled']:,} of the images have none)" if account["unlabelled"] else ""
    return [*rows, ("labels from", account["labels_from"] + without)]


def source_content(source: Source, scan: Scan) -> str:
    """sha256 (hex) over names and sizes of the files, and over every item with its label and place."""
    return hashlib.sha256(json.dumps([source.files, scan.items]).encode()).hexdigest()


def source_files(source: Source) -> dict[str, Any]:
    """The manifest's `source_files`."""
    files = [source.files] if source.label_file is None else [source.files, source.label_file]
    return {"count": len(source.files), "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}


def require_unchanged(
    uri: str, format: str, split: str | None, options: Options, manifest: Mapping[str, Any], output: str
) -> str | None:
    """Compare a source with what a finished data set was made from.

    Args:
        uri: Of the source; `format`, `split`, `options` as for `open_source`.
        format: See there.
        split: See there.
        options: See there.
        manifest: Of the data set; one without `source_files` is from before there was such a field.
        output: Where it lies.

    Returns:
        Why they could not be compared, such as that the source is not there any more; None where nothing has changed.

    Raises:
        DataError: Files have been added, removed or replaced by others of another size since.
    """
    if uri.startswith("embedded://"):
        return None
    try:
        source = open_source(uri, format, split, options)
        then = manifest.get("source_files")
        if isinstance(then, dict):
            same = then.get("sha256") == source_files(source)["sha256"]
            counts = f" ({then.get('count')} files then, {len(source.files)} now)"
        else:
            same = manifest.get("source_content") == source_content(source, source.format.scan(list(source.files)))
            counts = ", or this version of the software reads it differently"
    except (DataError, StorageError) as error:
        return str(error)
    if not same:
        raise DataError(
            f"source = {uri}: has changed since {output} was made from it{counts}; ingest it into another output, or "
            "delete that one first"
        )
    return None
