"""Parquet as other tools write it: any type of bytes as images, any kind of class as labels; the rest is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.image_files import png
from support.source_reading import labels_of, read, scan

from pipelines.cli.errors import DataError
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest

IMAGES = [png(index) for index in range(4)]
STRUCT = pa.array([{"bytes": content, "path": f"{index}.png"} for index, content in enumerate(IMAGES)])


def put(path: Path, columns: dict[str, Any], class_labels: dict[str, list[str]] | None = None) -> None:
    table = pa.table(columns)
    if class_labels:
        features = {name: {"names": names, "_type": "ClassLabel"} for name, names in class_labels.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)


def stored(source: Path, output: Path, **options: str) -> tuple[list[int], tuple[str, ...] | None, dict[str, Any]]:
    """What an ingest makes of a source: labels (-1: none), class names, account."""
    result = ingest(IngestConfig(str(source), str(output), **options))
    assert result.account is not None
    return (
        result.dataset.read_images(0, result.dataset.num_rows)[2].tolist(),
        result.dataset.label_names,
        result.account,
    )


@pytest.mark.parametrize(
    "column",
    [
        pa.array(IMAGES, pa.binary()),
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES, pa.binary_view()),
        pa.array(IMAGES).dictionary_encode(),
        pa.array([content.ljust(300, b"\0") for content in IMAGES], pa.binary(300)),
        STRUCT,
        pa.StructArray.from_arrays([pa.array(["a"] * 4), pa.array(IMAGES, pa.large_binary())], ["path", "bytes"]),
        pa.StructArray.from_arrays([pa.array(IMAGES), pa.array([{"h": 8}] * 4)], ["bytes", "size"]),
    ],
    ids=str,
)
def test_images_in_any_type_of_bytes(tmp_path: Path, column: pa.Array) -> None:
    put(tmp_path / "a.parquet", {"image": column})
    images, _ = read(tmp_path)
    assert [bytes(image.payload).rstrip(b"\0") for image in images] == [content.rstrip(b"\0") for content in IMAGES]


@pytest.mark.parametrize(
    ("column", "labels", "names"),
    [
        (["cat", "dog", "cat", None], [0, 1, 0, -1], ("cat", "dog")),
        (pa.array(["b", "a", "", "b"], pa.large_string()), [1, 0, -1, 1], ("a", "b")),
        (pa.array(["b", "a", "c", "b"], pa.string_view()), [1, 0, 2, 1], ("a", "b", "c")),
        (pa.array(["dog", "cat", None, "dog"]).dictionary_encode(), [1, 0, -1, 1], ("cat", "dog")),
        (pa.array([7, 3, None, 7]).dictionary_encode(), [7, 3, -1, 7], None),
        ([True, False, None, False], [1, 0, -1, 0], None),
        ([0.0, 1.0, float("nan"), None], [0, 1, -1, -1], None),
        (pa.array([0, 1, 2, None], pa.float16()), [0, 1, 2, -1], None),
        (pa.array([None, 1, None, 0], pa.int64()), [-1, 1, -1, 0], None),
        (pa.array([None] * 4), [-1] * 4, None),
        ([-5, -1, 0, 1], [-1, -1, 0, 1], None),
        (pa.array([0, 255, 1, 2], pa.uint8()), [0, 255, 1, 2], None),
    ],
)
def test_labels_of_any_kind(tmp_path: Path, column: Any, labels: list[int], names: tuple[str, ...] | None) -> None:
    put(tmp_path / "in/a.parquet", {"image": STRUCT, "label": column})
    found = stored(tmp_path / "in", tmp_path / "out")
    assert found[:2] == (labels, names)
    assert (found[2]["labels_from"], found[2]["unlabelled"]) == ("column label", labels.count(-1))


def test_labels_that_are_lists_are_told_and_not_used(tmp_path: Path) -> None:
    put(tmp_path / "in/a.parquet", {"image": STRUCT, "label": [[0], [1], [0, 1], []]})
    labels, _, account = stored(tmp_path / "in", tmp_path / "out")
    assert labels == [-1] * 4
    assert account["labels_from"] == "none: column label is list<element: int64>, neither integers nor words"
    with pytest.raises(DataError, match=r"column label is list.*; choose another with label_column, or none"):
        read(tmp_path / "in", label_column="label")


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    columns = {"image": STRUCT, "mask": pa.array(IMAGES[::-1]), "label": [0, 1, 2, 3], "text": list("abca")}
    put(tmp_path / "a.parquet", columns)
    assert scan(tmp_path)[0].labels_from == "column label (not used: mask, text)"
    images, names = read(tmp_path, image_column="mask", label_column="text")
    assert [image.payload for image in images] == IMAGES[::-1]
    assert (labels_of(images), names) == (list("abca"), ("a", "b", "c"))
    found, _ = scan(tmp_path, label_column="none")
    assert (found.labels_from, found.label_names) == ("none, as label_column = none", None)
    with pytest.raises(DataError, match=r"no column 'x' among image, mask, label, text; choose one with image_column"):
        scan(tmp_path, image_column="x")
    with pytest.raises(DataError, match=r"no column 'x' among image, mask, label, text; correct label_column"):
        scan(tmp_path, label_column="x")
    with pytest.raises(
        DataError, match=r"column text is string; it must be binary .* choose another with image_column"
    ):
        scan(tmp_path, image_column="text")


def test_a_lone_column_of_classes_is_taken_and_several_are_refused(tmp_path: Path) -> None:
    fine, coarse = {"fine_label": [0, 1, 2, 3]}, {"coarse_label": [0, 0, 1, 1]}
    names = {"fine_label": list("abcd"), "coarse_label": list("xy")}
    put(tmp_path / "one/a.parquet", {"img": STRUCT, **fine}, names)
    images, found = read(tmp_path / "one")
    assert (labels_of(images), found) == ([0, 1, 2, 3], ("a", "b", "c", "d"))
    assert scan(tmp_path / "one")[0].labels_from == "column fine_label"
    put(tmp_path / "two/a.parquet", {"img": STRUCT, **fine, **coarse}, names)
    with pytest.raises(DataError, match=r"fine_label, coarse_label all look like labels; .* label_column = fine_label"):
        read(tmp_path / "two")
    images, found = read(tmp_path / "two", label_column="coarse_label")
    assert (labels_of(images), found) == ([0, 0, 1, 1], ("x", "y"))
    put(tmp_path / "named/a.parquet", {"img": STRUCT, "style": [1, 0, 1, 0], "artist": [5] * 4}, {"style": ["x", "y"]})
    assert scan(tmp_path / "named")[0].labels_from == "column style (not used: artist)"
    put(tmp_path / "none/a.parquet", {"img": STRUCT, "artist": [5] * 4, "text": ["a"] * 4})
    told = "none: no column label (there are artist, text; see label_column)"
    assert scan(tmp_path / "none")[0].labels_from == told


def test_files_must_agree_about_labels(tmp_path: Path) -> None:
    put(tmp_path / "words/a.parquet", {"image": STRUCT, "label": ["c", "a", "a", "c"]})
    put(tmp_path / "words/b.parquet", {"image": STRUCT, "label": ["b", "b", "a", None]})
    put(tmp_path / "words/c.parquet", {"image": STRUCT})
    labels, names, account = stored(tmp_path / "words", tmp_path / "out")
    assert labels == [2, 0, 0, 2, 1, 1, 0, -1, -1, -1, -1, -1]
    assert (names, account["unlabelled"]) == (("a", "b", "c"), 5)
    put(tmp_path / "words/d.parquet", {"image": STRUCT, "label": [0, 1, 2, 3]})
    with pytest.raises(DataError, match=r"numbers in d.parquet and words in a.parquet; .* label_column = none"):
        scan(tmp_path / "words")
    for file, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        put(tmp_path / f"names/{file}.parquet", {"image": STRUCT, "label": [0, 1, 0, 1]}, {"label": classes})
    with pytest.raises(DataError, match=r"b.parquet: names other classes than the files before it"):
        scan(tmp_path / "names")


@pytest.mark.parametrize(
    ("column", "match"),
    [
        ([0.0, 1.5, 2.0, 3.0], r"row 1: label = 1.5: labels must be integers or words; .* label_column, or none"),
        (["a" * 201, "b", "c", "d"], r"column label holds texts that are no class names .* label_column, or none"),
        (["a\x1b[2J", "b", "c", "d"], r"column label: the name 'a\\x1b\[2J' holds control characters"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_anything_is_decoded(
    tmp_path: Path, column: Any, match: str
) -> None:
    put(tmp_path / "a.parquet", {"image": STRUCT, "label": column})
    with pytest.raises(DataError, match=match):
        scan(tmp_path)
    assert len(read(tmp_path, label_column="none")[0]) == 4


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.lists(st.one_of(st.none(), st.text(st.characters(codec="ascii", exclude_categories=["C"]))), min_size=4))
def test_words_are_found_again_by_their_number(tmp_path: Path, words: list[str | None]) -> None:
    column = pa.array([png(index % 4) for index in range(len(words))])
    put(tmp_path / "in/a.parquet", {"image": column, "label": pa.array(words, pa.string())})
    images, names = read(tmp_path / "in")
    assert [image.label for image in images] == [word or None for word in words]
    assert list(names or ()) == sorted({word for word in words if word})
    assert np.all([image.label is None or image.label in (names or ()) for image in images])
