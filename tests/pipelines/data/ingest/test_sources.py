"""Sources: every format is recognised and gives its images, labels and names in order; bad ones are named."""

import gzip
import io
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.source_reading import labels_of, read, scan

from pipelines.cli.errors import ConfigError, DataError
from pipelines.data.dataset import PreparedDataset
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.formats import Item
from pipelines.data.ingest.job import ingest
from pipelines.data.ingest.sources import open_source, split_units
from pipelines.outputs.manifest import read_manifest
from pipelines.storage.location import Location

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (10, 6, 6, 3), np.uint8)


def png(index: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(PIXELS[index]).save(sink, "PNG")
    return sink.getvalue()


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 7))
def test_units_cut_the_rows_into_equal_parts_in_order(sizes: list[int], rows_per_unit: int) -> None:
    items = [Item(f"file{number}", 0, size) for number, size in enumerate(sizes)]
    units = list(split_units(items, rows_per_unit))
    rows = [[(item.file, row) for item in unit for row in range(item.start, item.stop)] for unit in units]
    assert [row for unit in rows for row in unit] == [(i.file, row) for i in items for row in range(i.stop)]
    assert all(len(unit) == rows_per_unit for unit in rows[:-1])
    assert all(0 < len(unit) <= rows_per_unit for unit in rows)


def test_a_folder_gives_its_first_level_as_class(tmp_path: Path) -> None:
    names = ["dog/b.png", "dog/deep/er/a.PNG", "cat/z.png", "loose.png"]
    for index, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(index))
    for ignored in ("readme.txt", "dog/.hidden.png", ".cache/x.png", "labels.csv"):
        (tmp_path / ignored).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ignored).write_bytes(b"no image")
    images, label_names = read(tmp_path)
    assert [image.source for image in images] == ["cat/z.png", "dog/b.png", "dog/deep/er/a.PNG", "loose.png"]
    assert [image.payload for image in images] == [png(2), png(0), png(1), png(3)]
    assert labels_of(images) == [0, 1, 1, None]
    assert label_names == ("cat", "dog")


def hugging_face(path: Path, rows: range, column: str = "image", label: str = "label", **options: object) -> None:
    features = {column: {"_type": "Image"}, label: {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(
        {
            column: pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in rows]),
            label: pa.array([-1 if i == 4 else i % 2 for i in rows]),
        }
    )
    pq.write_table(table.replace_schema_metadata(metadata), path, **options)


@pytest.mark.parametrize(("column", "label"), [("image", "label"), ("img", "labels")])
def test_hugging_face_parquet_by_file_glob_and_directory(tmp_path: Path, column: str, label: str) -> None:
    hugging_face(tmp_path / "train-00000-of-00002.parquet", range(0, 7), column, label, row_group_size=2)
    hugging_face(tmp_path / "train-00001-of-00002.parquet", range(7, 10), column, label)
    for uri in (tmp_path, tmp_path / "train-*.parquet"):
        images, names = read(uri)
        assert [image.payload for image in images] == [png(i) for i in range(10)]
        assert labels_of(images) == [0, 1, 0, 1, None, 1, 0, 1, 0, 1]
        assert names == ("cat", "dog")
        assert images[8].source == "train-00001-of-00002.parquet#1"
    assert len(read(tmp_path / "train-00001-of-00002.parquet")[0]) == 3


def test_plain_binary_parquet_without_labels(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([png(0), None, png(1)], pa.large_binary()), "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "x.parquet")
    images, names = read(tmp_path / "x.parquet")
    assert [image.payload for image in images] == [png(0), b"", png(1)]
    assert labels_of(images) == [None] * 3
    assert names is None


def test_mixed_splits_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        hugging_face(tmp_path / f"{split}-00000-of-00001.parquet", range(2))
    with pytest.raises(
        DataError, match=r"holds the splits test, train; choose one with split = train, or .* split = all"
    ):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"pixels": [b"1"]}, "no column `image` or `img` among pixels"),
        ({"image": ["text"]}, "must be binary"),
        ({"image": [b"1"], "label": [0.5]}, "row 0: label = 0.5: labels must be integers or words; .* label_column"),
    ],
)
def test_unsuitable_parquet_is_named(tmp_path: Path, columns: dict[str, list[object]], match: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=match):
        read(tmp_path)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_with_and_without_labels(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix else bytes
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(pack(idx(PIXELS[..., 0])))
    images, _ = read(path)
    assert np.array_equal(np.stack([image.payload for image in images]), PIXELS[..., 0])
    assert labels_of(images) == [None] * 10
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    (labelled / path.name).write_bytes(path.read_bytes())
    (labelled / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(10, dtype=np.uint8))))
    images, _ = read(labelled)
    assert labels_of(images) == list(range(10))
    assert images[7].source == f"train-images-idx3-ubyte{suffix}#7"


