"""What a store said, in one line: fsspec, s3fs and operating system errors as `StorageError`."""

import errno
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from botocore import exceptions as boto  # type: ignore[import-untyped]

from pipelines.cli.errors import DDPMError, StorageError, UnavailableError

_CREDENTIAL_CODES = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}
# Their own errors are no OSErrors; imported by none but the drivers, which are optional.
_DRIVERS = {"aiohttp", "azure", "botocore", "gcsfs", "google"}
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def clear_errors(action: str, uri: str) -> Iterator[None]:
    """Turn whatever a store raises inside into one line that names `uri`; `action` is a verb such as `read`."""
    try:
        yield
    except UnavailableError as error:
        raise UnavailableError(f"{uri}: cannot {action}: {error}") from error
    except DDPMError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | ImportError) and type(error).__module__.split(".")[0] not in _DRIVERS:
            raise
        raise StorageError(f"{uri}: cannot {action}: {_reason(error)}") from error


def is_conditional_refusal(error: OSError) -> bool:
    """Whether a conditional write failed because the object is, or is just being, written.

    Servers differ: s3fs reports the same 412 as FileExistsError or as EINVAL, and 409 as EBUSY or EIO.
    """
    codes = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
    return isinstance(error, FileExistsError) or boto_code(error) in codes


def boto_code(error: BaseException) -> str:
    """The S3 error code behind an exception that s3fs translated; empty where there is none."""
    for cause in (error, error.__cause__):
        if isinstance(cause, boto.ClientError):
            return str(cause.response.get("Error", {}).get("Code", ""))
    return ""


def wrapped_error(error: BaseException) -> Any:
    """What botocore wrapped in one of its own errors, or the error itself."""
    return getattr(error, "kwargs", {}).get("error", error)


def endpoint_name(url: str) -> str:
    """The store's URL without path, query and credentials."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def failure_text(failure: BaseException | str, url: str) -> str:
    """What is the matter with the store at `url`, in a clause: it answered with an error code, or failed to answer."""
    store = f"the store {endpoint_name(url)}"
    if isinstance(failure, str):
        return f"{store} keeps failing ({failure}); look at its own logs"
    if isinstance(failure, boto.ConnectionError):
        return f"{store} cannot be reached; check AWS_ENDPOINT_URL and the network"
    return f"{store} breaks off its answers ({type(failure).__name__}); check it and the network"


def _reason(error: BaseException) -> str:
    code = boto_code(error)
    if code == "NoSuchBucket":
        return "the bucket does not exist; create it or check the spelling"
    if code in _CREDENTIAL_CODES:
        return f"the store refused the credentials ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(wrapped_error(error), ssl.SSLCertVerificationError):
        return "the store's certificate is not trusted; set AWS_CA_BUNDLE to that of its authority"
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError):
        return f"{_first_line(wrapped_error(error))}; check AWS_ENDPOINT_URL and AWS_CA_BUNDLE"
    if isinstance(error, boto.ParamValidationError):
        return f"{str(error).splitlines()[-1].strip()}; correct the URI"
    if isinstance(error, ConnectionError | TimeoutError):
        return "the store cannot be reached; check its endpoint and the network"
    if isinstance(error, OSError) and error.errno in _FULL:
        return "the disk is full; free some space and run again"
    if isinstance(error, FileNotFoundError):
        return "does not exist; check the spelling"
    if isinstance(error, PermissionError):
        return f"permission denied{f' ({code})' if code else ''}; check the rights of this user or key"
    if isinstance(error, IsADirectoryError):
        return "is a directory; name a file"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return "a file is where a directory is needed; choose another path"
    return f"{_first_line(error)} ({code or type(error).__name__})"


def _first_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]
