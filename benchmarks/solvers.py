"""What each solver is worth: its order, the variance it leaves, how few evaluations of the network do, and its time.

    uv run benchmarks/solvers.py --orders docs/images/solver_orders.png --variance
    uv run benchmarks/solvers.py --model RUN              # of predictions clipped to the pixels' range, as jobs do
    uv run benchmarks/solvers.py --model RUN --no-clip
    uv run --group bench benchmarks/solvers.py --race 16

--orders: errors where the best eps is known, of pixels N(m, s^2), in float64, on the grid `edm` from gamma = 6 to -8;
the order is the slope between the last two. `published` is the third order as other implementations have it, diffusers'
DPMSolverMultistepScheduler with solver_order=3 among them: they take half of the second difference's integral, and a
first step of first order. From gamma = 1 that first step weighs more.

--variance: of samples of N(0, 1) with the best eps. Every solver is then linear in the starting noise and in the noise
of each step, so that the variance is a sum of squares and no sampling is done.

--model: distance of images, in pixels from -1 to 1, from those of a reference with 1,000 evaluations that starts from
the same noise: root mean square over all, and the median of the images' own, as one image of sixteen that comes out as
something else is most of the former. The last column has the evaluations with which either is what DDIM's is with 50.

--race: images/s of dpmpp_2m with so many evaluations, against diffusers' DDIM with 50 and its DPM-Solver++ 2M with as
many as ours. The networks of Fashion-MNIST's recipe have the same size within 5 %, and random weights, as the time
does not depend on them; all take turns in one process on one thread, each in fp32, and in bf16 where the CPU is faster
in it. On a busy machine trust the CPU time.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ddpm_core.denoiser import Labels, Prediction
from ddpm_core.model import load_model, model_from_bytes, save_model
from ddpm_core.parameterizations import EpsDenoiser
from ddpm_core.process.base import Images, Process, Spacing, Time, factor
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.samplers.base import STATIC_CLIP, Predictor, Sampler, sample, steps_between
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM
from ddpm_core.samplers.dpm_solver import DPMSolver
from ddpm_core.samplers.heun import Heun
from pipelines.cluster.precision import PrecisionField, bf16_of_cpu
from pipelines.models.find import find_model
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.request import request_of
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.sampling.shard import Source, sample_batch

MakeSampler = Callable[[int, Spacing], Sampler]


class FirstOrderStart(DPMSolver):
    """Third order whose first step is one of first order."""

    @property
    def _starts_twice(self) -> bool:
        return False


class HalfDifference(DPMSolver):
    """Third order with half of the second difference."""

    @staticmethod
    def weights(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w_0, w_1 and what stands in place of w_2."""
        first, second, third = DPMSolver.weights(h)
        return first, second, third / 2.0


class Published(HalfDifference, FirstOrderStart):
    """Third order as other implementations have it."""


DETERMINISTIC: dict[str, MakeSampler] = {
    "ddim": lambda steps, spacing: DDIM(steps, spacing=spacing),
    "dpmpp_2m": lambda steps, spacing: DPMSolver(steps, 2, spacing=spacing),
    "dpmpp_3m": lambda steps, spacing: DPMSolver(steps, 3, spacing=spacing),
    "heun": lambda steps, spacing: Heun(steps, spacing),
}
STOCHASTIC: dict[str, MakeSampler] = {
    "ddpm, σ² = β̃": lambda steps, spacing: DDPM(steps=steps, spacing=spacing),
    "dpmpp_2m_sde": lambda steps, spacing: DPMSolver(steps, 2, 1, spacing),
    "dpmpp_3m_sde": lambda steps, spacing: DPMSolver(steps, 3, 1, spacing),
}
THIRD_ORDERS: dict[str, MakeSampler] = {
    "third order, published": lambda steps, spacing: Published(steps, 3, spacing=spacing),
    "its difference, our start": lambda steps, spacing: HalfDifference(steps, 3, spacing=spacing),
    "our difference, its start": lambda steps, spacing: FirstOrderStart(steps, 3, spacing=spacing),
}
TABLE, VDM = DiscreteProcess.linear(1000), ContinuousProcess.linear(-13.3, 5.0)


