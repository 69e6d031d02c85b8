"""Tracking into a real MLflow database: everything arrives, nothing twice, through any kill and resume."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from support.mlflow_store import (
    PATIENCE_S,
    Lines,
    clean_environment,  # noqa: F401  an autouse fixture
    curve,
    report_steps,
    start,
    the_run,
    write_model,
    write_png,
)
from support.small_disk import small_disk

from pipelines.cli.errors import DDPMError, RequestMismatchError
from pipelines.storage.location import Location
from pipelines.tracking import tracker as tracking
from pipelines.tracking.mlflow_run import MlflowRun
from pipelines.tracking.spool import Spool, SpoolState, iter_records


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """One SQLite store for all tests of this file: making one takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"
    MlflowClient(uri).search_experiments()
    return uri


def test_the_end_of_a_run_waits_for_room_on_a_full_disk(tmp_path, database):
    with small_disk(tmp_path, "256k") as disk:
        tracker = start(disk, database)
        ballast = disk / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        report_steps(tracker.spool, 0, 1000)
        assert tracker.spool.flush() > 500, "the disk is full"
        reports = []
        ending = threading.Thread(target=lambda: reports.append(tracker.finish("FINISHED", PATIENCE_S)))
        ending.start()
        ballast.unlink()
        ending.join()
        assert (reports[0].pending, reports[0].advice) == (0, None)
        client, run = the_run(disk, database)
        assert run.info.status == "FINISHED"
        assert curve(client, run) == [(step, step / 4) for step in range(1000)]


def test_everything_a_run_records_is_in_mlflow_with_the_times_of_the_spool(tmp_path, database):
    heard = []
    tracker = start(tmp_path, database, listener=heard.append)
    spool, picture = tracker.spool, write_png(tmp_path / "grid.png")
    digest = "f" * 64
    spool.append("params", values={f"p{i}": i for i in range(250)})  # more than one request may hold
    spool.append("tags", values={"ddpm.job": "train"})
    spool.append("dataset", name="digits", digest=digest, uri="s3://bucket/digits", context="training")
    report_steps(spool, 0, 1500)
    spool.append("image", key="samples/grid", step=0, path=picture)
    spool.append("artifact", path=picture, artifact_path="report")
    spool.append("metrics", step=1499, values={"eval/bits_per_dim": 3.5})
    spool.append(
        "model",
        uri=write_model(tmp_path / "model"),
        name=f"m-{tmp_path.name}",
        model_id="hash",
        step=1499,
        metrics={"eval/bits_per_dim": 3.5, "eval/L_T": 0.001},
        dataset={"name": "digits", "digest": digest},
    )
    spool.append("note", markdown="**3.5 bits/dim**")
    report = tracker.finish("FINISHED")
    assert (report.pending, report.refused, report.advice) == (0, 0, None)
    assert report.champion == f"version 1: the first of m-{tmp_path.name}"
    client, run = the_run(tmp_path, database)
    assert run.info.status == "FINISHED"
    assert (run.data.params["p7"], len(run.data.params)) == ("7", 250)
    assert run.data.tags["ddpm.job"] == "train"
    assert run.data.tags["mlflow.note.content"] == "**3.5 bits/dim**"
    assert curve(client, run) == [(step, step / 4) for step in range(1500)]
    stamped = {r.payload["step"]: r.timestamp_ms for r in heard if "train/loss" in r.payload.get("values", {})}
    assert {p.step: p.timestamp for p in client.get_metric_history(run.info.run_id, "train/loss")} == stamped
    assert [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs] == [("digits", "f" * 36)]
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert [path.split("+timestamp")[0] for path in images] == ["images/samples~grid+step+0"] * 2
    assert [file.path for file in client.list_artifacts(run.info.run_id, "report")] == ["report/grid.png"]
    (output,) = run.outputs.model_outputs
    linked = client.get_logged_model(output.model_id).metrics
    assert {(m.key, m.value, m.dataset_name) for m in linked} == {
        ("eval/bits_per_dim", 3.5, "digits"),
        ("eval/L_T", 0.001, "digits"),
    }
    assert curve(client, run, "eval/bits_per_dim") == [(1499, 3.5)]  # linking a point does not double it
    ends = [record for record in iter_records(spool.path) if record.kind == "finish"]
    assert run.info.end_time == ends[0].timestamp_ms
    assert [record.kind for record in heard if record.kind != "metrics"][-2:] == ["note", "finish"]


