"""Fixtures every test may use; Ray tests share one local cluster."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from pipelines.data.dataset import PreparedDataset

sys.path.insert(0, str(Path(__file__).parent))  # test modules are not packages: their helpers are `support`

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray gives its workers the lowest priority; tests wait for them


# Run by a test as a process of its own, not to be imported by the collector of docstring examples.
collect_ignore = ["support/gloo_rank.py"]

# Examples are timed on a shared machine: a slow one is no defect.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


# The longest, since otherwise one process would wait for the other at the end; and those that start nodes of a Ray
# cluster in the process of the tests: its driver of the shared cluster would lose that one, and end the process.
FIRST = ("test_operations.py", "test_chaos.py", "test_nodes.py", "test_placement.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos", "tests/chaos")
    group.addoption("--faults", type=int, default=4, help="faults that happen to each job")
    group.addoption("--fault-seed", type=int, default=1, help="which faults, and when")
    group.addoption("--fault-table", help="Markdown file in which to renew the table of faults")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private local Ray for all Ray tests of the session."""
    import ray

    from pipelines.cluster import ray_private

    with ray_private.patience():
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., "PreparedDataset"]:
    """Commits a prepared data set of random images through the real shard engine and opens it; `labels` may be None for
    some images, or for all."""
    from pipelines.data.dataset import FORMAT, FORMAT_VERSION, PreparedDataset, dataset_id, encode_shard, rows_per_group
    from pipelines.outputs.shards import ShardedOutput, ShardOutput
    from pipelines.storage.location import Location

    def make(
        num_rows: int = 100,
        shape: tuple[int, int, int] = (8, 8, 1),
        shard_rows: int = 64,
        name: str = "data-set",
        labels: Sequence[int | None] | None = None,
        label_names: Sequence[str] | None = None,
    ) -> PreparedDataset:
        images = np.random.default_rng(num_rows).integers(0, 256, (num_rows, *shape), np.uint8)

        def compute(index: int) -> ShardOutput:
            start, stop = index * shard_rows, min((index + 1) * shard_rows, num_rows)
            own = pa.array([None] * (stop - start) if labels is None else list(labels[start:stop]), pa.int64())
            sources = pa.array([f"image {i}" for i in range(start, stop)])
            return ShardOutput(encode_shard(start, images[start:stop], own, sources), stop - start)

        output = ShardedOutput(Location.parse(tmp_path / name), {"rows": num_rows, "shape": list(shape)})
        output.begin()
        records = output.compute(lambda: compute, -(-num_rows // shard_rows))
        fields = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "dataset_id": dataset_id(shape, records),
            "num_rows": num_rows,
            "image_shape": list(shape),
            "label_names": None if label_names is None else list(label_names),
            "rows_per_group": rows_per_group(shape),
            "rejected": 0,
        }
        output.commit(fields, records)
        return PreparedDataset.open(output.location)

    return make
