"""Model registration against a real database: complete, usable, and the same after any interruption."""

import json

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.cli.errors import TrackingError
from pipelines.tracking.champion import check_promotable, promote_by_metric, promote_if_better
from pipelines.tracking.client import configure_mlflow
from pipelines.tracking.registry import register_model

configure_mlflow()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    root = tmp_path_factory.mktemp("mlflow")
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    yield MlflowClient()
    mlflow.set_tracking_uri(None)
    patch.undo()


@pytest.fixture
def run(client, tmp_path):
    experiment = client.create_experiment(tmp_path.name, artifact_location=(tmp_path / "artifacts").as_uri())
    return client.create_run(experiment)


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    schedule = {"name": "linear", "num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    (directory / "config.json").write_text(json.dumps({"network": {}, "schedule": schedule}))
    (directory / "ema.safetensors").write_bytes(bytes(range(256)))
    return directory


def payload(name, model_id="hash-1", step=100, **more):
    return {"uri": "unused", "name": name, "model_id": model_id, "step": step, **more}


def register(client, run, model, directory):
    return register_model(client, run.info.run_id, run.info.experiment_id, model, directory)[0]


def champion_after(client, run, model, directory):
    """What registering says of the champion."""
    return register_model(client, run.info.run_id, run.info.experiment_id, model, directory)[1]


def validation(total, standard_error=0.01, num_images=64, sigma2="beta_tilde", dataset_id="d" * 64):
    return {"total": total, "standard_error": standard_error, "num_images": num_images} | {
        "sigma2": sigma2,
        "dataset_id": dataset_id,
    }


def inventory(client, run, name):
    """Everything that registration makes."""
    models = client.search_logged_models([run.info.experiment_id])
    return {
        "models": sorted((model.tags["ddpm.model_id"], str(model.status)) for model in models),
        "outputs": sorted(o.model_id for o in client.get_run(run.info.run_id).outputs.model_outputs),
        "versions": {v.version: v.tags["ddpm.model_id"] for v in client.search_model_versions(f"name='{name}'")},
        "aliases": {a: int(v) for a, v in client.get_registered_model(name).aliases.items()},
    }


def test_a_registered_model_can_be_found_downloaded_and_identified(client, run, directory, tmp_path):
    name = f"ddpm-{tmp_path.name}"
    model = payload(name, tags={"ddpm.config_hash": "ab"}, validation=validation(3.25))
    model_id = register(client, run, model, directory)
    downloaded = mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path / "got"))
    for file in directory.iterdir():
        assert (tmp_path / "got" / file.name).read_bytes() == file.read_bytes()
    flavors = mlflow.models.Model.load(downloaded).flavors
    assert flavors["ddpm"] == {"weights": "ema.safetensors", "config": "config.json", "loader": "ddpm_core"}
    version = client.get_model_version_by_alias(name, "champion")
    assert version.tags == {
        "ddpm.config_hash": "ab",
        "ddpm.model_id": "hash-1",
        "step": "100",
        "validation.bits_per_dim": "3.25",
        "validation.standard_error": "0.01",
        "validation.num_images": "64",
        "validation.sigma2": "beta_tilde",
        "validation.dataset_id": "d" * 64,
        "ddpm.champion": f"version 1: the first of {name}",
    }
    assert version.description == (
        "step 100, 3.2500 ± 0.0100 bits/dim (64 validation images, σ² = beta_tilde); ε-prediction, linear T = 1,000. "
        f"Champion: version 1: the first of {name}"
    )
    assert version.run_id == run.info.run_id
    logged = client.get_logged_model(model_id)
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": name, "version": version.version}]
    assert logged.source_run_id == run.info.run_id


def test_registering_again_changes_nothing(client, run, directory, tmp_path):
    name = f"ddpm-{tmp_path.name}"
    first = register(client, run, payload(name), directory)
    once = inventory(client, run, name)
    assert register(client, run, payload(name), directory) == first
    assert inventory(client, run, name) == once
    assert once["models"] == [("hash-1", "READY")]
    assert once["versions"] == {1: "hash-1"}


