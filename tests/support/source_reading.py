"""Reading a source as ingest does: unit by unit."""

from pathlib import Path

from pipelines.data.ingest.formats import Options, RawImage, Scan
from pipelines.data.ingest.recognise import LeftOut
from pipelines.data.ingest.sources import open_source, split_units


def scan(uri: str | Path, format: str = "auto", split: str | None = None, **options: str) -> tuple[Scan, LeftOut]:
    """The scan of a source, and all that is left out."""
    source = open_source(str(uri), format, split, Options(**options))
    found = source.format.scan(list(source.files))
    source.left_out.include(found.left_out)
    return found, source.left_out


def read(
    uri: str | Path, format: str = "auto", rows_per_unit: int = 3, split: str | None = None, **options: str
) -> tuple[list[RawImage], tuple[str, ...] | None]:
    """All images of a source, and the names of its classes."""
    source = open_source(str(uri), format, split, Options(**options))
    found = source.format.scan(list(source.files))
    units = split_units(found.items, rows_per_unit)
    return [image for unit in units for image in source.format.read(unit)], found.label_names


def labels_of(images: list[RawImage]) -> list[int | str | None]:
    """Their labels."""
    return [image.label for image in images]
