"""Bad input and bad days of the training job: one line, the right exit code, nothing half-written."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.small_disk import small_disk
from support.train_runs import ROWS, changed, checkpoints, prepare_images, run_directory, tiny

from pipelines.cli.console import exit_code_of
from pipelines.data.dataset import PreparedDataset
from pipelines.storage.location import Location, forget_connections
from pipelines.storage.ownership import claim
from pipelines.tracking.spool import SpoolLock
from pipelines.training.checks import check
from pipelines.training.config import TrainConfig
from pipelines.training.driver import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    prepare_images(directory, "train", ROWS)
    prepare_images(directory, "other", ROWS + 1)
    prepare_images(directory, "small", 12, side=16)
    return directory


@pytest.fixture
def config(tmp_path: Path, data: Path) -> TrainConfig:
    """A training that would start."""
    return tiny(tmp_path, "refused", data={"train": str(data / "train"), "validation": None})


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a job that must end with `code`; returns its one `error:` line on stderr, without `error: `."""

    def run(code: int, job: Callable[[Sequence[str]], Any]) -> str:
        capsys.readouterr()
        ended = exit_code_of(job)
        shown = capsys.readouterr()
        assert shown.out == ""
        *waited, line = shown.err.splitlines()  # a busy machine says what it waits for before
        assert not any(said.startswith(("error", "Traceback")) for said in waited)
        assert line.startswith("error: ")
        assert "unexpected" not in line
        assert ended == code
        return line.removeprefix("error: ")

    return run


def of(config: TrainConfig, **changes: Any) -> Callable[[Sequence[str]], Any]:
    """The job with some fields changed."""
    return lambda argv: train(changed(config, **changes))


def nothing_was_written(config: TrainConfig) -> bool:
    return not (Path(config.root) / "runs").exists() and not (Path(config.root) / "mlflow.db").exists()


def test_data_sets_that_cannot_be_trained_on(config: TrainConfig, data: Path, tmp_path: Path, refusal, make_dataset):
    line = refusal(1, of(config, data={"train": str(data / "nowhere")}))
    assert line.startswith(f"{data}/nowhere: not a prepared data set (no manifest.json)")
    line = refusal(1, of(config, data={"validation": str(data / "nowhere")}))
    assert line.startswith(f"{data}/nowhere: not a prepared data set (no manifest.json)")
    line = refusal(2, of(config, data={"train": "embedded://faces/train"}))
    assert "embedded://faces/train" in line
    empty = make_dataset(num_rows=0, shape=(32, 32, 3))
    line = refusal(1, of(config, data={"train": empty.location.uri}))
    assert line.startswith(f"data.train = {empty.location.uri}: holds no images")
    line = refusal(1, of(config, data={"validation": empty.location.uri}))
    assert line.startswith(f"data.validation = {empty.location.uri}: holds no images")
    damaged = make_dataset(num_rows=10, shape=(32, 32, 3), name="damaged")
    shard = Path(damaged.location.path) / "data" / damaged.shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1])
    line = refusal(1, of(config, data={"train": damaged.location.uri}))
    assert line.startswith(f"{shard}: has ")
    assert nothing_was_written(config)


def test_shapes_that_do_not_fit(config: TrainConfig, data: Path, refusal) -> None:
    line = refusal(2, of(config, data={"validation": str(data / "small")}))
    assert line.startswith(f"data.validation = {data}/small: its images are (16, 16, 3), those of data.train are (32,")
    line = refusal(2, of(config, network={"channel_multipliers": (1,) * 8, "attention_resolutions": ()}))
    assert line.startswith("network.image_size: (32, 32) would be padded to 128 x 128 pixels by its 8 levels")
    line = refusal(2, of(config, network={"attention_resolutions": (7,)}))
    assert line.startswith("network.attention_resolutions: (7,) has a height that no level has")
    line = refusal(2, lambda argv: of(config, network={"num_groups": 0})(argv))
    assert line.startswith("network.num_groups: 0")
    assert nothing_was_written(config)


def test_roots_that_cannot_be_used(config: TrainConfig, tmp_path: Path, refusal) -> None:
    (tmp_path / "file").write_text("")
    line = refusal(1, lambda argv: train(replace(config, root=str(tmp_path / "file"))))
    assert str(tmp_path / "file") in line
    assert nothing_was_written(config)
    line = refusal(1, lambda argv: train(replace(config, root="gopher://x/y")))
    assert line.startswith("location = 'gopher://x/y': unknown protocol")


