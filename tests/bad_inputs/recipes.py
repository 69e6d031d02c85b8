"""Bad YAML recipes: every job reads its recipe in the same way, so each is given to one of them."""

import os
from collections.abc import Callable
from pathlib import Path

from bad_inputs.harness import Case

_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def recipe(text: str | bytes, *options: str) -> Callable[[Path], list[str]]:
    """A training from this recipe."""

    def build(at: Path) -> list[str]:
        (at / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["train.py", "--config", "recipe.yaml", *options]

    return build


def _directory(at: Path) -> list[str]:
    (at / "recipe.yaml").mkdir()
    return ["ingest.py", "--config", "recipe.yaml"]


def _pipe(at: Path) -> list[str]:
    os.mkfifo(at / "recipe.yaml")
    return ["sample.py", "--config", "recipe.yaml"]


def _huge(at: Path) -> list[str]:
    with (at / "recipe.yaml").open("wb") as file:
        file.truncate(20 * 2**30)
    return ["train.py", "--config", "recipe.yaml"]


def _case(name: str, build: Callable[[Path], list[str]], *says: str) -> Case:
    return Case("YAML recipe", name, build, says, code=2)


_IS_NO_YAML = "config = recipe.yaml: is not YAML ("

CASES = [
    _case(
        "missing", lambda at: ["train.py", "--config", "recipe.yaml"], "config = recipe.yaml: cannot be read (No such"
    ),
    _case("a directory", _directory, "config = recipe.yaml: is not a regular file"),
    _case("a named pipe that nobody writes to", _pipe, "config = recipe.yaml: is not a regular file"),
    _case(
        "a device without an end", lambda at: ["train.py", "--config", "/dev/zero"], "/dev/zero: is not a regular file"
    ),
    _case("20 GiB", _huge, "config = recipe.yaml: has 21,474,836,480 bytes, a recipe at most"),
    _case("option without a value", lambda at: ["train.py", "--config"], "--config: expected one argument"),
    _case("empty", recipe(""), "must hold fields and sections, as `name: value` lines"),
    _case("unbalanced bracket", recipe("train: [1"), _IS_NO_YAML, "line 1, column"),
    _case("tab as indentation", recipe("train:\n\tsteps: 5\n"), _IS_NO_YAML, "line 2, column 1"),
    _case("not UTF-8", recipe("name: caf\xe9".encode("latin-1")), _IS_NO_YAML, "can't decode byte 0xe9"),
    _case("control characters", recipe(b"name: a\x00b"), _IS_NO_YAML, "special characters are not allowed"),
    _case("two documents", recipe("name: a\n---\nname: b\n"), _IS_NO_YAML, "expected a single document"),
    _case("100,000 brackets deep", recipe("name: " + "[" * 100_000), "config = recipe.yaml: is nested too deeply"),
    _case("aliases that expand to 10^9 items", recipe(_LAUGHS), _IS_NO_YAML, "alias *a", "write the value out"),
    _case("an alias to itself", recipe("data: &a\n  train: *a\n"), _IS_NO_YAML, "alias *a"),
    _case(
        "tag that runs a program",
        recipe("name: !!python/object/apply:os.system ['touch executed']"),
        _IS_NO_YAML,
        "could not determine a constructor for the tag",
    ),
    _case("merge keys", recipe("a: &a {steps: 5}\ntrain: {<<: *a}\n"), _IS_NO_YAML, "alias *a"),
    _case("a list", recipe("- name: a"), "must hold fields and sections"),
    _case("duplicate field", recipe("name: a\nname: b\n"), _IS_NO_YAML, "name is given twice", "line 2"),
    _case(
        "duplicate field of a section",
        recipe("train:\n  steps: 5\n  steps: 6\n"),
        _IS_NO_YAML,
        "steps is given twice",
        "line 3",
    ),
    _case("a list as field name", recipe("[a, b]: c"), _IS_NO_YAML, "unhashable key"),
    _case("a number as field name", recipe("7: c"), "7"),
    _case("unknown field", recipe("nmae: a"), "nmae", "--help lists every field"),
    _case("unknown field of a section", recipe("train: {step: 5}"), "'train'", "'step'", "--help"),
    _case("text for a number", recipe("train: {steps: many}"), "train.steps", "many", "int"),
    _case("fraction for a whole number", recipe("train: {steps: 1.5}"), "train.steps", "1.5", "int"),
    _case("number for a section", recipe("train: 5"), "train", "5"),
    _case("section for a number", recipe("train: {steps: {a: 1}}"), "train.steps", "int"),
    _case("empty section", recipe("train:"), "config = recipe.yaml: train = None: is empty"),
    _case("null where none may be", recipe("train: {steps: null}"), "train.steps", "null"),
    _case(
        "recipe inside a recipe", recipe("config: other.yaml"), "config = recipe.yaml: config = 'other.yaml': must not"
    ),
    _case("list for a name", recipe("name: [yes, no]"), "name", "str"),
]
