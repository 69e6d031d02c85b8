"""One curve is one training: attempts under one key that are made from different things are different MLflow runs."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from support.mlflow_store import (
    Lines,
    clean_environment,  # noqa: F401  an autouse fixture
    curve,
    report_steps,
    start,
    the_run,
    write_png,
)

from pipelines.storage.location import Location
from pipelines.tracking import tracker as tracking
from pipelines.tracking.mlflow_run import RUN_KEY_TAG, MlflowRun
from pipelines.tracking.spool import Spool, SpoolState

TAG = "ddpm.config_hash"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """One SQLite store for all tests of this file: making one takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"
    MlflowClient(uri).search_experiments()
    return uri


def runs(tmp_path, uri):
    """The MLflow run of each value of the tag."""
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    assert len({run.data.tags[TAG] for run in found}) == len(found)
    return client, {run.data.tags[TAG]: run for run in found}


def attempt(tmp_path, uri, config, first, last, status="KILLED", **options):
    tracker = start(tmp_path, uri, made_from={TAG: config}, **options)
    tracker.spool.append("params", values={"learning_rate": config})
    tracker.spool.append("tags", values={TAG: config})
    report_steps(tracker.spool, first, last)
    return tracker.finish(status)


def test_a_restart_under_another_config_is_another_run_and_the_abandoned_one_is_marked(tmp_path, database):
    lines = Lines()
    attempt(tmp_path, database, "0.1", 0, 40)
    report = attempt(tmp_path, database, "0.2", 0, 10, "FINISHED", notify=lines)
    client, found = runs(tmp_path, database)
    first, second = found["0.1"], found["0.2"]
    assert curve(client, first) == [(step, step / 4) for step in range(40)]
    assert curve(client, second) == [(step, step / 4) for step in range(10)]
    assert (first.data.params, second.data.params) == ({"learning_rate": "0.1"}, {"learning_rate": "0.2"})
    assert not any(name.startswith("ddpm.changed.") for name in second.data.tags)
    assert (first.info.run_name, first.info.status) == ("a run (abandoned)", "KILLED")
    assert first.data.tags["ddpm.abandoned"] == "true"
    assert (second.info.run_name, second.info.status) == ("a run", "FINISHED")
    assert "ddpm.abandoned" not in second.data.tags
    assert report.run_id == second.info.run_id
    (link,) = [line for line in lines.seen if line.startswith("tracking: http")]
    assert second.info.run_id in link
    assert sum("another configuration or other data" in line for line in lines.seen) == 1


def test_a_restart_under_the_same_config_is_the_same_run(tmp_path, database):
    attempt(tmp_path, database, "0.1", 0, 40)
    attempt(tmp_path, database, "0.1", 0, 60)
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(60)]
    assert run.data.tags["ddpm.attempt"] == "2"


def test_a_finished_run_is_not_called_abandoned_when_its_output_is_made_from_something_else(tmp_path, database):
    attempt(tmp_path, database, "0.1", 0, 5, "FINISHED")
    attempt(tmp_path, database, "0.2", 0, 5, "FINISHED")
    _, found = runs(tmp_path, database)
    assert {run.info.run_name for run in found.values()} == {"a run"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}


def test_what_an_outage_kept_goes_to_the_run_that_it_belongs_to(tmp_path, database):
    assert attempt(tmp_path, "http://127.0.0.1:1", "0.1", 0, 30).pending > 0
    assert attempt(tmp_path, "http://127.0.0.1:1", "0.2", 0, 10).pending > 0
    attempt(tmp_path, database, "0.2", 5, 20, "FINISHED")
    client, found = runs(tmp_path, database)
    assert curve(client, found["0.1"]) == [(step, step / 4) for step in range(30)]
    assert curve(client, found["0.2"]) == [(step, step / 4) for step in range(20)]
    assert found["0.2"].data.tags["ddpm.attempt"] == "2"


def test_another_machine_finds_the_run_of_the_same_config(tmp_path, database):
    for machine, config, first, last in (("a", "0.1", 0, 30), ("b", "0.2", 0, 10), ("c", "0.2", 5, 20)):
        attempt(tmp_path, database, config, first, last, spool=tmp_path / machine / "spool.jsonl")
    client, found = runs(tmp_path, database)
    assert curve(client, found["0.1"]) == [(step, step / 4) for step in range(30)]
    assert curve(client, found["0.2"]) == [(step, step / 4) for step in range(20)]


def test_what_waits_in_the_mirror_goes_to_the_run_that_it_belongs_to(tmp_path, database):
    blocked = tmp_path / "mlartifacts"
    blocked.write_text("a file where the store's directory should be")
    options = {"mirror": Location.parse(tmp_path / "run" / "spool.jsonl")}
    tracker = start(tmp_path, database, made_from={TAG: "0.1"}, spool=tmp_path / "a" / "spool.jsonl", **options)
    tracker.spool.append("image", key="grid", step=0, path=write_png(tmp_path / "grid.png"))
    assert tracker.finish("KILLED").pending == 1
    blocked.unlink()
    attempt(tmp_path, database, "0.2", 0, 10, "FINISHED", spool=tmp_path / "b" / "spool.jsonl", **options)
    client, found = runs(tmp_path, database)
    pictures = {name: len(client.list_artifacts(run.info.run_id, "images")) for name, run in found.items()}
    assert pictures == {"0.1": 2, "0.2": 0}  # the picture and its thumbnail
    assert {run.data.tags["ddpm.attempt"] for run in found.values()} == {"1"}