def test_object_storage_that_is_missing_or_refuses(
    config: TrainConfig, s3_prefix: str, refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refusal(1, of(config, data={"train": f"{s3_prefix}/data"}))
    assert line.startswith(f"{s3_prefix}/data: not a prepared data set")
    line = refusal(1, of(config, data={"train": "s3://no-such-bucket/data"}))
    assert line.startswith("s3://no-such-bucket/data")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_connections()
    line = refusal(1, of(config, data={"train": f"{s3_prefix}/data"}))
    assert line.startswith(f"{s3_prefix}/data")
    assert "credentials" in line or "permission" in line
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("DDPM_STORAGE_PATIENCE_S", "0.1")
    forget_connections()
    line = refusal(1, of(config, data={"train": f"{s3_prefix}/data"}))
    assert "the store http://127.0.0.1:1 cannot be reached" in line
    assert nothing_was_written(config)


def test_a_checkpoint_of_another_training(
    config: TrainConfig, data: Path, refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PreparedDataset.open(config.data.train)
    state = {
        "dataset": {"id": dataset.dataset_id, "uri": config.data.train, "num_rows": ROWS},
        "config": json.loads(json.dumps(config.semantic())),
        "records": [],
    }
    checkpoints(config).save(12, {"weights.safetensors": b"weights"}, state)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "vision")
    claim(run_directory(config))
    before = {path: path.stat().st_mtime_ns for path in Path(config.root).rglob("*")}

    line = refusal(1, of(config, data={"train": str(data / "other")}))
    assert line.startswith(f"data.train = {data}/other: the data set has changed since the run's checkpoint of step 12")
    assert dataset.dataset_id[:12] in line
    line = refusal(1, of(config, seed=7, train={"learning_rate": 0.5}, network={"channel_multipliers": (1, 1)}))
    assert line.startswith(
        "name = 'refused': the run's checkpoint of step 12 was made with another config "
        "(network.channel_multipliers: [1, 2] -> [1, 1]; train.learning_rate: 0.001 -> 0.5; seed: 0 -> 7); "
    )
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "speech")
    assert "seed: 0 -> 7), begun by vision; give the run another `name`" in refusal(1, of(config, seed=7))
    assert "refused was begun by vision: this continues it" in check(config).told
    line = refusal(2, of(config, train={"steps": 11}))
    assert line.startswith("train.steps = 11: the run has 12 steps already")
    assert {path: path.stat().st_mtime_ns for path in Path(config.root).rglob("*")} == before


def test_a_run_that_another_job_is_running(config: TrainConfig, refusal) -> None:
    lock = SpoolLock(Path(run_directory(config).path) / "tracking/spool.jsonl")
    try:
        assert "another job (pid " in refusal(1, of(config))
    finally:
        lock.release()


def ends_with(code: int, job: Callable[[Sequence[str]], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a job that started and failed: `error: ...`, and no stack trace before it."""
    capsys.readouterr()
    ended = exit_code_of(job)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert ended == code
    assert "Traceback" not in shown.err + shown.out
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert shown.out == ""
    return lines[-1].removeprefix("error: ")


@pytest.mark.ray
@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint_before(
    ray_cluster: None, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    def loop(loop_config: dict[str, Any]) -> None:
        from pipelines.training.learner import Learner
        from pipelines.training.worker import train_loop

        step = Learner.step

        def poisoned_step(learner: Learner, batch: Any) -> Any:
            if batch.step == 9:
                next(learner.denoiser.parameters()).data.fill_(float("nan"))
            return step(learner, batch)

        Learner.step = poisoned_step
        train_loop(loop_config)

    config = replace(config, cluster=replace(config.cluster, max_failures=0))
    line = ends_with(1, lambda argv: train(config, loop=loop), capsys)
    assert line.startswith("step 10: loss = nan, gradient norm = nan; nothing after the last checkpoint is kept.")
    newest = checkpoints(config).newest(pytest.fail)
    assert newest is not None
    assert newest.step == 6
    assert run_directory(config).list() == ["checkpoints", "config.json", "owner.json", "ray", "tracking"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_and_keeps_the_checkpoint_before(
    ray_cluster: None, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path, "32m") as disk:

        def loop(loop_config: dict[str, Any]) -> None:
            from pipelines.models.checkpoints import CheckpointStore
            from pipelines.training.worker import train_loop

            write = CheckpointStore.write

            def write_on_a_full_disk(store: CheckpointStore, step: int, files: dict[str, bytes]) -> Any:
                if step == 12:
                    with (disk / "ballast").open("wb", buffering=0) as ballast:
                        try:
                            while ballast.write(bytes(4096)):
                                pass
                        except OSError:
                            pass
                return write(store, step, files)

            CheckpointStore.write = write_on_a_full_disk
            train_loop(loop_config)

        config = replace(config, root=str(disk), cluster=replace(config.cluster, max_failures=0))
        config = replace(config, tracking=replace(config.tracking, uri=f"sqlite:///{tmp_path}/mlflow.db"))
        line = ends_with(1, lambda argv: train(config, loop=loop), capsys)
        assert line.endswith("cannot write: the disk is full; free some space and run again")
        assert "/checkpoints/step-00000012/" in line
        newest = checkpoints(config).newest(pytest.fail)
        assert newest is not None
        assert newest.step == 6
        assert not (Location.parse(config.root) / "runs/refused/result.json").exists()
