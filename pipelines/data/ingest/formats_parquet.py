"""Images in Parquet, as Hugging Face data sets store them and as other tools write them."""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cli.errors import DataError
from pipelines.data.ingest.formats import NO_OPTIONS, NOT_WANTED, PARALLEL_REQUESTS, Item, Options, RawImage, Scan
from pipelines.data.ingest.recognise import require_plain_name
from pipelines.storage.location import Location

# A few bytes of dictionary and index stand for this many images, each of any size, in memory.
_ROWS_AT_ONCE = 8
# Encoded images do not compress: a column that expands a hundredfold beyond this size holds none.
_MAX_EXPANDED_BYTES = 2**28
_LABELS_AT_ONCE = 2**16
# More different words, or longer ones, are captions and no classes.
_MAX_CLASSES = 2**16
_MAX_WORD = 200


class _Columns(NamedTuple):
    """The columns of a table that are read, and what the labels come from, as a phrase."""

    image: str
    label: str | None
    kind: str | None
    labels_from: str


class _Table(NamedTuple):
    """What the scan of one file finds."""

    rows: int
    columns: _Columns
    names: tuple[str, ...] | None
    words: frozenset[str]


@dataclass(frozen=True)
class HuggingFaceParquet:
    """Parquet with a column of images, binary or struct{bytes, path}, and optionally one of labels.

    The images are in `image` or `img`; the labels in `label` or `labels`, else in the one column that is a ClassLabel
    of Hugging Face's or ends with `_label`; unless options name others. Labels are integers (whole floats and booleans
    among them) or words, which become class names. Null, NaN and negative labels are none.
    """

    base: Location
    options: Options = NO_OPTIONS
    is_encoded: ClassVar[bool] = True

    def scan(self, files: Sequence[str]) -> Scan:
        """See `Format.scan`."""
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as scanners:
            tables = dict(zip(files, scanners.map(self._scan_file, files), strict=True))
        items = [Item(file, 0, table.rows) for file, table in tables.items()]
        first: dict[str, str] = {}  # the first file of each kind of label
        for file, table in tables.items():
            if table.columns.kind in ("number", "fraction", "word"):
                first.setdefault("word" if table.columns.kind == "word" else "number", file)
        if len(first) > 1:
            raise DataError(
                f"source = {self.base}: labels are numbers in {first['number']} and words in {first['word']}; "
                "make them one kind, or give label_column = none"
            )
        names: tuple[str, ...] | None = None
        for file, table in tables.items():
            if names is not None and table.names not in (None, names):
                raise DataError(f"{self.base / file}: names other classes than the files before it; ingest it alone")
            names = names or table.names
        if words := {word for table in tables.values() for word in table.words}:
            names = tuple(sorted(words))
        labelled = next((table for table in tables.values() if table.columns.label is not None), None)
        told = labelled or next(iter(tables.values()))
        return Scan(items, names, told.columns.labels_from)

    def read(self, items: Sequence[Item]) -> Iterator[RawImage]:
        """See `Format.read`."""
        for item in items:
            location = self.base / item.file
            with location.open("rb") as stream, _arrow_errors(location):
                yield from self._read_rows(pq.ParquetFile(stream), item, location)

    def _read_rows(self, table: pq.ParquetFile, item: Item, location: Location) -> Iterator[RawImage]:
        image, label, _, _ = self._columns(table.schema_arrow, location)
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
                    known = _label_value(value, f"{location}: row {row}: {label}")
                    yield RawImage(content or b"", known, f"{item.file}#{row}")
                row += 1
        if row < item.stop:
            raise DataError(f"{location}: holds {row:,} rows, fewer than its footer promises; replace it")

    def _scan_file(self, file: str) -> _Table:
        location = self.base / file
        with location.open("rb") as stream, _arrow_errors(location):
            table = pq.ParquetFile(stream)
            columns = self._columns(table.schema_arrow, location)
            _require_no_bomb(table.metadata, {columns.image, columns.label}, location)
            words: frozenset[str] = frozenset()
            if columns.label is not None and columns.kind in ("word", "fraction"):
                words = _words(stream, columns.label, columns.kind, location)
            names = _class_names(table.schema_arrow, columns.label)
            return _Table(table.metadata.num_rows, columns, names, words)

    def _columns(self, schema: pa.Schema, location: Location) -> _Columns:
        """The columns to read, by the options or by their names."""
        image = self.options.image_column or next((name for name in ("image", "img") if name in schema.names), None)
        if image is None or image not in schema.names:
            wanted = f"column {image!r}" if image else "column `image` or `img`"
            raise DataError(f"{location}: no {wanted} among {', '.join(schema.names)}; choose one with image_column")
        kind = schema.field(image).type
        content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not _is_binary(content):
            raise DataError(
                f"{location}: column {image} is {kind}; it must be binary or a struct with binary `bytes`; choose "
                "another with image_column"
            )
        if self.options.no_labels:
            return _Columns(image, None, None, NOT_WANTED)
        if (asked := self.options.label_column) is not None:
            if asked not in schema.names:
                raise DataError(
                    f"{location}: no column {asked!r} among {', '.join(schema.names)}; correct label_column"
                )
            if (found := _label_kind(schema.field(asked).type)) is None:
                raise DataError(
                    f"{location}: column {asked} is {schema.field(asked).type}; labels are integers or words; "
                    "choose another with label_column, or none"
                )
            return _Columns(image, asked, found, f"column {asked}")
        others = [name for name in schema.names if name != image]
        likely = [name for name in others if name.endswith(("_label", "_labels")) or _class_names(schema, name)]
        likely = [name for name in ("label", "labels") if name in others] or [
            name for name in likely if _label_kind(schema.field(name).type) not in (None, "fraction")
        ]
        if not likely:
            unused = f" (there are {', '.join(others)}; see label_column)" if others else ""
            return _Columns(image, None, None, f"none: no column label{unused}")
        if len(likely) > 1 and likely != ["label", "labels"]:
            raise DataError(
                f"{location}: columns {', '.join(likely)} all look like labels; choose one with label_column = "
                f"{likely[0]}, or label_column = none"
            )
        label, kind = likely[0], schema.field(likely[0]).type
        if (found := _label_kind(kind)) is None:
            return _Columns(image, None, None, f"none: column {label} is {kind}, neither integers nor words")
        others.remove(label)
        unused = f" (not used: {', '.join(others)})" if others else ""
        return _Columns(image, label, found, f"column {label}{unused}")


