"""The learned noise schedule: what is drawn and told is that of the averaged weights, by one rank."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.objective_cases import CASES, batch, learner

from ddpm_core.process.continuous import continuous
from pipelines.storage.location import Location
from pipelines.training.learner import Learner
from pipelines.training.noise_schedule import NoiseSchedule, schedule_png
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports


@pytest.fixture(scope="module")
def trained() -> Learner:
    """Of a few steps at a large learning rate, so that the averaged weights lag behind."""
    config = CASES["γ and ends learned"]
    found = learner(replace(config, train=replace(config.train, learning_rate=0.1, warmup_steps=0)))
    for step in range(4):
        found.step(batch(step))
    return found


def observer(trained: Learner, run: Path, rank: int = 0) -> tuple[NoiseSchedule, Reports]:
    reports = Reports(rank, lambda report: None)
    schedule = NoiseSchedule(Location(str(run)), trained.config, trained.averaged, Ranks(rank, 2), reports)
    return schedule, reports


def test_the_averaged_schedule_is_drawn_and_its_ends_are_told(trained: Learner, tmp_path: Path) -> None:
    found, reports = observer(trained, tmp_path)
    found.observe(4)
    ends, image = reports.unsure()
    averaged = continuous(trained.averaged().process)
    picture = tmp_path / "noise_schedules/step-00000004.png"
    assert image == {"kind": "image", "key": "noise_schedule", "step": 4, "path": str(picture)}
    assert picture.read_bytes() == schedule_png(averaged)
    assert picture.read_bytes() != schedule_png(continuous(trained.denoiser.process)), "the weights of the last step"
    low, high = (float(trained.ema.state_dict()[f"process.schedule.{name}"]) for name in ("low", "high"))
    assert (ends["step"], ends["values"]) == (4, {"gamma_0": low, "gamma_1": high})
    assert (low, high) != continuous(trained.denoiser.process).ends


def test_fixed_ends_are_no_metrics_and_one_rank_draws(trained: Learner, tmp_path: Path) -> None:
    pinned = learner(CASES["γ learned"])
    found, reports = observer(pinned, tmp_path / "pinned")
    found.observe(7)
    assert [record["kind"] for record in reports.unsure()] == ["image"]
    found, _ = observer(trained, tmp_path / "other", rank=1)
    found.observe(7)
    assert not (tmp_path / "other").exists()


def test_it_is_drawn_as_often_as_a_grid_and_after_the_last_step(trained: Learner, tmp_path: Path) -> None:
    config = replace(trained.config, grid=replace(trained.config.grid, every_steps=10))
    found = NoiseSchedule(Location(str(tmp_path)), config, trained.averaged, Ranks(0, 1), Reports(0, lambda _: None))
    last = config.train.steps
    assert [done for done in (*range(1, 31), last) if found.is_due(done)] == [10, 20, 30, last]
