"""MLflow goes away, or was never there: the job goes on, says so once, and everything arrives later."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.mlflow_store import (
    PATIENCE_S,
    Lines,
    Server,
    clean_environment,  # noqa: F401  an autouse fixture
    curve,
    report_steps,
    start,
    the_run,
    write_model,
    write_png,
)

from pipelines.tracking import tracker as tracking
from pipelines.tracking.client import reason, redact
from pipelines.tracking.tracker import resolve_tracking_uri, run_link, without_credentials


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


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
    assert report.advice.endswith(f"python -m pipelines.tracking.tracker {tracker.spool.path}")
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
    assert "--backend-store-uri 'sqlite:////my runs/mlflow.db'" in run_link("sqlite:////my runs/mlflow.db", "7", "r")
    assert "p@" not in run_link("postgresql://u:p@h/db", "7", "r")
    assert without_credentials("https://u:p@ss@h/x") == "https://h/x"


@pytest.mark.parametrize("uri", ["http://u:p@h/x", "postgresql://u:p@ss@h", "see https://u:p@h for more"])
def test_messages_carry_no_passwords(uri):
    assert "u:p" not in redact(uri)
    assert "u:p" not in reason(ValueError(f"cannot open {uri}"))