def test_numbers_get_names(tmp_path: Path) -> None:
    source, names = tmp_path / "source", tuple(f"class {n}" for n in range(10))
    source.mkdir()
    (source / "train-images-idx3-ubyte").write_bytes(idx(PIXELS[..., 0]))
    (source / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(10, dtype=np.uint8)))

    def made(output: str, given: tuple[str, ...] | None) -> PreparedDataset:
        return ingest(IngestConfig(str(source), str(tmp_path / output), label_names=given)).dataset

    assert made("unnamed", None).label_names is None
    assert made("named", names).label_names == names
    assert PreparedDataset.open(str(tmp_path / "named")).read_images(0, 10)[2].tolist() == list(range(10))
    assert read_manifest(Location.parse(str(tmp_path / "named")))["request"]["label_names"] == list(names)
    assert "label_names" not in read_manifest(Location.parse(str(tmp_path / "unnamed")))["request"]
    with pytest.raises(ConfigError, match=r"label_names = .*: names 0\.\.8, the source has a label 9; name them all"):
        made("few", names[:9])
    assert not (tmp_path / "few").exists(), "seen before anything is decoded"
    with pytest.raises(ConfigError, match=r"label_names = .*: label_column = none takes no labels; leave one out"):
        IngestConfig(str(source), str(tmp_path / "wrong"), label_names=names, label_column="none")
    table = tmp_path / "table"
    table.mkdir()
    content = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(content, "PNG")
    pq.write_table(pa.table({"image": [content.getvalue()] * 3, "label": [0, 1, 2]}), table / "a.parquet")
    late = tmp_path / "late"
    with pytest.raises(ConfigError, match=rf"a label 2; name them all, after deleting the unfinished {late}$"):
        ingest(IngestConfig(str(table), str(late), label_names=("a", "b")))
    assert not (late / "manifest.json").exists()
    shutil.rmtree(late)
    assert ingest(IngestConfig(str(table), str(late), label_names=("a", "b", "c"))).dataset.num_rows == 3
    for wrong in (("a", "a"), ("a", ""), ()):
        with pytest.raises(ConfigError, match="label_names"):
            IngestConfig(str(source), str(tmp_path / "wrong"), label_names=wrong)
    folders = tmp_path / "folders"
    for index, name in enumerate(("cat", "dog")):
        (folders / name).mkdir(parents=True)
        Image.fromarray(PIXELS[index]).save(folders / name / "0.png")
    with pytest.raises(ConfigError, match="label_names = a, b: the source names them itself, cat, dog"):
        ingest(IngestConfig(str(folders), str(tmp_path / "twice"), label_names=("a", "b")))
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (idx(PIXELS[..., 0])[:-1], "holds 359 bytes of data, its header promises 10 x 6 x 6 = 360"),
        (b"\0\0\x0d\3" + bytes(12), "not an IDX file of unsigned bytes with 3"),
        (gzip.compress(idx(PIXELS[..., 0]))[:-9], "damaged gzip"),
        (b"", "not an IDX file"),
    ],
)
def test_damaged_idx_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=match):
        read(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "shape"),
    [
        ("images/train-images-idx3-ubyte", "labels/train-labels-idx1-ubyte.gz", ()),
        ("train-images/a-images.idx3-ubyte", "train-labels/a-labels.idx1-ubyte", ()),
        ("qmnist-train-images-idx3-ubyte", "qmnist-train-labels-idx2-int.gz", (8,)),
    ],
)
def test_idx_labels_in_a_folder_beside_and_as_a_table(
    tmp_path: Path, images: str, labels: str, shape: tuple[int, ...]
) -> None:
    values = np.arange(10).reshape(10, *[1 for _ in shape]) + 100 * np.arange(*shape or (1,))
    content = struct.pack(f">BBBB{1 + len(shape)}I", 0, 0, 12 if shape else 8, 1 + len(shape), 10, *shape)
    content += values.astype(">i4" if shape else np.uint8).tobytes()
    for name, data in ((images, idx(PIXELS[..., 0])), (labels, content)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    for source in (tmp_path, tmp_path / images):
        found, left_out = scan(source)
        assert labels_of(read(source)[0]) == list(range(10))
        assert found.labels_from == f"the file {Path(labels).name}"
        assert (found.label_files, left_out.count) == (1, 0)
    assert labels_of(read(tmp_path, label_column="none")[0]) == [None] * 10


def test_idx_without_labels_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(PIXELS[..., 0]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(10, dtype=np.uint8)))
    found, left_out = scan(tmp_path)
    assert found.labels_from == "none: there is no train-labels-idx1-ubyte beside the images"
    assert left_out.reasons == {"of another format than idx": (1, "t10k-labels-idx1-ubyte")}


