"""The prepared data set: what was written is read back, by groups and by ids, and damage is named."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cli.errors import DataError, StorageError
from pipelines.data.dataset import (
    FORMAT,
    FORMAT_VERSION,
    PreparedDataset,
    dataset_id,
    encode_shard,
    image_column,
    image_view,
    rows_per_group,
)
from pipelines.outputs.shards import ShardedOutput, ShardOutput
from pipelines.storage.location import Location

SHAPE = (16, 24, 3)
ROWS = 2500  # three shards of 1024, 1024 and 452 rows in groups of 512
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (ROWS, *SHAPE), np.uint8)
LABELS = RNG.integers(-1, 10, ROWS)


def write(uri: str) -> PreparedDataset:
    """Commit IMAGES and LABELS (-1: null) through the shard engine."""

    def compute(index: int) -> ShardOutput:
        rows = slice(index * 1024, min((index + 1) * 1024, ROWS))
        labels = pa.array(LABELS[rows], pa.int64(), mask=LABELS[rows] < 0)
        sources = pa.array([f"image {i}" for i in range(rows.start, rows.stop)])
        return ShardOutput(encode_shard(rows.start, IMAGES[rows], labels, sources), rows.stop - rows.start)

    output = ShardedOutput(Location.parse(uri), {"seed": 0})
    output.begin()
    records = output.compute(lambda: compute, 3)
    fields = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "dataset_id": dataset_id(SHAPE, records),
        "num_rows": ROWS,
        "image_shape": list(SHAPE),
        "label_names": ["a", "b"],
        "rows_per_group": rows_per_group(SHAPE),
        "rejected": 7,
    }
    output.commit(fields, records)
    return PreparedDataset.open(uri)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return write(str(tmp_path_factory.mktemp("data-set")))


def test_the_manifest_describes_the_shards(dataset: PreparedDataset) -> None:
    assert dataset.num_rows == ROWS
    assert dataset.image_shape == SHAPE
    assert dataset.label_names == ("a", "b")
    assert dataset.rejected == 7
    assert [(shard.first_id, shard.rows) for shard in dataset.shards] == [(0, 1024), (1024, 1024), (2048, 452)]
    assert dataset.group_starts.tolist() == [0, 512, 1024, 1536, 2048, 2500]
    assert dataset.group_starts.dtype == np.int64
    assert dataset.num_groups == 5


def test_shards_follow_the_contract_in_parquet(dataset: PreparedDataset) -> None:
    for shard in dataset.shards:
        path = f"{dataset.location.path}/data/{shard.name}"
        table, file = pq.read_table(path), pq.ParquetFile(path)
        assert table.schema.field("image").type == pa.binary(int(np.prod(SHAPE)))
        assert [table.schema.field(name).type for name in ("id", "label", "source")] == [
            pa.int64(),
            pa.int64(),
            pa.string(),
        ]
        ids = table["id"].to_pylist()
        assert ids == list(range(shard.first_id, shard.first_id + shard.rows))
        assert table["source"].to_pylist() == [f"image {i}" for i in ids]
        assert table["label"].to_pylist() == [None if LABELS[i] < 0 else LABELS[i] for i in ids]
        for group in range(file.num_row_groups):
            column = file.metadata.row_group(group).column(1)
            assert (column.compression, "PLAIN" in column.encodings) == ("UNCOMPRESSED", True)
            assert not column.has_dictionary_page


@given(st.lists(st.integers(0, 4), max_size=8))
def test_groups_come_in_the_order_given(dataset: PreparedDataset, groups: list[int]) -> None:
    starts = dataset.group_starts
    expected = np.concatenate([np.arange(0), *(np.arange(starts[g], starts[g + 1]) for g in groups)]).astype(int)
    ids, images = dataset.read_groups(groups)
    assert ids.dtype == np.int64
    assert images.dtype == np.uint8
    assert np.array_equal(ids, expected)
    assert np.array_equal(images, IMAGES[expected])


@settings(max_examples=40)
@given(st.integers(0, ROWS), st.integers(0, ROWS))
def test_any_range_of_ids_is_read_with_its_labels(dataset: PreparedDataset, first: int, second: int) -> None:
    start, stop = sorted((first, second))
    ids, images, labels = dataset.read_images(start, stop)
    assert np.array_equal(ids, np.arange(start, stop))
    assert np.array_equal(images, IMAGES[start:stop])
    assert np.array_equal(labels, LABELS[start:stop])


@given(st.lists(st.integers(0, 10**6), max_size=40))
@settings(max_examples=30)
def test_any_ids_are_read_in_their_order(dataset: PreparedDataset, numbers: list[int]) -> None:
    ids = np.array([number % dataset.num_rows for number in numbers], np.int64)
    images, labels = dataset.read_rows(ids)
    _, expected, expected_labels = dataset.read_images(0, dataset.num_rows)
    assert (images == expected[ids]).all()
    assert (labels == expected_labels[ids]).all()


def test_all_labels_are_read_without_images(dataset: PreparedDataset) -> None:
    labels = dataset.read_labels()
    assert labels.dtype == np.int64
    assert np.array_equal(labels, dataset.read_images(0, dataset.num_rows)[2])


def test_one_group_is_a_view_without_a_copy(dataset: PreparedDataset) -> None:
    _, images = dataset.read_groups([3])
    assert not images.flags.owndata


def test_out_of_range_reads_are_refused(dataset: PreparedDataset) -> None:
    for group in (-1, 5):
        with pytest.raises(IndexError, match="not within"):
            dataset.read_groups([group])
    for start, stop in ((-1, 3), (5, 4), (0, ROWS + 1)):
        with pytest.raises(IndexError, match="not within"):
            dataset.read_images(start, stop)


@pytest.mark.parametrize("outside", [-1, 10**6])
def test_ids_out_of_range_are_refused(dataset: PreparedDataset, outside: int) -> None:
    with pytest.raises(IndexError, match=f"ids \\[{outside}\\] are not within"):
        dataset.read_rows(np.array([0, outside]))


def test_it_travels_to_other_processes(dataset: PreparedDataset) -> None:
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy == dataset
    assert len(pickle.dumps(dataset)) < 10_000
    assert np.array_equal(copy.read_groups([4])[1], IMAGES[2048:])


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([1, 3]))
def test_groups_are_a_power_of_two_of_about_one_mebibyte(height: int, width: int, channels: int) -> None:
    rows = rows_per_group((height, width, channels))
    assert rows & (rows - 1) == 0
    assert 1 <= rows <= 4096
    assert rows == 4096 or 2**19 < rows * height * width * channels <= 2**20


def test_images_and_columns_share_memory() -> None:
    images = IMAGES[:10]
    view = image_view(image_column(images).slice(3, 5), SHAPE)
    assert np.array_equal(view, images[3:8])
    assert np.shares_memory(view, images)


def test_the_content_id_depends_on_every_byte(tmp_path_factory: pytest.TempPathFactory) -> None:
    first, again = (write(str(tmp_path_factory.mktemp("same"))) for _ in range(2))
    assert first.dataset_id == again.dataset_id
    assert dataset_id((24, 16, 3), first.shards) != first.dataset_id
    assert dataset_id(SHAPE, first.shards[:-1]) != first.dataset_id


def test_object_storage_reads_the_same(s3_prefix: str) -> None:
    dataset = write(s3_prefix)
    assert np.array_equal(dataset.read_groups([4, 0])[1], np.concatenate([IMAGES[2048:], IMAGES[:512]]))
    assert np.array_equal(dataset.read_images(1000, 1100)[2], LABELS[1000:1100])


def test_what_is_no_data_set_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a prepared data set .*ingest one with"):
        PreparedDataset.open(str(tmp_path))
    for content in ({"format": FORMAT, "version": 99}, {"format": "other", "version": 1}, [1]):
        Location.parse(tmp_path / "manifest.json").write_json(content)
        with pytest.raises(DataError, match=r"manifest.json: format .* version"):
            PreparedDataset.open(str(tmp_path))


def damaged(make: Callable[[Location], None], tmp_path: Path) -> str:
    dataset = write(str(tmp_path / "set"))
    make(dataset.location / "data" / "part-00001.parquet")
    with pytest.raises(DataError) as raised:
        PreparedDataset.open(dataset.location)
    return str(raised.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    assert re.search(r"part-00001.parquet: is missing, the manifest records", damaged(Location.delete, tmp_path))


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    def truncate(shard: Location) -> None:
        shard.write_bytes(shard.read_bytes()[:-1])

    assert re.search(r"part-00001.parquet: has [\d,]+ bytes, the manifest records", damaged(truncate, tmp_path))


def test_a_shard_damaged_within_is_named_when_read(tmp_path: Path) -> None:
    dataset = write(str(tmp_path / "set"))
    shard = dataset.location / "data" / "part-00000.parquet"
    shard.write_bytes(bytes(shard.size()))
    with pytest.raises(StorageError, match=r"part-00000.parquet: cannot read row groups \[0\]"):
        PreparedDataset.open(dataset.location).read_groups([0])


def test_what_an_output_was_made_from_is_reopened_and_another_is_refused(tmp_path: Path) -> None:
    dataset = write(str(tmp_path / "set"))
    uri = dataset.location.uri
    assert PreparedDataset.reopen(uri, dataset.dataset_id, "that was encoded") == dataset
    with pytest.raises(DataError) as raised:
        PreparedDataset.reopen(uri, "e" * 64, "that was encoded")
    assert str(raised.value) == f"{uri}: is not the data set {'e' * 12} that was encoded; restore it"
