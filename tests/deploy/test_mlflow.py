"""deploy/mlflow: one configuration in all its files, and just that server on a real PostgreSQL and S3 store.

PostgreSQL is installed by .ci/run; where there is none, the tests that need it are skipped.
"""

import json
import re
import shlex
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from mlflow import MlflowClient
from support.mlflow_store import (
    PATIENCE_S,
    Lines,
    Server,
    clean_environment,  # noqa: F401  an autouse fixture
    curve,
    report_steps,
    start,
    the_run,
    write_model,
)
from support.postgresql import NotInstalled, PostgreSQL
from support.s3_store import S3Store

REPOSITORY = Path(__file__).parents[2]
MLFLOW = REPOSITORY / "deploy/mlflow"
DOCKERFILE = (MLFLOW / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((MLFLOW / "compose.yaml").read_text())["services"]
KUSTOMIZATION = yaml.safe_load((MLFLOW / "kubernetes/kustomization.yaml").read_text())
DEPLOYMENT = list(yaml.safe_load_all((MLFLOW / "kubernetes/server.yaml").read_text()))[1]
SECRETS = {
    "PGPASSWORD": "",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "of the first admin",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key",
}


def of_image() -> dict[str, str]:
    """The variables that the image sets."""
    (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    return dict(word.split("=", 1) for word in shlex.split(block.replace("\\\n", " ")))


def of_kubernetes() -> dict[str, str]:
    (generated,) = KUSTOMIZATION["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generated["literals"])


def test_no_secret_has_a_value_or_a_default() -> None:
    for service in COMPOSE.values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|DESTINATION", name):
                assert re.fullmatch(r"\$\{\w+:\?must be in \.env\}", value)
    assert not set(SECRETS) & (set(of_image()) | set(of_kubernetes()))
    assert "password" not in "".join(re.findall("^[^#].*", (MLFLOW / "basic_auth.ini").read_text(), re.MULTILINE))
    assert "deploy/mlflow/.env" in (REPOSITORY / ".gitignore").read_text().split()


def test_compose_and_kubernetes_give_the_server_the_same_variables() -> None:
    (container,) = DEPLOYMENT["spec"]["template"]["spec"]["containers"]
    assert set(COMPOSE["mlflow"]["environment"]) == (
        set(of_kubernetes()) - {"MLFLOW_SERVER_ALLOWED_HOSTS"} | set(SECRETS)  # compose takes it from .env
    )
    assert COMPOSE["mlflow"]["image"] == container["image"]
    assert not {"command", "args", "env"} & set(container)
    assert "command" not in COMPOSE["mlflow"]
    # The service of that name would set MLFLOW_PORT.
    assert DEPLOYMENT["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_the_database_is_the_composes() -> None:
    server, database = COMPOSE["mlflow"]["environment"], COMPOSE["postgresql"]["environment"]
    assert server["PGHOST"] == "${PGHOST:-postgresql}"
    assert (server["PGUSER"], server["PGDATABASE"]) == (database["POSTGRES_USER"], database["POSTGRES_DB"])
    assert server["PGPASSWORD"] == database["POSTGRES_PASSWORD"]


@pytest.fixture(scope="module")
def database() -> Iterator[PostgreSQL]:
    try:
        postgresql = PostgreSQL()
    except NotInstalled as error:
        pytest.skip(str(error))
    yield postgresql
    postgresql.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Store]:
    bucket = S3Store(tmp_path_factory.mktemp("s3"))
    yield bucket
    bucket.close()


@pytest.fixture
def server(database: PostgreSQL, store: S3Store, tmp_path: Path) -> Iterator[Server]:
    """The image's command with its and compose's variables; only where things are is the test's."""
    command = json.loads(re.findall(r"^CMD (.+)$", DOCKERFILE, re.MULTILINE)[0])
    assert command[:2] == ["mlflow", "server"]
    made = Server(tmp_path, command[2:], {**of_image(), **SECRETS, **database.environment, **store.environment})
    names = of_kubernetes()["MLFLOW_SERVER_ALLOWED_HOSTS"].replace("5000", str(made.port))
    made.environment |= {
        "PATH": "",
        "MLFLOW_AUTH_CONFIG_PATH": str(MLFLOW / "basic_auth.ini"),
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{store.bucket}/ddpm/mlflow",
        "MLFLOW_SERVER_ALLOWED_HOSTS": names,
    }
    yield made
    made.stop()


def ask(
    server: Server, path: str, user: tuple[str, str] | None, content: Any = None, host: str | None = None
) -> tuple[int, Any]:
    """The status and content of an answer of MLflow's REST interface."""
    request = urllib.request.Request(f"{server.uri}/api/2.0/mlflow/{path}")
    if user is not None:
        request.add_header("Authorization", f"Basic {b64encode(':'.join(user).encode()).decode()}")
    if content is not None:
        request.add_header("Content-Type", "application/json")
        request.data = json.dumps(content).encode()
    request.add_header("Host", host or f"mlflow:{server.port}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, None


@pytest.mark.slow
def test_three_writers_an_outage_and_a_restored_dump(
    server: Server, database: PostgreSQL, store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.start()
    admin, team, other = ("admin", "of the first admin"), ("vision", "of the vision team"), ("audio", "of their own 1")
    experiments = "experiments/search?max_results=10"
    assert ask(server, experiments, None)[0] == 401
    assert ask(server, experiments, ("admin", "password1234"))[0] == 401
    assert ask(server, experiments, admin, host="elsewhere.example")[0] == 403
    for name, password in (team, other):
        assert ask(server, "users/create", admin, {"username": name, "password": password})[0] == 200
    assert ask(server, "users/create", team, {"username": "third", "password": "of nobody at all"})[0] == 403

    # As jobs get them.
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", team[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", team[1])
    writers = []
    for n in range(3):
        directory, lines = tmp_path / f"writer-{n}", Lines()
        directory.mkdir()
        writers.append((directory, lines, start(directory, server.uri, notify=lines)))
    for directory, _, tracker in writers:
        report_steps(tracker.spool, 0, 100)
        model = {"uri": write_model(directory / "model"), "name": directory.name, "model_id": "hash", "step": 100}
        tracker.spool.append("model", **model)
    for _, lines, _ in writers:
        lines.expect("/runs/")  # connected, and the run is made

    server.stop()
    for _, lines, tracker in writers:
        report_steps(tracker.spool, 100, 200)
        lines.expect("cannot be used")
    dump = database.run("pg_dump", "--format", "custom")
    database.execute("CREATE DATABASE restored")
    database.run("pg_restore", "--exit-on-error", "--dbname", "restored", content=dump)
    database.execute("ALTER DATABASE mlflow RENAME TO lost")
    database.execute("ALTER DATABASE restored RENAME TO mlflow")
    server.start()

    for _, lines, tracker in writers:
        lines.expect("answers again")
        assert tracker.finish("FINISHED", timeout_s=PATIENCE_S).pending == 0
    for directory, _, _ in writers:
        client, run = the_run(directory, server.uri)
        assert curve(client, run) == [(step, step / 4) for step in range(200)]
        version = client.get_model_version_by_alias(directory.name, "champion")
        assert version.tags["ddpm.model_id"] == "hash"
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    objects = boto3.client(
        "s3",
        endpoint_url=store.endpoint,
        aws_access_key_id=store.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=store.environment["AWS_SECRET_ACCESS_KEY"],
        region_name=store.environment["AWS_DEFAULT_REGION"],
    ).list_objects_v2(Bucket=store.bucket, Prefix="ddpm/mlflow/")["Contents"]
    assert sum(entry["Key"].endswith("ema.safetensors") for entry in objects) == 3

    # What one team has made, another may read and not change.
    (experiment,) = [e for e in MlflowClient(server.uri).search_experiments() if e.name == writers[0][0].name]
    assert ask(server, f"experiments/get?experiment_id={experiment.experiment_id}", other)[0] == 200
    renaming = {"experiment_id": experiment.experiment_id, "new_name": "taken"}
    assert ask(server, "experiments/update", other, renaming)[0] == 403
    assert ask(server, "experiments/update", team, renaming)[0] == 200
