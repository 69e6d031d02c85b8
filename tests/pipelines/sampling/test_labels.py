"""Labels of samples: what is asked for, what follows for each id, and that other programs read it back."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model_kinds import EXTRA, KINDS
from support.sample_runs import tiny

from ddpm_core.model import load_model, save_model
from pipelines.cli.errors import ConfigError, DataError
from pipelines.data.dataset import PreparedDataset
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.models.find import find_model
from pipelines.outputs.shards import ShardedOutput
from pipelines.sampling.labels import AskedLabels, SampleLabels, settle
from pipelines.sampling.request import request_of
from pipelines.sampling.shard import SUFFIXES, SampleShards, decode_rows
from pipelines.storage.location import Location

NAMES = ("cat", "große Ente", "T-shirt/top")


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("all", AskedLabels("all")),
        ("all:100", AskedLabels("all:100", counts=(100,))),
        ("3", AskedLabels("3", ("3",))),
        ("3,5", AskedLabels("3,5", ("3", "5"))),
        ("cat:2, dog:1", AskedLabels("cat:2, dog:1", ("cat", "dog"), (2, 1))),
        ("n01:tench", AskedLabels("n01:tench", ("n01:tench",))),
        ("balanced", AskedLabels("balanced", in_turn=True)),
        ("from:s3://b/data", AskedLabels("from:s3://b/data", dataset="s3://b/data")),
    ],
)
def test_what_can_be_asked_for(text: str, asked: AskedLabels) -> None:
    assert AskedLabels.parse(text) == asked


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must be all, balanced, from:DATASET, or classes"),
        ("3,,5", "must be all, balanced, from:DATASET, or classes"),
        ("from:", "must name a prepared data set"),
        ("3:0", "the count of 3 must be a whole number >= 1, not 0"),
        ("3:-5", "the count of 3 must be a whole number >= 1, not -5"),
        ("all:1.5", "the count of all must be a whole number >= 1, not 1.5"),
        ("3:²", "the count of 3 must be a whole number >= 1, not ²"),
        ("3:1234567890", "the count of 3 must be a whole number >= 1, not 1234567890"),
        ("3:5,4", "must give each class a count, or none and num_images"),
    ],
)
def test_what_is_no_form_of_labels_is_refused(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"^labels = '{text}': {rule}"):
        AskedLabels.parse(text)


def test_a_count_of_thousands_of_digits_is_refused_in_a_short_line() -> None:
    with pytest.raises(ConfigError, match=r"^labels = '3:9{297}: the count of 3 must be .* >= 1, not 9{40}$"):
        AskedLabels.parse(f"3:{'9' * 5000}")


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=6, unique_by=lambda x: x[0]))
def test_the_label_of_an_id_is_a_function_of_the_id(classes_and_counts: list[tuple[int, int]]) -> None:
    classes, counts = (tuple(part) for part in zip(*classes_and_counts, strict=True))
    total = sum(counts)
    ids = np.arange(total + 3)
    blocks, turns = np.repeat(classes, counts), np.resize(classes, total)
    rows = SampleLabels(total, dataset_id="d", of_rows=blocks)
    for labels, expected in (
        (SampleLabels(total, classes, counts), blocks),
        (SampleLabels(total, classes), turns),
        (rows, blocks),
    ):
        np.testing.assert_array_equal(labels.of(ids), [*expected, -1, -1, -1])
        np.testing.assert_array_equal(labels.of(ids[::-1]), labels.of(ids)[::-1])
        first = labels.first_ids(2)
        assert {label: ids.tolist() for label, ids in first.items()} == {
            label: np.flatnonzero(expected == label)[:2].tolist() for label in set(expected)
        }


@pytest.mark.parametrize(
    ("text", "num_images", "classes", "counts"),
    [
        ("all", 7, (0, 1, 2), (3, 2, 2)),
        ("all:4", None, (0, 1, 2), (4, 4, 4)),
        ("all:4", 12, (0, 1, 2), (4, 4, 4)),
        ("T-shirt/top,0", 4, (2, 0), (2, 2)),
        ("2:1,cat:5", None, (2, 0), (1, 5)),
        ("balanced", 5, (0, 1, 2), None),
    ],
)
def test_classes_by_name_or_index_share_the_images(
    text: str, num_images: int | None, classes: tuple[int, ...], counts: tuple[int, ...] | None
) -> None:
    total = num_images or sum(counts or ())
    assert settle(AskedLabels.parse(text), num_images, NAMES, None) == SampleLabels(total, classes, counts)


@pytest.mark.parametrize(
    ("text", "num_images", "told"),
    [
        ("3", 5, "labels = 3: is no class of the model, which has 0..2; by name cat, große Ente, T-shirt/top"),
        ("dog", 5, "labels = dog: is no class of the model"),
        ("-1", 5, "labels = -1: is no class of the model"),
        ("0,cat", 5, "labels = '0,cat': names class 0 twice"),
        ("all:4", 11, "num_images = 11: labels = all:4 ask for 12; leave it out"),
        ("all", 2, "num_images = 2: must be at least 3, one for each class of labels"),
    ],
)
def test_what_the_model_does_not_have_is_refused(text: str, num_images: int, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{told}"):
        settle(AskedLabels.parse(text), num_images, NAMES, None)


@pytest.mark.parametrize("text", ["all", "0", "balanced", "from:data"])
def test_labels_of_a_model_that_has_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^labels = {text}: the model was trained without labels"):
        settle(AskedLabels.parse(text), 5, (), None)


def data_with(root: Path, labels: list[int | None], names: tuple[str, ...] | None = NAMES) -> PreparedDataset:
    """A prepared data set with a row for each label, by way of Parquet."""
    import pyarrow as pa
    from PIL import Image

    root.mkdir()
    pngs = []
    for value in range(len(labels)):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(buffer, "PNG")
        pngs.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"image": pngs, "label": pa.array(labels, pa.int64())})
    features = {"label": {"names": list(names or ()), "_type": "ClassLabel"}}
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, root / "source.parquet")
    ingest(IngestConfig(str(root / "source.parquet"), str(root / "data")))
    return PreparedDataset.open(str(root / "data"))


def test_labels_of_a_data_set_are_those_of_its_rows(tmp_path: Path) -> None:
    data = data_with(tmp_path / "data", [2, None, 0, 1])
    asked = AskedLabels.parse("from:data")
    found = settle(asked, None, NAMES, data)
    assert (found.num_images, found.dataset_id) == (4, data.dataset_id)
    assert found.of(np.arange(6)).tolist() == [2, -1, 0, 1, -1, -1]
    assert settle(asked, 3, NAMES, data).num_images == 3
    with pytest.raises(ConfigError, match=r"^num_images = 5: labels = from:data: holds 4 rows"):
        settle(asked, 5, NAMES, data)
    with pytest.raises(DataError, match=r"^labels = from:data: calls class 2 'T-shirt/top', the model 'dog'"):
        settle(asked, None, ("cat", "große Ente", "dog"), data)
    numbers = data_with(tmp_path / "numbers", [2, 7], names=None)
    with pytest.raises(DataError, match=r"^labels = from:data: has label 7, the model's classes are 0\.\.2"):
        settle(asked, None, NAMES, numbers)
    none = data_with(tmp_path / "none", [None, None], names=None)
    with pytest.raises(DataError, match=r"^labels = from:data: none of the first 2 rows has a label"):
        settle(asked, None, NAMES, none)


def shards_of(root: Path, labels: str, **fields: Any) -> tuple[SampleShards, int, Path]:
    """As in test_shard.py, of a model of three classes with names."""
    denoiser = KINDS["eps, labels"].build()
    save_model(root / "model", denoiser.named_weights(), denoiser, {**EXTRA, "label_names": list(NAMES)})
    config = tiny(root, labels=labels, **{"num_images": None, **fields})
    model, asked = load_model(config.model), config.asked_labels
    assert asked is not None
    data = None if asked.dataset is None else PreparedDataset.open(asked.dataset)
    settled = settle(asked, config.num_images, model.label_names, data)
    location = Location.parse(config.output)
    find_model(config.model, None, root).keep(location / "model")
    from dataclasses import replace

    request = request_of(replace(config, num_images=settled.num_images), model, settled)
    return SampleShards(location, request, 1, data), request.num_shards, Path(config.output)


def make(root: Path, labels: str, **fields: Any) -> list[Path]:
    """The shards' files."""
    shards, count, output = shards_of(root, labels, **fields)
    result = ShardedOutput(Location.parse(output), {})
    result.compute(lambda: shards(), count, suffix=SUFFIXES[shards.request.format])
    return sorted((output / "data").iterdir())


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_ingest_reads_labels_and_names_back(tmp_path: Path, kind: str) -> None:
    data = data_with(tmp_path / "data", [2, None, 0, 2, 2, 1, None, 0])
    for name, labels, expected in (
        ("some", "2:5,cat:3", [2] * 5 + [0] * 3),
        ("rows", f"from:{data.location}", [2, -1, 0, 2, 2, 1, -1, 0]),
    ):
        files = make(tmp_path / name, labels, format=kind)
        rows = [row for file in files for row in decode_rows(file.read_bytes(), kind)]
        assert [row.label for row in rows] == expected
        assert [row.id for row in rows] == list(range(8))
        ingest(IngestConfig(f"{files[0].parent}/*{SUFFIXES[kind]}", str(tmp_path / name / "again")))
        again = PreparedDataset.open(str(tmp_path / name / "again"))
        assert again.read_labels().tolist() == expected
        assert again.label_names == NAMES