def test_what_the_run_before_loses_because_its_store_still_fails_is_told(tmp_path, database):
    (tmp_path / "mlartifacts").write_text("a file where the store's directory should be")
    tracker = start(tmp_path, database, made_from={TAG: "0.1"})
    tracker.spool.append("image", key="grid", step=0, path=write_png(tmp_path / "grid.png"))
    assert tracker.finish("KILLED").pending == 1
    lines = Lines()
    report = attempt(tmp_path, database, "0.2", 0, 10, "FINISHED", notify=lines)
    assert (report.pending, report.refused) == (0, 1)
    assert sum("1 records of the run before are left out" in line for line in lines.seen) == 1


def test_a_run_of_a_version_that_did_not_say_what_it_was_made_from_is_continued(tmp_path, database):
    tracker = start(tmp_path, database)
    report_steps(tracker.spool, 0, 10)
    tracker.finish("KILLED")
    attempt(tmp_path, database, "0.1", 5, 20)
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(20)]
    attempt(tmp_path, database, "0.2", 0, 5)  # by now it is known
    assert len(runs(tmp_path, database)[1]) == 2
    assert run.data.tags[RUN_KEY_TAG] == f"key of {tmp_path.name}"


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    attempts=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 30), st.booleans()), min_size=1, max_size=5),
)
@example([("b", 1, False), ("a", 1, False), ("a", 1, False), ("b", 1, False), ("a", 1, True)])
def test_any_history_of_configs_and_lost_states_gives_each_its_own_curve(tmp_path_factory, database, attempts):
    """Each attempt begins at step 0, and perhaps loses what it knew of the server."""
    tmp_path = tmp_path_factory.mktemp("history")
    spool, identity = Spool(tmp_path / "spool.jsonl"), {"run_key": tmp_path.name, "experiment": tmp_path.name}
    identity |= {"run_name": "r", "tracking_uri": database, "artifact_root": str(tmp_path)}
    reached, count = {}, {}
    for config, steps, forget in attempts:
        spool.append("start", **identity, made_from={TAG: config})
        report_steps(spool, 0, steps)
        reached[config], count[config] = max(reached.get(config, 0), steps), count.get(config, 0) + 1
        if forget:
            SpoolState.path_for(spool.path).unlink(missing_ok=True)
        run = MlflowRun(spool.path, identity, database, SpoolState.load(spool.path, database), print)
        run.connect()
        tracking.send_new_records(spool.path, run)
    client, found = runs(tmp_path, database)
    assert {name: len(curve(client, run)) for name, run in found.items()} == reached
    assert {name: int(run.data.tags["ddpm.attempt"]) for name, run in found.items()} == count
    abandoned = {name for name, run in found.items() if "ddpm.abandoned" in run.data.tags}
    assert abandoned == found.keys() - {attempts[-1][0]}


def test_a_training_says_what_it_is_made_from(tmp_path: Path, database: str) -> None:
    """The training's driver, without Ray: two attempts that saved nothing, the second one under another config."""
    from pipelines.data.opening import ensure_embedded
    from pipelines.training.checks import Checked
    from pipelines.training.complete import made_from
    from pipelines.training.config import OptimizationConfig, TrainConfig, TrainJob, TrainTrackingConfig
    from pipelines.training.tracked import announce, open_tracker

    root = Location.parse(tmp_path)
    data = ensure_embedded("embedded://digits/train", root / "data")
    run = root / "runs" / "r"
    tracking = TrainTrackingConfig(uri=database, experiment=tmp_path.name)
    config = TrainConfig(name="r", root=str(tmp_path), tracking=tracking)
    for learning_rate, steps in ((1e-3, 100), (1e-3, 200), (2e-3, 200)):
        config = replace(config, train=OptimizationConfig(learning_rate=learning_rate, steps=steps))
        job = TrainJob(config, run.uri, data.location.uri, None, "version")
        checked = Checked(job, data, None, made_from(config, data, None), [], None)
        tracker = open_tracker(checked, lambda record: None)
        announce(tracker.spool, checked)
        tracker.finish("KILLED")
    _, found = runs(tmp_path, database)
    by_rate = {found.data.params["train.learning_rate"]: found for found in found.values()}
    assert by_rate.keys() == {"0.001", "0.002"}
    assert by_rate["0.001"].data.tags["ddpm.changed.train.steps"] == "200"  # more of the same training
    assert by_rate["0.001"].data.tags["ddpm.abandoned"] == "true"
    assert "ddpm.abandoned" not in by_rate["0.002"].data.tags
