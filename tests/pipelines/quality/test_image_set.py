"""The images of a side: a sample set is read as a data set is, and what is neither is ingested once."""

from pathlib import Path

import numpy as np
import pytest
from support.quality_runs import blobs, prepared
from support.sample_runs import tiny

from pipelines.cli.errors import DataError
from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.outputs.pictures import encode_png, to_picture
from pipelines.quality.image_set import open_image_set, reopen
from pipelines.sampling.job import sample
from pipelines.sampling.sample_set import SampleSet
from pipelines.storage.location import Location


@pytest.fixture(autouse=True)
def no_cluster_or_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def opened(tmp_path: Path, uri: str) -> PreparedDataset | SampleSet:
    return open_image_set(Location.parse(tmp_path / "home"), Location.parse(tmp_path / "store"), "samples", uri)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_sample_set_is_read_as_what_is_ingested_of_it(tmp_path: Path, kind: str) -> None:
    config = tiny(tmp_path, format=kind, cluster=GpuClusterConfig())
    sample(config)
    samples = opened(tmp_path, config.output)
    assert isinstance(samples, SampleSet)
    data = ingest(IngestConfig(f"{config.output}/data", str(tmp_path / "ingested"))).dataset
    assert (samples.num_rows, samples.image_shape) == (data.num_rows, data.image_shape) == (22, (8, 8, 1))
    for start, stop in ((0, 22), (4, 13), (21, 22), (5, 5)):  # over the ends of shards, which have 6 rows
        ids, images, labels = samples.read_images(start, stop)
        assert ids.tolist() == list(range(start, stop))
        assert np.array_equal(images, data.read_images(start, stop)[1])
        assert (labels == -1).all()
    assert (samples.read_labels() == -1).all()
    assert reopen(config.output, samples.dataset_id) == samples
    with pytest.raises(DataError, match="is not the sample set 000000000000 that was compared"):
        reopen(config.output, "0" * 64)
    damaged = Path(config.output) / "data" / samples.shards[1].name
    content = damaged.read_bytes()
    damaged.write_bytes(b"\0" * len(content))
    with pytest.raises(DataError, match=r"cannot be read as a shard of samples|do not hold the image 6"):
        samples.read_images(0, 22)
    damaged.unlink()
    with pytest.raises(DataError, match=r"is missing or cut; run the jobs/sample.py command again"):
        opened(tmp_path, config.output)


def test_a_source_is_ingested_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    for number, image in enumerate(blobs(3, 0)):
        (folder / f"{number}.png").parent.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode_png(to_picture(image[..., None])))
    found = opened(tmp_path, str(folder))
    assert found.num_rows == 3
    assert "3 images ingested into" in capsys.readouterr().err
    again = opened(tmp_path, str(folder))
    assert again.dataset_id == found.dataset_id
    assert capsys.readouterr().err == ""
    (folder / "other.png").write_bytes(encode_png(to_picture(np.zeros((5, 9, 1), np.uint8))))
    with pytest.raises(DataError, match=r"samples = .*photos: .*; or prepare it with jobs/ingest.py"):
        opened(tmp_path, str(folder))


def test_a_data_set_is_taken_as_it_is(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data", blobs(3, 0))
    assert opened(tmp_path, str(data.location)) == data