def test_options_that_a_format_does_not_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    with pytest.raises(ConfigError, match="image_column = 'jpg': a source of format folder has no such choice"):
        read(tmp_path, image_column="jpg")
    with pytest.raises(ConfigError, match="label_column = 'x': a source of format folder"):
        read(tmp_path, label_column="x")
    with pytest.raises(ConfigError, match="split = 'train': embedded://digits/test has no such choice"):
        read("embedded://digits/test", split="train")


def test_idx_labels_must_match_and_one_file_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "a-images-idx3-ubyte").write_bytes(idx(PIXELS[..., 0]))
    (tmp_path / "a-labels-idx1-ubyte").write_bytes(idx(np.zeros(9, np.uint8)))
    with pytest.raises(DataError, match="10 images and 9 labels"):
        read(tmp_path)
    (tmp_path / "b-images-idx3-ubyte").write_bytes(idx(PIXELS[..., 0]))
    with pytest.raises(DataError, match=r"2 image files .*name one"):
        read(tmp_path)


def test_embedded_digits_are_all_there_once() -> None:
    train, names = read("embedded://digits/train", rows_per_unit=1000)
    test, _ = read("embedded://digits/test")
    assert (len(train), len(test)) == (1498, 299)
    assert names == tuple("0123456789")
    numbers = [int(image.source.split("#")[1]) for image in train + test]
    assert sorted(numbers) == list(range(1797))
    from sklearn.datasets import load_digits

    digits = load_digits()
    for image, number in zip(train + test, numbers, strict=True):
        assert np.array_equal(image.payload, np.round(digits.images[number] * 255 / 16))
        assert image.label == digits.target[number]


@contextmanager
def as_a_user() -> Iterator[None]:
    """Root may read everything: act as nobody."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o311], ids=oct)
@pytest.mark.parametrize("pattern", ["", "/*/*.png", "/**/*.png"])
def test_a_folder_that_may_not_be_read_is_refused_and_not_passed_over(mode: int, pattern: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for folder in ("a", "b", ".hidden", "lost+found"):
            (root / folder).mkdir()
            (root / folder / "1.png").write_bytes(png(0))
        for folder in (".hidden", "lost+found"):
            (root / folder).chmod(mode)
        open_source(name + pattern)
        with as_a_user():
            assert sorted(open_source(name + pattern).files) == ["a/1.png", "b/1.png"]
        (root / "b").chmod(mode)
        with (
            as_a_user(),
            pytest.raises(DataError, match=rf"^source = {name}.*: {name}/b: may not be read by this user"),
        ):
            open_source(name + pattern)
        for folder in root.iterdir():
            folder.chmod(0o700)


def test_unusable_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown embedded data set"):
        open_source("embedded://digits/validation")
    for uri in (tmp_path / "missing", tmp_path / "no-*.png", tmp_path):
        with pytest.raises(DataError, match="nothing is there"):
            open_source(str(uri))
    (tmp_path / "notes.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"no images among its 1 file\(s\) \(1 no image \(\*.zip\): notes.zip\)"):
        open_source(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match="formats tar, folder; choose one with `format`"):
        open_source(str(tmp_path))
    assert list(open_source(str(tmp_path), "folder").files) == ["a.png"]
    with pytest.raises(DataError, match="no file of format 'parquet' among its 3"):
        open_source(str(tmp_path), "parquet")


def test_a_single_file_and_special_names_are_sources(tmp_path: Path) -> None:
    folder = tmp_path / "odd [name] é"
    folder.mkdir()
    (folder / "a b.png").write_bytes(png(1))
    assert [image.source for image in read(folder)[0]] == ["a b.png"]
    assert [image.source for image in read(folder / "a b.png")[0]] == ["a b.png"]
