"""The number of steps that keeps a tolerance: found, recorded, kept when the output is continued."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.sample_runs import tiny

from pipelines.cli.errors import ConfigError, RequestMismatchError
from pipelines.cluster.config import GpuClusterConfig
from pipelines.outputs.manifest import MANIFEST
from pipelines.outputs.shards import begun_request
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.job import sample
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.sampling.tolerance import Found, fewest_steps
from pipelines.storage.location import Location


def of_first_order(steps: int) -> torch.Tensor:
    """Images that are 1 / steps off: half the steps move them by 1 / steps."""
    return torch.full((3, 1, 2, 2), 1.0 / steps)


@pytest.mark.parametrize(("tolerance", "steps"), [(0.5, 6), (0.1, 12), (0.05, 22), (0.0099, 102), (0.0021, 478)])
def test_it_is_the_least_even_number_that_keeps_the_tolerance(tolerance: float, steps: int) -> None:
    found = fewest_steps(tolerance, of_first_order, 1000)
    assert found.steps == steps
    assert found.distance == pytest.approx(1.0 / steps, rel=1e-5)
    assert found.distance < tolerance


def test_the_most_steps_are_told_where_they_do_not_keep_it() -> None:
    assert fewest_steps(1e-4, of_first_order, 101) == Found(100, pytest.approx(0.01))
    assert fewest_steps(1e-4, of_first_order, 4).steps == 4


def in_process(root: Path, tolerance: float, name: str = "dpmpp_2m") -> SampleConfig:
    sampler = SamplerConfig(name, tolerance=tolerance)  # type: ignore[arg-type]
    config = tiny(root, sampler=sampler, batch_size=22, shard_size=22)
    return replace(config, cluster=GpuClusterConfig())


def test_the_choice_is_part_of_the_request_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = in_process(tmp_path, 0.3)
    rows = dict(sample(config).rows)
    request = begun_request(Location.parse(config.output))
    assert request["tolerance"] == 0.3
    assert request["steps"] % 2 == 0
    assert rows["sampler"] == f"dpmpp_2m, {request['steps']} steps, spacing log_snr"
    manifest = (Path(config.output) / MANIFEST).read_bytes()
    monkeypatch.setattr("pipelines.sampling.job.steps_within", None)  # found again, it would cost as much again
    assert sample(config).title == "Sample set, complete before"
    assert (Path(config.output) / MANIFEST).read_bytes() == manifest
    with pytest.raises(RequestMismatchError, match=r"tolerance: 0\.3 -> 0\.2"):
        sample(in_process(tmp_path, 0.2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match="other: "):  # before the search, too
        sample(replace(config, output=str(tmp_path / "other")))


def test_a_tolerance_that_no_number_of_steps_keeps_is_refused(tmp_path: Path) -> None:
    rule = r"^sampler\.tolerance = 1e-09: is not kept by 20 steps, which move images by .*; raise it"
    with pytest.raises(ConfigError, match=rule):
        sample(in_process(tmp_path, 1e-9))
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "heun"])
def test_a_dry_run_finds_it_too_and_tells_the_evaluations_of_every_sampler(tmp_path: Path, name: str) -> None:
    rows = dict(sample(replace(in_process(tmp_path, 0.5, name), dry_run=True)).rows)
    steps = int(rows["sampler"].split()[1])
    calls = {"ddim": steps, "dpmpp_3m": steps + 1, "heun": 2 * steps - 1}[name]
    assert rows["sampler"].endswith(f": {calls} evaluations per image")
    assert rows["network"].startswith(f"{calls} calls with 22 images")
    others = {row: value for row, value in rows.items() if row.startswith("or ")}
    assert len(others) == 6
    assert f"or {name}" not in others
    if name != "heun":
        assert others["or heun"].startswith("10 steps, 19 evaluations per image, about 0:")
    assert not (tmp_path / "samples").exists()
