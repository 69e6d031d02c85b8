"""Which trainings a sweep consists of: the command line of jobs/train.py with every combination of some values."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from pipelines.cli.config import parse, require
from pipelines.cli.errors import ConfigError
from pipelines.training.config import TrainConfig

MAX_VARIANTS = 1000
_ABOUT = """Train a variant of a model for every combination of the values of some fields.

Every other option is one of jobs/train.py (see its --help) and is common to all variants; `name` is the sweep's. A
variant is the training NAME.FIELD-VALUE..., which `jobs/train.py` could have made: its run, its model and its
evaluations are those of any training. The same command continues a sweep that was interrupted; with more values it adds
trainings to it."""


@dataclass(frozen=True)
class Variant:
    """One training.

    Attributes:
        label: The values that it has, for a person.
        options: Its command line.
        config: The same, parsed.
    """

    label: str
    options: tuple[str, ...]
    config: TrainConfig


@dataclass(frozen=True)
class Sweep:
    """What a command line asks for: `base` are the options of all variants, parsed; `varied` the fields with their
    values as they were written."""

    base: TrainConfig
    varied: dict[str, tuple[str, ...]]
    parallel: int
    variants: tuple[Variant, ...]


def sweep_of(argv: Sequence[str]) -> Sweep:
    """Read the command line of jobs/sweep.py.

    Raises:
        ConfigError: No field is varied, or one that all trainings must share; there are too many variants, or two of
            one name; a variant is no training.
        SystemExit: After `--help`.
    """
    parser = argparse.ArgumentParser(
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
        usage="sweep.py --vary FIELD=VALUE,VALUE,... [--vary ...] [--parallel N] [OPTION OF train.py ...]",
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=VALUE,...",
        help="A field of jobs/train.py and its values, as train.learning_rate=1e-4,3e-4; can be given several times.",
    )
    parser.add_argument(
        "--parallel",
        default="1",
        metavar="N",
        help="Trainings at the same time (default: 1); more than one need a cluster to share.",
    )
    try:
        own, common = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; --help says how it is written") from error
    require(re.fullmatch("[1-9][0-9]{0,3}", own.parallel) is not None, "parallel", own.parallel, "must be in 1..9999")
    varied = dict(map(_field_and_values, own.vary))
    require(len(varied) == len(own.vary), "vary", own.vary, "must not name a field twice; write all of its values once")
    require(bool(varied), "vary", None, "must name a field and its values, as train.learning_rate=1e-4,3e-4")
    base = parse(TrainConfig, common, "Train variants.")
    variants = []
    for values in product(*varied.values()):
        pairs = list(zip(varied, values, strict=True))
        name = ".".join([base.name, *(f"{_short(field, varied)}-{_plain(value)}" for field, value in pairs)])
        options = [*common, *(word for field, value in pairs for word in (f"--{field}", value)), "--name", name]
        label = ", ".join(f"{_short(field, varied)} {value}" for field, value in pairs)
        try:
            variants.append(Variant(label, tuple(options), parse(TrainConfig, options, "Train a variant.")))
        except ConfigError as error:
            raise ConfigError(f"variant {label}: {error}") from error
        rule = f"must give at most {MAX_VARIANTS} variants"
        require(len(variants) <= MAX_VARIANTS, "vary", own.vary, rule)
    names = [variant.config.name for variant in variants]
    require(
        len({*names}) == len(names), "vary", own.vary, "must not give two variants one name; leave equal values out"
    )
    return Sweep(base, varied, int(own.parallel), tuple(variants))


def _field_and_values(text: str) -> tuple[str, tuple[str, ...]]:
    """`a.b=1,[2,3]` is a.b with 1 and [2,3].

    >>> _field_and_values("network.channel_multipliers=[1,2],[1,2,2]")
    ('network.channel_multipliers', ('[1,2]', '[1,2,2]'))
    """
    field, equals, rest = text.partition("=")
    values = tuple(re.split(r",(?![^\[]*\])", rest))
    rule = "must be FIELD=VALUE,VALUE,..., as train.learning_rate=1e-4,3e-4"
    require(bool(field and equals and all(values)), "vary", text, rule)
    same = field in ("name", "root", "config") or field.startswith("tracking.")
    require(not same, "vary", text, f"must not vary {field}, which all trainings of a sweep share")
    return field, values


def _short(field: str, varied: dict[str, tuple[str, ...]]) -> str:
    """The last part of a field's name, where that tells it from the others."""
    last = field.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in varied) == 1 else field


def _plain(value: str) -> str:
    """As a name may have it.

    >>> _plain("[1, 2]"), _plain("1e-4")
    ('1_2', '1e-4')
    """
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", value).strip("_").replace("+", "")
