"""What reaching MLflow leaves behind."""

import signal
import subprocess
import sys
from pathlib import Path

from pipelines.tracking.client import mlflow_client, sqlite_uri

# Makes a database and is killed while the tables are made.
KILLED = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from pipelines.tracking.client import mlflow_client

@event.listens_for(Engine, "after_cursor_execute")
def die(connection, cursor, statement, *rest):
    if "CREATE TABLE evaluation_datasets" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

mlflow_client(sys.argv[1])
"""


def test_a_process_that_is_killed_while_it_makes_the_database_leaves_none_that_is_half_made(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path / "mlflow.db")
    killed = subprocess.run([sys.executable, "-c", KILLED, uri], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "mlflow.db").exists()
    client = mlflow_client(uri)
    (default,) = client.search_experiments()
    assert client.create_experiment("next") != default.experiment_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
