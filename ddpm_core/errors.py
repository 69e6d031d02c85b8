"""What the mathematics refuses. The jobs' errors stand on the same base: pipelines/cli/errors.py has the whole tree."""


class DDPMError(Exception):
    """Base of every error that is raised on purpose; its message is one line for the user."""


class ConfigError(DDPMError, ValueError):
    """An argument or a field is unknown, of the wrong type or out of range."""


class ModelError(DDPMError):
    """Weights, or a model's files, are missing, incomplete or altered, or do not fit the network."""
