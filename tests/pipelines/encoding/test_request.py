"""What an encoding's request is stored as: encodings of before are found by it."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.encode_runs import request_by_hand, tiny_encoding
from support.model_kinds import KINDS

from ddpm_core.samplers.base import STATIC_CLIP
from ddpm_core.samplers.ddim import DDIM
from pipelines.cli.errors import DataError
from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.encoding.request import EncodeRequest
from pipelines.storage.location import Location

PATH = Location.parse("/out/manifest.json")
STORED: dict[str, Any] = {
    "model_id": "m" * 64,
    "dataset_id": "d" * 64,
    "num_images": 20,
    "sampler": "ddim",
    "steps": 5,
    "eta": 0.0,
    "clip_x_0": False,
    "dtype": "float32",
    "device": "cpu",
    "batch_size": 3,
    "shard_size": 6,
}


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({}, {"labels": "given"}),
        ({"labels": "null", "num_images": 7, "clip_x_0": True}, ...),
        ({"sampler": {"steps": None}}, {"steps": 20, "labels": "given"}),
        ({"cluster": GpuClusterConfig(gpus_per_worker=0.5)}, {"device": "cuda", "labels": "given"}),
    ],
)
def test_the_stored_values(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path, fields: dict[str, Any], stored: Any
) -> None:
    model_id, data = KINDS["eps, labels"].save(tmp_path / "model"), make_dataset(20, labels=[2] * 20)
    request = request_by_hand(tiny_encoding(tmp_path, data, **fields), data)
    of_both = {"model_id": model_id, "dataset_id": data.dataset_id}
    assert request.to_json() == {**STORED, **of_both, **(fields if stored is ... else stored)}
    again = EncodeRequest.from_json(json.loads(json.dumps(request.to_json())), PATH)
    assert again == request == pickle.loads(pickle.dumps(request))
    assert again.on_gpu == (request.device == "cuda")


def test_what_follows_from_the_stored_values() -> None:
    request = EncodeRequest.from_json(STORED, PATH)
    assert (request.sampler, request.described_sampler) == (DDIM(5, 0.0), "ddim, 5 steps, η = 0.0")
    assert (request.num_shards, request.clip, request.labels) == (4, None, None)
    assert EncodeRequest.from_json({**STORED, "clip_x_0": True}, PATH).clip == STATIC_CLIP


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sampler": "euler"}, "request.sampler = 'euler': must be one of "),
        ({"eta": None}, "request.eta = None: must be a number"),
        ({"steps": "5"}, "request.steps = '5': must be a whole number"),
        ({"labels": "both"}, "request.labels = 'both': must be one of given, null"),
        ({"seed": 2}, "request.seed = 2: is not known to this version"),
    ],
)
def test_a_damaged_request_is_told_by_its_field(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=f"^/out/manifest.json: {told}"):
        EncodeRequest.from_json({**STORED, **changed}, PATH)
