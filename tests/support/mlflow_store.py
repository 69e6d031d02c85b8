"""What the tracking tests share: a real MLflow server that can be stopped, and how a run is driven and read."""

import json
import os
import queue
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image
from support.s3_store import free_ports

from pipelines.tracking import tracker as tracking
from pipelines.tracking.client import configure_mlflow
from pipelines.tracking.tracker import Tracker

configure_mlflow()
from mlflow import MlflowClient  # noqa: E402  its settings come first

PATIENCE_S = 180  # a server may take minutes to start on a busy machine


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(tracking, "LISTEN_INTERVAL_S", 0.02)
    monkeypatch.setattr(tracking, "SEND_INTERVAL_S", 0.1)
    monkeypatch.setattr(tracking, "SLOW_INTERVAL_S", 0.5)


class Server:
    """A real `mlflow server` on a loopback port, started and stopped by the tests.

    By default its runs are in a SQLite file and its artifacts in `directory`; `options` and `environment` are the words
    after `mlflow server` and the variables that say otherwise. What it says is in `directory`/server.log.
    """

    def __init__(
        self, directory: Path, options: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        (self.port,) = free_ports(1)
        self.uri, self._directory, self._process = f"http://127.0.0.1:{self.port}", directory, None
        store = ["--backend-store-uri", f"sqlite:///{directory}/mlflow.db"]
        self._options = options or [*store, "--artifacts-destination", str(directory / "artifacts")]
        self.environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **(environment or {})}

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", *self._options]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self._directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._directory,
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(self.uri + "/health", timeout=5):
                    return
            except OSError:
                log = (self._directory / "server.log").read_text(errors="replace")[-2000:]
                assert self._process.poll() is None, f"mlflow server ended:\n{log}"
                assert time.monotonic() < deadline, f"mlflow server does not start:\n{log}"
                time.sleep(0.2)  # between probes of a starting server; the loop above is the condition

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


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
    schedule = {"name": "linear", "num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    (directory / "config.json").write_text(json.dumps({"network": {}, "schedule": schedule}))
    (directory / "ema.safetensors").write_bytes(b"weights")
    return str(directory)
