"""Validation and sample grids: the same numbers on any number of ranks, nothing counted twice."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from support.denoisers import FunctionDenoiser, GreyWorld

from ddpm_core.denoiser import Prediction
from ddpm_core.images import to_uint8
from ddpm_core.likelihood.bounds import Respaced
from ddpm_core.likelihood.designs import GROUP_SIZE, Design, continuous_design, stratified_design, timestep_proposal
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.intervals import MeanStatistics
from ddpm_core.process.base import Process, Spacing
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess, discrete
from ddpm_core.process.variances import BetaTilde
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.dpm_solver import DPMSolver
from pipelines.storage.location import json_bytes
from pipelines.training.config import GridConfig, ValidationConfig
from pipelines.training.grid import Layout, sample_images
from pipelines.training.ranks import Ranks
from pipelines.training.validation import BitsPerDim, validate

torch.set_num_threads(1)
PROCESS = DiscreteProcess.linear(100)
CONTINUOUS = ContinuousProcess.linear(-8.0, 3.0)
CONFIG = ValidationConfig(num_images=50, timesteps_per_image=4, batch_size=16)
CPU = torch.device("cpu")


class Halt(Exception):
    """Leaves a rank at its gather."""


@dataclass(frozen=True)
class OneOfMany(Ranks):
    """A rank that is run after the others: each in turn leaves its value, the last round gets them all."""

    values: list[Any] = field(default_factory=list)
    complete: bool = False

    def gather(self, value: Any) -> list[Any]:
        if self.complete:
            return self.values
        self.values.append(value)
        raise Halt


def on_ranks(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` gives each of `world_size` ranks."""
    ranks = [OneOfMany(0, world_size)]
    ranks += [OneOfMany(rank, world_size, ranks[0].values) for rank in range(1, world_size)]
    for rank in ranks:
        with pytest.raises(Halt):
            work(rank)
    return [work(replace(rank, complete=True)) for rank in ranks]