def test_hugging_face_datasets_load_labels_with_their_names(tmp_path: Path) -> None:
    files = make(tmp_path, "2:5,cat:3")
    loaded = datasets.load_dataset(
        "parquet", data_files=[str(file) for file in files], split="train", cache_dir=str(tmp_path / "cache")
    )
    feature = loaded.features["label"]
    assert isinstance(feature, datasets.ClassLabel)
    assert feature.names == list(NAMES)
    assert loaded["label"][:] == [2] * 5 + [0] * 3
    assert [feature.int2str(label) for label in loaded["label"]] == loaded["label_name"][:]
    table = pq.read_table(files[0])
    assert table["label_name"].to_pylist() == ["T-shirt/top"] * 5 + ["cat"]


def test_hugging_face_datasets_load_tar_files_with_labels(tmp_path: Path) -> None:
    data = data_with(tmp_path / "data", [2, None, 0])
    (file,) = make(tmp_path, f"from:{data.location}", format="webdataset")
    loaded = datasets.load_dataset(
        "webdataset", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"), streaming=True
    )
    rows = list(loaded)
    assert [row["json"]["label_name"] for row in rows] == ["T-shirt/top", None, "cat"]
    assert [row["cls"] for row in rows] == [2, -1, 0]
    assert [np.asarray(row["png"]).shape for row in rows] == [(8, 8)] * 3
    with tarfile.open(file) as archive:
        names = archive.getnames()
    assert names[:4] == ["000000000000.png", "000000000000.cls", "000000000000.json", "000000000001.png"]


def test_a_label_changes_the_image_and_shards_do_not_depend_on_what_is_made_beside_them(tmp_path: Path) -> None:
    shards, count, _ = shards_of(tmp_path, "balanced", num_images=10)
    one, other = shards(), shards()
    forward = [one(index).data for index in range(count)]
    assert [other(index).data for index in reversed(range(count))] == forward[::-1]
    images = {row.id: row.png for content in forward for row in decode_rows(content, "parquet")}
    blocks, count, _ = shards_of(tmp_path / "blocks", "0:4,1:3,2:3")
    made = {row.id: row for index in range(count) for row in decode_rows(blocks()(index).data, "parquet")}
    assert {index for index in images if images[index] == made[index].png} == {
        index for index in images if index % 3 == made[index].label
    }
