"""Connecting to Ray."""

import socket

import pytest

from ddpm_core.errors import ClusterError
from pipelines import cluster


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
        cluster.connect(address)
    assert str(refusal.value).startswith(f"cluster.address = {address}: cannot connect to Ray (")
    assert "Connection refused" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_address_of_the_environment_is_used(not_connected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    address = nobody_listens_at()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=address):
        cluster.connect()
    monkeypatch.setenv("RAY_ADDRESS", "host.invalid:6379")
    with pytest.raises(ClusterError, match=r"host\.invalid:6379: cannot connect to Ray"):
        cluster.connect()


@pytest.mark.ray
def test_a_connection_that_is_there_is_used_and_left(ray_cluster: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    assert cluster.connect() == f"Ray at {address}"
    cluster.disconnect()
    assert ray.is_initialized()
    assert ray.get_runtime_context().gcs_address == address
