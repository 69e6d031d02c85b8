"""What the tracking tests share: a real MLflow server that can be stopped, and how a run is driven and read."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

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
