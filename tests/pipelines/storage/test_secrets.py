"""Credentials reach the store and nothing else: no output, no log, no error, no file."""

import io
import logging
import os
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cli.console import exit_code_of
from pipelines.cli.errors import DDPMError
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.outputs.shards import ShardedOutput, ShardOutput
from pipelines.storage.location import Location, forget_connections
from pipelines.tracking.spool import Spool

TOKEN = "sentinel-session-token"


@pytest.fixture
def secret(s3_prefix: str) -> str:
    if "AWS_SECRET_ACCESS_KEY" not in os.environ:
        pytest.skip("the caller's credentials are not in the environment, so there is nothing to look for")
    return os.environ["AWS_SECRET_ACCESS_KEY"]


@pytest.fixture
def credentials_file(s3_prefix: str, secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is given by files and AWS_PROFILE alone."""
    (tmp_path / "credentials").write_text(
        f"[cluster]\naws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {secret}\n"
    )
    region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    (tmp_path / "config").write_text(
        f"[profile cluster]\nregion = {region}\n" + (f"endpoint_url = {endpoint}\n" if endpoint else "")
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "cluster")
    forget_connections()


def write_images(root: Location) -> None:
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)):
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        (root / f"class-{index % 2}" / f"{index}.png").write_bytes(sink.getvalue())


def everything_below(root: Location) -> str:
    prefix = root.path.rstrip("/") + "/"
    return "".join((root / path.removeprefix(prefix)).read_bytes().decode("latin-1") for path in root.find())


@pytest.mark.parametrize("source", ["environment", "files"])
def test_what_a_job_writes_and_prints_carries_no_secret(
    s3_prefix: str,
    secret: str,
    source: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if source == "files":
        request.getfixturevalue("credentials_file")
    root = Location.parse(s3_prefix)
    write_images(root / "in")
    ingest(IngestConfig(f"{s3_prefix}/in", f"{s3_prefix}/out"), lambda *call: print(call))
    # An unfinished output keeps what a finished one removes: the request and the records.
    unfinished = ShardedOutput(root / "unfinished", {"source": f"{s3_prefix}/in"})
    unfinished.begin()
    unfinished.compute(lambda: lambda index: ShardOutput(b"data", 1), 2)
    with pytest.raises(DDPMError) as raised:
        ingest(IngestConfig(f"{s3_prefix}/nothing", f"{s3_prefix}/out-2"))
    spool = Spool(tmp_path / "spool.jsonl")
    spool.append("fatal", error=type(raised.value).__name__, message=str(raised.value))
    written = everything_below(root) + (tmp_path / "spool.jsonl").read_text()
    assert written.count(f"{s3_prefix}/in") >= 2
    told = "".join(capfd.readouterr()) + caplog.text + "".join(traceback.format_exception(raised.value))
    assert secret not in written + told
    assert "X-Amz-Signature" not in written + told


def test_what_fails_tells_no_secret(
    s3_prefix: str, secret: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every failure in full, chain of causes included, and as a job prints it when asked for the stack trace."""
    monkeypatch.setenv("DDPM_DEBUG", "1")
    monkeypatch.setenv("DDPM_STORAGE_PATIENCE_S", "0.2")
    failures = {
        "denied": {"AWS_ACCESS_KEY_ID": "nobody"},
        "wrong": {"AWS_SECRET_ACCESS_KEY": secret + "-not"},
        "token": {"AWS_SESSION_TOKEN": TOKEN},
        "away": {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_SESSION_TOKEN": TOKEN},
        "user": {"AWS_ENDPOINT_URL": f"http://someone:{secret}@127.0.0.1:9"},
        "malformed": {"AWS_ENDPOINT_URL": f"nonsense://someone:{secret}@nowhere"},
    }
    told = []
    for name, environment in failures.items():
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            forget_connections()
            location = Location.parse(f"{s3_prefix}/{name}")
            for operation in (location.read_bytes, lambda at=location: at.open().read(), location.size):
                with pytest.raises(DDPMError) as raised:
                    operation()
                told.append("".join(traceback.format_exception(raised.value)))

            def main(argv: object, at: Location = location) -> None:
                at.read_bytes()

            assert exit_code_of(main) == 1
    text = "".join(told) + "".join(capfd.readouterr())
    assert "error: " in text
    for hidden in (secret, TOKEN, "X-Amz-Signature"):
        assert hidden not in text


def test_the_drivers_do_not_log_requests(s3_prefix: str) -> None:
    Location.parse(s3_prefix).exists()
    for name in ("botocore", "aiobotocore", "s3fs", "fsspec", "aiohttp", "urllib3"):
        assert not logging.getLogger(name).isEnabledFor(logging.DEBUG)
