"""Verification: what is right passes, and everything that is off is named."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.model_kinds import KINDS
from support.sample_runs import save_tiny_model, tiny

from ddpm_core.model import load_model
from pipelines.cli.config import digest
from pipelines.cli.errors import ConfigError, DataError
from pipelines.cluster.config import CpuClusterConfig
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.data.opening import ensure_embedded
from pipelines.models.find import find_model
from pipelines.outputs.manifest import MANIFEST
from pipelines.sampling.kind import SAMPLE_SET
from pipelines.sampling.request import request_of
from pipelines.sampling.shard import SampleShards
from pipelines.storage.location import Location
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import VerifyResult, verify


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A complete sample set, made in this process."""
    return make_samples(tmp_path)


def make_samples(tmp_path: Path, **fields: Any) -> Path:
    config = tiny(tmp_path, **fields)
    found, location = find_model(config.model, None, tmp_path), Location.parse(config.output)
    request = request_of(config, load_model(config.model))
    output = SAMPLE_SET.output(location, request)
    output.begin()
    found.keep(location / "model")
    records = output.compute(SampleShards(location, request, 1), 4)
    fields = {
        "format": SAMPLE_SET.format,
        "version": SAMPLE_SET.version,
        "num_rows": 22,
        "image_shape": [8, 8, 1],
        "model": found.origin,
        "lineage": {"step": 7, "dataset": {"id": "d" * 64, "uri": "/data"}, "code_version": "1"},
        "code_version": "2",
        "made_with": {"torch": "3"},
    }
    output.commit(fields, records)
    return Path(config.output)


def change(root: Path, **fields: Any) -> None:
    location = Location.parse(root) / MANIFEST
    location.write_json({**location.read_json(), **fields})


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_sample_set_passes_and_its_lineage_is_told(samples: Path) -> None:
    result = verify(VerifyConfig(str(samples)))
    rows = dict(result.rows)
    assert result.problems == []
    result.require_no_problems()
    assert rows["checked"].startswith("22 images in 4 shards")
    assert rows["model"].startswith(load_model(samples / "model").model_id)
    assert rows["model"].endswith("/model, step 7), ε-prediction, linear T = 20")
    assert "d" * 64 in rows["trained on"]
    assert rows["verdict"] == "everything is right"