STEPS = [
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "log_outputs",
    "create_registered_model",
    "create_model_version",
    "set_logged_model_tags",
    "set_registered_model_alias",
    "update_model_version",
    "set_model_version_tag",
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_any_step_registers_nothing_twice(client, run, directory, tmp_path, monkeypatch, step, moment):
    name = f"ddpm-{tmp_path.name}"
    real = getattr(MlflowClient, step)

    def killed(self, *args, **kwargs):
        if moment == "after":
            real(self, *args, **kwargs)
        raise KeyboardInterrupt(step)

    monkeypatch.setattr(MlflowClient, step, killed)
    with pytest.raises(KeyboardInterrupt, match=step):
        register(client, run, payload(name), directory)
    monkeypatch.undo()
    mlflow.set_tracking_uri(client.tracking_uri)
    model_id = register(client, run, payload(name), directory)
    assert inventory(client, run, name) == {
        "models": [("hash-1", "READY")],
        "outputs": [model_id],
        "versions": {1: "hash-1"},
        "aliases": {"champion": 1},
    }


def test_a_version_that_is_better_beyond_the_intervals_is_champion(client, run, directory, tmp_path):
    name = f"ddpm-{tmp_path.name}"

    def champion(step, **scores):
        model = payload(name, f"hash-{step}", step, validation=validation(**scores))
        return champion_after(client, run, model, directory)

    assert champion(100, total=5.17) == f"version 1: the first of {name}"
    better = "4.6100 ± 0.0196 bits/dim is below its 5.1700 ± 0.0196 (95%, the same 64 validation images)"
    assert champion(200, total=4.61) == f"now version 2, was 1: {better}"
    assert champion(300, total=4.58).startswith(
        "stays version 2: 4.5800 ± 0.0196 bits/dim of version 3 is not clearly below its 4.6100 ± 0.0196 (95%); "
        "compare them with jobs/evaluate.py --promote"
    )
    assert champion(400, total=5.9).startswith("stays version 2: 5.9000")
    assert inventory(client, run, name)["aliases"] == {"champion": 2}
    assert champion(500, total=4.0).startswith("now version 5, was 2: 4.0000")
    assert inventory(client, run, name)["aliases"] == {"champion": 5}
    assert client.get_model_version(name, "2").tags["ddpm.champion"] == f"now version 2, was 1: {better}"
    latest = mlflow.artifacts.download_artifacts(f"models:/{name}/latest", dst_path=str(tmp_path / "latest"))
    assert mlflow.models.Model.load(latest).model_id in inventory(client, run, name)["outputs"]


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        ({"dataset_id": "e" * 64}, "validated differently, dataset_id dddddddddddd and eeeeeeeeeeee for version 2"),
        (
            {"dataset_id": "d" * 64 + "/held-out/20"},
            "validated differently, dataset_id dddddddddddd and dddddddddddd/h",
        ),
        ({"num_images": 32}, "validated differently, num_images 64 and 32 for version 2"),
        ({"sigma2": "beta"}, "validated differently, sigma2 beta_tilde and beta for version 2"),
        ({"standard_error": None}, "one validation image tells no error of version 2"),
        ({"standard_error": float("inf")}, "one validation image tells no error of version 2"),
        (None, "version 2 has no validation on record"),
    ],
)
def test_what_cannot_be_compared_leaves_the_champion_and_says_why(client, run, directory, tmp_path, scores, why):
    name = f"ddpm-{tmp_path.name}"
    register(client, run, payload(name, validation=validation(5.0)), directory)
    second = None if scores is None else validation(1.0, **scores)
    said = champion_after(client, run, payload(name, "hash-2", 200, validation=second), directory)
    assert said.startswith(f"stays version 1: {why}")
    assert inventory(client, run, name)["aliases"] == {"champion": 1}


def test_models_of_different_kinds_compete_each_by_the_bound_of_its_kind(client, run, directory, tmp_path):
    """A VDM against a DDPM, then back: upper bounds of the same images' bits, and no bound that serves both."""
    name = f"ddpm-{tmp_path.name}"

    def champion(step, total, bound):
        scores = validation(total, sigma2=bound)
        return champion_after(client, run, payload(name, f"hash-{step}", step, validation=scores), directory)

    champion(1, 5.17, "beta_tilde")
    assert champion(2, 2.1, "steps_50").startswith(
        "stays version 1: validated differently, sigma2 beta_tilde and steps_50 for version 2"
    )
    below = "2.1200 ± 0.0196 bits/dim is below its 5.1700 ± 0.0196"
    bounds = "the same 64 validation images, bounds continuous and beta_tilde"
    assert champion(3, 2.12, "continuous") == f"now version 3, was 1: {below} (95%, {bounds})"
    assert champion(4, 2.5, "learned").startswith("stays version 3: 2.5000")
    assert champion(5, 1.0, "beta").startswith("stays version 3: validated differently")


