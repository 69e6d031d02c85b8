"""The tree of errors is what its documentation says, and the mathematics declares none of the jobs' errors."""

import re

import ddpm_core.errors
from pipelines.cli import errors
from pipelines.cli.errors import DDPMError, error_of, exit_code


def declared(module: object) -> dict[str, type[DDPMError]]:
    return {name: value for name, value in vars(module).items() if isinstance(value, type)}


def test_the_documented_tree_is_the_tree_with_its_exit_codes() -> None:
    lines = re.findall(r"^    ([│├└─ ]*)(\w+) +exit (\d)", errors.__doc__ or "", flags=re.MULTILINE)
    parents: list[str] = []
    found = []
    for branch, name, code in lines:
        depth = len(branch) // 4
        parents[depth:] = [name]
        found.append((name, parents[depth - 1] if depth else "Exception", int(code)))
    classes = declared(errors)
    assert found
    assert sorted(found) == sorted(
        (name, value.__bases__[0].__name__, exit_code(error_of(name, "x"))) for name, value in classes.items()
    )


def test_the_mathematics_declares_what_it_raises() -> None:
    assert set(declared(ddpm_core.errors)) == {"DDPMError", "ConfigError", "ModelError"}