def test_a_data_set_passes_and_so_does_one_with_rejected_images(tmp_path: Path) -> None:
    data = ensure_embedded("embedded://digits/test", tmp_path / "digits")
    result = verify(VerifyConfig(data.location.uri))
    assert result.problems == []
    assert dict(result.rows)["data set id"] == data.dataset_id
    (tmp_path / "in").mkdir()
    for index in range(3):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "in" / f"{index}.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"")
    ingest(IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"), max_rejected_fraction=0.5))
    result = verify(VerifyConfig(str(tmp_path / "out")))
    assert (result.problems, dict(result.rows)["rejected"]) == ([], "1")


@pytest.mark.parametrize("kind", ["samples", "digits"])
def test_damage_is_named(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    if kind == "samples":
        root = request.getfixturevalue("samples")
        flip_a_byte(root / "data" / "part-00002.parquet")
        (root / "data" / "part-00001.parquet").unlink()
        (root / "data" / "part-00003.parquet").write_bytes(b"cut")
        expected = [
            "part-00001.parquet: cannot read",
            "part-00002.parquet: its sha256",
            "part-00003.parquet: has 3 bytes",
        ]
    else:
        root = Path(ensure_embedded("embedded://digits/test", tmp_path / "digits").location.path)
        flip_a_byte(root / "data" / "part-00000.parquet")
        expected = ["part-00000.parquet: its sha256"]
    (root / "data" / "stray.parquet").write_bytes(b"")
    result = verify(VerifyConfig(str(root)))
    for text in ["stray.parquet: is not in the manifest", *expected]:
        assert sum(text in problem for problem in result.problems) == 1, text
    assert len(result.problems) == 1 + len(expected)
    with pytest.raises(DataError, match=rf"{len(result.problems)} thing\(s\) wrong, the first: .*stray"):
        result.require_no_problems()


def test_a_shard_with_other_ids_is_named_though_its_digest_is_right(samples: Path) -> None:
    manifest = (Location.parse(samples) / MANIFEST).read_json()
    path = samples / "data" / "part-00001.parquet"
    table, sink = pq.read_table(path), io.BytesIO()
    pq.write_table(table.take([0, 0, 2, 3, 4, 5]), sink)
    path.write_bytes(sink.getvalue())
    manifest["shards"][1] |= {"bytes": len(sink.getvalue()), "sha256": hashlib.sha256(sink.getvalue()).hexdigest()}
    change(samples, shards=manifest["shards"])
    (problem,) = verify(VerifyConfig(str(samples))).problems
    assert problem.endswith("part-00001.parquet: does not hold exactly the ids of places 6..11 in order")


def test_a_manifest_that_does_not_add_up_is_named(samples: Path) -> None:
    manifest = (Location.parse(samples) / MANIFEST).read_json()
    change(samples, num_rows=21, request={**manifest["request"], "seed": 5})
    problems = verify(VerifyConfig(str(samples))).problems
    assert any("its shards hold 22 rows, it says 21" in problem for problem in problems)
    assert any("the request is not the one whose hash it records" in problem for problem in problems)


def test_another_model_beside_the_samples_is_named(samples: Path, tmp_path: Path) -> None:
    save_tiny_model(samples / "model", weights_seed=5)
    (problem,) = verify(VerifyConfig(str(samples))).problems
    assert "model: is not the model" in problem


def test_what_is_no_finished_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished output"):
        verify(VerifyConfig(str(tmp_path)))
    (tmp_path / MANIFEST).write_text('{"format": "other"}')
    with pytest.raises(DataError, match="format 'other' is not of this software"):
        verify(VerifyConfig(str(tmp_path)))
    data = ensure_embedded("embedded://digits/test", tmp_path / "digits")
    with pytest.raises(ConfigError, match=r"recompute = 0\.5: a data set is made from its source"):
        verify(VerifyConfig(data.location.uri, recompute=0.5))
    with pytest.raises(ConfigError, match=r"recompute = 2\.0: must be in \[0, 1\]"):
        VerifyConfig("x", recompute=2.0)
    with pytest.raises(ConfigError, match=r"cluster\.num_workers = -1: must be 0"):  # before anything is read
        VerifyConfig("x", cluster=CpuClusterConfig(num_workers=-1))


@pytest.mark.ray
def test_shards_are_made_again_and_compared(ray_cluster: None, samples: Path) -> None:
    result = verify(VerifyConfig(str(samples), recompute=0.5))
    assert result.problems == []
    assert dict(result.rows)["made again"].startswith("2 shard(s), 2 bit-equal")
    # samples of another seed, consistent in every digest: only making them again tells
    manifest = (Location.parse(samples) / MANIFEST).read_json()
    request = {**manifest["request"], "seed": 99}
    change(samples, request=request, request_sha256=digest(request))
    result: VerifyResult = verify(VerifyConfig(str(samples), recompute=1.0))
    assert sum("comes out different when it is made again" in problem for problem in result.problems) == 4


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["learned variances", "v, learned ends"])
def test_samples_of_other_kinds_of_models_are_made_again_too(ray_cluster: None, tmp_path: Path, kind: str) -> None:
    KINDS[kind].save(tmp_path / "model")
    samples = make_samples(tmp_path, sampler={"name": "ddpm", "steps": 4})
    result = verify(VerifyConfig(str(samples), recompute=1.0))
    assert result.problems == []
    rows = dict(result.rows)
    assert rows["made again"].startswith("4 shard(s), 4 bit-equal")
    assert rows["model"].endswith(f"/model, step 7), {KINDS[kind].told}")