@dataclass
class GaussianPixels:
    """Pixels N(m, s^2), of which everything is known; a `Denoiser`."""

    process: Process
    mean: Tensor
    deviation: Tensor
    num_classes: int | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.mean.shape
        return channels, height, width

    def __call__(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
        """The best eps: sigma (z_t - alpha m) / (alpha^2 s^2 + sigma^2)."""
        now = self.process.at(time)
        spread = (now.alpha * self.deviation).square() + now.sigma.square()
        return Prediction.of_eps(z_t, now, now.sigma * (z_t - now.alpha * self.mean) / spread)


def within(make: MakeSampler, process: Process, calls: int, spacing: Spacing) -> Sampler:
    """With the most steps that take no more than so many evaluations."""
    samplers = (make(steps, spacing) for steps in range(calls, 0, -1))
    return next(sampler for sampler in samplers if len(sampler.calls(process)) <= calls)


def row(cells: Iterable[object]) -> None:
    """Print one of a table."""
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def head(cells: Iterable[object]) -> None:
    """Print a table's head."""
    cells = list(cells)
    row(cells)
    print("|" + "---|" * len(cells))


def errors(make: MakeSampler, counts: list[int], noisiest: float) -> list[float]:
    """The largest of any pixel with so many steps, from gamma = `noisiest` to -8."""
    process = ContinuousProcess.linear(-8.0, noisiest)
    mean = torch.linspace(-0.5, 0.5, 4, dtype=torch.float64).reshape(1, 2, 2)
    deviation = torch.tensor([0.2, 0.3, 0.5, 0.8], dtype=torch.float64).reshape(1, 2, 2)
    z = torch.randn(16, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    high, low = (process.at(torch.tensor([gamma], dtype=torch.float64)) for gamma in reversed(process.ends))
    before, after = ((m.alpha * deviation).square() + m.sigma.square() for m in (high, low))
    exact = mean + (z - high.alpha * mean) * (after / before).sqrt() / low.alpha
    data, ids = GaussianPixels(process, mean, deviation), torch.arange(len(z))
    found = (sample(data, make(count, "edm"), ids, 0, None, start=z) for count in counts)
    return [float((x - exact).abs().max()) for x in found]


def orders(path: Path) -> None:
    """Draw the errors over the evaluations, and print how fast they fall."""
    from matplotlib.figure import Figure

    counts = [10, 20, 40, 80, 160, 320]
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.subplots()
    head(["Largest error", *(f"{count} steps" for count in counts), "order", "order from γ = 1"])
    for name, make in (DETERMINISTIC | THIRD_ORDERS).items():
        far, near = (errors(make, counts, noisiest) for noisiest in (6.0, 1.0))
        slopes = [f"{math.log2(e[-2] / e[-1]):.2f}" for e in (far, near)]
        row([name, *(f"{error:.1e}" for error in far), *slopes])
        if name in DETERMINISTIC or name == "third order, published":
            calls = [len(make(count, "edm").calls(VDM)) for count in counts]
            style = "o-" if name in DETERMINISTIC else "x--"
            axes.loglog(calls, far, style, markersize=4, label=f"{name}: order {float(slopes[0]):.0f}")
    axes.set(xlabel="evaluations of the denoiser", ylabel="largest error of a pixel (range -1 to 1)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def variance_left(sampler: Sampler, process: Process) -> float:
    """Of x where the data are N(0, 1): rows 0, 1, ..., K hold the factors of the starting noise and of each step's."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    times = sampler.times(process)
    steps, count = steps_between(process, times), len(times)
    units = torch.eye(count + 1, dtype=torch.float64)[:, :, None, None, None]
    z, memory = math.sqrt(process.prior_variance) * units[0], None
    denoise = Predictor(GaussianPixels(process, 0.0 * one, one), None, None)
    for k in range(count):
        is_to_data = float(steps.then.sigma[k]) == 0.0
        noise = None if is_to_data else lambda k=k: units[k + 1]
        z, memory = sampler.step(steps[k : k + 1], z, denoise, noise, memory)
    return float((z / factor(steps.then.alpha[-1:], z)).square().sum())


def variances() -> None:
    """Print the tables."""
    calls = (10, 20, 50)
    for name, process in {"linear, T = 1,000": TABLE, "VDM, γ from -13.3 to 5": VDM}.items():
        head([f"Variance left in %, {name}", *(f"{s}: {', '.join(map(str, calls))}" for s in get_args(Spacing))])
        for solver, make in (DETERMINISTIC | STOCHASTIC).items():
            left = (
                [variance_left(within(make, process, count, spacing), process) for count in calls]
                for spacing in get_args(Spacing)
            )
            row([solver, *(", ".join(f"{100.0 * value:.1f}" for value in values) for values in left)])
        print()


@torch.inference_mode()
def distances(run: str, num_images: int, calls: list[int], is_clipped: bool) -> None:
    """Print the distances of every solver on every grid, and the evaluations for DDIM's with 50."""
    denoiser = model_from_bytes(find_model(run, None, Path("unused")).files, "cpu").denoiser
    process, ids = denoiser.process, torch.arange(num_images)
    clip = STATIC_CLIP if is_clipped else None

    def images(sampler: Sampler) -> Images:
        return sample(denoiser, sampler, ids, 0, clip)

    reference = images(DPMSolver(1000, 2, spacing="time"))

    def distance(sampler: Sampler) -> tuple[float, float]:
        squares = (images(sampler) - reference).square().flatten(1).mean(1)
        return float(squares.mean().sqrt()), float(squares.sqrt().median())

    aim = distance(DDIM(50))
    print(f"ddim with 50 calls, even in time: {aim[0]:.4f}, {aim[1]:.4f}\n")
    head(["Distance", *(f"{count} calls" for count in calls), "calls for ddim's with 50"])
    seen: list[Time] = []
    for spacing in get_args(Spacing):
        times = process.grid(20, spacing)
        if any(torch.allclose(times, other) for other in seen):
            continue  # log-SNR where gamma is linear in time
        seen.append(times)
        for name, make in DETERMINISTIC.items():
            solvers = [within(make, process, count, spacing) for count in calls]
            used = [len(solver.calls(process)) for solver in solvers]
            found = [distance(solver) for solver in solvers]
            needed = [calls_for(aim[which], used, [each[which] for each in found]) for which in (0, 1)]
            row([f"{name}, {spacing}", *(f"{mean:.4f}, {median:.4f}" for mean, median in found), ", ".join(needed)])


def calls_for(aim: float, calls: list[int], values: list[float]) -> str:
    """Where the distance falls below `aim`, by a straight line between the logarithms."""
    points = list(zip(calls, values, strict=True))
    for (few, far), (many, near) in itertools.pairwise(points):
        if far > aim >= near:
            share = math.log(far / aim) / math.log(far / near)
            return f"{math.exp((1.0 - share) * math.log(few) + share * math.log(many)):.1f}"
    return f"< {calls[0]}" if values[0] <= aim else f"> {calls[-1]}"


def race(calls: int, batch: int, rounds: int) -> None:
    """Print the rates and their ratios."""
    import peers
    from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler
    from train import PRESETS

    with tempfile.TemporaryDirectory() as directory:
        denoiser = EpsDenoiser.build(PRESETS["fashion"], TABLE)
        save_model(Path(directory), denoiser.named_weights(), denoiser, {})
        model = load_model(Path(directory), "cpu")

    def ours(precision: PrecisionField) -> Callable[[int], object]:
        sampler = SamplerConfig("dpmpp_2m", calls)
        config = SampleConfig("unused", "unused", batch, sampler=sampler, precision=precision, batch_size=batch)
        request = request_of(config, model)
        return lambda turn: sample_batch(request, Source(model), torch.arange(batch) + turn * batch)

    def theirs(scheduler: object, steps: int, precision: PrecisionField) -> Callable[[int], object]:
        pipeline = DDPMPipeline(peers.diffusers_unet(PRESETS["fashion"]), scheduler)  # runs any scheduler
        pipeline.set_progress_bar_config(disable=True)

        def turn(number: int) -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return pipeline(batch_size=batch, num_inference_steps=steps, output_type="np")

        return turn

    makers = {
        f"dpmpp_2m, {calls}": ours,
        "diffusers' DDIM, 50": lambda precision: theirs(DDIMScheduler(), 50, precision),
        f"diffusers' DPM-Solver++, {calls}": lambda precision: theirs(DPMSolverMultistepScheduler(), calls, precision),
    }
    precisions: tuple[PrecisionField, ...] = ("fp32",) if bf16_of_cpu().slower else ("fp32", "bf16")
    turns = {(name, precision): make(precision) for name, make in makers.items() for precision in precisions}
    clocks = {"wall-clock": time.perf_counter, "CPU": time.process_time}
    seconds: dict[tuple[str, str, str], list[float]] = {(*key, clock): [] for key in turns for clock in clocks}
    for number in range(rounds + 1):  # the first warms up
        for key, turn in turns.items():
            before = {clock: now() for clock, now in clocks.items()}
            turn(number)
            for clock, now in clocks.items():
                seconds[*key, clock].append(now() - before[clock])
    for clock in clocks:
        median = {key: statistics.median(seconds[*key, clock][1:]) for key in turns}
        best = {name: min(median[name, precision] for precision in precisions) for name in makers}
        head([f"Images/s, {clock} time", *precisions, f"dpmpp_2m, {calls}, against it, the better precision of each"])
        for name in makers:
            ratio = best[name] / best[f"dpmpp_2m, {calls}"]
            row([name, *(f"{batch / median[name, precision]:.2f}" for precision in precisions), f"{ratio:.2f} ×"])
        print()


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--orders", type=Path, metavar="PNG", help="draw the errors into this file")
    parser.add_argument("--variance", action="store_true", help="print what variance each solver leaves")
    parser.add_argument("--model", metavar="RUN", help="a model, in place of what is known exactly")
    parser.add_argument("--images", type=int, default=16, help="of the model")
    parser.add_argument("--calls", type=int, nargs="+", default=[8, 10, 14, 20, 30], help="per image")
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, default=True, help="predictions to [-1, 1]")
    parser.add_argument("--race", type=int, metavar="CALLS", help="time dpmpp_2m against diffusers")
    parser.add_argument("--batch", type=int, default=32, help="images of a turn of the race")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each in the race")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.orders is not None:
        orders(args.orders)
    if args.variance:
        variances()
    if args.model is not None:
        distances(args.model, args.images, args.calls, args.clip)
    if args.race is not None:
        race(args.race, args.batch, args.rounds)


if __name__ == "__main__":
    main()
