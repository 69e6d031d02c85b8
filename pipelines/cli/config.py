"""Reading a job's configuration: a YAML recipe, command line overrides, and refusals in one line."""

import argparse
import dataclasses
import difflib
import hashlib
import json
import re
import stat
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args, get_type_hints

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from pipelines.cli.errors import ConfigError, DDPMError
from pipelines.cli.paths import absolute_path, expand_home, with_variables

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
_MAX_RECIPE_BYTES = 2**20
# Fields by their names in earlier versions, as stored requests and checkpoints still have them: the name of today, and
# the values of today.
_RENAMED: dict[str, tuple[str, dict[str, str]]] = {
    "dtype": ("precision", {"float32": "fp32", "bfloat16": "bf16"}),
    "train.precision": ("precision", {}),
    "train.batch_size": ("batch_size", {}),
    "train.seed": ("seed", {}),
    "cluster.use_gpu": ("cluster.gpus_per_worker", {"true": "1", "false": "0"}),
    "num_workers": ("cluster.num_workers", {}),
    "cpus_per_worker": ("cluster.cpus_per_worker", {}),
    "gpus_per_worker": ("cluster.gpus_per_worker", {}),
    "tracking_uri": ("tracking.uri", {}),
}
# Fields that have moved into a section on the command line and in recipes; stored requests go on to have the old names.
_MOVED = {
    "sampler": "sampler.name",
    "steps": "sampler.steps",
    "eta": "sampler.eta",
    "sigma2": "sampler.sigma2",
}
_RAYS_COPY = "/runtime_resources/working_dir_files/"
_HELP = "; --help lists every field"


def require(holds: bool, field: str, value: object, rule: str) -> None:
    """Raise a ConfigError that names the field, its value and the rule unless `holds`."""
    if not holds:
        raise ConfigError(f"{field} = {value!r:.300}: {rule}")


def require_place(field: str, place: str, rule: str = "must be a path or a URI") -> None:
    """Raise a ConfigError unless something can be written to `place`, and outlives the job.

    A job submitted with a working directory runs in a copy of it, which Ray removes.
    """
    require(bool(place), field, place, rule)
    if _RAYS_COPY in f"{Path.cwd()}/" and "://" not in place and _RAYS_COPY in absolute_path(with_variables(place)):
        lost = "would lie in Ray's temporary copy of the working directory, and be lost with it"
        require(False, field, place, f"{lost}; give an absolute path or an s3:// prefix")


def require_local(root: str) -> None:
    """Raise a ConfigError unless `root` can be a directory of this machine, as MLflow's database needs one."""
    require("://" not in root or root.startswith("file:/"), "root", root, "must be a local directory")
    require_place("root", root, "must be a local directory")


def parse(config_class: type[Config], argv: Sequence[str], description: str) -> Config:
    """Build a config dataclass from `--config recipe.yaml` and `--section.field value` overrides.

    A boolean field is also a flag: `--field` alone means true. An option must be written out.

    Args:
        config_class: A frozen dataclass, with documented fields; its sections are dataclasses too.
        argv: The command line without the program's name.
        description: What `--help` says the job does.

    Raises:
        ConfigError: An unknown key, a field's name of an earlier version, a wrong type, an out-of-range value, or an
            unreadable recipe.
        SystemExit: After `--help` or `--print_config`.
    """
    fields = dict(_fields(config_class))
    _check_words(argv, fields)
    _check_recipes(argv, fields)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML recipe; later options override it.")
    parser.add_class_arguments(config_class, None)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True
    try:
        parsed = parser.parse_args(list(argv))
        _check_given(config_class, parsed)
        values = parser.instantiate(parsed)
        return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise ConfigError(_one_line(error, _advice(str(error), parser))) from error


def _advice(refusal: str, parser: ArgumentParser) -> str:
    """What to do about a refused command line; an unknown option may be a known one, misspelt or abbreviated."""
    if match := re.match(r"unrecognized arguments: (--[^\s=]+)", refusal):
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(match[1], known, n=1) or [n for n in known if n.startswith(match[1])][:3]
        if near:
            return f"; did you mean {' or '.join(near)}?"
    return _HELP


def _fields(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, type) of a job's fields and sections, the fields of a section as `section.field`."""
    for name, kind in get_type_hints(config_class).items():
        yield f"{prefix}{name}", kind
        if dataclasses.is_dataclass(kind):
            yield from _fields(cast(type, kind), f"{prefix}{name}.")


