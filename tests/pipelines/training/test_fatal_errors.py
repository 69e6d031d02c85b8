"""An error that ends a training travels from a worker to the job's own line, whatever its class."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ddpm_core
import pipelines
from pipelines.cli.errors import DDPMError, error_of, exit_code
from pipelines.tracking.spool import Spool, read_records
from pipelines.training.ray_train import controller_callback, own_error


def tree(root: type[DDPMError] = DDPMError) -> Iterator[type[DDPMError]]:
    """Every class of the project's tree, wherever it is defined."""
    if root.__module__.startswith(("ddpm_core.", "pipelines.")):
        yield root
    for child in root.__subclasses__():
        yield from tree(child)


@pytest.fixture(scope="module")
def classes() -> set[type[DDPMError]]:
    for package in (ddpm_core, pipelines):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return {*tree()}


def test_every_class_reaches_the_driver_through_controller_and_spool(
    classes: set[type[DDPMError]], tmp_path: Path
) -> None:
    from ray import cloudpickle
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    assert {found.__name__ for found in classes} >= {"DDPMError", "StorageError", "UnavailableError", "ClusterError"}
    spool = Spool(tmp_path / "spool.jsonl")
    sent = [found(f"s3://bucket/{found.__name__}: cannot be read (±); wait") for found in classes]
    for error in sent:
        from_worker = cloudpickle.loads(cloudpickle.dumps(UserExceptionWithTraceback(error, "a trace")))
        controller_callback(spool).after_exception(None, {1: from_worker})  # type: ignore[arg-type]
    records, _, _ = read_records(spool.path, 0)
    assert [record.kind for record in records] == ["fatal"] * len(sent)
    arrived = [error_of(record.payload["error"], record.payload["message"]) for record in records]
    assert [(type(error), str(error), exit_code(error)) for error in arrived] == [
        (type(error), str(error), exit_code(error)) for error in sent
    ]


def test_a_class_that_only_the_worker_knows_still_ends_the_job_with_its_line() -> None:
    error = error_of("FutureError", "x = 1: must be 2")
    assert (type(error), str(error)) == (DDPMError, "x = 1: must be 2")


@pytest.mark.ray
def test_every_class_is_found_in_what_ray_makes_of_it(ray_cluster: None, classes: set[type[DDPMError]]) -> None:
    import ray

    @ray.remote
    def reads(error: Exception) -> Any:
        raise error

    for found in classes:
        with pytest.raises(DDPMError) as raised:
            ray.get(reads.remote(found("x = 1: must be 2")))
        own = own_error(raised.value)
        assert (type(own), str(own)) == (found, "x = 1: must be 2")