def test_versions_registered_before_validation_was_recorded_keep_the_alias(client, run, directory, tmp_path):
    name = f"ddpm-{tmp_path.name}"
    client.create_registered_model(name)
    client.create_model_version(name, source=str(directory), tags={"ddpm.model_id": "old"})
    client.set_registered_model_alias(name, "champion", "1")
    said = champion_after(client, run, payload(name, "new", validation=validation(1.0)), directory)
    assert said.startswith("stays version 1: version 1 has no validation on record; compare them with")


def test_whoever_moves_the_alias_has_the_last_word(client, run, directory, tmp_path):
    """Registering again, as a finished training does that is run once more, decides nothing anew."""
    name = f"ddpm-{tmp_path.name}"
    models = [payload(name, f"hash-{step}", step, validation=validation(500 / step)) for step in (100, 200)]
    for model in models:
        register(client, run, model, directory)
    client.set_registered_model_alias(name, "champion", "1")
    assert champion_after(client, run, models[1], directory) == "version 1"
    client.delete_registered_model_alias(name, "champion")
    assert champion_after(client, run, models[1], directory) == "none, the alias was taken away"
    assert inventory(client, run, name)["aliases"] == {}


def evaluated(client, run, name, model_id, job="eval", **metrics):
    """A finished evaluation of a model, as `jobs/evaluate.py` records it, or another job."""
    found = client.get_experiment_by_name(f"{name}/{job}")
    experiment = found.experiment_id if found else client.create_experiment(f"{name}/{job}")
    tags = {"ddpm.model_id": model_id, "ddpm.dataset_id": "d"}
    made = client.create_run(experiment, tags=tags).info.run_id
    for metric, value in metrics.items():
        client.log_metric(made, metric, value)
    client.set_terminated(made, "FINISHED")


NOW = {
    "low/data_set.beta": 3.0,
    "high/data_set.beta": 3.2,
    "low/population.beta": 2.9,
    "high/population.beta": 3.3,
}
FORMER = {
    "eval_ci/data_set.beta.low": 3.0,
    "eval_ci/data_set.beta.high": 3.2,
    "eval_ci/population.beta.low": 2.9,
    "eval_ci/population.beta.high": 3.3,
}
GIVEN = {"low/given_images.beta": 3.09, "high/given_images.beta": 3.11}


@pytest.mark.parametrize("metrics", [NOW, FORMER], ids=["now", "of version 0.1"])
def test_promotion_compares_with_the_champions_evaluation(client, run, directory, tmp_path, metrics):
    name = f"ddpm-{tmp_path.name}"
    asked = client.tracking_uri, name, f"{name}/eval"
    with pytest.raises(TrackingError, match=r"no version of .* is the model one"):
        check_promotable(*asked, "one", "d", 64, "beta", draws_known=True)
    for model_id in ("one", "two"):
        register(client, run, payload(name, model_id), directory)
    check_promotable(*asked, "one", "d", 64, "beta", draws_known=True)  # it is the champion: nothing to compare
    with pytest.raises(TrackingError, match="has no evaluation on data set d with σ² = beta; evaluate models:/"):
        check_promotable(*asked, "two", "d", 64, "beta", draws_known=True)
    evaluated(client, run, name, "one", **{"eval/num_images": 64.0}, **metrics)
    with pytest.raises(TrackingError, match="one draw tells no Monte-Carlo error"):
        check_promotable(*asked, "two", "d", 64, "beta", draws_known=True)
    check_promotable(*asked, "two", "d", 128, "beta", draws_known=True)  # other images: intervals for the data set
    said = promote_if_better(*asked, "two", "d", 128, "beta", {"given_images": None, "data_set": (2.9, 3.1)})
    assert said == "stays version 1: 2.9000..3.1000 is not below its 3.0000..3.2000"
    evaluated(client, run, name, "one", **{"eval/num_images": 64.0}, **metrics, **GIVEN)
    check_promotable(*asked, "two", "d", 64, "beta", draws_known=True)
    with pytest.raises(TrackingError, match="one draw tells no Monte-Carlo error"):
        check_promotable(*asked, "two", "d", 64, "beta", draws_known=False)
    intervals = {"given_images": (3.06, 3.08), "data_set": (2.9, 3.1)}
    assert promote_if_better(*asked, "two", "d", 64, "beta", intervals) == "now version 2, was 1"
    decided = "now version 2, was 1: by an evaluation on data set d"
    assert client.get_model_version(name, "2").tags["ddpm.champion"] == decided
    assert (
        client.get_model_version(name, "2").description
        == f"step 100; ε-prediction, linear T = 1,000. Champion: {decided}"
    )
    assert inventory(client, run, name)["aliases"] == {"champion": 2}


