"""Fixtures of the tests that use storage or a finished training."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pipelines.training.config import TrainConfig

import s3_store

from pipelines.storage import forget_connections

BUCKET = "test-bucket"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_store.S3Store]:
    """One object store for the session, with one bucket."""
    import boto3

    store = s3_store.S3Store(tmp_path_factory.mktemp("s3"))
    client = boto3.client(
        "s3",
        endpoint_url=store.endpoint,
        aws_access_key_id=s3_store.ACCESS_KEY,
        aws_secret_access_key=s3_store.SECRET_KEY,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    yield store
    store.close()


@pytest.fixture
def s3_prefix(s3_server: s3_store.S3Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty prefix of this test's own; the environment points at the store as a user's would."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_store.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_store.SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    forget_connections()
    yield f"s3://{BUCKET}/{uuid.uuid4().hex}"
    forget_connections()


@pytest.fixture(scope="session")
def training_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets and a place for the tests' trainings."""
    from train_runs import ROWS, prepare_images

    directory = tmp_path_factory.mktemp("root")
    prepare_images(directory, "train", ROWS)
    prepare_images(directory, "validation", 12)
    return directory


@pytest.fixture(scope="session")
def two_workers(ray_cluster: None, training_root: Path) -> "TrainConfig":
    """What two workers train when nothing happens to them."""
    from train_runs import tiny

    from pipelines.training.job import train

    config = tiny(training_root, "two-workers", num_workers=2)
    train(config)
    return config
