"""Spot interruption notices of EC2: a machine that AWS is about to take leaves the Ray cluster in good order.

Two minutes ahead the notice appears in the instance's metadata service. This watcher runs beside the raylet
(`python -m pipelines.cluster.spot_notice`, started by ray_cluster.yaml on spot workers) and turns the notice into a
drain with that deadline: Ray schedules nothing new on the node, a training saves a checkpoint and goes on elsewhere.

Source: EC2 User Guide, "Spot Instance interruption notices" and "Use the Instance Metadata Service".
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from pipelines.cli.config import parse, require
from pipelines.cli.console import event
from pipelines.cli.errors import ClusterError
from pipelines.cluster import ray_private

_TIMEOUT_S = 2.0
_TOKEN_TTL_S = 21_600
# Long enough for the GCS to answer under load, short enough for many attempts in the two minutes of a notice.
_DRAIN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class SpotNoticeConfig:
    """What to watch, and whom to drain."""

    poll_seconds: float = 5.0
    """Seconds between two questions to the metadata service, in (0, 60]; AWS recommends five."""
    metadata: str = "http://169.254.169.254"
    """Address of the metadata service."""
    raylet_pid: int | None = None
    """Process id of the raylet to drain; null for the only one of this machine."""

    def __post_init__(self) -> None:
        require(0 < self.poll_seconds <= 60, "poll_seconds", self.poll_seconds, "must lie in (0, 60]")
        require(
            urlsplit(self.metadata).scheme in ("http", "https"), "metadata", self.metadata, "must be an http:// address"
        )


@dataclass(frozen=True)
class Notice:
    """What AWS announces: `action` (terminate, stop or hibernate) at `time` (UTC)."""

    action: str
    time: datetime

    @classmethod
    def parse(cls, text: str) -> "Notice":
        """Read `{"action": "terminate", "time": "2026-11-22T08:22:00Z"}`.

        Raises:
            ValueError: The text is something else.
        """
        try:
            values = json.loads(text)
            return cls(str(values["action"]), datetime.strptime(values["time"], "%Y-%m-%dT%H:%M:%S%z"))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"is no notice: {text[:100]!r}") from error

    @property
    def seconds_left(self) -> float:
        """Until the machine is taken; negative afterwards."""
        return self.time.timestamp() - time.time()


class MetadataService:
    """The instance metadata service, version 2 (every question carries a token that expires)."""

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        self._token = ""
        # It is on this machine: never ask a proxy for it.
        self._opener = build_opener(ProxyHandler({}))

    def get(self, path: str) -> str | None:
        """The text at `/latest/meta-data/<path>`; None where there is none.

        Raises:
            OSError, HTTPException: The service does not answer, or not properly.
        """
        for retry in (False, True):
            if retry or not self._token:
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
                self._token = self._open(Request(f"{self._address}/latest/api/token", headers=lifetime, method="PUT"))
            headers = {"X-aws-ec2-metadata-token": self._token}
            try:
                return self._open(Request(f"{self._address}/latest/meta-data/{path}", headers=headers))
            except HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or retry:  # 401: the token has expired
                    raise
        raise AssertionError("unreachable")

    def _open(self, request: Request) -> str:
        with self._opener.open(request, timeout=_TIMEOUT_S) as response:
            return str(response.read().decode())


@dataclass(frozen=True)
class Raylet:
    """Ray's process on this machine, its node's id (hex) and the address of the cluster's GCS."""

    process: psutil.Process
    node_id: str
    gcs_address: str

    @classmethod
    def find(cls, pid: int | None = None) -> "Raylet":
        """The raylet with process id `pid`, or the only one of this machine.

        Raises:
            ClusterError: There is none, or there are several and no `pid`.
        """
        found = {}
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] == "raylet":
                words = [word.partition("=") for word in process.info["cmdline"] or ()]
                options = {name: value for name, _, value in words}
                if "--node_id" in options and "--gcs-address" in options:
                    found[process.pid] = cls(process, options["--node_id"], options["--gcs-address"])
        if pid is None and len(found) > 1:
            raise ClusterError(f"raylet_pid = null: must name one of {sorted(found)}, this machine's raylets; set it")
        chosen = found.get(pid) if pid is not None else next(iter(found.values()), None)
        if chosen is None:
            raise ClusterError(f"raylet_pid = {pid or 'null'}: no raylet runs here; start it first (ray start)")
        return chosen

    def ends_within(self, seconds: float) -> bool:
        """Wait for the raylet's end, for `seconds` at most; whether it has ended."""
        try:
            self.process.wait(timeout=max(seconds, 0))
        except psutil.TimeoutExpired:
            return False
        return True

    def drain(self, notice: Notice) -> None:
        """Ask the GCS, once, to drain this node by the time of the notice.

        Raises:
            ClusterError: The GCS does not answer, or refuses.
        """
        # Imported late: a watcher that waits for weeks should be small.
        from ray.exceptions import RayError

        try:
            why = f"EC2 spot interruption: {notice.action} at {notice.time.isoformat()}"
            accepted, reason = ray_private.drain_node(
                self.gcs_address, self.node_id, why, notice.time, _DRAIN_TIMEOUT_S
            )
        except RayError as error:
            raise ClusterError(f"GCS at {self.gcs_address}: {str(error).splitlines()[0]}") from error
        if not accepted:
            raise ClusterError(f"GCS at {self.gcs_address}: refused to drain node {self.node_id} ({reason})")


def watch(raylet: Raylet, service: MetadataService, poll_seconds: float) -> None:
    """Wait for a notice and drain; returns when that is done or the raylet has ended.

    Raises:
        ClusterError: The node could not be drained before its machine was taken.
    """
    trouble = recommended = ""
    while True:
        try:
            text = service.get("spot/instance-action")
            if text is not None:
                return drain(raylet, Notice.parse(text), poll_seconds)
            recommendation = service.get("events/recommendations/rebalance") or ""
            if recommendation and not recommended:
                event(f"rebalance recommendation {recommendation}: an interruption is likelier now, nothing is drained")
            recommended = recommendation
            if trouble:
                event("the metadata service answers again")
            trouble = ""
        except (OSError, HTTPException, ValueError) as error:
            if str(error) != trouble:
                event(f"the metadata service cannot be used ({error}): trying again")
            trouble = str(error)
        if raylet.ends_within(poll_seconds):
            event("the raylet has ended: nothing to watch for")
            return


def drain(raylet: Raylet, notice: Notice, retry_seconds: float) -> None:
    """Drain the node, trying again until the time of the notice.

    Raises:
        ClusterError: No attempt succeeded.
    """
    event(f"spot notice: {notice.action} at {notice.time.isoformat()}, in {notice.seconds_left:.0f} s")
    wait = 0.0
    while not raylet.ends_within(wait):
        try:
            raylet.drain(notice)
        except ClusterError as error:
            if notice.seconds_left <= 0:
                raise
            event(f"{error}: trying again")
            wait = min(retry_seconds, notice.seconds_left)
        else:
            event(f"Ray node {raylet.node_id} drains")
            return
    event("the raylet has ended: nothing to drain")


def main(argv: Sequence[str]) -> None:
    """Watch until a notice was passed on, or the raylet ends."""
    config = parse(SpotNoticeConfig, argv, "Drain this machine's Ray node when AWS announces to take a spot instance.")
    raylet = Raylet.find(config.raylet_pid)
    event(f"Ray node {raylet.node_id}: watching {config.metadata} for spot notices")
    watch(raylet, MetadataService(config.metadata), config.poll_seconds)


if __name__ == "__main__":
    from pipelines.cli.console import run_job

    run_job(main)
