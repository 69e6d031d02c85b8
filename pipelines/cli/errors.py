"""The project's one tree of errors, the map from a name to its class, and the exit code of each.

Every error that a user can cause or meet derives from `DDPMError`. A message names the field or the file, the value,
the rule and the fix, in one line.

    DDPMError                 exit 1
    ├── ConfigError           exit 2   a field or an argument is unknown, of the wrong type or out of range
    ├── ModelError            exit 1   a model is missing, incomplete or altered, or does not fit
    ├── DataError             exit 1   a source or a prepared data set cannot be used
    ├── StorageError          exit 1   a URI cannot be read or written (missing, refused, disk full)
    │   └── UnavailableError  exit 1   its store did not answer for as long as requests are repeated
    ├── CheckpointError       exit 1   a training checkpoint is corrupt or belongs to another run
    ├── LedgerError           exit 1   a row was about to be used twice in an epoch, or was skipped
    ├── RequestMismatchError  exit 2   an unfinished output was started with another request
    ├── NonFiniteLossError    exit 1   the training loss is NaN or infinite
    ├── ClusterError          exit 1   Ray cannot give what the job needs, or gave up retrying
    ├── SweepError            exit 1   some trainings of a sweep failed
    ├── AlreadyRunningError   exit 1   another process of this machine drives the same run
    └── TrackingError         exit 1   MLflow refused something that a retry cannot mend

The first three are the mathematics' own (ddpm_core/errors.py).
"""

from ddpm_core.errors import ConfigError as ConfigError
from ddpm_core.errors import DDPMError as DDPMError
from ddpm_core.errors import ModelError as ModelError


class DataError(DDPMError):
    """A source or a prepared data set cannot be used."""


class StorageError(DDPMError):
    """A URI cannot be read or written: missing, refused, full."""


class UnavailableError(StorageError):
    """The store did not answer, or kept failing, for as long as a request is repeated."""


class CheckpointError(DDPMError):
    """A training checkpoint is corrupt or belongs to another run."""


class LedgerError(DDPMError):
    """A row was about to be used twice in an epoch, or was skipped."""


class RequestMismatchError(DDPMError):
    """An unfinished output was started with another request; the differing fields are named."""


class NonFiniteLossError(DDPMError):
    """The training loss is NaN or infinite; the step is named and nothing after it is kept."""


class ClusterError(DDPMError):
    """Ray cannot give what the job needs, or gave up retrying."""


class SweepError(DDPMError):
    """Some trainings of a sweep failed; they are named."""


class AlreadyRunningError(DDPMError):
    """Another process of this machine drives the same run."""


class TrackingError(DDPMError):
    """MLflow refused something that a retry cannot mend."""


def error_of(name: str, message: str) -> DDPMError:
    """The error that another process has written down: of the class called `name`, wherever in the tree that is.

    A class that this process does not know becomes a plain DDPMError.
    """
    classes = [DDPMError]
    for found in classes:  # grows while it is walked
        classes += found.__subclasses__()
    return {found.__name__: found for found in classes}.get(name, DDPMError)(message)


def exit_code(error: DDPMError) -> int:
    """The exit code of a job that this error ends: 2 where the command has to change, 1 for everything else."""
    return 2 if isinstance(error, ConfigError | RequestMismatchError) else 1