def test_a_run_begun_under_former_names_of_metrics_keeps_them(tmp_path, database):
    former = {"train/loss": 1.0, "train/grad_norm": 2.0, "perf/workers": 3.0, "validation/beta/L_0": 4.0}
    now = {"train/loss": 5.0, "grad_norm": 6.0, "workers": 7.0, "validation/beta/terms/decoder": 8.0, "epoch": 9.0}
    for step, values in ((1, former), (2, now)):
        tracker = start(tmp_path, database)
        tracker.spool.append("metrics", step=step, values=values)
        assert tracker.finish("KILLED").pending == 0
    client, run = the_run(tmp_path, database)
    curves = {key: curve(client, run, key) for key in run.data.metrics}
    assert curves == {
        "train/loss": [(1, 1.0), (2, 5.0)],
        "train/grad_norm": [(1, 2.0), (2, 6.0)],
        "perf/workers": [(1, 3.0), (2, 7.0)],
        "validation/beta/L_0": [(1, 4.0), (2, 8.0)],
        "epoch": [(2, 9.0)],
    }


@pytest.mark.parametrize(
    ("job", "suffix"), [("train", ""), ("evaluate", "/eval"), ("sample", "/samples"), ("encode", "/encodings")]
)
def test_an_experiment_has_a_description_and_a_table_with_the_columns_that_matter(tmp_path, database, job, suffix):
    experiment = f"{tmp_path.name}{suffix}"
    start(tmp_path, database, run_key=f"{job}/out", experiment=experiment).finish("FINISHED")
    client = MlflowClient(database)
    found = client.get_experiment_by_name(experiment)
    link = f"#/experiments/{found.experiment_id}/runs?compareRunsMode=TABLE&viewStateShareKey=ddpm&workflowType=machine"
    assert f"**{tmp_path.name}**" in found.tags["mlflow.note.content"]
    assert f"({link}" in found.tags["mlflow.note.content"]
    columns = json.loads(found.tags["mlflow.sharedViewState.ddpm"])["selectedColumns"]
    view = json.loads(found.tags["mlflow.sharedViewState.ddpm"])
    assert (view["columnOrder"][-len(columns) :], set(view["columnWidths"])) == (columns, set(columns))
    assert "metrics.`images_per_second`" in columns
    assert [column for column in columns if "bits_per_dim" in column] or suffix in ("/samples", "/encodings")
    client.set_experiment_tag(found.experiment_id, "mlflow.note.content", "mine")
    start(tmp_path, database, run_key=f"{job}/other", experiment=experiment, spool=tmp_path / "b").finish("FINISHED")
    assert client.get_experiment_by_name(experiment).tags["mlflow.note.content"] == "mine", "a person's stays"


def test_who_may_not_describe_an_experiment_still_gets_the_run(tmp_path, database, monkeypatch):
    def refuse(client: MlflowClient, experiment_id: str, key: str, value: object) -> None:
        raise MlflowException("Permission denied", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    told: list[str] = []
    tracker = start(tmp_path, database, run_key="train/out", notify=told.append)
    report_steps(tracker.spool, 0, 5)
    report = tracker.finish("FINISHED")
    assert (report.pending, report.refused) == (0, 0)
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(5)]
    assert len([line for line in told if "gets no description (" in line]) == 1


def test_a_resumed_run_continues_its_curve(tmp_path, database):
    picture = write_png(tmp_path / "grid.png")
    for attempt, (first, last) in enumerate([(0, 30), (20, 50), (10, 60)]):
        tracker = start(tmp_path, database)
        tracker.spool.append("params", values={"seed": 0, "world_size": 8 // 2**attempt})
        tracker.spool.append("image", key="grid", step=20, path=picture)
        report_steps(tracker.spool, first, last)
        report = tracker.finish("KILLED" if attempt < 2 else "FINISHED")
        assert (report.pending, report.refused) == (0, 0)
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(60)]
    assert run.info.status == "FINISHED"
    assert run.data.tags["ddpm.attempt"] == "3"
    assert run.data.params == {"seed": "0", "world_size": "8"}
    assert run.data.tags["ddpm.changed.world_size"] == "2"
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2  # the picture and its thumbnail


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(attempts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=5))
def test_any_history_of_resumes_and_lost_states_gives_each_step_once(tmp_path_factory, database, attempts):
    """Each attempt goes back to a checkpoint, trains on, and perhaps loses what it knew of the server."""
    tmp_path = tmp_path_factory.mktemp("history")
    spool = Spool(tmp_path / "spool.jsonl")
    identity = {"run_key": tmp_path.name, "experiment": tmp_path.name, "run_name": "r", "tracking_uri": database}
    identity["artifact_root"] = str(tmp_path)
    reached = 0
    for back, steps, forget in attempts:
        spool.append("start", **identity)
        first = max(0, reached - back)
        report_steps(spool, first, first + steps)
        reached = max(reached, first + steps)
        if forget:
            SpoolState.path_for(spool.path).unlink(missing_ok=True)
        run = MlflowRun(spool.path, identity, database, SpoolState.load(spool.path, database), print)
        run.connect()
        tracking.send_new_records(spool.path, run)
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(reached)]
    assert run.data.tags["ddpm.attempt"] == str(len(attempts))