class Network:
    """A fixed ε that depends on every pixel and on t; notes the shapes it is called with."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        torch.manual_seed(0)
        self.mix = torch.nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x_t.shape))
        return torch.tanh(self.mix(x_t)) * (1 + t.float() / 100)[:, None, None, None]


def denoiser(network: Network | None = None, process: Process = PROCESS) -> FunctionDenoiser:
    return FunctionDenoiser(lambda z_t, t: (network or Network())(z_t.float(), t), process)


@pytest.mark.parametrize("process", [PROCESS, CONTINUOUS])
@pytest.mark.parametrize("num_rows", [50, 33, 70, 1])
def test_any_number_of_ranks_gives_the_very_same_bits_per_dim(make_dataset, num_rows: int, process: Process) -> None:
    dataset = make_dataset(num_rows=num_rows)

    def work(ranks: Ranks) -> BitsPerDim:
        return validate(denoiser(process=process), dataset, CONFIG, 7, CPU, ranks)

    alone = work(Ranks(0, 1))
    assert alone.num_images == min(50, num_rows)
    for world_size in (2, 3, 5):
        assert on_ranks(world_size, work) == [alone] * world_size


def test_the_estimate_is_the_mean_over_each_image_once_with_its_standard_error(make_dataset) -> None:
    dataset = make_dataset(num_rows=70)
    result = validate(denoiser(), dataset, CONFIG, 7, CPU, Ranks(0, 1))
    ids, images, _ = dataset.read_images(0, 50)
    pixels = torch.tensor(images).permute(0, 3, 1, 2)

    def design_of(place: int) -> Design:
        return stratified_design(torch.tensor([place]), 7, timestep_proposal(PROCESS), 4)

    one_by_one = [
        elbo(denoiser(), pixels[i : i + 1], torch.tensor(ids[i : i + 1]), design_of(i), 7, BetaTilde(), batch_size=5)
        for i in range(50)
    ]
    total = np.array([float(found.parts()[0]) for found in one_by_one])
    assert result.total == pytest.approx(total.mean(), rel=1e-6)
    replicates = torch.cat([found.replicates for found in one_by_one])
    statistics = MeanStatistics.of(replicates, GROUP_SIZE)
    assert result.standard_error == pytest.approx(statistics.population.standard_error, rel=1e-5)
    # By hand: the spread over images less what the draws add to it, and the draws' own part, group by group.
    draws = replicates.var(1).sum() / 2
    groups = sum(float((group - group.mean()).sum(0).var()) for group in replicates.split(GROUP_SIZE)) / 2
    spread = max(float(replicates.mean(1).var() - draws / 50), 0.0) / 50
    assert result.standard_error == pytest.approx(math.sqrt(groups / 50**2 + spread), rel=1e-3)
    assert result.prior == pytest.approx(np.mean([float(found.prior) for found in one_by_one]), rel=1e-9)
    assert result.decoder == pytest.approx(np.mean([float(found.parts()[1]) for found in one_by_one]), rel=1e-6)
    assert result.total == pytest.approx(result.prior + result.kl_sum + result.decoder, rel=1e-12)


@pytest.mark.parametrize(
    ("process", "num_timesteps", "name"),
    [
        (PROCESS, 10, "steps_10.beta_tilde"),
        (CONTINUOUS, None, "continuous"),
        (CONTINUOUS, 10, "steps_10"),
    ],
)
def test_other_bounds_are_the_estimators_own(
    make_dataset, process: Process, num_timesteps: int | None, name: str
) -> None:
    """Continuous time, K steps of it, K steps of a table: `elbo` by hand, with intervals."""
    dataset, config = make_dataset(num_rows=20), replace(CONFIG, num_timesteps=num_timesteps)
    result = validate(denoiser(process=process), dataset, config, 7, CPU, Ranks(0, 1))
    ids, images, _ = dataset.read_images(0, 20)
    levels, ids = torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(ids)
    if num_timesteps is None:
        seen, design = denoiser(process=CONTINUOUS), continuous_design(torch.arange(20), 7, CONTINUOUS, 4)
    else:
        seen = Respaced.of(denoiser(process=process), num_timesteps)
        design = stratified_design(torch.arange(20), 7, timestep_proposal(discrete(seen.process)), 4)
    found = elbo(seen, levels, ids, design, 7, BetaTilde(), batch_size=5)
    total, decoder, between = (part.mean().item() for part in found.parts())
    assert (result.sigma2, result.num_images) == (name, 20)
    assert (result.total, result.decoder, result.kl_sum) == pytest.approx((total, decoder, between), rel=1e-6)
    assert result.prior == pytest.approx(found.prior.mean().item(), rel=1e-9)
    statistics = MeanStatistics.of(found.replicates, GROUP_SIZE)
    assert result.standard_error == pytest.approx(statistics.population.standard_error, rel=1e-5)
    assert 0 < result.standard_error < math.inf
    middle = "diffusion" if name == "continuous" else "kl_sum"
    assert result.to_json() == {
        "total": result.total, "standard_error": result.standard_error, "prior": result.prior, middle: result.kl_sum,
        "decoder": result.decoder, "num_images": 20, "sigma2": name,
    }  # fmt: skip


def test_an_odd_number_of_time_steps_is_one_replicate(make_dataset) -> None:
    config = replace(CONFIG, timesteps_per_image=5)
    result = validate(denoiser(), make_dataset(num_rows=40), config, 7, CPU, Ranks(0, 1))
    even = validate(denoiser(), make_dataset(num_rows=40), CONFIG, 7, CPU, Ranks(0, 1))
    assert result.standard_error is not None
    assert abs(result.total - even.total) < 4 * result.standard_error


def test_every_call_of_the_network_has_the_same_shape(make_dataset) -> None:
    network = Network()
    validate(denoiser(network), make_dataset(num_rows=35), CONFIG, 7, CPU, Ranks(0, 1))
    assert set(network.shapes) == {(16, 1, 8, 8)}


def test_another_seed_or_sigma2_is_another_estimate(make_dataset) -> None:
    dataset = make_dataset(num_rows=20)
    results = [
        validate(denoiser(), dataset, replace(CONFIG, sigma2=sigma2), seed, CPU, Ranks(0, 1))
        for sigma2, seed in (("beta_tilde", 7), ("beta_tilde", 8), ("beta", 7))
    ]
    assert len({result.total for result in results}) == 3
    assert [result.sigma2 for result in results] == ["beta_tilde", "beta_tilde", "beta"]


def test_one_image_has_no_standard_error(make_dataset) -> None:
    result = validate(denoiser(), make_dataset(num_rows=1), CONFIG, 7, CPU, Ranks(0, 1))
    assert json.loads(json_bytes(asdict(result)), parse_constant=pytest.fail)["standard_error"] is None
    assert (result.num_images, result.standard_error) == (1, None)


class Conditional(FunctionDenoiser):
    """Three classes, and the null class, each with an ε of its own."""

    def __init__(self, process: Process = PROCESS) -> None:
        super().__init__(Network(), process, num_classes=3)

    def __call__(self, z_t: torch.Tensor, time: torch.Tensor, label: torch.Tensor | None = None) -> Prediction:
        share = 0.0 if label is None else (label + 1).to(z_t)[:, None, None, None] / 4
        return Prediction.of_eps(z_t, self.process.at(time), share * super().__call__(z_t.float(), time).eps.to(z_t))


@pytest.mark.parametrize(("labels", "name"), [([0, 1, 2, None], "given_label.continuous"), ([None] * 4, "continuous")])
def test_a_model_with_classes_is_told_the_labels_that_there_are(make_dataset, labels: list, name: str) -> None:
    """-log2 p(x | c), and of an image without a label -log2 p(x); the name says which."""
    dataset = make_dataset(num_rows=40, labels=labels * 10)
    model = Conditional(CONTINUOUS)

    def work(ranks: Ranks) -> BitsPerDim:
        return validate(model, dataset, CONFIG, 7, CPU, ranks)

    found = work(Ranks(0, 1))
    ids, images, given = dataset.read_images(0, 40)
    levels, rows = torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(ids)
    design = continuous_design(rows, 7, CONTINUOUS, 4, 2)
    wanted = elbo(model, levels, rows, design, 7, BetaTilde(), label=torch.tensor(given))
    assert found.total == pytest.approx(float(wanted.parts()[0].mean()), rel=1e-9)
    assert found.sigma2 == name
    assert set(found.terms) == {"prior", "diffusion", "decoder"}
    assert on_ranks(3, work) == [found] * 3


@pytest.mark.parametrize(("num_images", "drawn", "columns"), [(7, 6, 2), (8, 9, 3), (100, 99, 33), (2, 2, 1)])
def test_a_grid_has_a_row_for_each_class(num_images: int, drawn: int, columns: int) -> None:
    config, model = GridConfig(num_images=num_images, sampler_steps=3), Conditional()
    layout = Layout.of(num_images, 3)
    assert (layout.num_images, layout.columns) == (drawn, columns)
    alone = sample_images(model, config, 3, CPU, Ranks(0, 1))
    assert len(alone) == drawn
    for row, label in enumerate(layout.classes):
        ids = torch.arange(row * columns, (row + 1) * columns)
        of_class = sample(model, DPMSolver(3, eta=1, spacing="log_snr"), ids, 3, label=torch.full_like(ids, label))
        np.testing.assert_array_equal(alone[row * columns : (row + 1) * columns], to_uint8(of_class).numpy())
    for samples in on_ranks(2, lambda ranks: sample_images(model, config, 3, CPU, ranks)):
        np.testing.assert_array_equal(samples, alone)


@pytest.mark.parametrize("process", [PROCESS, CONTINUOUS])
@pytest.mark.parametrize("num_images", [1, 32, 33, 70])
def test_samples_are_the_same_on_any_number_of_ranks(num_images: int, process: Process) -> None:
    config = GridConfig(num_images=num_images, sampler_steps=3)

    def work(ranks: Ranks) -> np.ndarray:
        return sample_images(denoiser(process=process), config, 3, CPU, ranks)

    alone = work(Ranks(0, 1))
    assert (alone.shape, alone.dtype) == ((num_images, 8, 8, 1), np.uint8)
    assert len(np.unique(alone.reshape(num_images, -1), axis=0)) == num_images
    for world_size in (2, 4):
        for samples in on_ranks(world_size, work):
            np.testing.assert_array_equal(samples, alone)
    np.testing.assert_array_equal(
        sample_images(denoiser(process=process), replace(config, num_images=1), 3, CPU, Ranks(0, 1)), alone[:1]
    )


@pytest.mark.parametrize(
    ("process", "spacing"),
    [(PROCESS, "log_snr"), (CONTINUOUS, "log_snr"), (PROCESS.rescaled_to_zero_terminal_snr(), "time")],
)
def test_a_grid_is_drawn_by_the_second_order_solver_with_noise(process: Process, spacing: Spacing) -> None:
    """Lu 2022, DPM-Solver++, eq. 18; even in time where SNR 0 leaves no other grid."""
    model = GreyWorld([40, 90, 200], [0.2, 0.5, 0.3], (1, 4, 4)).denoiser(process)
    drawn = sample_images(model, GridConfig(num_images=4, sampler_steps=5), 3, CPU, Ranks(0, 1))
    wanted = sample(model, DPMSolver(5, eta=1, spacing=spacing), torch.arange(4), 3)
    np.testing.assert_array_equal(drawn, to_uint8(wanted).numpy())
