"""Every kind of process, prediction, objective and times trains the same on any number of ranks and after a resume."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from support.gloo_rank import MORE, STEPS
from support.objective_cases import BATCH, CASES, learner, resumed, saved, train

from ddpm_core import counter_random

torch.set_num_threads(1)
REMEMBERS = ["learned variance, vlb", "x_0, importance"]


def losses(results: list[Any]) -> list[float]:
    return [float(each.loss) for each in results]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_goes_on_bit_for_bit(case: str) -> None:
    config = CASES[case]
    whole, first = learner(config), learner(config)
    trace = losses(train(whole, 0, STEPS + MORE))
    assert losses(train(first, 0, STEPS)) == trace[:STEPS]
    second = resumed(config, saved(first))
    torch.manual_seed(1234)  # no generator state is needed
    assert losses(train(second, STEPS, STEPS + MORE)) == trace[STEPS:]
    assert saved(second) == saved(whole)
    assert ("objective.safetensors" in saved(whole)) == (case in REMEMBERS)


@pytest.mark.parametrize("case", CASES)
def test_everything_is_trained_averaged_and_saved(case: str) -> None:
    trained = learner(CASES[case])
    before = {name: weight.detach().clone() for name, weight in trained.denoiser.named_weights().items()}
    train(trained, 0, 3)
    files = {name: load_tensors(content) for name, content in saved(trained).items()}
    for name, weight in trained.denoiser.named_weights().items():
        for stored in (files["weights.safetensors"][name], files["ema.safetensors"][name]):
            assert not torch.equal(stored, before[name]), name
        assert torch.equal(files["weights.safetensors"][name], weight), name
        assert files["optimizer.safetensors"][f"exp_avg_sq/{name}"].any(), name
    averaged = trained.averaged().named_weights()
    assert all(torch.equal(averaged[name], weight) for name, weight in files["ema.safetensors"].items())


@pytest.mark.parametrize("case", REMEMBERS)
def test_a_resume_without_the_history_would_be_another_training(case: str) -> None:
    config = CASES[case]
    trained = learner(config)
    train(trained, 0, STEPS)
    files = saved(trained)
    history = load_tensors(files["objective.safetensors"])
    assert set(history["times.count"].tolist()) == {10}
    forgetful = resumed(config, files)
    for value in forgetful.objective.state_dict().values():
        value.zero_()
    whole = losses(train(resumed(config, files), STEPS, STEPS + MORE))
    assert all(a != b for a, b in zip(losses(train(forgetful, STEPS, STEPS + MORE)), whole, strict=True))


@pytest.mark.parametrize("case", ["learned variance, vlb", "γ and ends learned", "edm"])
def test_cutting_a_batch_into_parts_changes_nothing(case: str) -> None:
    traces = []
    for accumulate in (1, 3):
        config = CASES[case]
        trained = learner(replace(config, train=replace(config.train, accumulate=accumulate, grad_clip=None)))
        traces.append(train(trained, 0, 3))
    for ours, whole in zip(*traces, strict=True):
        torch.testing.assert_close(ours.loss, whole.loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.grad_norm, whole.grad_norm, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(ours.moments, whole.moments, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_finite_and_close_to_float32(case: str) -> None:
    config = CASES[case]
    rounded, exact = (train(learner(replace(config, precision=precision)), 0, 3) for precision in ("bf16", "fp32"))
    for ours, whole in zip(rounded, exact, strict=True):
        assert ours.grad_norm.isfinite()
        torch.testing.assert_close(ours.loss, whole.loss, rtol=0.1, atol=0.01)


def test_even_times_are_spread_over_the_global_batch() -> None:
    """t_i = frac(u + i / B) (Kingma 2021, VDM, app. I.1): one in each B-th of [0, 1), from one number for each step."""
    trained, ids = learner(CASES["γ fixed"]), torch.arange(BATCH)
    steps = [trained._uniforms(step, ids, torch.zeros_like(ids)) for step in range(3)]
    for step, found in enumerate(steps):
        assert found.dtype == torch.float64
        assert sorted((found * BATCH).long().tolist()) == list(range(BATCH))
        first = counter_random.uniform(0, "train/t/even", torch.tensor([step]), 0, 1)
        torch.testing.assert_close(found, torch.cat([first[0] + i / BATCH for i in range(BATCH)]).frac())
    assert len({float(found[0]) for found in steps}) == 3
    other = trained._uniforms(0, ids + 99, torch.ones_like(ids))
    assert torch.equal(other, steps[0])  # of the place, not of the row


@pytest.mark.slow
def test_ranks_give_the_numbers_of_one_process(tmp_path: Path) -> None:
    """Two real gloo ranks with shares of 6 and 7 rows, some of them in two parts."""
    tests = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"}
    command = [sys.executable, str(tests / "support/gloo_rank.py")]
    processes = [
        subprocess.Popen([*command, str(rank), "2", tmp_path], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for found in ranks:
        assert (found["gathered"], found["broadcast"]) == ([0, 10], "from rank 0")
    for case, config in CASES.items():
        config = replace(config, train=replace(config.train, grad_clip=0.5))
        alone = learner(config)
        expected = train(alone, 0, STEPS + MORE)
        parts = [found["cases"][case] for found in ranks]
        for name in ("loss", "moments"):
            value, whole = sum(part[name] for part in parts), torch.stack([getattr(each, name) for each in expected])
            torch.testing.assert_close(
                value, whole, rtol=1e-5, atol=1e-6, msg=lambda text, case=case: f"{case}: {text}"
            )
        norms = torch.stack([each.grad_norm for each in expected])
        torch.testing.assert_close(parts[0]["grad_norm"], norms, rtol=1e-4, atol=1e-6)
        assert torch.equal(parts[0]["grad_norm"], parts[1]["grad_norm"]), case
        assert parts[0]["end"] == parts[1]["end"], case
        # one worker instead of two: the same state, and from it the same numbers
        files = parts[0]["files"]
        one = resumed(config, files)
        assert one.state() == {name: files[name] for name in one.state()}
        continued = torch.tensor(losses(train(one, STEPS, STEPS + MORE)))
        torch.testing.assert_close(continued, sum(part["loss"][STEPS:] for part in parts), rtol=1e-5, atol=1e-6)