@pytest.mark.slow
def test_a_driver_killed_by_sigkill_loses_and_doubles_nothing(tmp_path, database):
    code = """
import sys, time
from pathlib import Path
from pipelines.tracking.tracker import Tracker
root, uri, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tracker = Tracker(root / "spool.jsonl", run_key="k", experiment=root.name, run_name="r", root=root,
                  tracking_uri=uri, notify=lambda line: print(line, flush=True))
for step in range(first, last):
    tracker.spool.append("metrics", step=step, values={"train/loss": step / 4})
    time.sleep(0.005)  # the pace of a training loop
sys.stdin.read()  # the driver to be killed waits here, having more to do
report = tracker.finish("FINISHED")
print("pending", report.pending, flush=True)
"""

    def driver(first, last, stdin):
        command = [sys.executable, "-c", code, tmp_path, database, str(first), str(last)]
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, **pipes, text=True)

    killed = driver(0, 4000, subprocess.PIPE)
    assert killed.stdout.readline().startswith("tracking: ")  # connected: it is sending now
    client, run = the_run(tmp_path, database)
    deadline = time.monotonic() + PATIENCE_S
    while len(curve(client, run)) < 100:
        assert time.monotonic() < deadline
    killed.kill()
    killed.communicate()
    client, run = the_run(tmp_path, database)
    assert run.info.status == "RUNNING"
    reached = max(r.payload["step"] for r in iter_records(tmp_path / "spool.jsonl") if r.kind == "metrics") + 1
    assert reached >= 100
    resumed = driver(max(0, reached - 150), reached + 200, subprocess.DEVNULL)
    out, _ = resumed.communicate(timeout=PATIENCE_S)
    assert out.endswith("pending 0\n")
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(reached + 200)]
    assert run.info.status == "FINISHED"
    assert run.data.tags["ddpm.attempt"] == "2"


def test_one_run_has_one_driver(tmp_path, database):
    tracker = start(tmp_path, database)
    with pytest.raises(DDPMError, match=rf"another job \(pid {os.getpid()}\)"):
        start(tmp_path, database)
    tracker.finish("FINISHED")
    with pytest.raises(RequestMismatchError, match="belongs to run"):
        start(tmp_path, database, run_key="another")
    start(tmp_path, database).finish("FINISHED")


def test_a_deleted_run_is_replaced_by_one_with_the_whole_history(tmp_path, database):
    tracker = start(tmp_path, database)
    report_steps(tracker.spool, 0, 20)
    first = tracker.finish("KILLED").run_id
    MlflowClient(database).delete_run(first)
    tracker = start(tmp_path, database)
    report_steps(tracker.spool, 10, 30)
    tracker.finish("FINISHED")
    client, run = the_run(tmp_path, database)
    assert run.info.run_id != first
    assert curve(client, run) == [(step, step / 4) for step in range(30)]


def test_a_new_machine_continues_from_the_mirror(tmp_path, database):
    mirror, lines = Location.parse(tmp_path / "run" / "spool.jsonl"), Lines()
    tracker = start(tmp_path, database, spool=tmp_path / "a" / "spool.jsonl", mirror=mirror, notify=lines)
    report_steps(tracker.spool, 0, 20)
    tracker.finish("KILLED")
    # Another machine can go on, but does not find the run in MLflow.
    assert lines.seen[0].startswith("tracking: runs and registered models are on this machine only, in /")
    assert not mirror.exists()  # nothing was pending
    lines = Lines()
    tracker = start(tmp_path, "http://127.0.0.1:1", spool=tmp_path / "a" / "spool.jsonl", mirror=mirror, notify=lines)
    report_steps(tracker.spool, 15, 40)
    assert tracker.finish("KILLED").pending > 0
    assert not any("on this machine only" in line for line in lines.seen)
    tracker = start(tmp_path, database, spool=tmp_path / "b" / "spool.jsonl", mirror=mirror)
    report_steps(tracker.spool, 35, 60)
    assert tracker.finish("FINISHED").pending == 0
    assert mirror.read_bytes() == b""
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(60)]


def test_a_new_machine_without_any_spool_asks_mlflow_what_it_has(tmp_path, database):
    for machine, first, last in (("a", 0, 40), ("b", 20, 60), ("c", 10, 80)):
        tracker = start(tmp_path, database, spool=tmp_path / machine / "spool.jsonl")
        report_steps(tracker.spool, first, last)
        tracker.finish("FINISHED")
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(80)]
    assert run.data.tags["ddpm.attempt"] == "3"


