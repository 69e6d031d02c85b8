"""The quality job: one comparison per request, whoever makes it, and what is told of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from support.quality_runs import blobs, compared, prepared
from support.sample_runs import save_tiny_model, tiny

from ddpm_core.sets.distances import frechet_distance, kernel_distance
from ddpm_core.sets.moments import Moments
from pipelines.cli.console import with_interval
from pipelines.cli.errors import ConfigError, DataError, RequestMismatchError, TrackingError
from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.outputs.manifest import MANIFEST
from pipelines.quality.config import MemorisationConfig, QualityConfig
from pipelines.quality.job import quality
from pipelines.quality.searches import NEIGHBOURS, OWN
from pipelines.sampling.job import sample
from pipelines.storage.location import Location
from pipelines.tracking.config import TrackingConfig
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify


@pytest.fixture(scope="module", autouse=True)
def no_cluster_or_server_of_the_user() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("pipelines.cluster.connection.is_named", lambda address: False)
        yield


@dataclass(frozen=True)
class Compared:
    """150 samples, shifted, and 200 reference images, with two labels; their comparison, and what it said."""

    root: Path
    samples: PreparedDataset
    reference: PreparedDataset
    config: QualityConfig
    rows: dict[str, str]

    def other(self, name: str, **fields: Any) -> QualityConfig:
        """Another comparison of the same sides, with features of its own."""
        own = {"output": str(self.root / name / "quality")}
        return replace(self.config, **{**own, **fields})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, no_cluster_or_server_of_the_user: None) -> Compared:
    root, labels = tmp_path_factory.mktemp("done"), np.arange(200) % 2
    samples = prepared(root / "samples", blobs(150, 1, 8.0), labels[:150])
    reference = prepared(root / "reference", blobs(200, 2), labels)
    config = compared(root, samples.location, reference.location)
    return Compared(root, samples, reference, config, dict(quality(config).rows))


def manifest_of(config: QualityConfig) -> dict[str, Any]:
    return Location.parse(f"{config.output}/{MANIFEST}").read_json()


def features_of(data: PreparedDataset) -> np.ndarray:
    _, images, _ = data.read_images(0, data.num_rows)
    return (images.reshape(len(images), -1) / np.float32(255)).astype(np.float32)


def test_the_numbers_are_those_of_all_features_together(done: Compared) -> None:
    samples, reference = features_of(done.samples), features_of(done.reference)
    found = manifest_of(done.config)["results"]["all"]["numbers"]
    expected = frechet_distance(Moments.of(samples), Moments.of(reference))
    assert found["fd"]["value"] == pytest.approx(expected, rel=1e-10)
    assert found["fd"]["low"] < expected < found["fd"]["high"]
    assert found["fd_limit"]["value"] < expected
    # Blocks are means of the same unbiased estimator, so they lie around that of all images.
    assert found["kid"]["low"] < kernel_distance(samples, reference) < found["kid"]["high"]
    distances = np.linalg.norm(samples[:, None].astype(float) - reference[None], axis=2)
    own = np.sort(np.linalg.norm(reference[:, None].astype(float) - reference[None], axis=2), 1)[:, 3]
    own_of_samples = np.sort(np.linalg.norm(samples[:, None].astype(float) - samples[None], axis=2), 1)[:, 3]
    inside = distances <= own[None]
    assert found["precision"]["value"] == inside.any(1).mean()
    assert found["density"]["value"] == pytest.approx(inside.sum(1).mean() / 3)
    assert found["coverage"]["value"] == (distances.min(0) <= own).mean()
    assert found["recall"]["value"] == (distances <= own_of_samples[:, None]).any(0).mean()
    assert done.rows["Fréchet distance"] == with_interval(found["fd"])


def test_classes_are_compared_by_themselves(done: Compared, tmp_path: Path) -> None:
    classes = manifest_of(done.config)["results"]["classes"]
    assert sorted(classes) == ["0", "1"]
    samples, reference = features_of(done.samples), features_of(done.reference)
    expected = frechet_distance(Moments.of(samples[1::2]), Moments.of(reference[1::2]))
    assert classes["1"]["numbers"]["fd"]["value"] == pytest.approx(expected, rel=1e-10)
    assert (classes["1"]["num_samples"], classes["1"]["num_reference"]) == (75, 100)
    alone = compared(
        tmp_path,
        prepared(tmp_path / "odd-samples", blobs(150, 1, 8.0)[1::2]).location,
        prepared(tmp_path / "odd-reference", blobs(200, 2)[1::2]).location,
        output=str(tmp_path / "alone"),
    )
    quality(alone)
    by_itself = manifest_of(alone)["results"]["all"]["numbers"]
    for name in ("fd", "fd_limit", "kid", "precision", "recall", "density", "coverage"):
        assert classes["1"]["numbers"][name] == pytest.approx(by_itself[name], rel=1e-9), name


@pytest.mark.ray
def test_two_workers_make_the_same_bytes_as_none(ray_cluster: None, done: Compared) -> None:
    two = done.other("two", cluster=GpuClusterConfig(num_workers=2))
    quality(two)
    one, other = manifest_of(done.config), manifest_of(two)
    assert other["shards"] == one["shards"]
    assert other["own"] == one["own"]
    assert other["results"] == one["results"]


def test_features_are_made_once_and_used_again(done: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    store = done.root / "features"
    assert len(list(store.iterdir())) == 2
    sides = str(done.reference.location), str(done.samples.location)
    quality(done.other("turned", samples=sides[0], reference=sides[1], store=str(store)))
    assert capsys.readouterr().err.count("made before") == 2
    assert len(list(store.iterdir())) == 2
    assert quality(done.config).title == "Quality, complete before"


def test_a_lost_shard_is_made_again(done: Compared) -> None:
    of_features = next((done.root / "features").glob("*/data/part-00001.parquet"))
    of_neighbours, own = (Path(done.config.output) / name / "part-00002.parquet" for name in (NEIGHBOURS, OWN))
    files = (of_features, of_neighbours, own)
    contents = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    assert quality(done.config).title == "Quality, 1 lost shard(s) made again"
    assert [path.read_bytes() for path in files] == contents
    own.unlink()
    assert quality(done.config).title == "Quality, complete before"
    assert own.read_bytes() == contents[-1]


def test_verify_computes_every_number_again(done: Compared) -> None:
    output, features = done.config.output, next((done.root / "features").iterdir())
    assert verify(VerifyConfig(output)).problems == []
    assert verify(VerifyConfig(str(features))).problems == []
    own = Path(output) / "own" / "part-00001.parquet"
    kept = own.rename(done.root / "own.parquet")
    assert verify(VerifyConfig(output)).problems == [f"{own}: is missing, or its sha256 is not the recorded one"]
    kept.rename(own)
    path = Location.parse(f"{output}/{MANIFEST}")
    manifest, content = path.read_json(), path.read_bytes()
    manifest["results"]["all"]["numbers"]["recall"]["high"] += 1e-6
    path.write_json(manifest)
    assert verify(VerifyConfig(output)).problems == [f"{path}: all.numbers.recall.high is not what the rows give"]
    path.write_bytes(content)
    moved = features.rename(done.root / "moved")
    with pytest.raises(DataError, match="are not there any more"):
        verify(VerifyConfig(output))
    moved.rename(features)


@pytest.mark.ray
def test_verify_makes_shards_again(ray_cluster: None, done: Compared) -> None:
    for output in (done.config.output, str(next((done.root / "features").iterdir()))):
        assert verify(VerifyConfig(output, recompute=0.5)).problems == []


def test_too_few_images_for_a_covariance_leave_kid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = prepared(tmp_path / "20", blobs(20, 20))
    reference = prepared(tmp_path / "40", blobs(40, 40), np.arange(40) % 2)
    config = compared(tmp_path, samples.location, reference.location, features="random_conv")
    rows = dict(quality(config).rows)
    found = manifest_of(config)["results"]["all"]
    assert {"fd", "fd_limit"} & found["numbers"].keys() == set()
    assert "kid" in found["numbers"]
    assert rows["Fréchet distance"].startswith("left out: needs 73 images of each side for 64 features, there are 20")
    assert "kernel distance (KID)" in rows["result"]
    assert "no comparison by class: the samples have no labels" in capsys.readouterr().err


def test_mlflow_shows_the_numbers_under_the_stamp_of_how_they_were_measured(done: Compared) -> None:
    client = MlflowClient(f"sqlite:///{done.config.root}/mlflow.db")
    (run,) = client.search_runs(
        [client.get_experiment_by_name("samples/quality").experiment_id],
        "attributes.run_name = 'quality'",
        max_results=1,
    )
    manifest = manifest_of(done.config)
    stamp, numbers = manifest["protocol"]["stamp"], manifest["results"]["all"]["numbers"]
    for name, found in numbers.items():
        assert run.data.metrics[f"{name}/pixels.{stamp}"] == found["value"]
        assert run.data.metrics[f"low/{name}.pixels.{stamp}"] == found["low"]
    assert run.data.tags["ddpm.protocol"] == stamp
    assert sorted(tag.value for given in run.inputs.dataset_inputs for tag in given.tags) == ["reference", "samples"]
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    assert {"report/index.html", "report/images.png", "report/fd_by_size.png"} <= pictures


def test_a_comparison_is_told_against_another_of_the_same_protocol_only(done: Compared) -> None:
    worse = prepared(done.root / "worse", blobs(150, 3, 30.0))
    fields = {"samples": str(worse.location), "store": str(done.root / "features"), "compare_with": done.config.output}
    rows = [value for name, value in quality(done.other("worse-than", **fields)).rows if name == "against quality"]
    assert len(rows) == 7
    assert rows[0].startswith("Fréchet distance ")
    assert rows[0].endswith(": worse")
    other = done.other("otherwise", **fields, neighbours=4)
    with pytest.raises(DataError, match=r"compare_with = .*: was measured in another way \(neighbours: 3 -> 4\)"):
        quality(other)
    assert not Path(other.output).exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(done: Compared, tmp_path: Path) -> None:
    samples, reference = str(done.samples.location), str(done.reference.location)
    large = prepared(tmp_path / "large", np.arange(30 * 64, dtype=np.uint8).reshape(30, 8, 8))
    one = prepared(tmp_path / "one", blobs(1, 0))
    for fields, error, message in (
        ({"samples": str(large.location)}, DataError, r"images are 4x4x1 .*, those of samples 8x8x1; give --resize"),
        ({"samples": str(one.location)}, DataError, r"samples = .*: holds 1 image\(s\); intervals need at least 20"),
        ({"output": f"{samples}/within"}, ConfigError, "lies in the images of samples"),
        ({"promote": True}, TrackingError, "the samples are no sample set"),
        ({"neighbours": 5, "output": done.config.output}, RequestMismatchError, "neighbours: 3 -> 5"),
    ):
        config = compared(tmp_path, **{"samples": samples, "reference": reference, **fields})
        with pytest.raises(error, match=message):
            quality(config)
    assert not (tmp_path / "quality").exists()
    assert not (tmp_path / "features").exists()
    assert quality(compared(tmp_path, large.location, reference, resize=6, by_label=False)).title == "Quality"


def test_a_dry_run_tells_the_work_and_writes_nothing(done: Compared) -> None:
    config = done.other("planned", dry_run=True)
    result = quality(config)
    rows = dict(result.rows)
    assert result.title == "Plan; nothing was written"
    assert rows["pixels of samples"] == "150 of 150 images to do; 0 MiB"
    assert "MiB for each worker" in rows["memory"]
    assert not (done.root / "planned").exists()
    (folder := done.root / "folder").mkdir()
    (folder / "image.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"dry_run = True: samples = .*: is not prepared, and would be ingested"):
        quality(replace(config, samples=str(folder)))
    with pytest.raises(ConfigError, match=r"dry_run = True: reference = embedded://digits/test: is not prepared"):
        quality(replace(config, reference="embedded://digits/test", root=str(done.root / "nowhere")))
    assert not (done.root / "nowhere").exists()


def test_a_side_with_a_label_beyond_all_counting_is_compared_all_the_same(tmp_path: Path) -> None:
    labels = np.where(np.arange(60) < 50, 2**40, 3)
    sides = [prepared(tmp_path / name, blobs(60, 1), labels) for name in ("samples", "reference")]
    assert [side.read_labels().max() for side in sides] == [2**40] * 2
    quality(compared(tmp_path, *(side.location for side in sides)))


def trained_on(tmp_path: Path, train: PreparedDataset) -> Path:
    """A sample set of a model that says it was trained on `train`."""
    extra = {"step": 7, "dataset": {"id": train.dataset_id, "uri": train.location.uri}, "code_version": "0"}
    save_tiny_model(tmp_path / "model", extra=extra)
    config = tiny(tmp_path, num_images=40, cluster=GpuClusterConfig())
    sample(config)
    return Path(config.output)


def test_samples_that_repeat_training_images_are_found(tmp_path: Path) -> None:
    train, unseen = blobs(300, 1), prepared(tmp_path / "unseen", blobs(300, 2))
    of_train = prepared(tmp_path / "train", train)
    copies = train[:60].astype(int) + np.random.default_rng(3).integers(-1, 2, (60, 4, 4))
    repeated = prepared(tmp_path / "copies", copies.clip(0, 255).astype(np.uint8))
    fresh = prepared(tmp_path / "fresh", np.concatenate([blobs(59, 4), blobs(1, 4)[:1]]))
    asked = MemorisationConfig(train_data=str(of_train.location), unseen_data=str(unseen.location))
    found = {}
    for name, samples in (("copies", repeated), ("fresh", fresh)):
        config = compared(
            tmp_path, samples.location, unseen.location, memorisation=asked, output=str(tmp_path / f"{name}-quality")
        )
        rows = dict(quality(config).rows)
        found[name] = manifest_of(config)["results"]["memorisation"]["features"]
        assert rows["memorisation"].startswith("ALARM in features" if name == "copies" else "no alarm")
    assert found["copies"]["near"]["value"] == 1.0
    assert found["fresh"]["closer"]["low"] < 0.5 < found["fresh"]["closer"]["high"]
    pair = found["copies"]["pairs"][0]
    assert pair["sample"] == pair["train"]
    assert dict(rows)["duplicates"].startswith("1 samples")


def test_a_sample_set_says_what_its_model_was_trained_on(tmp_path: Path) -> None:
    train = prepared(tmp_path / "train", np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8))
    unseen = prepared(tmp_path / "unseen", np.random.default_rng(1).integers(0, 256, (60, 8, 8), np.uint8))
    samples = trained_on(tmp_path, train)
    tracking = TrackingConfig(experiment="both models")
    config = compared(tmp_path, samples, unseen.location, features="random_conv", tracking=tracking)
    quality(config)
    manifest = manifest_of(config)
    assert manifest["sets"]["train"] == train.location.uri
    assert set(manifest["results"]["memorisation"]) == {"features", "pixels"}
    client = MlflowClient(f"sqlite:///{config.root}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("both models").experiment_id])
    assert run.data.tags["ddpm.step"] == "7"
    assert run.data.tags["quality.memorised"].startswith(("no alarm", "ALARM"))
    assert run.data.params["sampler"].startswith("ddim")
    assert run.data.metrics["evaluations_per_image"] == 5
