"""Which directories a training takes for its own."""

from pathlib import Path

import pytest
from support.train_runs import tiny

from pipelines.cli.config import as_dict
from pipelines.cli.errors import ConfigError
from pipelines.models.checkpoints import CheckpointStore
from pipelines.storage.location import Location
from pipelines.training.driver import train
from pipelines.training.run_directory import is_run, require_own

FOREIGN = {
    "notes": {"thesis.txt": b"mine"},
    "a model of other software": {"config.json": b'{"architectures": []}', "model.safetensors": b"mine"},
    "what is no JSON": {"config.json": b"{"},
    "checkpoints of other software": {"checkpoints/step-00000100/state.pt": b"mine"},
}


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_directory_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, kind: str) -> None:
    run = Location.parse(tmp_path) / "runs" / "thesis"
    for name, content in FOREIGN[kind].items():
        (run / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"^name = 'thesis': .* must be empty, or hold a run of this name; it hold"):
        train(tiny(tmp_path, "thesis"))
    assert contents(tmp_path) == {f"runs/thesis/{name}": content for name, content in FOREIGN[kind].items()}


def test_what_a_training_leaves_at_any_time_is_its_own(tmp_path: Path) -> None:
    run = Location.parse(tmp_path) / "run"
    require_own(run)
    (run / f".config.json.{'0' * 32}.tmp").write_bytes(b"killed while writing the first file")
    require_own(run)
    assert not is_run(run)
    for number, (name, content) in enumerate(
        {
            "tracking/spool.jsonl.lock": b"",
            "tracking/spool.jsonl": b"",
            "result.json": b"{}",
            "config.json": b"",
        }.items()
    ):
        place = run.parent / f"run-{number}"
        if name == "config.json":
            (place / name).write_json(as_dict(tiny(tmp_path, "run")))
        else:
            (place / name).write_bytes(content)
        (place / "thesis.txt").write_bytes(b"put there later")
        require_own(place)
        assert is_run(place)
    CheckpointStore.open(run.uri).save(5, {"weights.safetensors": b"x"}, {})
    require_own(run)
    assert is_run(run)
