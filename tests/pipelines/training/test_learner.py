"""One training step: the same numbers however its rows are divided, and a resume that is exact."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ddpm_core.config import UNetConfig
from ddpm_core.objectives import Losses
from ddpm_core.objectives.times import UniformTimes
from ddpm_core.objectives.weighted import WeightedError
from ddpm_core.parameterizations import EpsDenoiser
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.cli.errors import CheckpointError
from pipelines.cluster.precision import PrecisionField
from pipelines.data.stream import MicroBatch, Rows, shares
from pipelines.training.config import DataConfig, OptimizationConfig, TrainConfig
from pipelines.training.learner import Learner

torch.set_num_threads(1)
CPU = torch.device("cpu")
UNET = UNetConfig(
    image_size=8, in_channels=1, base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1,
    attention_resolutions=(4,), dropout=0.0, num_groups=4,
)  # fmt: skip


def configured(batch_size: int = 12, precision: PrecisionField = "fp32", seed: int = 0, **train: Any) -> TrainConfig:
    """With these fields of the section `train`."""
    fields = {"learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.9, **train}
    return TrainConfig(batch_size=batch_size, precision=precision, seed=seed, train=OptimizationConfig(**fields))


CONFIG = configured()


def build(unet: UNetConfig = UNET) -> EpsDenoiser:
    return EpsDenoiser.build(unet, DiscreteProcess.linear(100))


def learner(config: TrainConfig = CONFIG, unet: UNetConfig = UNET) -> Learner:
    return Learner(lambda: build(unet), config, CPU)


def batch(step: int, size: int = 12, epoch: int = 0) -> MicroBatch:
    ids = np.arange(step * size, (step + 1) * size, dtype=np.int64)
    images = np.random.default_rng(step).integers(0, 256, (size, 8, 8, 1), np.uint8)
    return MicroBatch(step, Rows(images, ids, np.full(size, epoch, np.int64)))


def weights(trained: Learner) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trained.denoiser.named_weights().items()}


def losses(of: Learner, x_0: torch.Tensor, ids: torch.Tensor, epochs: torch.Tensor) -> Losses:
    return of._losses(x_0, of._uniforms(0, ids, epochs), ids, epochs)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


LABELLED = replace(UNET, num_classes=3)


def labelled(label_dropout: float, batch_size: int = 12, **train: Any) -> Learner:
    config = replace(configured(batch_size, **train), network=replace(CONFIG.network, num_classes=3))
    return learner(replace(config, train=replace(config.train, label_dropout=label_dropout)), LABELLED)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_labels_are_dropped_with_the_probability_asked_for_by_row_and_pass(p: float) -> None:
    """c -> null with probability p (Ho and Salimans 2021, algorithm 1)."""
    trained, n = labelled(p), 20_000
    ids, labels = torch.arange(n), np.arange(n, dtype=np.int64) % 4 - 1
    passes = [trained._label(labels, ids, torch.full_like(ids, number)) for number in (0, 1)]
    drops = []
    for told in passes:
        assert told is not None
        dropped = (told == -1).numpy()
        assert dropped[labels == -1].all()
        np.testing.assert_array_equal(told.numpy()[~dropped], labels[~dropped])
        for label in range(3):
            of_class = dropped[labels == label]
            assert abs(of_class.mean() - p) < 4 * np.sqrt(p * (1 - p) / len(of_class))
        drops.append(dropped[labels >= 0])
    both, expected = (drops[0] & drops[1]).mean(), p**2  # two passes drop independently
    assert abs(both - expected) < 4 * np.sqrt(expected * (1 - expected) / len(drops[0]))


@pytest.mark.parametrize(("p", "told"), [(0.0, [0, 1, 2, -1]), (1.0, [-1] * 4)])
def test_no_label_is_dropped_or_all_are(p: float, told: list[int]) -> None:
    trained, ids = labelled(p), torch.arange(4)
    assert trained._label(np.array([0, 1, 2, -1]), ids, ids).tolist() == told


def test_a_row_is_told_the_same_label_however_its_batch_is_divided() -> None:
    labels = np.random.default_rng(0).integers(-1, 3, 12)
    whole = replace(batch(0), rows=replace(batch(0).rows, labels=labels))
    told: list[torch.Tensor] = []

    def all_told(world_size: int, accumulate: int) -> list[int]:
        told.clear()
        for low, high in shares(12, world_size):
            trained = labelled(0.3, high - low, accumulate=accumulate)
            trained.denoiser.network.register_forward_pre_hook(lambda module, args: told.append(args[2]))
            trained.step(MicroBatch(0, whole.rows[low:high]))
        assert len(told) == world_size * accumulate
        return torch.cat(told).tolist()

    alone = all_told(1, 1)
    assert -1 in np.array(alone)[labels >= 0]
    assert [all_told(*divided) for divided in [(1, 3), (2, 1), (3, 2)]] == [alone] * 3


@pytest.mark.parametrize("loss", ["simple", "vlb", "min_snr"])
def test_cutting_a_batch_into_parts_changes_nothing(loss: str) -> None:
    results, ends = [], []
    for accumulate in (1, 2, 3, 5):
        trained = learner(configured(loss=loss, grad_clip=1e9, accumulate=accumulate))
        results.append([trained.step(batch(step)) for step in range(3)])
        ends.append(weights(trained))
    for steps in results[1:]:
        for ours, whole in zip(steps, results[0], strict=True):
            torch.testing.assert_close(ours.loss, whole.loss, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(ours.grad_norm, whole.grad_norm, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(ours.moments, whole.moments, rtol=1e-5, atol=1e-7)
    assert all(distance(end, ends[0]) < 1e-3 for end in ends[1:])


def test_a_row_has_the_same_loss_beside_any_other_rows() -> None:
    trained = learner()
    whole = batch(0)
    to = torch.tensor
    x_0 = to(whole.rows.images).permute(0, 3, 1, 2) / 127.5 - 1

    def losses_of(rows: list[int], epoch: int = 0, of: Learner = trained) -> list[float]:
        ids = to(whole.rows.ids[rows])
        return losses(of, x_0[rows], ids, torch.full_like(ids, epoch)).rows.tolist()

    singles = [losses_of([row])[0] for row in range(12)]
    assert losses_of(list(range(12))) == pytest.approx(singles, rel=1e-5)
    assert losses_of([7, 2, 11]) == pytest.approx([singles[7], singles[2], singles[11]], rel=1e-5)
    assert losses_of([7], epoch=1)[0] != pytest.approx(singles[7], rel=1e-3)  # another epoch: another t and ε
    assert losses_of([7], of=learner(configured(seed=1)))[0] != pytest.approx(singles[7], rel=1e-3)


def test_flips_are_drawn_for_each_row_and_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr("ddpm_core.objectives.weighted.q_sample", lambda marginal, x_0, eps: seen.append(x_0) or x_0)
    trained = learner(replace(CONFIG, data=DataConfig(random_flip=True)))
    ids = torch.arange(400)
    ramp = torch.arange(8.0).expand(400, 1, 8, 8)
    losses(trained, ramp, ids, torch.zeros_like(ids))
    losses(trained, ramp[:100], ids[300:], torch.zeros_like(ids[300:]))
    losses(trained, ramp, ids, torch.ones_like(ids))
    first, part, next_epoch = ((x_0[:, 0, 0, 0] == 7) for x_0 in seen)
    assert torch.equal(first[300:], part)
    assert not torch.equal(first, next_epoch)
    for flipped in (first, next_epoch):
        assert abs(int(flipped.sum()) - 200) < 5 * 10  # 5 standard deviations of a fair coin
    assert all(torch.equal(x, ramp[0] if not flip else ramp[0].flip(-1)) for x, flip in zip(seen[0], first))


@pytest.mark.parametrize(
    ("config", "dropout"),
    [
        (CONFIG, 0.0),
        (configured(optimizer="adamw", weight_decay=0.1), 0.3),
        (configured(precision="bf16"), 0.0),
    ],
)
def test_a_resumed_training_ends_in_the_very_same_weights(config: TrainConfig, dropout: float) -> None:
    unet = replace(UNET, dropout=dropout)
    whole = learner(config, unet)
    losses = [float(whole.step(batch(step)).loss) for step in range(6)]
    first = learner(config, unet)
    for step in range(3):
        first.step(batch(step))
    state, ema = first.state(), save_tensors(first.ema.state_dict())
    second = learner(replace(config, seed=config.seed), unet)
    second.load(state["weights.safetensors"], state["optimizer.safetensors"], ema)
    torch.manual_seed(1234)  # no generator state is needed
    assert [float(second.step(batch(step)).loss) for step in range(3, 6)] == losses[3:]
    assert same(weights(second), weights(whole))
    assert same(second.ema.state_dict(), whole.ema.state_dict())
    assert second.state() == whole.state()


def test_a_checkpoint_of_another_network_is_refused() -> None:
    small, large = learner(), learner(unet=replace(UNET, base_channels=16))
    deep = learner(unet=replace(UNET, num_res_blocks=2))
    for trained in (small, large, deep):
        trained.step(batch(0))
    good = (*small.state().values(), save_tensors(small.ema.state_dict()))
    for other in (large, deep):
        bad = (*other.state().values(), save_tensors(other.ema.state_dict()))
        for index in range(3):
            mixed = [*good]
            mixed[index] = bad[index]
            with pytest.raises(CheckpointError) as refusal:
                learner().load(*mixed)
            assert "\n" not in str(refusal.value)
    with pytest.raises(CheckpointError, match="does not fit"):
        learner().load(good[0], b"no tensors", good[2])


class CountingError(WeightedError):
    """An objective that remembers how often it was called."""

    def __init__(self) -> None:
        process = DiscreteProcess.linear(100)
        super().__init__(process, UniformTimes(process), torch.ones(100, dtype=torch.float64))
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, *arguments: Any) -> Losses:
        self.calls += 1
        return super().forward(*arguments)


def test_what_an_objective_remembers_is_kept_and_nothing_where_it_remembers_nothing() -> None:
    plain, counting, resumed = learner(), learner(), learner()
    counting.objective, resumed.objective = CountingError(), CountingError()
    for step in range(3):
        plain.step(batch(step))
        counting.step(batch(step))
    ema = save_tensors(counting.ema.state_dict())
    files = counting.state()
    assert files.keys() - plain.state().keys() == {"objective.safetensors"}
    resumed.load(files["weights.safetensors"], files["optimizer.safetensors"], ema, files["objective.safetensors"])
    assert resumed.objective.state_dict()["calls"] == 3
    with pytest.raises(CheckpointError, match="CountingError"):
        resumed.load(files["weights.safetensors"], files["optimizer.safetensors"], ema)


def test_the_loss_falls_on_an_easy_problem() -> None:
    trained = learner(configured(batch_size=32, learning_rate=3e-3, warmup_steps=10))
    images = np.full((32, 8, 8, 1), 255, np.uint8)  # every image is white: ε can be read off x_t
    losses = []
    for step in range(60):
        ids = np.arange(step * 32, (step + 1) * 32, dtype=np.int64)
        losses.append(float(trained.step(MicroBatch(step, Rows(images, ids, np.zeros(32, np.int64)))).loss))
    assert losses[0] == pytest.approx(1.0, abs=0.1)  # zero-initialised output: the loss is the mean of ε²
    assert np.mean(losses[-10:]) < 0.5


def test_a_step_tells_the_moments_of_its_rows_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = learner(configured(accumulate=2))
    found: list[Losses] = []
    forward = trained.objective.forward

    def noted(*args: Any) -> Losses:
        found.append(forward(*args))
        return found[-1]

    monkeypatch.setattr(trained.objective, "forward", noted)
    result = trained.step(batch(0))
    rows = torch.cat([each.rows for each in found]).detach().double()
    assert len(rows) == 12
    torch.testing.assert_close(result.moments, torch.stack([rows.mean(), rows.square().mean()]))


def test_bf16_keeps_float32_weights_moments_and_loss() -> None:
    trained = learner(configured(precision="bf16"))
    result = trained.step(batch(0))
    assert result.loss.dtype == result.grad_norm.dtype == torch.float32
    stored = [load_tensors(data) for data in trained.state().values()]
    kept = [*stored[0].values(), *stored[1].values(), *trained.ema.state_dict().values()]
    assert {value.dtype for value in kept} == {torch.float32}
    plain = learner()
    assert float(plain.step(batch(0)).loss) == pytest.approx(float(result.loss), rel=0.02)
    ran_in: list[torch.dtype] = []
    for module in trained.denoiser.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: ran_in.append(output.dtype))
    trained.step(batch(1))
    assert set(ran_in) == {torch.bfloat16}


def test_the_learning_rate_warms_up_and_stays() -> None:
    trained = learner(configured(learning_rate=0.1, warmup_steps=4))
    assert [trained.learning_rate(step) for step in range(6)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert learner(configured(learning_rate=0.1, warmup_steps=0)).learning_rate(0) == 0.1


def test_gradients_are_clipped_and_their_norm_before_it_is_told() -> None:
    tight, loose = learner(configured(grad_clip=1e-6)), learner(configured(grad_clip=None))
    first = [trained.step(batch(0)) for trained in (tight, loose)]
    assert first[0].grad_norm == first[1].grad_norm > 1e-3
    assert not same(weights(tight), weights(loose))


def test_the_evaluation_network_is_a_copy_without_dropout() -> None:
    trained = learner(unet=replace(UNET, dropout=0.5))
    trained.step(batch(0))
    averaged = trained.averaged()
    z_t, t = torch.randn(4, 1, 8, 8), torch.arange(4)
    before = averaged(z_t, t).eps
    assert torch.equal(before, averaged(z_t, t).eps)
    trained.step(batch(1))
    assert torch.equal(before, averaged(z_t, t).eps)
    assert not torch.equal(before, trained.averaged()(z_t, t).eps)


def test_moments_take_the_memory_layout_of_their_parameters() -> None:
    """On GPUs the network is channels-last, and fused Adam pairs a parameter with its moments by address."""

    def channels_last() -> Learner:
        made = learner()
        made.denoiser.network.to(memory_format=torch.channels_last)
        return made

    whole, first, second = channels_last(), channels_last(), channels_last()
    for step in range(4):
        whole.step(batch(step))
    for step in range(2):
        first.step(batch(step))
    second.load(*first.state().values(), save_tensors(first.ema.state_dict()))
    for parameter, state in second.optimizer.state.items():
        assert parameter.stride() == state["exp_avg"].stride() == state["exp_avg_sq"].stride()
    for step in range(2, 4):
        second.step(batch(step))
    assert distance(weights(second), weights(whole)) < 1e-6
