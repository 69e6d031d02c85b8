"""S3 that does not give up at once: s3fs with one retry policy, below everything that asks the store anything.

botocore asks its `needs-retry` handlers after every answer to every request: single objects, pages of a listing,
parts of an upload, ranges of an open file. The one registered here decides alone: nested retries would multiply. It
also reads the body of what was asked for, so that an answer which breaks off halfway is asked for again like any other.
"""

import io
import os
import random
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from botocore import exceptions as boto  # type: ignore[import-untyped]
from fsspec.asyn import sync
from s3fs import S3FileSystem

from pipelines.cli.console import clock, event
from pipelines.cli.errors import StorageError, UnavailableError
from pipelines.storage.errors import boto_code, endpoint_name, failure_text, wrapped_error

# How long one request is repeated: longer than a store takes to be restarted or failed over.
PATIENCE_VARIABLE = "DDPM_STORAGE_PATIENCE_S"
_PATIENCE_S = 180.0
# Full jitter (Brooker 2015, "Exponential backoff and jitter"): a uniform draw from 0 to a bound that doubles. The
# first is short, because most faults concern one request only.
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.01, 5.0
# A silence of the store within a request; and how long nothing at all may succeed before a person is told.
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _SILENCE_S = 5, 20, 3.0
_CONNECTIONS = 32
_UPLOADS = 5
_KEYS_PER_DELETION = 1000  # the most that S3 takes

_TRANSIENT_STATUS = {429, 500, 502, 503, 504}
_TRANSIENT_CODES = {  # with a status that says otherwise, or in a list of what could not be deleted
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT_ERRORS = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)


class PatientS3FileSystem(S3FileSystem):  # type: ignore[misc]
    """s3fs whose requests are repeated until they succeed, are refused for good, or `DDPM_STORAGE_PATIENCE_S` is over.

    Raises, besides what s3fs raises for permanent refusals:
        UnavailableError: The store did not do it in that time. It is no OSError: s3fs and fsspec read several of those
            as "there is nothing".
    """

    # Of s3fs' own: left for the few errors that botocore raises without asking its handlers, such as for an error
    # message that breaks off.
    retries = 5
    _s3: Any

    def __init__(self, **options: Any) -> None:
        config = {
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "max_pool_connections": _CONNECTIONS,
        }
        self._patience = _Patience(_patience_s())
        # Other processes write, too: a remembered listing would hide their objects.
        super().__init__(**{"use_listings_cache": False, "config_kwargs": config, **options})

    async def set_session(self, refresh: bool = False, kwargs: dict[str, Any] | None = None) -> Any:
        """Connect, as s3fs does, and take over the decision about retries."""
        before = self._s3
        try:
            client = await super().set_session(refresh, kwargs or {})
        except ValueError as error:
            if isinstance(error, boto.BotoCoreError):
                raise
            # From none: it repeats the URL, and with it what it must not carry.
            raise StorageError("AWS_ENDPOINT_URL: is no URL; write it as http://host:port or https://host") from None
        if client is not before:
            endpoint = client.meta.endpoint_url
            if urlsplit(endpoint).username is not None:
                self._s3 = None  # the next request must not find a connection
                raise StorageError(
                    f"AWS_ENDPOINT_URL = {endpoint_name(endpoint)}: must not carry credentials; "
                    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                )
            client.meta.events.register("needs-retry.s3", self._patience, unique_id="patience")
        return client

    async def _pipe_file(self, path: str, data: bytes, *args: Any, **kwargs: Any) -> Any:
        """As s3fs, but a completed upload whose acknowledgement was lost is not taken for one that never was."""
        for attempt in range(_UPLOADS):
            try:
                return await super()._pipe_file(path, data, *args, **kwargs)
            except FileNotFoundError as error:
                if boto_code(error) != "NoSuchUpload" or attempt == _UPLOADS - 1:
                    raise

    def first_keys(self, path: str, limit: int) -> list[str]:
        """Up to `limit` objects below the prefix `path`, at any depth, as `bucket/key`: one request."""
        keys: list[str] = sync(self.loop, self._first_keys, path, limit)
        return keys

    async def _first_keys(self, path: str, limit: int) -> list[str]:
        bucket, _, key = path.partition("/")
        prefix = f"{key.rstrip('/')}/" if key else ""
        answer = await self._call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=limit)
        return [f"{bucket}/{entry['Key']}" for entry in answer.get("Contents", [])]

    def delete_keys(self, paths: Sequence[str]) -> None:
        """Delete these objects of one bucket; not s3fs' `rm`, which takes a name with [ ] for a pattern."""
        for start in range(0, len(paths), _KEYS_PER_DELETION):
            sync(self.loop, self._bulk_delete, list(paths[start : start + _KEYS_PER_DELETION]))


