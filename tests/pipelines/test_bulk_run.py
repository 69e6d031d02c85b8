"""The frame of sampling and evaluation jobs."""

from pathlib import Path

import mlflow_store
import pytest
from sample_runs import save_tiny_model

from pipelines.bulk_run import BulkRun
from pipelines.engine.shards import ShardedOutput
from pipelines.models import find_model
from pipelines.storage import Location
from pipelines.tracking.client import configure_mlflow
from pipelines.tracking.tracker import resolve_tracking_uri

configure_mlflow()
from mlflow import MlflowClient  # noqa: E402  its settings come first

clean_environment = mlflow_store.clean_environment


def test_what_mlflow_has_not_got_goes_on_from_another_machine(s3_prefix: str, tmp_path: Path) -> None:
    """The spool is on the driver's disk; its unsent part is beside the output, in case that machine dies.

    The other machine's root has a name that means something in a URI; its database is in it all the same.
    """
    save_tiny_model(tmp_path / "model")
    found = find_model(str(tmp_path / "model"), None, tmp_path)
    output = ShardedOutput(Location.parse(f"{s3_prefix}/samples"), {"seed": 1})

    def attempt(machine: str, root: Path, tracking_uri: str | None) -> dict[str, int]:
        run = BulkRun("sample", output, found, experiment="e", name=None, root=root, tracking_uri=tracking_uri)
        run.record("metrics", step=1, values={machine: 1.0})
        return run.attempt(lambda: {"rows": 1})[0]

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