def test_one_refused_record_costs_that_record_only(tmp_path, database):
    lines = Lines()
    tracker = start(tmp_path, database, notify=lines)
    report_steps(tracker.spool, 0, 10)
    tracker.spool.append("metrics", step=3, values={"bad name?": 1.0})
    tracker.spool.append("metrics", step=3, values={"train/text": "high"})
    tracker.spool.append("artifact", path=str(tmp_path / "missing.txt"))
    report_steps(tracker.spool, 10, 20)
    report = tracker.finish("FINISHED")
    assert (report.pending, report.refused) == (0, 3)
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(20)]
    assert sum("metrics record" in line for line in lines.seen) == 1
    assert sum("missing.txt: does not exist" in line for line in lines.seen) == 1


def test_a_broken_artifact_store_delays_pictures_not_metrics(tmp_path, database):
    blocked = tmp_path / "mlartifacts"
    blocked.write_text("a file where the store's directory should be")
    mirror, lines = Location.parse(tmp_path / "run" / "spool.jsonl"), Lines()
    tracker = start(tmp_path, database, spool=tmp_path / "a" / "spool.jsonl", notify=lines, mirror=mirror)
    tracker.spool.append("image", key="grid", step=0, path=write_png(tmp_path / "grid.png"))
    report_steps(tracker.spool, 0, 20)
    report = tracker.finish("FINISHED")
    assert (report.pending, report.refused) == (1, 0)
    assert sum("kept for a later try" in line for line in lines.seen) == 1
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(20)]
    blocked.unlink()
    elsewhere = start(tmp_path, database, spool=tmp_path / "b" / "spool.jsonl", mirror=mirror)
    assert elsewhere.finish("FINISHED").pending == 0
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2
    tracking.replay(tracker.spool.path, notify=lines)  # the first machine's spool still has it, too
    assert SpoolState.load(tracker.spool.path, database).deferred == []
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2


def test_a_failing_display_is_said_once_and_stops_nothing(tmp_path, database):
    lines = Lines()

    def broken(record):
        raise RuntimeError("no terminal")

    tracker = start(tmp_path, database, notify=lines, listener=broken)
    report_steps(tracker.spool, 0, 5)
    assert tracker.finish("FINISHED").pending == 0
    assert sum("no terminal" in line for line in lines.seen) == 1


def test_the_listener_can_be_waited_for_and_its_own_records_stay_out_of_mlflow(tmp_path, database):
    heard = []
    tracker = start(tmp_path, database, listener=heard.append)
    report_steps(tracker.spool, 0, 2000)
    tracker.spool.append("event", message="worker 1 was lost")
    tracker.spool.append("fatal", error="ClusterError", message="gave up")
    assert tracker.catch_up(PATIENCE_S)
    assert [record.kind for record in heard] == ["start", *["metrics"] * 2000, "event", "fatal"]
    report = tracker.finish("FAILED")
    assert (report.pending, report.refused) == (0, 0)
    assert the_run(tmp_path, database)[1].info.status == "FAILED"


def test_a_run_in_an_object_store_is_tracked_from_there(tmp_path, database, s3_prefix):
    run_directory = Location.parse(s3_prefix)
    write_png(tmp_path / "grid.png")
    write_model(tmp_path / "model")
    (run_directory / "grids" / "grid.png").write_bytes((tmp_path / "grid.png").read_bytes())
    (run_directory / "model").upload_directory(tmp_path / "model")
    mirror = run_directory / "spool.jsonl"
    tracker = start(tmp_path, "http://127.0.0.1:1", spool=tmp_path / "a" / "spool.jsonl", mirror=mirror)
    tracker.spool.append("image", key="grid", step=5, path=f"{s3_prefix}/grids/grid.png")
    tracker.spool.append("artifact", path=f"{s3_prefix}/grids/grid.png", artifact_path="report")
    tracker.spool.append("artifact", path=f"{s3_prefix}/gone.png")
    model = {"uri": f"{s3_prefix}/model", "name": f"m-{tmp_path.name}", "model_id": "hash", "step": 5}
    tracker.spool.append("model", **model)
    assert tracker.finish("KILLED").pending == 6
    tracker = start(tmp_path, database, spool=tmp_path / "b" / "spool.jsonl", mirror=mirror)
    report = tracker.finish("FINISHED")
    assert (report.pending, report.refused) == (0, 1)
    assert mirror.read_bytes() == b""
    client, run = the_run(tmp_path, database)
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2
    assert [file.path for file in client.list_artifacts(run.info.run_id, "report")] == ["report/grid.png"]
    (logged,) = client.search_logged_models([run.info.experiment_id])
    files = {file.path for file in client.list_logged_model_artifacts(logged.model_id)}
    assert files == {"MLmodel", "config.json", "ema.safetensors"}