def _patience_s() -> float:
    """Seconds for which a request is repeated, from the environment.

    Raises:
        StorageError: The variable is no positive number.
    """
    text = os.environ.get(PATIENCE_VARIABLE, str(_PATIENCE_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise StorageError(f"{PATIENCE_VARIABLE} = {text!r}: must be a positive number of seconds; correct or unset it")
    return seconds


class _Patience:
    """botocore's `needs-retry` handler: None when a request is settled, else the seconds to wait before the next try.

    All of it runs in the one thread of fsspec's event loop.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._last_success = 0.0
        self._away_since: float | None = None

    async def __call__(
        self,
        *,
        response: tuple[Any, dict[str, Any]] | None,
        attempts: int,
        caught_exception: Exception | None,
        request_dict: dict[str, Any],
        **_: Any,
    ) -> float | None:
        failure: Exception | str | None = caught_exception
        if response is not None:
            failure = await _failure_of(response[1])
        now = time.monotonic()
        if failure is None:
            self._last_success = now
            if self._away_since is not None:
                event(f"storage: the store answers again after {clock(now - self._away_since)}")
                self._away_since = None
            return None
        if isinstance(failure, Exception) and not _is_transient(failure):
            return None
        began = request_dict["context"].setdefault("ddpm_failing_since", now)
        text = failure_text(failure, request_dict["url"])
        if now - began >= self._patience_s:
            raise UnavailableError(f"{text} (tried for {self._patience_s:g} s)") from (
                failure if isinstance(failure, Exception) else None
            )
        silent_since = max(began, self._last_success)
        if self._away_since is None and now - silent_since >= _SILENCE_S:
            self._away_since = silent_since
            event(f"storage: {text}; trying again for up to {self._patience_s:g} s")
        bound = min(_FIRST_DELAY_S * 2 ** min(attempts - 1, 30), _LONGEST_DELAY_S)
        return random.uniform(0, bound)


async def _failure_of(answer: dict[str, Any]) -> Exception | str | None:
    """What is transiently wrong with a parsed answer: an error code, what broke off its body, or nothing."""
    code = str(answer.get("Error", {}).get("Code", ""))
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    if status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES:
        return code or str(status)
    for error in answer.get("Errors", []):  # of the objects that were to be deleted by one request
        if error.get("Code") in _TRANSIENT_CODES:
            return str(error["Code"])
        raise PermissionError(f"{error.get('Message') or 'not deleted'} ({error.get('Code')}, {error.get('Key')})")
    if status < 300 and hasattr(answer.get("Body"), "read"):
        body = answer["Body"]
        try:
            answer["Body"] = _ReadBody(await body.read())
        except _TRANSIENT_ERRORS as error:
            return error
        finally:
            body.close()
    return None


def _is_transient(error: Exception) -> bool:
    wrapped = wrapped_error(error)
    if type(error) is boto.HTTPClientError:  # what botocore has no name for
        error = wrapped
    # A ValueError inside is a URL that cannot be or a certificate that is not trusted.
    return isinstance(error, _TRANSIENT_ERRORS) and not isinstance(wrapped, ValueError)


class _ReadBody:
    """A body that has been read, as s3fs expects one to be read."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    async def read(self, amount: int | None = None) -> bytes:
        return self._data.read(amount)

    def close(self) -> None:
        pass
