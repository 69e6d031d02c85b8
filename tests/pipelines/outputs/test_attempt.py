"""What a bulk job's attempt tells MLflow and its user."""

import shutil
import signal
from pathlib import Path

import pytest
from support import mlflow_store

from pipelines.cli.console import Interrupted
from pipelines.outputs.attempt import Attempt
from pipelines.outputs.shards import Progress, ShardedOutput, ShardOutput
from pipelines.storage.location import Location
from pipelines.tracking.client import configure_mlflow
from pipelines.tracking.tracker import resolve_tracking_uri

configure_mlflow()
from mlflow import MlflowClient  # noqa: E402  its settings come first

clean_environment = mlflow_store.clean_environment


def test_what_mlflow_has_not_got_goes_on_from_another_machine(s3_prefix: str, tmp_path: Path) -> None:
    """The spool is on the driver's disk; its unsent part is beside the output, in case that machine dies.

    The other machine's root has a name that means something in a URI; its database is in it all the same.
    """
    output = ShardedOutput(Location.parse(f"{s3_prefix}/samples"), {"seed": 1})

    def attempt(machine: str, root: Path, tracking_uri: str | None) -> dict[str, int]:
        run = Attempt("sample", output, experiment="e", name="samples", root=root, tracking_uri=tracking_uri)
        run.record("metrics", step=1, values={machine: 1.0})
        return run.run(lambda: {"rows": 1})[0]

    roots = tmp_path / "roots"
    odd = roots / "why?x=1 & 100%25 #a"
    assert attempt("first", roots / "first", "http://127.0.0.1:1") == attempt("second", odd, None)
    assert {path.name for path in roots.iterdir()} == {"first", odd.name}
    assert (odd / "mlflow.db").is_file()
    client = MlflowClient(resolve_tracking_uri(None, odd))
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == pytest.approx({"first": 1.0, "second": 1.0})
    assert (output.location / "tracking/spool.jsonl").read_bytes() == b""


def test_an_interrupted_attempt_is_killed_in_mlflow_and_says_what_is_kept(tmp_path: Path) -> None:
    """As is one of another request in the same place another MLflow run, once the output was deleted."""
    database = f"sqlite:///{tmp_path}/mlflow.db"

    def shards(index: int) -> ShardOutput:
        return ShardOutput(b"shard", 1)

    def stop_at_two(progress: Progress) -> None:
        if progress.shards == 2:
            raise Interrupted(signal.SIGTERM)

    for seed in (1, 1, 2):
        output = ShardedOutput(Location.parse(tmp_path / "samples"), {"seed": seed})
        output.begin()
        attempt = Attempt("sample", output, experiment="e", name="samples", root=tmp_path, tracking_uri=database).run

        def compute(output: ShardedOutput = output) -> dict[str, object]:
            return dict.fromkeys(map(str, output.compute(lambda: shards, 9, on_progress=stop_at_two)))

        with pytest.raises(Interrupted) as interruption:
            attempt(compute)
        assert interruption.value.kept == "2 finished shard(s) are kept, run the same command to continue"
        if seed == 1:
            shutil.rmtree(tmp_path / "samples")
    client = MlflowClient(database)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"}
    assert sorted((run.info.run_name, run.data.tags["ddpm.attempt"]) for run in runs) == [
        ("samples", "1"),
        ("samples (abandoned)", "2"),
    ]