def _check_words(argv: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Refuse options by their names of earlier versions."""
    given = []
    for word, following in zip_longest(argv, argv[1:], fillvalue="--"):
        option, _, value = word.partition("=")
        if word.startswith("--"):
            # An option without a value is a flag.
            value = value if "=" in word else "true" if following.startswith("--") else following
            given.append((option.removeprefix("--"), value))
    _refuse_renamed(given, fields, "", "--{}", "--{} {}", " ")


def _check_recipes(argv: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Refuse a recipe that is no YAML mapping, by its name: the parser would tell neither file nor reason. And fields
    by their names of earlier versions, a field without a value, and a recipe that names another."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    try:
        paths = finder.parse_known_args(list(argv))[0].config
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; give the path of a YAML recipe") from error
    for path in paths:
        values = _read_recipe(path)
        require(isinstance(values, dict), "config", path, "must hold fields and sections, as `name: value` lines")
        where = f"config = {path}: "
        _refuse_renamed(_leaves(values), fields, where, "{}", "{}: {}", ", ")
        for name, value in values.items():
            given = value is not None or type(None) in get_args(fields.get(name))
            require(given, f"{where}{name}", value, "is empty; give a value or leave it out")
            require(name != "config", f"{where}config", value, "must not name another recipe; copy its fields")


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value as one writes it) of the fields in a recipe."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def _refuse_renamed(
    given: Iterable[tuple[str, str]], fields: Mapping[str, Any], where: str, name: str, line: str, between: str
) -> None:
    """Raise a ConfigError if one of the `given` (name, value) is a name of an earlier version, and no field now."""
    names, lines = [], []
    for old, value in given:
        new, values = _RENAMED.get(old, (_MOVED.get(old, old), {}))
        # A section may be called as one of its fields was: then what is no mapping was meant for the field.
        is_field = new.startswith(f"{old}.") and not value.startswith("{") and value != "null"
        if new in fields and (old not in fields or is_field):
            names.append(f"{name.format(old)} is now {name.format(new)}")
            lines.append(line.format(new, values.get(value, value)))
    if names:
        raise ConfigError(f"{where}{', '.join(names)}; write {between.join(lines)}")


def today(name: str, value: Any) -> tuple[str, Any]:
    """A field of a stored request or config, and its value, as the command line calls them.

    >>> today("dtype", "float32"), today("steps", 50)
    (('precision', 'fp32'), ('steps', 50))
    """
    new, values = _RENAMED.get(name, (name, {}))
    return new, values.get(value, value) if isinstance(value, str) else value


def _read_recipe(path: str) -> Any:
    """The content of a recipe, which is a file of a size that a person writes."""
    file = expand_home(path)
    try:
        found = file.stat()
        # A pipe would be waited for, a device read without an end.
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"config = {path}: is not a regular file; give a YAML recipe")
        if found.st_size > _MAX_RECIPE_BYTES:
            allowed = f"a recipe at most {_MAX_RECIPE_BYTES:,}"
            raise ConfigError(f"config = {path}: has {found.st_size:,} bytes, {allowed}; give a YAML recipe")
        with file.open(encoding="utf-8") as stream:
            return yaml.load(stream, _RecipeLoader)
    except OSError as error:
        raise ConfigError(f"config = {path}: cannot be read ({error.strerror}); give a YAML recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config = {path}: is not YAML ({_one_line(error, '')})") from error
    except RecursionError:
        raise ConfigError(
            f"config = {path}: is nested too deeply; write fields and sections, as `name: value`"
        ) from None


class _RecipeLoader(yaml.SafeLoader):  # type: ignore[misc]  # untyped
    """The safe loader without what makes a recipe mean something else than it shows: a field given twice, of which
    the last would count, and aliases, of which a few lines expand to more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.composer.ComposerError(
                problem=f"alias *{alias.anchor}: write the value out", problem_mark=alias.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for position, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value in names[:position]:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def _check_given(config_class: type, values: Namespace, prefix: str = "") -> None:
    """Refuse what the parser lets through: a null where none is allowed, a value in place of a section."""
    for name, kind in get_type_hints(config_class).items():
        field, value = f"{prefix}{name}", values[name]
        if dataclasses.is_dataclass(kind):
            require(isinstance(value, Namespace), field, value, "must be a section with fields of its own")
            _check_given(cast(type, kind), value, f"{field}.")
        else:
            require(value is not None or type(None) in get_args(kind), field, value, "must not be null")


def _one_line(error: BaseException, advice: str = _HELP) -> str:
    """The rule that was broken, from the parser's nested report."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = text.replace('Parser key "', "").replace('":', ":", 1).replace("<class '", "").replace("'>", "")
    return text if isinstance(error, DDPMError) else f"{text}{advice}"


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))
    return plain


def digest(values: Any) -> str:
    """sha256 (hex) of JSON values, independent of key order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()


def differences(stored: Any, given: Any, prefix: str = "") -> list[str]:
    """The leaves in which two JSON values differ, as `section.field: stored -> given`, called as on the command line.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}})
    ['a.b: 1 -> 3']
    """
    if isinstance(stored, dict) and isinstance(given, dict):
        found = []
        for key in sorted(stored.keys() | given.keys()):
            found += differences(stored.get(key), given.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    if stored == given:
        return []
    (name, old), (_, new) = today(prefix, stored), today(prefix, given)
    return [f"{name}: {old!r} -> {new!r}"]