def test_promotion_prefers_the_same_bound_and_else_takes_each_kinds_own(client, run, directory, tmp_path):
    name = f"ddpm-{tmp_path.name}"
    for model_id in ("one", "two"):
        register(client, run, payload(name, model_id), directory)
    asked = client.tracking_uri, name, f"{name}/eval", "two", "d", 64
    evaluated(client, run, name, "one", **NOW)  # under beta, which is a choice, not a kind
    with pytest.raises(TrackingError, match=r"no evaluation on data set d with continuous time; .* \(with sigma2 auto"):
        check_promotable(*asked, "continuous", draws_known=True)
    own = {metric.replace("beta", "beta_tilde"): value for metric, value in NOW.items()}
    evaluated(client, run, name, "one", **{"eval/num_images": 64.0}, **own)
    intervals = {"given_images": None, "data_set": (2.1, 2.9)}
    with pytest.raises(TrackingError, match=r"no evaluation on data set d with 50 steps; evaluate models:.* first$"):
        promote_if_better(*asked, "steps_50", intervals)
    # the images are the same, but the champion has no interval for exactly these
    with pytest.raises(TrackingError, match="one draw tells no Monte-Carlo error"):
        promote_if_better(*asked, "continuous", intervals)
    # the newest evaluation is by another bound, of higher bits: the one by the same bound counts
    same = {metric.replace("beta", "continuous"): value - 1.0 for metric, value in NOW.items()}
    evaluated(client, run, name, "one", **same)
    evaluated(client, run, name, "one", **own)
    assert promote_if_better(*asked, "continuous", intervals).startswith("stays version 1: 2.1000..2.9000 is not below")
    assert promote_if_better(*asked, "learned", intervals) == "now version 2, was 1"
    decided = "now version 2, was 1: by an evaluation on data set d, bounds learned and beta_tilde"
    assert client.get_model_version(name, "2").tags["ddpm.champion"] == decided


def test_promotion_by_another_metric_compares_with_the_champions_newest(client, run, directory, tmp_path):
    name, metrics = f"ddpm-{tmp_path.name}", ("low/fd.random_conv_64.1a2b3c4d", "high/fd.random_conv_64.1a2b3c4d")
    asked = client.tracking_uri, name, f"{name}/quality"
    for model_id in ("one", "two"):
        register(client, run, payload(name, model_id), directory)
    assert promote_by_metric(*asked, "one", metrics, None) == "version 1 is the champion already"
    evaluated(client, run, name, "one", **dict.fromkeys(metrics, 2.0))  # bits/dim are of another experiment
    with pytest.raises(TrackingError, match=r"has no fd.random_conv_64.1a2b3c4d; compare samples of models:/"):
        promote_by_metric(*asked, "two", metrics, None)
    evaluated(client, run, name, "one", job="quality", **dict(zip(metrics, (2.0, 2.2), strict=True)))
    assert promote_by_metric(*asked, "two", metrics, None) == ""
    assert (
        promote_by_metric(*asked, "two", metrics, (1.9, 2.05)) == "stays version 1: 1.9..2.05 is not below its 2..2.2"
    )
    assert promote_by_metric(*asked, "two", metrics, (1.8, 1.9)) == "now version 2, was 1"
    assert (
        client.get_model_version(name, "2").tags["ddpm.champion"]
        == "now version 2, was 1: by fd.random_conv_64.1a2b3c4d"
    )


def test_a_refused_name_is_reported_as_mlflow_reports_it(client, run, directory):
    with pytest.raises(MlflowException) as caught:
        register(client, run, payload("a/b"), directory)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
