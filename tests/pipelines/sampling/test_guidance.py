"""Guided sample sets: w, an interval and a weaker model are the request's, and what they take is counted."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from mlflow import MlflowClient
from support.model_kinds import EXTRA, KINDS
from support.mortal_actors import Mortal
from support.sample_runs import NETWORK, save_tiny_model, tiny

from ddpm_core.guidance import Guided
from ddpm_core.images import to_uint8
from ddpm_core.model import Model, load_model, save_model
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.ddim import DDIM
from pipelines.cli.errors import ConfigError, DataError, RequestMismatchError
from pipelines.cluster.actor_pool import ActorPool
from pipelines.cluster.config import CpuClusterConfig, GpuClusterConfig
from pipelines.data.ingest.decode import decode_image
from pipelines.outputs.manifest import MANIFEST
from pipelines.outputs.pictures import grid_png
from pipelines.sampling.config import GuidanceConfig, SampleConfig
from pipelines.sampling.job import sample as sample_job
from pipelines.sampling.kind import SAMPLE_SET
from pipelines.sampling.labels import SampleLabels
from pipelines.sampling.plan import work_of
from pipelines.sampling.request import SampleRequest, request_of
from pipelines.sampling.shard import SampleShards, Source, decode_rows, denoiser_of, sample_batch
from pipelines.storage.location import Location
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify

IDS = torch.arange(6)
TURNS = SampleLabels(6, (0, 1, 2))
NAMES = ["cat", "dog", "T-shirt/top"]


def models(root: Path, kind: str) -> tuple[Model, Model]:
    """A model of the kind in `root`/model, and another of it in `root`/weaker."""
    for seed, name in enumerate(("model", "weaker")):
        if not (root / name).exists():
            denoiser = KINDS[kind].build(seed)
            names = {"label_names": NAMES} if denoiser.num_classes else {}
            save_model(root / name, denoiser.named_weights(), denoiser, {**EXTRA, **names})
    return load_model(root / "model"), load_model(root / "weaker")


def config_of(root: Path, kind: str, **fields: Any) -> SampleConfig:
    """Images of the classes in turn, made in this process."""
    models(root, kind)
    values: dict[str, Any] = {"num_images": 10, "labels": "balanced", "cluster": GpuClusterConfig(), **fields}
    return tiny(root, **values)


def digests(config: SampleConfig) -> list[str]:
    manifest = (Location.parse(config.output) / MANIFEST).read_json()
    return [shard["sha256"] for shard in manifest["shards"]]


@pytest.fixture(autouse=True)
def no_cluster_or_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("kind", ["eps, labels", "vdm, labels"])
def test_w_of_1_and_0_are_the_plain_samplers_bit_for_bit_in_one_call(tmp_path: Path, kind: str) -> None:
    """Ho and Salimans 2021, eq. 6, by the convention eps_0 + w (eps_c - eps_0)."""
    model, weaker = models(tmp_path, kind)
    plain = request_of(config_of(tmp_path, kind, labels=None), model)
    conditional = sample(model.denoiser, plain.sampler, IDS, 3, label=torch.tensor([0, 1, 2, 0, 1, 2]))
    unconditional = sample(model.denoiser, plain.sampler, IDS, 3)
    of_weaker = sample(weaker.denoiser, plain.sampler, IDS, 3, label=torch.tensor([0, 1, 2, 0, 1, 2]))
    counted = []
    model.denoiser.network.register_forward_hook(lambda *_: counted.append("own"))
    weaker.denoiser.network.register_forward_hook(lambda *_: counted.append("weaker"))
    for scale, by, expected, calls in (
        (1.0, None, conditional, ["own"] * 5),
        (0.0, None, unconditional, ["own"] * 5),
        (1.0, weaker, conditional, ["own"] * 5),
        (0.0, weaker, of_weaker, ["weaker"] * 5),
        (2.0, None, None, ["own"] * 10),
        (2.0, weaker, None, ["own", "weaker"] * 5),
    ):
        counted.clear()
        request = replace(
            plain,
            label_classes=TURNS.classes,
            guidance_scale=scale,
            guidance_model_id=by.model_id if by else None,
        )
        images = sample_batch(request, Source(model, by, TURNS), IDS)
        assert counted == calls
        if expected is not None:
            assert (images == to_uint8(expected).numpy()).all()
        else:
            assert not (images == to_uint8(conditional).numpy()).all()


def test_images_are_those_of_the_guided_denoiser_with_the_label_of_each_id(tmp_path: Path) -> None:
    model, weaker = models(tmp_path, "eps, labels")
    config = config_of(tmp_path, "eps, labels", guidance=GuidanceConfig(3.0, (0.2, 2.0), str(tmp_path / "weaker")))
    request = request_of(config, model, TURNS, weaker)
    images = sample_batch(request, Source(model, weaker, TURNS), torch.tensor([4, 5, 2]))
    guided = Guided(model.denoiser, 3.0, (0.2, 2.0), weaker.denoiser)
    expected = sample(guided, DDIM(5), torch.tensor([4, 5, 2]), 3, label=torch.tensor([1, 2, 2]))
    assert (images == to_uint8(expected).numpy()).all()


@pytest.mark.parametrize("kind", ["eps, labels", "vdm, labels"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("interval", [None, (0.1, 1.0), (0.0, 1e-9)])
@pytest.mark.parametrize("by_weaker", [False, True])
def test_the_calls_that_are_told_are_those_that_are_made(
    tmp_path: Path, kind: str, scale: float, interval: tuple[float, float] | None, by_weaker: bool
) -> None:
    model, weaker = models(tmp_path, kind)
    plain = request_of(config_of(tmp_path, kind, labels=None), model)
    other = weaker if by_weaker else None
    request = replace(
        plain,
        label_classes=(0, 1, 2),
        guidance_scale=scale,
        guidance_interval=interval,
        guidance_model_id=other.model_id if other else None,
    )
    counted = []
    model.denoiser.network.register_forward_hook(lambda *_: counted.append("own"))
    weaker.denoiser.network.register_forward_hook(lambda *_: counted.append("weaker"))
    sample_batch(request, Source(model, other, TURNS), IDS)
    denoiser = denoiser_of(request, model, other)
    assert isinstance(denoiser, Guided)
    own, before = denoiser.calls(request.sampler.times(model.denoiser.process))
    assert own + before == len(counted)
    assert before == (counted.count("weaker") if by_weaker else len(counted) - own)
    if interval == (0.0, 1e-9) or scale == 1.0:
        assert before == 0


def test_a_request_stores_labels_and_guidance_only_where_they_are_asked_for(tmp_path: Path) -> None:
    model, weaker = models(tmp_path, "eps, labels")
    plain = request_of(config_of(tmp_path, "eps, labels", labels=None), model)
    guidance = GuidanceConfig(2.0, (0.3, 5.0), str(tmp_path / "weaker"))
    for labels, stored in (
        (TURNS, {"label_classes": [0, 1, 2]}),
        (SampleLabels(10, (2, 0), (4, 6)), {"label_classes": [2, 0], "label_counts": [4, 6]}),
        (SampleLabels(10, dataset_id="d"), {"label_dataset_id": "d"}),
        (None, {}),
    ):
        request = request_of(config_of(tmp_path, "eps, labels", guidance=guidance), model, labels, weaker)
        guided = {
            "guidance_scale": 2.0,
            "guidance_interval": [0.3, 5.0],
            "guidance_model_id": weaker.model_id,
        }
        assert request.to_json() == {**plain.to_json(), **stored, **guided}
        again = SampleRequest.from_json(json.loads(json.dumps(request.to_json())), Location.parse("/m.json"))
        assert again == request
    assert request.described_guidance == f"w = 2 at noise levels 0.3 to 5, by model {weaker.model_id[:12]}"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"label_classes": []}, "label_classes are indices >= 0"),
        ({"label_classes": [-1]}, "label_classes are indices >= 0"),
        ({"label_classes": [0], "label_dataset_id": "d"}, "label_classes are indices >= 0, where no label_dataset_id"),
        ({"label_counts": [10]}, "label_counts are one >= 1 for each"),
        ({"label_classes": [0, 1], "label_counts": [10]}, "label_counts are one >= 1 for each"),
        ({"label_classes": [0, 1], "label_counts": [4, 5]}, "label_counts are one >= 1 for each .* num_images in all"),
        ({"label_classes": ["cat"]}, r"request.label_classes\[0\] = 'cat': must be a whole number"),
        ({"guidance_interval": [0.1, 1.0]}, "guidance has a scale"),
        ({"guidance_scale": 1.0, "guidance_interval": [0.1]}, "guidance_interval is two noise levels"),
        ({"guidance_scale": 1.0, "guidance_interval": [1.0, 0.1]}, "guidance_interval"),
    ],
)
def test_a_damaged_request_is_told(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    model, _ = models(tmp_path, "eps, labels")
    stored = request_of(config_of(tmp_path, "eps, labels", labels=None), model).to_json()
    with pytest.raises(DataError, match=told):
        SampleRequest.from_json({**stored, **changed}, Location.parse("/m.json"))


def test_a_weaker_model_that_does_not_fit_is_refused_by_its_field(tmp_path: Path) -> None:
    config = config_of(tmp_path, "eps, labels", guidance=GuidanceConfig(2.0, model=str(tmp_path / "other")))
    wide = replace(NETWORK, in_channels=3, num_classes=3)
    for network, extra, told in (
        (wide, {}, r"the weaker model's image shape is \(3, 8, 8\), not \(1, 8, 8\)"),
        (NETWORK, {}, "the weaker model's number of classes is None, not 3"),
        (replace(NETWORK, num_classes=3), {"label_names": ["a", "b", "c"]}, "calls its classes otherwise"),
    ):
        save_tiny_model(tmp_path / "other", network=network, extra={**EXTRA, **extra})
        with pytest.raises(ConfigError, match=rf"^guidance\.model = {tmp_path}/other: {told}"):
            sample_job(config)
    assert not (tmp_path / "samples").exists()


def test_a_weaker_model_samples_alone_only_with_variances_that_it_has(tmp_path: Path) -> None:
    for name, kind in (("model", "learned variances"), ("other", "x_0")):
        KINDS[kind].save(tmp_path / name)
    model, other = load_model(tmp_path / "model"), load_model(tmp_path / "other")
    by_other = {"labels": None, "sampler": {"name": "ddpm"}, "num_images": 10}

    def asked(scale: float, **fields: Any) -> SampleRequest:
        guidance = GuidanceConfig(scale, model=str(tmp_path / "other"))
        return request_of(tiny(tmp_path, **{**by_other, "guidance": guidance, **fields}), model, None, other)

    with pytest.raises(ConfigError, match=r"^guidance\.model = .*/other: with guidance\.scale = 0 it samples alone, .*"
                       r"sampler.sigma2 = learned needs; give --sampler.sigma2 beta_tilde$"):  # fmt: skip
        asked(0.0)
    for request in (asked(0.0, sampler={"name": "ddpm", "sigma2": "beta_tilde"}), asked(0.0, sampler={}), asked(2.0)):
        assert len(sample_batch(request, Source(model, other, None), IDS)) == 6
    own = request_of(tiny(tmp_path, **by_other, guidance=GuidanceConfig(0.0, model="m")), model, None, model)
    assert len(sample_batch(own, Source(model, model, None), IDS)) == 6


def test_that_a_weaker_model_is_not_used_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weaker = str(tmp_path / "weaker")
    config = config_of(tmp_path, "eps", labels=None, dry_run=True)
    for scale, told in ((1.0, "guidance.scale = 1: no call uses the weaker model"), (2.0, "guided by the weaker")):
        sample_job(replace(config, guidance=GuidanceConfig(scale, None, weaker)))
        said = [line for line in capsys.readouterr().err.splitlines() if "weaker model" in line]
        assert len(said) == 1
        assert said[0].startswith(told)


def test_a_guided_sample_set_keeps_both_models_and_tells_of_them(tmp_path: Path) -> None:
    weaker = str(tmp_path / "weaker")
    config = config_of(
        tmp_path,
        "eps, labels",
        labels="T-shirt/top:4,cat:6",
        num_images=None,
        guidance=GuidanceConfig(2.0, None, weaker),
    )
    rows = dict(sample_job(config).rows)
    assert (rows["labels"], rows["guidance"][:5]) == ("T-shirt/top:4,cat:6", "w = 2")
    assert rows["weaker model"].startswith(weaker)
    manifest = (Location.parse(config.output) / MANIFEST).read_json()
    model_id = load_model(weaker).model_id
    assert (
        manifest["request"]["guidance_model_id"] == model_id == load_model(f"{config.output}/guidance_model").model_id
    )
    assert (manifest["guidance_model"]["uri"], manifest["guidance_model"]["lineage"]["step"]) == (weaker, 7)
    assert manifest["request"]["label_counts"] == [4, 6]
    checked = verify(VerifyConfig(config.output))
    assert checked.problems == []
    assert dict(checked.rows)["weaker model"].startswith(f"{model_id} ({weaker}, step 7), ε-prediction")
    client = MlflowClient(f"sqlite:///{config.root}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("model/samples").experiment_id])
    assert run.info.run_name == "samples, w = 2"
    told = {"guidance_scale": "2.0", "labels": "T-shirt/top:4,cat:6", "guidance_model": weaker}
    assert told.items() <= run.data.params.items()
    assert run.data.tags["ddpm.guidance_model_id"] == model_id
    assert "labels T-shirt/top:4,cat:6, w = 2, by model" in run.data.tags["mlflow.note.content"]
    # Without the model where it was: the output has all that it is made from.
    before = digests(config)
    (Path(config.output) / "data" / "part-00001.parquet").unlink()
    assert sample_job(config).title == "Sample set, 1 lost shard(s) made again"
    assert digests(config) == before
    with pytest.raises(RequestMismatchError, match=r"guidance_scale: 2\.0 -> 3\.0"):
        sample_job(replace(config, guidance=GuidanceConfig(3.0, None, weaker)))
    save_tiny_model(tmp_path / "intruder")
    content = (tmp_path / "intruder" / "ema.safetensors").read_bytes()
    (Path(config.output) / "guidance_model" / "ema.safetensors").write_bytes(content)
    (problem,) = verify(VerifyConfig(config.output)).problems
    assert "guidance_model: is not the model" in problem


def test_a_label_that_is_not_the_requests_is_found_by_verify(tmp_path: Path) -> None:
    config = config_of(tmp_path, "eps, labels")
    sample_job(config)
    path = Location.parse(config.output) / MANIFEST
    manifest = path.read_json()
    manifest["request"]["label_classes"] = [0, 2, 1]
    path.write_json(manifest)
    problems = verify(VerifyConfig(config.output)).problems
    assert any("image 1 has label 1, not the request's" in problem for problem in problems)


def test_a_model_without_labels_is_guided_by_a_weaker_one(tmp_path: Path) -> None:
    guidance = GuidanceConfig(2.0, model=str(tmp_path / "weaker"))
    plain = config_of(tmp_path, "eps", labels=None)
    guided = replace(plain, guidance=guidance, output=str(tmp_path / "guided"))
    sample_job(plain)
    sample_job(guided)
    assert digests(plain) != digests(guided)
    assert verify(VerifyConfig(guided.output)).problems == []
    rows = dict(sample_job(replace(guided, output=str(tmp_path / "new"), dry_run=True)).rows)
    assert rows["network"] == "40 calls with 3 images = 120 evaluations, 20 of the calls by the weaker model"
    assert rows["measured"].count(" ms") == 2


def test_what_guidance_takes_is_in_the_work_of_a_job(tmp_path: Path) -> None:
    from pipelines.models.find import find_model
    from pipelines.models.used import UsedModel

    model, weaker = models(tmp_path, "eps, labels")
    used, second = (
        UsedModel(find_model(str(tmp_path / name), None, tmp_path), each)
        for name, each in (("model", model), ("weaker", weaker))
    )
    request = request_of(config_of(tmp_path, "eps, labels"), model, TURNS)
    once = work_of(request, used, None, [0, 1])
    assert (once.calls, once.weaker_calls) == (20, 0)
    twice = work_of(replace(request, guidance_scale=2.0), used, None, [0, 1])
    assert (twice.calls, twice.weaker_calls, twice.weights) == (40, 0, 2 * once.weights)
    by_weaker = work_of(replace(request, guidance_scale=2.0, guidance_model_id="w"), used, second, [0, 1])
    assert (by_weaker.calls, by_weaker.weaker_calls, by_weaker.weights) == (20, 20, 2 * once.weights)


def test_the_preview_has_a_row_for_each_class_with_its_name(tmp_path: Path, make_dataset: Any) -> None:
    data = make_dataset(12, labels=[2, None, 0, 1, 1, 2, None, 0, 0, 1, 2, 2], label_names=NAMES)
    config = config_of(tmp_path, "eps, labels", labels=f"from:{data.location}", num_images=11)
    sample_job(config)
    plain = replace(config, labels=None, num_images=10, output=str(tmp_path / "plain"))
    sample_job(plain)
    blank, rows = np.zeros((8, 8, 1), np.uint8), [[1, 6, None], [2, 7, 8], [3, 4, 9], [0, 5, 10]]
    for made, ids, columns, names in (
        (config, [index for row in rows for index in row], 3, ["no label", *NAMES]),
        (plain, list(range(10)), None, None),
    ):
        stored = {
            row.id: decode_image(row.png, None, None)
            for file in sorted((Path(made.output) / "data").iterdir())
            for row in decode_rows(file.read_bytes(), "parquet")
        }
        expected = grid_png(np.stack([stored.get(index, blank) for index in ids]), columns, row_names=names)
        assert (Path(made.output) / "preview" / "grid.png").read_bytes() == expected


@pytest.mark.ray
@pytest.mark.parametrize("by_weaker", [False, True])
def test_guided_samples_are_the_same_by_any_workers_after_any_kills_and_recomputed(
    ray_cluster: None, tmp_path: Path, by_weaker: bool
) -> None:
    guidance = GuidanceConfig(2.0, (0.05, 3.0), str(tmp_path / "weaker") if by_weaker else None)
    config = config_of(tmp_path, "eps, labels", num_images=22, guidance=guidance)
    alone = replace(config, output=str(tmp_path / "alone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.cluster.connection.is_named", lambda address: False)
        patch.setattr("pipelines.cluster.connection.connect", None)
        sample_job(alone)
    two = replace(config, cluster=GpuClusterConfig(num_workers=2))
    sample_job(two)
    assert digests(two) == digests(alone)
    model, weaker = models(tmp_path, "eps, labels")
    request = request_of(config, model, SampleLabels(22, (0, 1, 2)), weaker if by_weaker else None)
    killed = Location.parse(tmp_path / "killed")
    output = SAMPLE_SET.output(killed, request)
    output.begin()
    for name in ("model", "guidance_model") if by_weaker else ("model",):
        (killed / name).upload_directory(f"{two.output}/{name}")
    ray.cloudpickle.register_pickle_by_value(sys.modules[Mortal.__module__])  # actors cannot import the tests
    mortal = Mortal(SampleShards(killed, request, 1), str(tmp_path / "deaths"))
    Path(mortal.log).mkdir()
    records = output.compute(mortal, 4, pool=ActorPool(2))
    assert [record.sha256 for record in records] == digests(two)
    assert len(list(Path(mortal.log).iterdir())) == 4, "an actor died at every shard"
    again = verify(VerifyConfig(two.output, recompute=1.0, cluster=CpuClusterConfig(num_workers=1)))
    assert again.problems == []
    assert dict(again.rows)["made again"].startswith("4 shard(s), 4 bit-equal")


@pytest.mark.ray
def test_labels_of_a_data_set_are_read_by_the_workers_and_by_verify(
    ray_cluster: None, tmp_path: Path, make_dataset: Any
) -> None:
    data = make_dataset(12, labels=[2, None, 0, 1, 1, 2, None, 0, 0, 1, 2, 2], label_names=NAMES)
    config = config_of(
        tmp_path,
        "eps, labels",
        labels=f"from:{data.location}",
        num_images=None,
        guidance=GuidanceConfig(2.0),
        cluster=GpuClusterConfig(num_workers=2),
    )
    sample_job(config)
    manifest = (Location.parse(config.output) / MANIFEST).read_json()
    assert (manifest["num_rows"], manifest["label_data"]) == (12, data.location.uri)
    assert manifest["request"]["label_dataset_id"] == data.dataset_id
    again = verify(VerifyConfig(config.output, recompute=1.0, cluster=CpuClusterConfig(num_workers=1)))
    assert again.problems == []
    client = MlflowClient(f"sqlite:///{config.root}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("model/samples").experiment_id])
    assert [used.dataset.digest for used in run.inputs.dataset_inputs] == [data.dataset_id[:36]]
    other = make_dataset(12, name="other", labels=[0] * 12, label_names=NAMES)
    manifest["label_data"] = other.location.uri
    (Location.parse(config.output) / MANIFEST).write_json(manifest)
    with pytest.raises(DataError, match=r"is not the data set .* whose labels were taken"):
        verify(VerifyConfig(config.output, recompute=1.0))
