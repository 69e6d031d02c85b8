"""Chaos: random faults, the same for a seed, of every kind, while each job runs; its result must not show them.

In full, with the table in docs/operations.md made anew:

    uv run pytest tests/chaos -n 0 --faults 28 --fault-seed 1 --fault-table docs/operations.md
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import jobs
from chaos.faults import Outcome, live_through, sequence, write_table
from chaos.world import PREFIX, World
from mlflow import MlflowClient
from support.cloudformation import Stack
from support.s3_policy import allows, right_of

from pipelines.data.epochs import Epochs
from pipelines.data.hold_out import HoldOut
from pipelines.data.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]
DIGITS = 1498  # rows of embedded://digits/train
JOBS = ("ingest", "train", "sample", "evaluate", "quality")
# Metrics that measure the machine and not the model, and those with a point for every step.
MACHINE = {
    "images_per_second",
    "eta_seconds",
    "workers",
    "data_wait_seconds",
    "data_wait_fraction",
    "first_batch_seconds",
}
EVERY_STEP = {"train/loss", "train/loss_variance", "grad_norm", "learning_rate"}


@pytest.fixture(scope="module")
def plan(request: pytest.FixtureRequest) -> tuple[int, int]:
    """(seed, faults per job)."""
    return request.config.getoption("--fault-seed"), request.config.getoption("--faults")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, plan: tuple[int, int]) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("chaos"), plan[0])
    yield world
    world.close()


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, plan: tuple[int, int]) -> Iterator[dict[str, Outcome]]:
    """What each job lived through; becomes the table at the end."""
    outcomes: dict[str, Outcome] = {}
    yield outcomes
    if path := request.config.getoption("--fault-table"):
        write_table(Path(path), outcomes, plan[0])


@pytest.mark.parametrize("name", JOBS)
def test_a_disturbed_job_ends_like_an_undisturbed_one(
    name: str, world: World, plan: tuple[int, int], outcomes: dict[str, Outcome]
) -> None:
    seed, count = plan
    store = jobs.Store(world)
    job: jobs.ChaosJob = getattr(jobs, name)(world, store, 2 * (count + 1))
    calm, stormy = f"{name}-undisturbed", f"{name}-disturbed"
    world.run(*job.command(calm))
    faults = sequence(f"{seed} {name}", count)
    outcome = live_through(faults, world, job.command(stormy), lambda: job.progress(stormy), 1800)
    assert outcome.faults.total() == count

    expected, found = (jobs.contents(world, store, job.output(which)) for which in (calm, stormy))
    assert jobs.digests(found) == jobs.digests(expected)
    if name == "train":
        check_ledger(found, job)
    else:
        ids = jobs.ids(found)
        assert len(set(ids)) == len(ids) >= job.parts
    if name != "ingest":
        assert metrics(world, stormy) == metrics(world, calm)
    outcomes[name] = outcome


def test_all_that_was_asked_of_the_store_is_allowed_on_aws(world: World, outcomes: dict[str, Outcome]) -> None:
    rights = {right for request in world.proxy.asked() if (right := right_of(*request)) is not None}
    policy = Stack(Bucket=world.store.bucket, Prefix=PREFIX).policies["StorageAccess"]
    assert [right for right in sorted(rights, key=str) if not allows(policy, *right)] == []
    if len(outcomes) == len(JOBS):
        assert {action for action, _, _ in rights} >= {"s3:ListBucket", "s3:GetObject", "s3:PutObject"}


def metrics(world: World, name: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point of the one MLflow run of this name; of bulk jobs, and validation, the last.

    Left out is what measures the machine and not the model.
    """
    client = MlflowClient(world.mlflow.uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = [run for run in client.search_runs(experiments) if run.info.run_name == name]
    assert run.info.status == "FINISHED"
    curves = {}
    for key in run.data.metrics:
        if key not in MACHINE and not key.startswith("system/"):
            points = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
            curves[key] = points if key in EVERY_STEP else points[-1:]
    return curves


def check_ledger(found: dict[str, bytes], job: jobs.ChaosJob) -> None:
    """Every row of every finished epoch was used exactly once, and of the last one those that were due."""
    (content,) = [data for name, data in found.items() if name.endswith("ledger.parquet")]
    ledger, steps = Ledger.from_bytes(content), 10 * job.parts
    ledger.check(Epochs(HoldOut(DIGITS)), steps, jobs.TRAIN_BATCH)
    assert ledger.total() == steps * jobs.TRAIN_BATCH
    for epoch in range(steps * jobs.TRAIN_BATCH // DIGITS):
        assert ledger.ids(epoch).tolist() == list(range(DIGITS))
