"""What an actor does, in a process in which MLflow cannot be imported."""

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.outputs.shard_store import ShardRecord, Store

_SCRIPT = """
import pickle, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mlflow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from pipelines.cluster.actor_pool import _Actor

results = []
for store in pickle.load(open(sys.argv[1], "rb")):
    results += [pickle.loads(row["result"][0]) for row in _Actor(store)({"indices": [range(1)]})]
pickle.dump(results, open(sys.argv[1], "wb"))
"""


def first_shards(stores: Sequence[Store], scratch: Path) -> list[ShardRecord]:
    """The record of shard 0 of each store, made one after the other by another process as an actor makes it."""
    path = scratch / "stores.pickle"
    path.write_bytes(pickle.dumps(list(stores)))
    subprocess.run([sys.executable, "-c", _SCRIPT, str(path)], check=True)
    results = pickle.loads(path.read_bytes())
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [record for _, (record, _) in results]
