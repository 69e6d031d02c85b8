"""Reading a job's configuration: a YAML recipe, command line overrides, and refusals in one line."""

import dataclasses
import hashlib
import json
import re
from argparse import ArgumentError
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from ddpm_core.errors import ConfigError, DDPMError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def require(holds: bool, field: str, value: object, rule: str) -> None:
    """Raise a ConfigError that names the field, its value and the rule unless `holds`."""
    if not holds:
        raise ConfigError(f"{field} = {value!r}: {rule}")


def parse(config_class: type[Config], argv: Sequence[str], description: str) -> Config:
    """Build a config dataclass from `--config recipe.yaml` and `--section.field value` overrides.

    Args:
        config_class: A frozen dataclass, with documented fields; its sections are dataclasses too.
        argv: The command line without the program's name.
        description: What `--help` says the job does.

    Raises:
        ConfigError: An unknown key, a wrong type, an out-of-range value, or an unreadable recipe.
        SystemExit: After `--help` or `--print_config`.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML recipe; later options override it.")
    parser.add_class_arguments(config_class, None)
    try:
        values = parser.instantiate(parser.parse_args(list(argv)))
        return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise ConfigError(_one_line(error)) from error


def _one_line(error: BaseException) -> str:
    """The rule that was broken, from the parser's nested report."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = text.replace('Parser key "', "").replace('":', ":", 1).replace("<class '", "").replace("'>", "")
    return text if isinstance(error, DDPMError) else f"{text}; --help lists every field"


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def digest(values: Any) -> str:
    """sha256 (hex) of JSON values, independent of key order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(stored: Any, given: Any, prefix: str = "") -> list[str]:
    """The leaves in which two JSON values differ, as `section.field: stored -> given`.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}})
    ['a.b: 1 -> 3']
    """
    if isinstance(stored, dict) and isinstance(given, dict):
        found = []
        for key in sorted(stored.keys() | given.keys()):
            found += differences(stored.get(key), given.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return [] if stored == given else [f"{prefix}: {stored!r} -> {given!r}"]
