"""Quality while training: the numbers of all images together, on any number of ranks, against features stored once."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.denoisers import FunctionDenoiser
from support.quality_runs import compared, prepared
from support.thread_ranks import on_threads

from ddpm_core.denoiser import Labels, Prediction
from ddpm_core.images import to_uint8
from ddpm_core.networks.random_conv import RandomConv
from ddpm_core.process.base import Images, Time
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.dpm_solver import DPMSolver
from ddpm_core.sets import fewest_images
from ddpm_core.sets.distances import frechet_distance, kernel_distance
from ddpm_core.sets.moments import Moments
from pipelines.cli.errors import ConfigError
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.outputs.manifest import read_manifest
from pipelines.quality.job import quality
from pipelines.storage.location import Location
from pipelines.training.checks import check
from pipelines.training.config import DataConfig, QualityConfig, TrainConfig
from pipelines.training.network import NetworkConfig
from pipelines.training.quality import Quality, reference_rows
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports

torch.set_num_threads(1)
CPU = torch.device("cpu")
PROCESS = ContinuousProcess.linear(-8.0, 3.0)
CONFIG = TrainConfig(seed=3, quality=QualityConfig(num_images=80, every_steps=5, sampler_steps=2))
STORED = "quality/reference.parquet"


class Model(FunctionDenoiser):
    """Depends on pixel, time and class."""

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__(lambda z_t, time: z_t.sin() * 0.5, PROCESS, num_classes=num_classes)

    def __call__(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
        share = 0.0 if label is None else (label + 1).to(z_t)[:, None, None, None] / 4
        return Prediction.of_eps(z_t, self.process.at(time), (z_t + share).sin())


class Measured:
    """What one rank has told, and its last numbers, after each call of `observe`."""

    def __init__(self, run: Path, dataset: PreparedDataset, ranks: Ranks = Ranks(0, 1), **changes: Any) -> None:  # noqa: B008
        config, model = replace(CONFIG, **changes.get("config", {})), changes.get("model", Model())
        hold_out = HoldOut(dataset.num_rows, changes.get("every", 0))
        self.reports = Reports(ranks.rank, lambda report: self.sent.extend(report["records"]))
        self.sent: list[dict[str, Any]] = []
        self.quality = Quality(Location(str(run)), dataset, config, hold_out, lambda: model, CPU, ranks, self.reports)

    def at(self, step: int) -> dict[str, Any]:
        self.quality.observe(step)
        self.reports.send(step)
        result = self.quality.result()
        assert result is not None
        return json.loads(json.dumps(result))


def features_of(images: np.ndarray) -> np.ndarray:
    return RandomConv(images.shape[1:])(torch.tensor(images)).numpy()


def drawn(model: Model, num_images: int, labels: Callable[[torch.Tensor], Labels | None]) -> np.ndarray:
    ids = torch.arange(num_images)
    return to_uint8(sample(model, DPMSolver(2, eta=1, spacing="log_snr"), ids, 3, label=labels(ids))).numpy()


@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_numbers_are_those_of_all_samples_and_images_together(
    make_dataset, tmp_path: Path, num_classes: int | None
) -> None:
    """Heusel 2017, eq. 6; Chong & Forsyth 2020; Bińkowski 2018: with classes, of each in turn."""
    dataset, model = make_dataset(num_rows=150), Model(num_classes)
    measured = Measured(tmp_path, dataset, model=model)
    result = measured.at(5)
    samples = features_of(drawn(model, 80, lambda ids: None if num_classes is None else ids % 3))
    reference = features_of(dataset.read_images(0, 150)[1])
    numbers = result["numbers"]
    wanted = frechet_distance(Moments.of(samples), Moments.of(reference))
    assert numbers["fd"]["value"] == pytest.approx(wanted, rel=1e-5)
    assert numbers["fd_limit"]["low"] < numbers["fd_limit"]["value"] < wanted
    whole = kernel_distance(samples, reference)
    assert numbers["kid"]["low"] < whole < numbers["kid"]["high"]
    assert (result["num_samples"], result["num_reference"]) == (80, 150)
    assert result["reference_id"] == dataset.dataset_id


@pytest.mark.slow
def test_the_numbers_are_those_of_the_quality_job(
    make_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their intervals: groups and blocks are dealt in the same way."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    dataset = make_dataset(num_rows=90)
    result = Measured(tmp_path, dataset).at(5)
    samples = prepared(tmp_path / "samples", drawn(Model(), 80, lambda ids: None)[..., 0])
    config = compared(tmp_path / "job", samples.location, dataset.location, features="random_conv")
    quality(config)
    found = read_manifest(Location.parse(config.output))["results"]["all"]["numbers"]
    for name, number in result["numbers"].items():
        assert number == pytest.approx(found[name], rel=1e-5), name


def test_one_and_two_ranks_measure_the_very_same(make_dataset, tmp_path: Path) -> None:
    dataset = make_dataset(num_rows=300)
    alone = Measured(tmp_path / "alone", dataset).at(5)
    for world_size in (2, 3):
        run = tmp_path / str(world_size)
        found = on_threads(world_size, lambda ranks, run=run: Measured(run, dataset, ranks).at(5))
        assert found == [alone] * world_size
        assert (run / STORED).read_bytes() == (tmp_path / "alone" / STORED).read_bytes()


def test_metrics_and_a_line_carry_how_they_were_measured(make_dataset, tmp_path: Path) -> None:
    measured = Measured(tmp_path, make_dataset(num_rows=100))
    result = measured.at(5)
    metrics, line = measured.sent
    stamp, numbers = result["stamp"], result["numbers"]
    assert metrics["step"] == 5
    assert metrics["values"] == {
        f"quality/{name}{suffix}.random_conv_64.{stamp}": numbers[name][end]
        for name in ("fd", "fd_limit", "kid")
        for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    assert line["message"].startswith("step 5: quality: FD ")
    assert line["message"].endswith("random_conv_64, 80 samples, 100 validation images")


def test_another_way_of_measuring_has_another_stamp(make_dataset, tmp_path: Path) -> None:
    dataset = make_dataset(num_rows=200)
    same = [Measured(tmp_path, dataset).at(5), Measured(tmp_path / "again", dataset, config={"seed": 4}).at(5)]
    others = [
        Measured(tmp_path / "a", dataset, config={"quality": QualityConfig(90, 5, 2)}),
        Measured(tmp_path / "b", dataset, config={"quality": QualityConfig(80, 5, 3)}),
        Measured(tmp_path / "c", make_dataset(num_rows=190, name="other")),
        Measured(tmp_path / "d", dataset, every=2, config={"data": DataConfig(validation="held-out", hold_out=2)}),
    ]
    stamps = [each["stamp"] for each in same] + [each.at(5)["stamp"] for each in others]
    assert stamps[0] == stamps[1]
    assert len(set(stamps)) == 5
    assert same[0]["numbers"] != same[1]["numbers"], "of other noise"


def test_stored_features_are_read_again(make_dataset, tmp_path: Path) -> None:
    dataset = make_dataset(num_rows=100)
    first = Measured(tmp_path, dataset).at(5)
    table = pq.read_table(tmp_path / STORED)
    assert table["id"].to_pylist() == list(range(100))
    np.testing.assert_array_equal(
        np.array(table["feature"].to_pylist(), np.float32), features_of(dataset.read_images(0, 100)[1])
    )
    before = (tmp_path / STORED).stat().st_mtime_ns

    class Unreadable(PreparedDataset):
        def read_rows(self, ids: Any) -> Any:
            pytest.fail("the images are read again")

    again = Measured(tmp_path, Unreadable(**vars(PreparedDataset._from_manifest(dataset.location))))
    assert again.at(5) == first == again.at(10)
    assert (tmp_path / STORED).stat().st_mtime_ns == before


def damaged(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def rewritten(content: bytes, change: Callable[[pa.Table], pa.Table]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(change(pq.read_table(io.BytesIO(content))), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "harm",
    [
        damaged,
        lambda content: content[:-9],
        lambda content: b"",
        lambda content: rewritten(content, lambda table: table.replace_schema_metadata(None)),
        lambda content: rewritten(content, lambda table: table.slice(1)),
        lambda content: rewritten(content, lambda table: table.drop_columns(["feature"])),
        lambda content: rewritten(content, lambda table: table.set_column(0, "id", pa.array(range(1, 101)))),
    ],
    ids=["a bit", "an end", "empty", "of nothing", "a row less", "no features", "other rows"],
)
def test_features_that_are_damaged_or_of_something_else_are_made_anew(
    make_dataset, tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    dataset, path = make_dataset(num_rows=100), tmp_path / STORED
    first, content = Measured(tmp_path, dataset).at(5), b""
    content = path.read_bytes()
    path.write_bytes(harm(content))
    assert Measured(tmp_path, dataset).at(5) == first
    assert path.read_bytes() == content


def test_features_of_another_data_set_or_network_are_made_anew(
    make_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, path = make_dataset(num_rows=100), tmp_path / STORED
    Measured(tmp_path, make_dataset(num_rows=100, shard_rows=50, name="other")).at(5)
    assert b"other" not in (of_other := path.read_bytes())
    first = Measured(tmp_path, dataset).at(5)
    assert path.read_bytes() != of_other
    made_of = json.loads(pq.read_schema(path).metadata[b"made_of"])
    assert made_of["reference_id"] == first["reference_id"] == dataset.dataset_id
    monkeypatch.setattr(RandomConv, "sha256", lambda self: "0" * 64)
    assert Measured(tmp_path, dataset).at(5)["stamp"] != first["stamp"]
    assert json.loads(pq.read_schema(path).metadata[b"made_of"])["extractor"]["sha256"] == "0" * 64


def test_reference_images_are_all_or_ten_thousand_evenly_spread(make_dataset) -> None:
    dataset = make_dataset(num_rows=90)
    assert reference_rows(dataset, None).tolist() == list(range(90))
    np.testing.assert_array_equal(reference_rows(dataset, HoldOut(90, 9)), HoldOut(90, 9).ids)
    rows = reference_rows(replace(dataset, num_rows=25_000), None)
    assert (len(rows), len(np.unique(rows)), rows[0], rows[-1]) == (10_000, 10_000, 0, 24_997)
    assert set(np.diff(rows)) == {2, 3}


def test_it_is_measured_as_often_as_asked_and_after_the_last_step(make_dataset, tmp_path: Path) -> None:
    measured = Measured(tmp_path, make_dataset(num_rows=100)).quality
    last = CONFIG.train.steps
    assert [done for done in (*range(1, 12), last) if measured.is_due(done)] == [5, 10, last]


def config_for(root: Path, data: PreparedDataset, **fields: Any) -> TrainConfig:
    return TrainConfig(
        name="quality", root=str(root), data=DataConfig(data.location.uri, **fields), quality=QualityConfig(100)
    )


def test_enough_validation_images_of_enough_pixels_are_needed(make_dataset, tmp_path: Path) -> None:
    assert fewest_images(64) == 73
    few, enough = make_dataset(num_rows=72, name="few"), make_dataset(num_rows=73, name="enough")
    small = make_dataset(num_rows=100, shape=(3, 8, 1), name="small")
    trained = make_dataset(num_rows=720, name="trained")
    root = tmp_path / "root"
    told = {
        "needs 73 validation images, there are 72": config_for(root, trained, validation=few.location.uri),
        "needs 73 validation images, there are 48": config_for(root, trained, validation="held-out", hold_out=15),
        "needs 73 validation images, there are 0": config_for(root, trained, validation=None),
        "needs images of 4 x 4 pixels, these have 3 x 8": replace(
            config_for(root, small, validation=small.location.uri), network=NetworkConfig(8, (1,))
        ),
    }
    for words, config in told.items():
        with pytest.raises(ConfigError) as refusal:
            check(config)
        assert str(refusal.value).startswith(f"quality.num_images = 100: {words}")
        assert check(replace(config, quality=QualityConfig())).result is None
    check(config_for(root, trained, validation=enough.location.uri))


def test_a_training_can_go_on_with_it_turned_on() -> None:
    assert CONFIG.semantic() == replace(CONFIG, quality=QualityConfig()).semantic()
    assert TrainConfig().quality.num_images == 0
