"""The manifest of a finished output, and what every kind of output has in it."""

import re
from typing import Any

from pipelines.cli.errors import DataError
from pipelines.storage.location import Location

MANIFEST = "manifest.json"


def refused(path: Location, field: str, value: object, rule: str) -> DataError:
    """The error that names the JSON file at `path`, the field, its value and the rule that it breaks."""
    shown = f"{value!r:.100}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return DataError(f"{path}: {field} = {shown}: {rule}; restore the file, or delete the output and make it again")


def require_in(path: Location, holds: bool, field: str, value: object, rule: str) -> None:
    """Raise the DataError `refused` unless `holds`."""
    if not holds:
        raise refused(path, field, value, rule)


def read_manifest(location: Location) -> dict[str, Any]:
    """The manifest of the finished output at `location`, checked as far as all kinds of output agree.

    Raises:
        DataError: A field is missing or is not what it must be; a shard's name leads out of its directory.
        StorageError: There is none, it cannot be read, or is not JSON.
    """
    path = location / MANIFEST
    return checked_manifest(path, path.read_json())


def checked_manifest(path: Location, manifest: Any) -> dict[str, Any]:
    """`manifest`, the content of `path`, when it is one; see `read_manifest`."""
    require_in(path, isinstance(manifest, dict), "content", manifest, "must be an object")
    for key, kind in (("request", dict), ("shards", list)):
        value = manifest.get(key)
        require_in(path, isinstance(value, kind), key, value, f"must be a {kind.__name__}")
    names: set[str] = set()
    for index, shard in enumerate(manifest["shards"]):
        field = f"shards[{index}]"
        require_in(path, isinstance(shard, dict), field, shard, "must be an object")
        name, sha256 = (shard.get(key) for key in ("name", "sha256"))
        plain = isinstance(name, str) and re.fullmatch(r"part-\d{5,}\.[a-z]+", name) is not None
        require_in(path, plain, f"{field}.name", name, "must be a shard's, as part-00042.parquet, without a directory")
        require_in(path, name not in names, f"{field}.name", name, "must not be there twice")
        names.add(name)
        for key in ("rows", "bytes"):
            whole = type(shard.get(key)) is int and shard[key] >= 0
            require_in(path, whole, f"{field}.{key}", shard.get(key), "must be a whole number >= 0")
        hexadecimal = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None
        require_in(path, hexadecimal, f"{field}.sha256", sha256, "must be 64 hexadecimal digits")
    return dict(manifest)