@contextmanager
def _arrow_errors(location: Location) -> Iterator[None]:
    """Arrow's complaints about a file's content, as a DataError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{location}: not a readable Parquet file ({reason}); replace it") from error


def _is_binary(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def _label_kind(kind: pa.DataType) -> str | None:
    """`number`, `word`, `fraction` (which may be whole), `null`, or None for what is no label."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "word"
    if pa.types.is_floating(kind):
        return "fraction"
    return "null" if pa.types.is_null(kind) else None


def _words(stream: Any, label: str, kind: str, location: Location) -> frozenset[str]:
    """The different words of a column; none of one of numbers, which are checked to be whole."""
    stream.seek(0)
    # A dictionary takes little memory, however often a word is repeated.
    table = pq.ParquetFile(stream, read_dictionary=[label] if kind == "word" else [])
    words: set[str] = set()
    row = 0
    for batch in table.iter_batches(_LABELS_AT_ONCE, columns=[label], use_threads=False):
        values = batch[label]
        if kind == "fraction":
            for index, value in enumerate(values.to_pylist()):
                _label_value(value, f"{location}: row {row + index}: {label}")
        else:
            words.update(word for word in values.unique().to_pylist() if word)
        row += len(batch)
        if len(words) > _MAX_CLASSES or any(len(word) > _MAX_WORD for word in words):
            raise DataError(
                f"{location}: column {label} holds texts that are no class names (more than {_MAX_CLASSES:,}, or "
                f"longer than {_MAX_WORD} characters); choose another with label_column, or none"
            )
    for word in words:
        require_plain_name(f"{location}: column {label}", word)
    return frozenset(words)


def _label_value(value: Any, where: str) -> int | str | None:
    """A label as it is in the table: an integer, a word, or none."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and not value.is_integer():
        raise DataError(
            f"{where} = {value}: labels must be integers or words; choose another with label_column, or none"
        )
    known = int(value)
    if known >= 2**63:
        raise DataError(f"{where} = {known}: must be below 2^63; correct it")
    # Hugging Face marks rows without a label by -1.
    return None if known < 0 else known


def _require_no_bomb(metadata: pq.FileMetaData, columns: set[str | None], location: Location) -> None:
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for column in (row_group.column(index) for index in range(row_group.num_columns)):
            expanded, stored = column.total_uncompressed_size, column.total_compressed_size
            name = column.path_in_schema.partition(".")[0]
            if name in columns and expanded > max(_MAX_EXPANDED_BYTES, 100 * stored):
                raise DataError(
                    f"{location}: column {name} of row group {group} expands from {stored:,} to {expanded:,} bytes, "
                    "as neither images nor labels do; replace it"
                )


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """Class names from the `huggingface` schema metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return None
