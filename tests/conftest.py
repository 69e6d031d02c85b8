"""Fixtures every test may use; Ray tests share one local cluster."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private local Ray for all Ray tests of the session."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
