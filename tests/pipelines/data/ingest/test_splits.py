"""Splits are never mixed unless asked for: they are told from files' names and folders, refused, and chosen by name."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.image_files import png, write, write_tar
from support.source_reading import labels_of, read, scan

from pipelines.cli.errors import DataError
from pipelines.data.ingest.splits import split_of


def table(rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([png(row) for row in range(rows)])}), sink)
    return sink.getvalue()


LAYOUTS = [
    ("train.parquet", "test.parquet"),
    ("default/train/0000.parquet", "default/test/0000.parquet"),
    ("default/partial-train/0000.parquet", "default/partial-test/0000.parquet"),
    ("mnist-train.parquet", "mnist-test.parquet"),
    ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    ("train-00000-of-00001-0123456789abcdef.parquet", "test-00000-of-00001-0123456789abcdef.parquet"),
    ("data/TRAINING_2024.parquet", "data/eval_2024.parquet"),
]


@pytest.mark.parametrize("names", LAYOUTS)
def test_splits_of_parquet_files_are_refused_and_chosen_by_name(tmp_path: Path, names: tuple[str, str]) -> None:
    train, test = names
    write(tmp_path, {train: table(6), test: table(3), "README.md": b"x"})
    refusal = r"holds the splits test, train; choose one with split = train, or mix them with split = all"
    with pytest.raises(DataError, match=refusal):
        scan(tmp_path)
    assert len(read(tmp_path, split="train")[0]) == 6
    assert len(read(tmp_path, split="testing")[0]) == 3
    assert len(read(tmp_path, split="all")[0]) == 9
    _, left_out = scan(tmp_path, split="test")
    assert left_out.reasons["of split train, as split = test"] == (1, train)
    with pytest.raises(DataError, match="holds no split 'val', but the splits test, train; correct `split`"):
        scan(tmp_path, split="val")
    assert len(read(tmp_path / test)[0]) == 3, "a file that is named is what is meant"


def test_one_named_split_beside_files_of_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"part-0.parquet": table(4), "test.parquet": table(2)})
    with pytest.raises(DataError, match=r"holds the split test and files of no split, such as part-0.parquet; choose"):
        scan(tmp_path)
    assert len(read(tmp_path, split="test")[0]) == 2


@pytest.mark.parametrize("names", [("train-000.tar", "val-000.tar"), ("train/000.tar", "dev/000.tar")])
def test_splits_of_archives_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, count in zip(names, (3, 2), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, [(f"{index}.png", png(index)) for index in range(count)])
    with pytest.raises(DataError, match="holds the splits train, validation"):
        scan(tmp_path)
    assert len(read(tmp_path, split="validation")[0]) == 2


@pytest.mark.parametrize("pattern", ["{split}/{label}/{index}.png", "{label}/{split}/{index}.png"])
def test_split_folders_are_no_classes(tmp_path: Path, pattern: str) -> None:
    for split, count in (("train", 3), ("Test", 2)):
        for label in ("cat", "dog"):
            for index in range(count):
                write(tmp_path, {pattern.format(split=split, label=label, index=index): png(index)})
    with pytest.raises(DataError, match="holds the splits test, train"):
        scan(tmp_path)
    images, names = read(tmp_path, split="test")
    assert (labels_of(images), names) == ([0, 0, 1, 1], ("cat", "dog"))
    assert scan(tmp_path, split="test")[0].labels_from == "the first folder level below the split's"
    assert len(read(tmp_path, split="all")[0]) == 10


def test_a_lone_split_folder_is_no_class_but_a_class_may_be_called_train(tmp_path: Path) -> None:
    write(tmp_path / "a", {"train/cat/0.png": png(0), "train/dog/0.png": png(1), "train/2.png": png(2)})
    images, names = read(tmp_path / "a")
    assert (dict(zip([image.source for image in images], labels_of(images), strict=True)), names) == (
        {"train/2.png": None, "train/cat/0.png": 0, "train/dog/0.png": 1},
        ("cat", "dog"),
    )
    write(tmp_path / "b", {"bus/0.png": png(0), "train/0.png": png(1), "train.png": png(2)})
    images, names = read(tmp_path / "b")
    assert (labels_of(images), names) == ([0, None, 1], ("bus", "train"))


@pytest.mark.parametrize(
    ("file", "format", "split"),
    [
        ("latest.parquet", "parquet", None),
        ("pretrained/0.parquet", "parquet", None),
        ("unsupervised-00000-of-00002.parquet", "parquet", "unsupervised"),
        ("t10k-images-idx3-ubyte.gz", "idx", "test"),
        ("test/train.parquet", "parquet", "train"),
        ("x.valid.tar", "tar", None),
        ("test_data/0.png", "folder", None),
        ("cat/train.png", "folder", None),
    ],
)
def test_split_of_a_name(file: str, format: str, split: str | None) -> None:
    assert split_of(file, format) == split
