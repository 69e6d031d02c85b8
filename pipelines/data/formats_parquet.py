"""Images in Parquet, as Hugging Face data sets store them."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_core.errors import DataError
from pipelines.data.formats import PARALLEL_REQUESTS, Item, RawImage, Scan
from pipelines.storage import Location

# A few bytes of dictionary and index stand for this many images, each of any size, in memory.
_ROWS_AT_ONCE = 8
# Encoded images do not compress: a column that expands a hundredfold beyond this size holds none.
_MAX_EXPANDED_BYTES = 2**28


@dataclass(frozen=True)
class HuggingFaceParquet:
    """Parquet with `image` or `img`, a struct{bytes, path} or binary, and an optional integer `label(s)`."""

    base: Location
    is_encoded: ClassVar[bool] = True

    def scan(self, files: Sequence[str]) -> Scan:
        """See `Format.scan`."""
        tables = [file for file in files if file.endswith(".parquet")]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as scanners:
            found = list(scanners.map(self._scan_file, tables))
        return Scan([item for item, _ in found], found[0][1] if found else None)

    def read(self, items: Sequence[Item]) -> Iterator[RawImage]:
        """See `Format.read`."""
        for item in items:
            location = self.base / item.file
            with location.open("rb") as stream, _arrow_errors(location):
                yield from self._read_rows(pq.ParquetFile(stream), item, location)

    def _read_rows(self, table: pq.ParquetFile, item: Item, location: Location) -> Iterator[RawImage]:
        image, label = _parquet_columns(table.schema_arrow, location)
        groups, row, first = [], 0, None
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row < item.stop and row + rows > item.start:
                groups.append(group)
                first = row if first is None else first
            row += rows
        row = first or 0
        columns = [image] if label is None else [image, label]
        batches = table.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns, use_threads=False)
        for batch in batches:
            payloads, labels = batch[image], batch[label].to_pylist() if label else [None] * len(batch)
            if row + len(batch) <= item.start or row >= item.stop:
                row += len(batch)
                continue
            for payload, value in zip(payloads, labels, strict=True):
                if item.start <= row < item.stop:
                    content = payload.as_py()
                    content = content.get("bytes") if isinstance(content, dict) else content
                    # Hugging Face marks rows without a label by -1.
                    known = None if value is None or value < 0 else int(value)
                    if known is not None and known >= 2**63:
                        raise DataError(f"{location}: row {row}: {label} = {known}: must be below 2^63; correct it")
                    yield RawImage(content or b"", known, f"{item.file}#{row}")
                row += 1
        if row < item.stop:
            raise DataError(f"{location}: holds {row:,} rows, fewer than its footer promises; replace it")

    def _scan_file(self, file: str) -> tuple[Item, tuple[str, ...] | None]:
        location = self.base / file
        with location.open("rb") as stream, _arrow_errors(location):
            table = pq.ParquetFile(stream)
            image, label = _parquet_columns(table.schema_arrow, location)
            _require_no_bomb(table.metadata, image, location)
            names = _label_names(table.schema_arrow.metadata or {}, label)
            return Item(file, 0, table.metadata.num_rows), names


@contextmanager
def _arrow_errors(location: Location) -> Iterator[None]:
    """Arrow's complaints about a file's content, as a DataError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{location}: not a readable Parquet file ({reason}); replace it") from error


def _parquet_columns(schema: pa.Schema, location: Location) -> tuple[str, str | None]:
    """Names of the image column and of the label column (None: there is none)."""
    image = next((name for name in ("image", "img") if name in schema.names), None)
    if image is None:
        raise DataError(f"{location}: no column `image` or `img` among {', '.join(schema.names)}; rename one")
    kind = schema.field(image).type
    content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
        raise DataError(f"{location}: column {image} is {kind}; it must be binary or a struct with binary `bytes`")
    label = next((name for name in ("label", "labels") if name in schema.names), None)
    if label is not None and not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{location}: column {label} is {schema.field(label).type}; labels must be integers")
    return image, label


def _require_no_bomb(metadata: pq.FileMetaData, image: str, location: Location) -> None:
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for column in (row_group.column(index) for index in range(row_group.num_columns)):
            expanded, stored = column.total_uncompressed_size, column.total_compressed_size
            is_image = column.path_in_schema.partition(".")[0] == image
            if is_image and expanded > max(_MAX_EXPANDED_BYTES, 100 * stored):
                raise DataError(
                    f"{location}: column {image} of row group {group} expands from {stored:,} to {expanded:,} bytes, "
                    "as no encoded images do; replace it"
                )


def _label_names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...] | None:
    """Class names from the `huggingface` schema metadata."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return None
