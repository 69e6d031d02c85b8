"""What an output answers: a job's request as a frozen dataclass, and the JSON that is stored, hashed and compared."""

import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from pipelines.cli.errors import ConfigError
from pipelines.outputs.manifest import refused
from pipelines.storage.location import Location

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", types.NoneType: "null"}


@dataclass(frozen=True)
class Request:
    """The values that determine every byte of an output: the fields of a subclass.

    They are stored under their names. A field whose default is None is left out where it is None, so that a field which
    is added leaves the requests from before it as they are.
    """

    @property
    def on_gpu(self) -> bool:
        """Whether GPUs make the shards."""
        return False

    def to_json(self) -> dict[str, Any]:
        """The request as it is stored."""
        optional = {field.name for field in fields(self) if field.default is None}
        values = asdict(self, dict_factory=lambda pairs: {name: _as_json(value) for name, value in pairs})
        return {name: value for name, value in values.items() if not (value is None and name in optional)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], path: Location) -> Self:
        """The request that the manifest at `path` holds.

        Raises:
            DataError: A field is missing, is not known, or has not the type or a value that it must have.
        """
        return read_fields(cls, stored, path)


def read_fields(
    cls: type[T], stored: Mapping[str, Any], path: Location, prefix: str = "request.", **given: object
) -> T:
    """The dataclass `cls` with the fields `given` and all others from `stored`; see `Request.from_json`."""
    hints, values = get_type_hints(cls), dict(given)
    for field in fields(cls):
        name = f"{prefix}{field.name}"
        if field.name in stored:
            values[field.name] = read_value(hints[field.name], stored[field.name], path, name)
        elif field.name not in given and field.default is not None:
            raise refused(path, name, None, "must be there")
    for key in sorted(stored.keys() - values.keys()):
        raise refused(path, f"{prefix}{key}", stored[key], "is not known to this version")
    try:
        return cls(**values)
    except ConfigError as error:
        raise refused(path, prefix.rstrip("."), dict(stored), f"does not hold together ({error})") from error


def read_value(hint: Any, value: Any, path: Location, name: str) -> Any:
    """`value` as the type `hint`: a JSON type, a Literal, a dataclass, a `tuple[T, ...]` of them, or a union; `name` is
    its field.

    Raises:
        DataError: It is of another type.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if is_dataclass(option) and isinstance(option, type) and isinstance(value, dict):
            return read_fields(option, value, path, f"{name}.")
        if get_origin(option) is tuple and isinstance(value, list):
            of_each, _ = get_args(option)
            return tuple(read_value(of_each, each, path, f"{name}[{place}]") for place, each in enumerate(value))
        if _is(option, value):
            return value
    raise refused(path, name, value, f"must be {' or '.join(map(_name_of, options))}")


def _as_json(value: Any) -> Any:
    return [_as_json(each) for each in value] if isinstance(value, tuple) else value


def _is(option: Any, value: Any) -> bool:
    if get_origin(option) is Literal:
        return isinstance(value, str) and value in get_args(option)
    return type(value) is option or (option is float and type(value) is int)


def _name_of(option: Any) -> str:
    if get_origin(option) is Literal:
        return f"one of {', '.join(get_args(option))}"
    if get_origin(option) is tuple:
        return "a list"
    return "an object" if is_dataclass(option) else _NAMES[option]
