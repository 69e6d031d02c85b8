"""What is private to Ray stays in one file, and does there what it is for."""

import ast
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster import ray_private

REPOSITORY = Path(__file__).parents[3]


def private_names(tree: ast.Module) -> Iterator[str]:
    """The names private to Ray that a module imports or reads as attributes of `ray`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            root, *parts = name.split(".")
            if root == "ray" and any(part.startswith("_") or part in ("generated", "internal_kv") for part in parts):
                yield name


def test_names_private_to_ray_stand_in_one_file() -> None:
    files = [path for name in ("pipelines", "jobs") for path in (REPOSITORY / name).rglob("*.py")]
    found = {path.name: {*private_names(ast.parse(path.read_text()))} for path in files}
    assert {name for name, private in found.items() if private} == {"ray_private.py"}
    assert len(found["ray_private.py"]) >= 10


def test_a_private_ray_has_time_to_start_as_long_as_its_process_lives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ray._private import services

    raylet = tmp_path / "raylet"
    shutil.copy(shutil.which("sleep") or "", raylet)
    processes = [subprocess.Popen([raylet, "60"])]  # of another Ray of this process: it tells nothing
    asked = []

    def get_node(gcs_address: str, node_id: str) -> dict[str, str]:
        asked.append(node_id)
        if len(asked) < 4 or processes[-1].poll() is not None:
            raise RuntimeError("no such node")
        return {"node_id": node_id}

    monkeypatch.setattr(services, "get_node", get_node)
    try:
        with ray_private.patience():
            processes.append(subprocess.Popen([raylet, "60"]))
            assert services.get_node("address", "n") == {"node_id": "n"}
            assert len(asked) == 4
            processes[-1].kill()
            processes[-1].wait()
            with pytest.raises(ChildProcessError, match="its raylet ended before it answered"):
                services.get_node("address", "n")
            assert len(asked) == 5
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert services.get_node is get_node
