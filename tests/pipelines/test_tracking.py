"""Tracking against a real MLflow database and a real server that goes away: nothing lost, nothing twice."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm_core.errors import DDPMError, RequestMismatchError
from pipelines import tracking
from pipelines.mlflow_run import MlflowRun, configure_mlflow, reason, redact
from pipelines.spool import Spool, SpoolState, iter_records
from pipelines.storage import Location
from pipelines.tracking import Tracker, resolve_tracking_uri, run_link, without_credentials

configure_mlflow()
from mlflow import MlflowClient  # noqa: E402  its settings come first

PATIENCE_S = 180  # a server may take minutes to start on a busy machine


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(tracking, "LISTEN_INTERVAL_S", 0.02)
    monkeypatch.setattr(tracking, "SEND_INTERVAL_S", 0.1)
    monkeypatch.setattr(tracking, "SLOW_INTERVAL_S", 0.5)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """One SQLite store for all tests of this file: making one takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"
    MlflowClient(uri).search_experiments()
    return uri


class Server:
    """A real `mlflow server` on a loopback port, started and stopped by the tests."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self._directory, self._process = f"http://127.0.0.1:{self.port}", directory, None

    def start(self) -> None:
        store = f"sqlite:///{self._directory}/mlflow.db"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", store]
        command += ["--artifacts-destination", str(self._directory / "artifacts")]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(self.uri + "/health", timeout=5):
                    return
            except OSError:
                assert self._process.poll() is None, "mlflow server ended"
                assert time.monotonic() < deadline, "mlflow server does not start"
                time.sleep(0.2)  # between probes of a starting server; the loop above is the condition

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


class Lines(queue.Queue):
    """Collects what `notify` is told; a test waits for the line it needs."""

    def __call__(self, line: str) -> None:
        self.seen = [*getattr(self, "seen", []), line]
        self.put(line)

    def expect(self, text: str) -> str:
        while True:
            line = self.get(timeout=PATIENCE_S)
            if text in line:
                return line


def start(tmp_path, uri, *, notify=None, **options):
    options = {"run_key": f"key of {tmp_path.name}", "experiment": tmp_path.name, "run_name": "a run", **options}
    return Tracker(
        options.pop("spool", tmp_path / "spool.jsonl"),
        root=tmp_path,
        tracking_uri=uri,
        notify=notify or Lines(),
        **options,
    )


def the_run(tmp_path, uri):
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(tmp_path.name)
    (run,) = client.search_runs([experiment.experiment_id])  # exactly one
    return client, run


def curve(client, run, key="train/loss"):
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def report_steps(spool, first, last):
    for step in range(first, last):
        spool.append("metrics", step=step, values={"train/loss": step / 4, "train/lr": 1e-4})


def write_png(path):
    Image.effect_noise((32, 32), 60).save(path)
    return str(path)


def write_model(directory):
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "ema.safetensors").write_bytes(b"weights")
    return str(directory)


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
from pipelines.tracking import Tracker
root, uri, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tracker = Tracker(root / "spool.jsonl", run_key="k", experiment=root.name, run_name="r", root=root,
                  tracking_uri=uri, notify=lambda line: print(line, flush=True))
for step in range(first, last):
    tracker.spool.append("metrics", step=step, values={"train/loss": step / 4})
    time.sleep(0.005)  # the pace of a training loop
report = tracker.finish("FINISHED")
print("pending", report.pending, flush=True)
"""

    def driver(first, last):
        command = [sys.executable, "-c", code, tmp_path, database, str(first), str(last)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    killed = driver(0, 100_000)
    assert killed.stdout.readline().startswith("tracking: ")  # connected: it is sending now
    client, run = the_run(tmp_path, database)
    deadline = time.monotonic() + PATIENCE_S
    while len(curve(client, run)) < 100:
        assert time.monotonic() < deadline
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    client, run = the_run(tmp_path, database)
    assert run.info.status == "RUNNING"
    reached = max(r.payload["step"] for r in iter_records(tmp_path / "spool.jsonl") if r.kind == "metrics") + 1
    assert reached >= 100
    resumed = driver(max(0, reached - 150), reached + 200)
    out, _ = resumed.communicate(timeout=PATIENCE_S)
    assert out.endswith("pending 0\n")
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(reached + 200)]
    assert run.info.status == "FINISHED"
    assert run.data.tags["ddpm.attempt"] == "2"


@pytest.mark.slow
def test_an_unreachable_server_at_start_and_in_the_middle_only_delays_the_records(tmp_path, server):
    lines, heard = Lines(), Lines()
    tracker = start(tmp_path, server.uri, notify=lines, listener=heard)
    line = lines.expect("cannot be used")
    assert "Connection refused" in line
    assert str(tracker.spool.path) in line
    report_steps(tracker.spool, 0, 50)
    while heard.get(timeout=PATIENCE_S).payload.get("step") != 49:
        pass  # the display works without MLflow
    server.start()
    lines.expect("answers again")
    assert lines.expect("workflowType").startswith(f"tracking: {server.uri}/#/experiments/")
    report_steps(tracker.spool, 50, 80)
    server.stop()
    report_steps(tracker.spool, 80, 120)
    tracker.spool.append("image", key="grid", step=100, path=write_png(tmp_path / "grid.png"))
    lines.expect("cannot be used")
    server.start()
    lines.expect("answers again")
    report_steps(tracker.spool, 120, 150)
    model = write_model(tmp_path / "model")
    tracker.spool.append(
        "model", uri=model, name="over-http", model_id="hash", step=149, metrics={"train/loss": 149 / 4}
    )
    report = tracker.finish("FINISHED")
    assert (report.pending, report.refused) == (0, 0)
    assert sum("cannot be used" in line for line in lines.seen) == 2  # one line per outage
    client, run = the_run(tmp_path, server.uri)
    assert curve(client, run) == [(step, step / 4) for step in range(150)]
    assert run.info.status == "FINISHED"
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2
    version = client.get_model_version_by_alias("over-http", "champion")
    assert version.tags["ddpm.model_id"] == "hash"
    assert version.source == f"models:/{run.outputs.model_outputs[0].model_id}"


