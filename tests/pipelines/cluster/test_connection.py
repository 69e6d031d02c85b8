"""Connecting to Ray."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.cli.errors import ClusterError
from pipelines.cluster import connection


def nobody_listens_at() -> str:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return "{}:{}".format(*opened.getsockname())


@pytest.fixture
def not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own, whatever other tests have connected this one to."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)


def test_an_address_without_a_cluster_is_refused_at_once(not_connected: None) -> None:
    address = nobody_listens_at()
    with pytest.raises(ClusterError) as refusal:
        connection.connect(address)
    assert str(refusal.value).startswith(f"cluster.address = {address}: cannot connect to Ray (")
    assert "Connection refused" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_address_of_the_environment_is_used(not_connected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    address = nobody_listens_at()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=address):
        connection.connect()
    monkeypatch.setenv("RAY_ADDRESS", "host.invalid:6379")
    with pytest.raises(ClusterError, match=r"host\.invalid:6379: cannot connect to Ray"):
        connection.connect()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:8265", "is the URL of a dashboard, which takes jobs"),
        ("https://ray.example:443/", "is the URL of a dashboard, which takes jobs"),
        ("nobody", "cannot connect to Ray (Connection refused)"),
        ("web server", "cannot connect to Ray (a web server answers there, such as the dashboard)"),
    ],
)
def test_the_variable_is_named_that_gives_a_wrong_address(
    not_connected: None, monkeypatch: pytest.MonkeyPatch, address: str, says: str
) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = {"nobody": nobody_listens_at(), "web server": f"127.0.0.1:{server.server_port}"}.get(address, address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    try:
        for refused in (connection.check, connection.connect):
            with pytest.raises(ClusterError) as refusal:
                refused()
            line = str(refusal.value).replace("[Errno 111] ", "")
            assert line.startswith(f"RAY_ADDRESS = {address}: {says}; ") or says.startswith("is the URL")
            assert f"RAY_ADDRESS = {address}: {says}" in line
            assert "cluster.address" not in line
            assert "unset it to use this machine" in line
    finally:
        server.shutdown()
        server.server_close()


def test_no_address_is_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", value)
        connection.check()
        assert connection.source_of(None) is None


@pytest.mark.ray
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "the cluster asks for a token; set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token"}, "the cluster does not take this token, or there is none; set RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 64}, "the cluster does not take this token"),
    ],
)
def test_a_cluster_with_a_token_says_what_is_missing(
    ray_cluster: None, tmp_path: Path, environment: dict[str, str], says: str
) -> None:
    import ray

    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    address = ray.get_runtime_context().gcs_address
    asked = subprocess.run(
        [sys.executable, "-c", "from pipelines.cluster import connection; connection.check()"],
        env={**clean, "HOME": str(tmp_path), "RAY_ADDRESS": address, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.returncode == 1
    assert f"ClusterError: RAY_ADDRESS = {address}: {says}" in asked.stderr.splitlines()[-1]


def test_a_long_temporary_directory_is_replaced_by_a_short_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert connection._short_directory() is None
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    found = connection._short_directory()
    assert found is not None
    assert Path(found).is_dir()
    assert len(found) < 30
    connection._remove_short_directory()
    assert not Path(found).exists()


@pytest.mark.ray
@pytest.mark.parametrize("trouble", ["raylet.kill()", "os.kill(os.getpid(), signal.SIGTERM)", "pass"])
def test_a_private_ray_that_fails_is_started_once_more_and_a_signal_meanwhile_is_the_jobs(trouble: str) -> None:
    script = f"""
import os, signal, psutil
from ray._private import services
from pipelines.cluster import connection
from pipelines.cli.console import run_job

once, troubled = services.get_node, []
def get_node(*arguments):
    if not troubled:
        raylet = next(child for child in psutil.Process().children() if child.name() == "raylet")
        troubled.append(raylet)
        {trouble}
    return once(*arguments)

services.get_node = get_node
def main(argv):
    print(connection.connect(num_cpus=1), flush=True)
    sockets = [each for process in psutil.Process().children(recursive=True) for each in process.net_connections("tcp")]
    found = {{each.laddr.ip.removeprefix("::ffff:") for each in sockets if each.status == psutil.CONN_LISTEN}}
    assert found == {{"127.0.0.1"}}, found
    if "pass" in {trouble!r}:
        connection.disconnect()
        os.kill(os.getpid(), signal.SIGTERM)

run_job(main)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    if "kill()" not in trouble:
        assert (ended.returncode, ended.stdout) == (143, "a local Ray\n" if trouble == "pass" else ""), ended.stderr
        assert ended.stderr.splitlines()[-1] == "interrupted by SIGTERM: run the same command to continue"
    else:
        assert (ended.returncode, ended.stdout) == (0, "a local Ray\n"), ended.stderr
        assert "a private Ray has not started (its raylet ended before it answered): trying once more" in ended.stderr


@pytest.mark.ray
def test_a_connection_that_is_there_is_used_and_left(ray_cluster: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    assert connection.connect() == f"Ray at {address}"
    connection.disconnect()
    assert ray.is_initialized()
    assert ray.get_runtime_context().gcs_address == address
