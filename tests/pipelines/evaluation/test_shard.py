"""One shard of an evaluation."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from support.evaluate_runs import tiny_evaluation
from support.without_mlflow import first_shards

from ddpm_core.model import load_model
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.first_pass import DIRECTORY as FIRST_PASS
from pipelines.evaluation.first_pass import SUFFIX, FirstPass
from pipelines.evaluation.inputs import Inputs, request_of
from pipelines.evaluation.shard import DIRECTORY, TermShards
from pipelines.models.find import find_model
from pipelines.models.used import UsedModel
from pipelines.outputs.shard_store import Store
from pipelines.storage.location import Location


def test_a_worker_does_without_mlflow(make_dataset: Callable[..., PreparedDataset], tmp_path: Path) -> None:
    data = make_dataset(20)
    config = tiny_evaluation(tmp_path, data)
    found, location = find_model(config.model, None, tmp_path), Location.parse(config.output)
    found.keep(location / "model")
    request = request_of(config, Inputs(UsedModel(found, load_model(config.model)), data, data))
    first = Store(FirstPass(location, request, data, data, 1), location, FIRST_PASS, SUFFIX)
    terms = Store(TermShards(location, request, data, 1), location, DIRECTORY, ".parquet")
    counts, rows = first_shards([first, terms], tmp_path)
    assert (counts.rows, rows.rows) == (1, 16)
    again = terms.factory()(0)
    assert (location / DIRECTORY / rows.name).read_bytes() == again.data
    assert pq.read_table(f"{config.output}/{DIRECTORY}/{rows.name}")["id"].to_pylist() == list(range(16))
