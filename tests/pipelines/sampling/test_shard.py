"""One shard of a sample set: the same images whatever is computed beside them, in files that others can read."""

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from support.sample_runs import save_tiny_model, tiny
from support.without_mlflow import first_shards

from ddpm_core.config import UNetConfig
from ddpm_core.images import to_uint8
from ddpm_core.model import load_model
from ddpm_core.process.variances import variance_named
from ddpm_core.samplers.base import STATIC_CLIP, sample
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM
from pipelines.cli.errors import ModelError
from pipelines.data.dataset import PreparedDataset
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.models.find import find_model
from pipelines.outputs.shard_store import Store
from pipelines.outputs.shards import ShardedOutput
from pipelines.sampling.request import request_of
from pipelines.sampling.samplers import SAMPLERS
from pipelines.sampling.shard import SUFFIXES, SampleShards, decode_shard
from pipelines.storage.location import Location

REPOSITORY = Path(__file__).parents[3]


def shards_of(root: Path, **fields: Any) -> tuple[SampleShards, int, Path]:
    """The function of a sample set's shards, their number, and the output, which holds the model."""
    config = tiny(root, **fields)
    found, location = find_model(config.model, None, root), Location.parse(config.output)
    found.keep(location / "model")
    request = request_of(config, load_model(config.model))
    return SampleShards(location, request, threads=1), -(-config.num_images // config.shard_size), Path(config.output)


def images_of(content: bytes, kind: str = "parquet") -> dict[int, np.ndarray]:
    return {index: np.asarray(Image.open(io.BytesIO(png))) for index, png in decode_shard(content, kind)}


def all_images(root: Path, **fields: Any) -> dict[int, np.ndarray]:
    shards, count, _ = shards_of(root, **fields)
    compute = shards()
    return {index: image for shard in range(count) for index, image in images_of(compute(shard).data).items()}


@pytest.mark.parametrize(("num_images", "batch", "shard"), [(1, 3, 6), (2, 3, 6), (6, 3, 6), (22, 3, 6), (22, 4, 7)])
def test_every_id_once_whatever_divides_it(tmp_path: Path, num_images: int, batch: int, shard: int) -> None:
    shards, count, _ = shards_of(tmp_path, num_images=num_images, batch_size=batch, shard_size=shard)
    outputs = [shards()(index) for index in range(count)]
    assert [index for output in outputs for index in images_of(output.data)] == list(range(num_images))
    assert [output.rows for output in outputs] == [len(images_of(output.data)) for output in outputs]
    assert [output.extra["first_id"] for output in outputs] == [index * shard for index in range(count)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_shards_in_another_order_and_by_another_actor_are_the_same_bytes(tmp_path: Path, name: str) -> None:
    churn = {"churn": 20.0} if name == "heun" else {}
    shards, count, _ = shards_of(tmp_path, sampler={"name": name, "steps": 5, **churn})
    one, other = shards(), shards()
    forward = [one(index).data for index in range(count)]
    assert [other(index).data for index in reversed(range(count))] == forward[::-1]
    assert len(set(forward)) == count


def test_the_preview_may_show_images_between_two_ids(tmp_path: Path) -> None:
    """Song 2021, DDIM, sec. 5.3: the ends are the images of the two ids."""
    shards, _, output = shards_of(tmp_path, sampler={"name": "dpmpp_2m"}, interpolate=(2, 7))
    images = {index: image for shard in (0, 1) for index, image in images_of(shards()(shard).data).items()}
    sheet = np.asarray(Image.open(output / "preview" / "interpolation.png"))
    sheet = sheet[:: sheet.shape[0] // 10, :: sheet.shape[0] // 10].astype(int)
    assert sheet.shape == (10, 12 * 9 + 1)
    for left, index in ((1, 2), (1 + 11 * 9, 7)):
        assert np.abs(sheet[1:9, left : left + 8] - images[index]).max() <= 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampler": {"eta": 0.7}},
        {"sampler": {"name": "ddpm", "steps": None}},
        {"sampler": {"name": "ddpm", "steps": None, "sigma2": "beta"}, "clip_x_0": False},
    ],
)
def test_the_images_are_those_of_the_sampler(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Ho 2020, algorithm 2; Song 2021 (DDIM), eq. 12: an image is the sampler's, by its id alone."""
    found, model = all_images(tmp_path, **fields), load_model(tmp_path / "model")
    asked = fields.get("sampler", {})
    ids, sampler = torch.tensor([0, 7, 21]), DDIM(5, asked.get("eta", 0.0))
    if asked.get("name") == "ddpm":
        sampler = DDPM(variance_named(asked.get("sigma2", "beta_tilde")))
    x = sample(model.denoiser, sampler, ids, 3, STATIC_CLIP if fields.get("clip_x_0", True) else None)
    expected = to_uint8(x).numpy()[..., 0]
    for row, index in enumerate(ids.tolist()):
        assert np.abs(found[index].astype(int) - expected[row].astype(int)).max() <= 1
    assert len({image.tobytes() for image in found.values()}) == 22, "every image is another one"


def test_another_batch_size_moves_at_most_a_grey_level(tmp_path: Path) -> None:
    one, other = all_images(tmp_path), all_images(tmp_path, batch_size=11, shard_size=22)
    difference = np.abs(np.stack(list(one.values())).astype(int) - np.stack(list(other.values())).astype(int))
    assert (difference <= 1).mean() >= 0.999


def test_another_seed_gives_other_images(tmp_path: Path) -> None:
    one, other = all_images(tmp_path), all_images(tmp_path, seed=4)
    assert not any(np.array_equal(one[index], other[index]) for index in one)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_hugging_face_datasets_show_images_and_pandas_their_png_files(tmp_path: Path, channels: int) -> None:
    network = UNetConfig(8, channels, 8, (1, 2), 1, (4,), num_heads=1, dropout=0.0, num_groups=4)
    save_tiny_model(tmp_path / "model", network=network)
    shards, _, output = shards_of(tmp_path)
    content = shards()(1).data
    (output / "data").mkdir()
    (output / "data" / "part-00001.parquet").write_bytes(content)
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{output}/data/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded["id"][:] == list(range(6, 12))
    frame = pandas.read_parquet(output / "data")
    assert frame["image"][0]["path"] == "000000000006.png"
    for row, image in enumerate(images_of(content).values()):
        np.testing.assert_array_equal(np.asarray(loaded[row]["image"]), image)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(frame["image"][row]["bytes"]))), image)
        assert image.shape == ((8, 8) if channels == 1 else (8, 8, channels))
    page = (REPOSITORY / "docs/jobs/sample.md").read_text()
    (line,) = re.findall(r"^(Image\.open\(.*\))\.show\(\)$", page, re.MULTILINE)
    names = {"Image": Image, "BytesIO": io.BytesIO, "pandas": pandas}
    shown = eval(line.replace("part-00000.parquet", f"{output}/data/part-00001.parquet"), names)
    np.testing.assert_array_equal(np.asarray(shown), next(iter(images_of(content).values())))


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_ingest_reads_the_samples_back(tmp_path: Path, kind: str) -> None:
    shards, count, output = shards_of(tmp_path, format=kind)
    result = ShardedOutput(Location.parse(output), {})
    result.compute(lambda: shards(), count, suffix=SUFFIXES[kind])
    ingest(IngestConfig(f"{output}/data/*{SUFFIXES[kind]}", str(tmp_path / "data set")))
    _, images, _ = PreparedDataset.open(str(tmp_path / "data set")).read_images(0, 22)
    np.testing.assert_array_equal(images[..., 0], np.stack(list(all_images(tmp_path / "again").values())))


