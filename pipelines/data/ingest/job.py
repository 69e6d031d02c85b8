"""Turning a source of images into a prepared data set.

Two passes of the shard engine: the source's rows are cut into units, and each unit is decoded into a work
object that holds its usable images and the reasons for the others; then shards of equal size are cut from the
usable images, with dense ids. Rows keep the order of the source, so the bytes of the result depend on the
request alone. The manifest is written last; the work objects are removed after it.
"""

import importlib.metadata
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cli.console import Interrupted, event
from pipelines.cli.errors import ConfigError, DataError, StorageError
from pipelines.cluster.actor_pool import ActorPool
from pipelines.data.dataset import (
    PreparedDataset,
    dataset_id,
    encode_shard,
    image_column,
    image_view,
    rows_per_group,
)
from pipelines.data.ingest.account import account_of, require_unchanged, source_content, source_files
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.decode import PixelRules, RejectedImage, decode_image, with_channels
from pipelines.data.ingest.formats import Format, Item
from pipelines.data.ingest.kind import DATA_SET
from pipelines.data.ingest.request import request_of
from pipelines.data.ingest.sizes import mixed_sizes, probe, sizes_of
from pipelines.data.ingest.sources import canonical_source, open_source, source_place, split_units
from pipelines.outputs.manifest import read_manifest
from pipelines.outputs.shards import ShardedOutput, ShardOutput, ShardRecord, begun_request, shard_name
from pipelines.outputs.version import code_version
from pipelines.storage.location import Location
from pipelines.storage.ownership import require_apart

# A unit is what a kill can lose and what one actor holds: this much decoded data, and not more rows than that.
_UNIT_BYTES = 16 * 2**20
_MAX_UNIT_ROWS = 4096
# Up to this many shards are written by the driver: copying them takes less time than starting actors.
_SHARDS_WITHOUT_ACTORS = 4
# Raised when other pixels come out of the same files: units decoded by another version are not continued with.
_DECODING = 2

OnProgress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class IngestSummary:
    """What an ingest made, or found.

    Attributes:
        dataset: The data set.
        already_complete: Whether it was complete before.
        adapted: How many images needed which of `decode.ADAPTATIONS`; None where an older version did not count.
        restored: How many lost shards of it were made again.
        account: What became of all that the source holds, see `account`; None where an older version kept none.
        not_compared: Why it is not known whether a complete data set's source has changed since; None where it has not.
    """

    dataset: PreparedDataset
    already_complete: bool
    adapted: Mapping[str, int] | None
    restored: int
    account: Mapping[str, Any] | None
    not_compared: str | None


def ingest(config: IngestConfig, on_progress: OnProgress = lambda stage, done, total, rate: None) -> IngestSummary:
    """Prepare a data set, or continue to, or find that it is complete; shards of it that are lost are made again.

    Args:
        config: What to make.
        on_progress: Called with (stage, rows done, rows in all, rows per second); the stages are `decode`, `write`.

    Raises:
        ConfigError: The output overlaps the source, or holds files of something else.
        DataError: The source cannot be used, or too many of its images cannot; it has changed since the data set was
            finished; shards are lost, and the source is gone or has changed.
        RequestMismatchError: The output belongs to another request.
        StorageError: The source or the output cannot be read or written.
        ClusterError: Ray gave up.
    """
    location = Location.parse(config.output)
    require_apart(location, source_place(config.source), "the source")
    request, begun = request_of(config), begun_request(location).get("source")
    # Before `..` was resolved, it was recorded: the same source is the same request still.
    if isinstance(begun, str) and ".." in begun.split("/") and canonical_source(begun) == request.source:
        request = replace(request, source=begun)
    output = DATA_SET.output(location, request)
    manifest = output.committed()
    lost = output.lost(manifest) if manifest is not None else []
    if manifest is not None and not lost:
        place = output.location.uri
        trouble = require_unchanged(config.source, config.format, config.split, config.options, manifest, place)
        return _summary(output, already_complete=True, not_compared=trouble)
    try:
        if manifest is None:
            _prepare(config, output, on_progress)
        else:
            _restore(config, output, manifest, lost, on_progress)
    except StorageError:
        # A racing run of the same request ends first and removes the work objects while this one reads them.
        finished = output.committed()
        if finished is None or output.lost(finished):
            raise
    except Interrupted as interruption:
        again = "the lost shards are not all made again, run the same command to make them"
        interruption.kept = output.kept() if manifest is None else again
        raise
    return _summary(output, already_complete=manifest is not None, restored=len(lost))


