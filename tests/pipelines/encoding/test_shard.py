"""One shard of an encoding: the noise of the core's `encode`, in files that others can read."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.encode_runs import shards_of, tiny_encoding
from support.model_kinds import KINDS
from support.without_mlflow import first_shards

from ddpm_core.denoiser import NO_LABEL
from ddpm_core.images import to_model_range
from ddpm_core.model import load_model
from ddpm_core.samplers.base import STATIC_CLIP, Sampler, sample
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.dpm_solver import DPMSolver
from ddpm_core.samplers.encode import encode
from ddpm_core.samplers.heun import Heun
from pipelines.cli.errors import ModelError
from pipelines.data.dataset import PreparedDataset
from pipelines.outputs.progress import telling
from pipelines.outputs.shard_store import Store
from pipelines.sampling.samplers import name_of
from pipelines.storage.location import Location

REPOSITORY = Path(__file__).parents[3]
LABELS = [0, 2, None, 1, 0, 1, 2, 2, 0]


@pytest.mark.parametrize(
    ("kind", "sampler", "clip", "labels"),
    [
        ("eps", DDIM(5), False, "auto"),
        ("v", DDIM(5), True, "auto"),
        ("vdm", DPMSolver(5, 3, spacing="time"), True, "auto"),
        ("edm", Heun(4), True, "auto"),
        ("eps, labels", DDIM(5), False, "given"),
        ("eps, labels", DDIM(5), False, "null"),
    ],
)
def test_the_noise_is_that_of_the_core(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path, kind: str, sampler: Sampler, clip: bool, labels: str
) -> None:
    """Song 2021 (DDIM), sec. 5.4: every row by itself, whatever is in its batch."""
    KINDS[kind].save(tmp_path / "model")
    data = make_dataset(9, labels=LABELS)
    asked = {"name": name_of(sampler), "steps": sampler.steps, "spacing": sampler.spacing}
    compute = shards_of(tiny_encoding(tmp_path, data, sampler=asked, clip_x_0=clip, labels=labels), data)()
    outputs = [compute(index) for index in range(2)]
    found = pandas.concat([pandas.read_parquet(io.BytesIO(output.data)) for output in outputs])
    assert [(output.rows, output.extra) for output in outputs] == [(6, {"first_id": 0}), (3, {"first_id": 6})]
    assert found["id"].tolist() == list(range(9))
    _, images, _ = data.read_images(0, 9)
    x_0, denoiser = to_model_range(torch.from_numpy(images)), load_model(tmp_path / "model").denoiser
    rule = STATIC_CLIP if clip else None
    told = torch.tensor([NO_LABEL if label is None else label for label in LABELS]) if labels == "given" else None
    noise = encode(denoiser, sampler, x_0, rule, told)
    torch.testing.assert_close(torch.tensor(np.stack(found["noise"])), noise.flatten(1), rtol=1e-3, atol=1e-3)
    decoded = sample(denoiser, sampler, torch.arange(9), 0, rule, told, start=noise)
    rms = (decoded - x_0).square().mean((1, 2, 3)).sqrt() * 127.5
    np.testing.assert_allclose(found["round_trip_rms"], rms.numpy(), rtol=1e-3)
    assert ("label" in found) == (labels == "given")
    if labels == "given":
        assert [None if np.isnan(label) else int(label) for label in found["label"]] == LABELS


def test_shards_in_another_order_and_by_another_actor_are_the_same_bytes(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path
) -> None:
    data = make_dataset(20)
    shards = shards_of(tiny_encoding(tmp_path, data, num_images=13), data)
    one, other = shards(), shards()
    forward = [one(index).data for index in range(3)]
    assert [other(index).data for index in (2, 1, 0)] == forward[::-1]
    assert pq.read_table(io.BytesIO(forward[2]))["id"].to_pylist() == [12]


def test_pandas_arrow_and_hugging_face_read_the_noise(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path
) -> None:
    data = make_dataset(9)
    content = shards_of(tiny_encoding(tmp_path, data), data)()(0).data
    path = tmp_path / "part-00000.parquet"
    path.write_bytes(content)
    field = pq.read_schema(path).field("noise")
    assert (str(field.type), json.loads(field.metadata[b"shape"])) == (
        "fixed_size_list<element: float>[64]",
        [1, 8, 8],
    )
    expected = pq.read_table(path)["noise"].combine_chunks().flatten().to_numpy().reshape(-1, 1, 8, 8)
    page = (REPOSITORY / "docs/jobs/encode.md").read_text()
    (line,) = re.findall(r"^noise = (.*)$", page, re.MULTILINE)
    names = {"np": np, "pandas": pandas, "shape": (1, 8, 8)}
    found = eval(line.replace("part-00000.parquet", str(path)), names)
    np.testing.assert_array_equal(found, expected)
    assert (found.shape, found.dtype) == ((6, 1, 8, 8), np.float32)
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(np.array(loaded["noise"][:], np.float32).reshape(-1, 1, 8, 8), expected)


def test_the_picture_has_images_above_their_decodings_and_the_noise(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path
) -> None:
    data = make_dataset(9)
    config = tiny_encoding(tmp_path, data)
    shards_of(config, data)()(0)
    picture = np.asarray(Image.open(Path(config.output) / "preview" / "round_trip.png"))
    _, images, _ = data.read_images(0, 6)
    scale = round(768 / (6 * 9 + 1))
    margin = picture.shape[1] - (6 * 9 + 1) * scale
    sheet = picture[::scale, margin::scale]
    assert sheet.shape == (3 * 9 + 1, 6 * 9 + 1)
    for column in range(6):
        np.testing.assert_array_equal(sheet[1:9, 9 * column + 1 : 9 * column + 9], images[column, ..., 0])


@pytest.mark.parametrize(("kind", "steps"), [("eps", 4 + 5), ("vdm", 5 + 5)])  # to the noise, and back
def test_progress_is_told_with_every_step_of_both_ways(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path, kind: str, steps: int
) -> None:
    data, told = make_dataset(9), list[float]()
    KINDS[kind].save(tmp_path / "model")
    compute = shards_of(tiny_encoding(tmp_path, data), data)()
    with telling(told.append):
        compute(0)
    batches = 2
    assert len(told) == batches * steps
    np.testing.assert_allclose(told, np.arange(1, batches * steps + 1) * 3 / steps)


def test_noise_that_is_not_finite_is_refused(make_dataset: Callable[..., PreparedDataset], tmp_path: Path) -> None:
    KINDS["eps"].save(tmp_path / "model", scale=1e18)
    data = make_dataset(9)
    with pytest.raises(ModelError, match=r"no finite noise .* for 6 of 6 images \(first ids 0, 1, 2\) in fp32"):
        shards_of(tiny_encoding(tmp_path, data), data)()(0)


def test_a_worker_does_without_mlflow(make_dataset: Callable[..., PreparedDataset], tmp_path: Path) -> None:
    data = make_dataset(9)
    config = tiny_encoding(tmp_path, data)
    shards = shards_of(config, data)
    (record,) = first_shards([Store(shards, Location.parse(config.output), "data", ".parquet")], tmp_path)
    assert (Path(config.output) / "data" / record.name).read_bytes() == shards()(0).data