@pytest.mark.slow
def test_what_is_pending_at_the_end_is_sent_by_the_command_it_names(tmp_path, server, capsys):
    server.stop()
    tracker = start(tmp_path, server.uri)
    report_steps(tracker.spool, 0, 40)
    report = tracker.finish("FINISHED", timeout_s=PATIENCE_S)
    assert (report.pending, report.link) == (42, None)  # start, 40 steps, finish
    assert report.advice.endswith(f"python -m pipelines.tracking {tracker.spool.path}")
    assert tracking.main([str(tracker.spool.path)]) == 1
    assert "Connection refused" in capsys.readouterr().err
    server.start()
    for _ in range(2):  # the second time there is nothing left to send
        assert tracking.main([str(tracker.spool.path)]) == 0
        assert f"sent: {server.uri}/#/experiments/" in capsys.readouterr().out
    client, run = the_run(tmp_path, server.uri)
    assert curve(client, run) == [(step, step / 4) for step in range(40)]
    assert run.info.status == "FINISHED"


def test_the_command_refuses_what_is_no_spool(tmp_path, capsys):
    assert tracking.main([str(tmp_path / "none.jsonl")]) == 1
    assert "is not a tracking spool" in capsys.readouterr().err


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
    mirror = Location.parse(tmp_path / "run" / "spool.jsonl")
    tracker = start(tmp_path, database, spool=tmp_path / "a" / "spool.jsonl", mirror=mirror)
    report_steps(tracker.spool, 0, 20)
    tracker.finish("KILLED")
    assert not mirror.exists()  # nothing was pending
    tracker = start(tmp_path, "http://127.0.0.1:1", spool=tmp_path / "a" / "spool.jsonl", mirror=mirror)
    report_steps(tracker.spool, 15, 40)
    assert tracker.finish("KILLED").pending > 0
    tracker = start(tmp_path, database, spool=tmp_path / "b" / "spool.jsonl", mirror=mirror)
    report_steps(tracker.spool, 35, 60)
    assert tracker.finish("FINISHED").pending == 0
    assert mirror.read_bytes() == b""
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(60)]


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
    lines = Lines()
    tracker = start(tmp_path, database, notify=lines)
    tracker.spool.append("image", key="grid", step=0, path=write_png(tmp_path / "grid.png"))
    report_steps(tracker.spool, 0, 20)
    report = tracker.finish("FINISHED")
    assert (report.pending, report.refused) == (1, 0)
    assert sum("kept for a later try" in line for line in lines.seen) == 1
    client, run = the_run(tmp_path, database)
    assert curve(client, run) == [(step, step / 4) for step in range(20)]
    blocked.unlink()
    tracking.replay(tracker.spool.path, notify=lines)
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2


def test_an_unknown_scheme_is_said_and_the_records_are_kept(tmp_path):
    lines = Lines()
    tracker = start(tmp_path, "foo://ann:secret@x", notify=lines)
    assert "foo://x cannot be used" in lines.expect("cannot be used")
    assert tracker.finish("FINISHED").pending == 2
    assert "secret" not in "".join(lines.seen) + tracker.spool.path.read_text()


def test_refused_credentials_are_said_with_the_way_to_give_them(tmp_path):
    class Closed(BaseHTTPRequestHandler):
        """MLflow's basic-auth answer to wrong credentials."""

        def do_GET(self):
            body = b"You are not authenticated. Please see the documentation."
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Closed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        lines = Lines()
        tracker = start(tmp_path, f"http://ann:secret@127.0.0.1:{server.server_port}", notify=lines)
        assert "MLFLOW_TRACKING_PASSWORD" in lines.expect("refuses the credentials")
        assert tracker.finish("FINISHED").pending == 2
        assert "secret" not in "".join(lines.seen) + tracker.spool.path.read_text()
    finally:
        server.shutdown()
        server.server_close()


def test_a_failing_display_is_said_once_and_stops_nothing(tmp_path, database):
    lines = Lines()

    def broken(record):
        raise RuntimeError("no terminal")

    tracker = start(tmp_path, database, notify=lines, listener=broken)
    report_steps(tracker.spool, 0, 5)
    assert tracker.finish("FINISHED").pending == 0
    assert sum("no terminal" in line for line in lines.seen) == 1


def test_uris(tmp_path, monkeypatch):
    assert resolve_tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri("sqlite:///runs/x.db", tmp_path) == f"sqlite:///{tmp_path}/runs/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a")
    assert resolve_tracking_uri(None, tmp_path) == "http://a"
    assert resolve_tracking_uri("http://b", tmp_path) == "http://b"
    assert run_link("https://u:p@h:5000/", "7", "r") == (
        "https://h:5000/#/experiments/7/runs/r?workflowType=machine_learning"
    )
    assert "mlflow ui --backend-store-uri sqlite:////x/mlflow.db" in run_link("sqlite:////x/mlflow.db", "7", "r")
    assert "p@" not in run_link("postgresql://u:p@h/db", "7", "r")
    assert without_credentials("https://u:p@ss@h/x") == "https://h/x"


@pytest.mark.parametrize("uri", ["http://u:p@h/x", "postgresql://u:p@ss@h", "see https://u:p@h for more"])
def test_messages_carry_no_passwords(uri):
    assert "u:p" not in redact(uri)
    assert "u:p" not in reason(ValueError(f"cannot open {uri}"))