def test_the_trajectory_leads_from_noise_to_the_images(tmp_path: Path) -> None:
    shards, _, output = shards_of(tmp_path)
    images = images_of(shards()(0).data)
    picture = Image.open(output / "preview" / "trajectory.png")
    scale = picture.width // (5 * 9 + 1)
    sheet = np.asarray(picture)[::scale, ::scale]
    assert sheet.shape == (6 * 9 + 1, 5 * 9 + 1), "x_t and predicted x_0 of a batch of three images, five steps"
    for row in range(3):
        last = sheet[(2 * row + 1) * 9 + 1 :, 4 * 9 + 1 :][:8, :8]
        np.testing.assert_array_equal(last, images[row])  # the last prediction is the image
        assert sheet[2 * row * 9 + 1 :, 1:][:8, :8].std() > 50, "noise at the start"


def test_bfloat16_is_close_to_float32(tmp_path: Path) -> None:
    one, other = all_images(tmp_path), all_images(tmp_path, precision="bf16")
    difference = np.abs(np.stack(list(one.values())).astype(int) - np.stack(list(other.values())).astype(int))
    assert 0 < difference.mean() < 5


def test_another_model_beside_the_output_is_refused(tmp_path: Path) -> None:
    shards, _, output = shards_of(tmp_path)
    save_tiny_model(tmp_path / "other", weights_seed=1)
    find_model(str(tmp_path / "other"), None, tmp_path).keep(Location.parse(output / "model"))
    with pytest.raises(ModelError, match="is not the model"):
        shards()


def test_a_worker_does_without_mlflow(tmp_path: Path) -> None:
    shards, _, output = shards_of(tmp_path)
    store = Store(shards, Location.parse(output), "data", ".parquet")
    (record,) = first_shards([store], tmp_path)
    assert record.sha256 == hashlib.sha256(shards()(0).data).hexdigest()
    assert (output / "data" / record.name).stat().st_size == record.bytes