def _summary(
    output: ShardedOutput, already_complete: bool, restored: int = 0, not_compared: str | None = None
) -> IngestSummary:
    dataset, manifest = PreparedDataset.open(output.location), read_manifest(output.location)
    adapted, account = manifest.get("adapted"), manifest.get("account")
    return IngestSummary(dataset, already_complete, adapted, restored, account, not_compared)


def _restore(
    config: IngestConfig,
    output: ShardedOutput,
    manifest: Mapping[str, Any],
    lost: Sequence[int],
    on_progress: OnProgress,
) -> None:
    """Make lost shards of a finished data set again: the first pass once more, then those shards."""
    first = output.shards / manifest["shards"][lost[0]]["name"]
    event(f"{output.location}: {len(lost)} of {len(manifest['shards'])} shards are lost; making them again")
    try:
        _prepare(config, output, on_progress, (manifest, lost))
    except DataError as error:
        raise DataError(f"{first}: is lost, and cannot be made again without its source as it was: {error}") from error
    output.committed()  # removes the work objects


def _prepare(
    config: IngestConfig,
    output: ShardedOutput,
    on_progress: OnProgress,
    lost: tuple[Mapping[str, Any], Sequence[int]] | None = None,
) -> None:
    """Make and commit the data set, or of a finished one, by its manifest, the shards that are `lost`."""
    source = open_source(config.source, config.format, config.split, config.options)
    images, scan = source.format, source.format.scan(list(source.files))
    items = scan.items
    total = sum(item.stop - item.start for item in items)
    if total == 0:
        told = f" but {scan.left_out}" if scan.left_out.count else ""
        raise DataError(f"source = {config.source}: holds no images{told}; check the path and `format`")
    if scan.label_names is not None and config.label_names is not None:
        own = ", ".join(scan.label_names[:5])
        raise ConfigError(f"label_names = {', '.join(config.label_names)}: the source names them itself, {own}, ...")
    names = scan.label_names or config.label_names
    if not lost:
        known = [item.label for item in items if item.label is not None]
        _require_named(config, max([*known, -1 if scan.largest_label is None else scan.largest_label]))
    content = source_content(source, scan)
    if lost and content != lost[0].get("source_content"):
        raise DataError(f"source = {config.source}: has changed since; restore it, or the shard, or ingest it anew")
    probed = (
        None if config.image_size else probe(config.source, images, items, config.rules, config.max_rejected_fraction)
    )
    height, width = probed or (config.image_size or 0, config.image_size or 0)
    unit_rows = int(np.clip(_UNIT_BYTES // (height * width * 3), 16, _MAX_UNIT_ROWS))
    pool = ActorPool.of(config.cluster)
    # Pixels that need no decoding are copied in less time than actors take to start.
    on_actors = images.is_encoded and total > unit_rows
    if on_actors:
        pool.check()
    output.begin(source_content=content, decoding=_DECODING)

    num_units = _write_units(output.work / "units.parquet", items, unit_rows)
    decoder = DecodeUnits(images, output.work, config.image_size, probed, config.channels, config.rules, names)
    units = output.compute(
        decoder,
        num_units,
        into="_work/decoded",
        pool=pool if on_actors else None,
        on_progress=lambda progress: on_progress("decode", progress.rows, total, progress.rate),
    )
    accepted = [record.extra["accepted"] for record in units]
    num_rows = sum(accepted)
    if not lost:
        _write_rejected(output, units)
        _require_few_rejected(config, output, total - num_rows, total, probed)
        # Some formats show their labels only now.
        again = f", after deleting the unfinished {output.location}"
        _require_named(config, max(record.extra["largest_label"] for record in units), again)
    elif num_rows != lost[0]["num_rows"]:
        then = f"{lost[0]['num_rows']:,} when it was made, by {lost[0]['decoded_by']}, code {lost[0]['code_version']}"
        raise DataError(f"source = {config.source}: {num_rows:,} of its images can be used, {then}; use those versions")

    channels = config.channels or max(record.extra["channels"] for record in units)
    shape = (height, width, channels)
    group = rows_per_group(shape)
    shard_rows = max(1, config.shard_mib * 2**20 // (int(np.prod(shape)) * group)) * group
    num_shards = -(-num_rows // shard_rows)
    cutter = CutShards(output.work / "decoded", tuple(accepted), shape, shard_rows)
    if lost:
        output.restore(cutter, lost[1], lost[0], pool if len(lost[1]) > _SHARDS_WITHOUT_ACTORS else None)
        return
    shards = output.compute(
        cutter,
        num_shards,
        pool=pool if num_shards > _SHARDS_WITHOUT_ACTORS else None,
        on_progress=lambda progress: on_progress("write", progress.rows, num_rows, progress.rate),
    )
    fields = {
        "format": DATA_SET.format,
        "version": DATA_SET.version,
        "dataset_id": dataset_id(shape, shards),
        "num_rows": num_rows,
        "image_shape": list(shape),
        "label_names": None if names is None else list(names),
        "rows_per_group": group,
        "rejected": total - num_rows,
        "adapted": dict(sum((Counter(record.extra["adapted"]) for record in units), Counter())),
        "account": account_of(
            scan, source.left_out, num_rows, total - num_rows, sum(record.extra["unlabelled"] for record in units)
        ),
        "source_content": content,
        "source_files": source_files(source),
        "code_version": code_version(),
        "decoded_by": {name: importlib.metadata.version(name) for name in ("pillow", "pyarrow")},
    }
    output.commit(fields, shards)


def _require_named(config: IngestConfig, largest: int, after: str = "") -> None:
    """Refuse names that are fewer than the labels, whose `largest` is -1 where none is known."""
    if config.label_names is not None and largest >= len(config.label_names):
        given, last = f"label_names = {', '.join(config.label_names)}", len(config.label_names) - 1
        raise ConfigError(f"{given}: names 0..{last}, the source has a label {largest}; name them all{after}")


@dataclass(frozen=True)
class DecodeUnits:
    """First pass: decode unit `index` of the source into a work object.

    The object is Parquet: image (fixed-size binary), label, source, reason; first the rows of usable images,
    in order, then those of rejected ones, without image. Its record says how many are `accepted`, how many of those
    are `unlabelled`, their `largest_label`, how many `channels` they have, and how many of them were `adapted` in which
    way.
    """

    images: Format
    work: Location
    image_size: int | None
    shape: tuple[int, int] | None
    channels: int | None
    rules: PixelRules
    label_names: tuple[str, ...] | None

    def __call__(self) -> Callable[[int], ShardOutput]:
        """Make the compute function: the engine calls this once per actor."""
        units = pq.ParquetFile(io.BytesIO((self.work / "units.parquet").read_bytes()))
        return lambda index: self._decode([Item(**row) for row in units.read_row_group(index).to_pylist()])

    def _decode(self, unit: Sequence[Item]) -> ShardOutput:
        accepted, labels, sources, rejected = [], [], [], []
        adapted: Counter[str] = Counter()
        numbers = {name: number for number, name in enumerate(self.label_names or ())}
        for image in self.images.read(unit):
            try:
                accepted.append(decode_image(image.payload, self.image_size, self.shape, self.rules, adapted))
            except RejectedImage as reason:
                rejected.append((image.source, str(reason)))
                continue
            if isinstance(image.label, str) and image.label not in numbers:
                raise DataError(f"{image.source}: the label {image.label!r} is new: the source changes; run again")
            labels.append(numbers[image.label] if isinstance(image.label, str) else image.label)
            sources.append(image.source)
        channels = self.channels or max((pixels.shape[-1] for pixels in accepted), default=1)
        stacked = [with_channels(pixels, channels) for pixels in accepted]
        column = image_column(np.stack(stacked)) if stacked else pa.array([], pa.binary(1))
        blank = pa.nulls(len(rejected), column.type)
        table = pa.table(
            {
                "image": pa.chunked_array([column, blank]),
                "label": pa.array([*labels, *[None] * len(rejected)], pa.int64()),
                "source": pa.array([*sources, *(source for source, _ in rejected)], pa.string()),
                "reason": pa.array([*[None] * len(accepted), *(reason for _, reason in rejected)], pa.string()),
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
        known = [label for label in labels if label is not None and label >= 0]
        extra = {
            "accepted": len(accepted),
            "channels": channels,
            "adapted": dict(adapted),
            "unlabelled": len(labels) - len(known),
            "largest_label": max(known, default=-1),
        }
        return ShardOutput(sink.getvalue(), len(accepted) + len(rejected), extra)


@dataclass(frozen=True)
class CutShards:
    """Second pass: shard `index` holds the usable images index*shard_rows ... of all units, in order."""

    decoded: Location
    accepted: tuple[int, ...]
    shape: tuple[int, int, int]
    shard_rows: int

    def __call__(self) -> Callable[[int], ShardOutput]:
        """Make the compute function: the engine calls this once per actor."""
        return self._compute

    def _compute(self, index: int) -> ShardOutput:
        ends = np.cumsum(self.accepted)
        start = index * self.shard_rows
        stop = min(start + self.shard_rows, int(ends[-1]))
        images, tables = [], []
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        for unit in range(first, last + 1):
            begin = int(ends[unit]) - self.accepted[unit]
            rows = slice(max(start, begin) - begin, min(stop, int(ends[unit])) - begin)
            content = (self.decoded / shard_name(unit, ".parquet")).read_bytes()
            table = pq.read_table(io.BytesIO(content), use_threads=False).slice(rows.start, rows.stop - rows.start)
            for chunk in table["image"].chunks:
                channels = chunk.type.byte_width // (self.shape[0] * self.shape[1])
                images.append(with_channels(image_view(chunk, (*self.shape[:2], channels)), self.shape[2]))
            tables.append(table.select(["label", "source"]))
        rest = pa.concat_tables(tables).combine_chunks()
        labels, sources = rest["label"].combine_chunks(), rest["source"].combine_chunks()
        return ShardOutput(encode_shard(start, np.concatenate(images), labels, sources), stop - start)


def _write_units(location: Location, items: Sequence[Item], unit_rows: int) -> int:
    """Store the units, one row group each, so that an actor reads its own ones only; returns their number."""
    schema = pa.schema(
        [
            ("file", pa.string()),
            ("start", pa.int64()),
            ("stop", pa.int64()),
            ("label", pa.int64()),
            ("name", pa.string()),
            ("offset", pa.int64()),
            ("size", pa.int64()),
        ]
    )
    sink, count = io.BytesIO(), 0
    with pq.ParquetWriter(sink, schema) as writer:
        for unit in split_units(items, unit_rows):
            rows: list[Mapping[str, Any]] = [item._asdict() for item in unit]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=len(rows))
            count += 1
    location.write_bytes(sink.getvalue())
    return count


def _write_rejected(output: ShardedOutput, units: Sequence[ShardRecord]) -> None:
    """Collect the rejected rows of all units in rejected.parquet, one unit in memory at a time."""
    schema = pa.schema([("source", pa.string()), ("reason", pa.string())])
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema) as writer:
        for unit in units:
            if unit.rows > unit.extra["accepted"]:
                content = (output.work / "decoded" / unit.name).read_bytes()
                table = pq.read_table(io.BytesIO(content), columns=["source", "reason"], use_threads=False)
                writer.write_table(table.slice(unit.extra["accepted"]))
    (output.location / "rejected.parquet").write_bytes(sink.getvalue())


def _require_few_rejected(
    config: IngestConfig, output: ShardedOutput, rejected: int, total: int, probed: tuple[int, int] | None
) -> None:
    if rejected > config.max_rejected_fraction * total or rejected == total:
        path = output.location / "rejected.parquet"
        table = pq.read_table(io.BytesIO(path.read_bytes()))
        if probed and (sizes := sizes_of(table["reason"].to_pylist(), probed, total - rejected)):
            raise mixed_sizes(config.source, sizes)
        first = table.slice(0, 1).to_pylist()[0]
        raise DataError(
            f"source = {config.source}: {rejected:,} of {total:,} images ({rejected / total:.1%}) cannot be used, "
            f"more than max_rejected_fraction = {config.max_rejected_fraction} (first: {first['source']}: "
            f"{first['reason']}); repair the source or raise the limit, all reasons are in {path}"
        )
