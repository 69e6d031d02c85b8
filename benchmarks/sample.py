"""Sampling speed side by side: the bare sampler, the whole job, and two public implementations.

    uv run --group bench benchmarks/sample.py                       # Fashion-MNIST's network, CPU
    uv run --group bench benchmarks/sample.py --preset cifar10 --device cuda --batch 256

All get the same image size, batch, number of network evaluations and, within 5 %, number of parameters, with
random weights. The samplers take turns within one process; then (b) the whole job runs on one worker with as many
CPU threads, between two turns of (a). The job's rate is its own, from its first actor's first network call to the
last stored shard: PNG, Parquet, digests and records are in it, the start of Ray is not.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from train import PRESETS

from ddpm_core.config import UNetConfig
from ddpm_core.model import load_model, save_model
from ddpm_core.networks.unet import count_parameters
from ddpm_core.parameterizations import EpsDenoiser
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.precision import PrecisionField
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.job import sample
from pipelines.sampling.request import request_of
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.sampling.shard import Source, sample_batch
from pipelines.tracking.spool import iter_records

PRECISIONS: tuple[PrecisionField, ...] = ("fp32", "bf16")
Turn = Callable[[int], object]


def ours(directory: Path, args: argparse.Namespace, precision: PrecisionField) -> tuple[torch.nn.Module, Turn]:
    """(a) The bare sampler, DDIM with η = 0, without encoding or storing anything."""
    model = load_model(directory, args.device)
    config = SampleConfig(
        str(directory),
        "unused",
        args.batch,
        sampler=SamplerConfig("ddim", args.steps),
        precision=precision,
        batch_size=args.batch,
    )
    request = request_of(config, model)
    return model.denoiser.network, lambda turn: sample_batch(
        request, Source(model), torch.arange(args.batch) + turn * args.batch
    )


def diffusers(config: UNetConfig, args: argparse.Namespace, precision: PrecisionField) -> tuple[torch.nn.Module, Turn]:
    """(c) diffusers' DDPMPipeline, which returns arrays."""
    from diffusers import DDPMPipeline, DDPMScheduler

    pipeline = DDPMPipeline(peers.diffusers_unet(config), DDPMScheduler(num_train_timesteps=1000)).to(args.device)
    pipeline.set_progress_bar_config(disable=True)

    def turn(number: int) -> object:
        with torch.autocast(args.device, torch.bfloat16, enabled=precision == "bf16"):
            return pipeline(batch_size=args.batch, num_inference_steps=args.steps, output_type="np")

    return pipeline.unet, turn


def lucidrains(config: UNetConfig, args: argparse.Namespace, precision: PrecisionField) -> tuple[torch.nn.Module, Turn]:
    """(c) denoising-diffusion-pytorch's sampler, DDIM when it has fewer steps than were trained."""
    diffusion = peers.lucidrains_diffusion(config, args.steps).to(args.device).eval()
    import denoising_diffusion_pytorch.denoising_diffusion_pytorch as module

    module.tqdm = lambda steps, **kwargs: steps  # its progress bar would be printed and timed

    def turn(number: int) -> object:
        with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=precision == "bf16"):
            return diffusion.sample(batch_size=args.batch).cpu()

    return diffusion.model, turn


def job(directory: Path, args: argparse.Namespace, precision: PrecisionField, images: int) -> float:
    """(b) Images/s of the whole job, by its own record."""
    with tempfile.TemporaryDirectory() as scratch:
        config = SampleConfig(
            str(directory),
            f"{scratch}/samples",
            images,
            sampler=SamplerConfig("ddim", args.steps),
            precision=precision,
            batch_size=args.batch,
            shard_size=2 * args.batch,
            cluster=GpuClusterConfig(
                num_workers=1, cpus_per_worker=args.threads, gpus_per_worker=float(args.device == "cuda")
            ),
            root=scratch,
        )
        sample(config)
        (spool,) = Path(scratch).glob("spool/*/spool.jsonl")
        records = [record.payload["values"] for record in iter_records(spool) if record.kind == "metrics"]
        return float(records[-1]["images_per_second"])


def main() -> None:
    """Run the samplers in turns, then the job, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="fashion")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=64, help="images per network call")
    parser.add_argument("--steps", type=int, default=20, help="network evaluations per image")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each sampler")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; of the job, of its one worker")
    parser.add_argument("--job-shards", type=int, default=8, help="shards of two batches that the job makes; 0: no job")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = PRESETS[args.preset]
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        torch.manual_seed(0)
        denoiser = EpsDenoiser.build(config, DiscreteProcess.linear())
        save_model(model, denoiser.named_weights(), denoiser, {})
        makers = {
            "bare": lambda precision: ours(model, args, precision),
            "diffusers": lambda precision: diffusers(config, args, precision),
            "denoising-diffusion-pytorch": lambda precision: lucidrains(config, args, precision),
        }
        turns: dict[tuple[str, str], Turn] = {}
        for name, make in makers.items():
            for precision in PRECISIONS:
                network, turns[name, precision] = make(precision)
            print(f"{name}: {count_parameters(network):,} parameters")

        def rate(turn: Turn, number: int) -> float:
            start = time.perf_counter()
            turn(number)
            return args.batch / (time.perf_counter() - start)

        rates: dict[tuple[str, str], list[float]] = {key: [] for key in turns}
        for turn in turns.values():
            rate(turn, 0)  # warm-up
        for number in range(args.rounds):
            for key, turn in turns.items():
                rates[key].append(rate(turn, number))
        medians = {key: statistics.median(values) for key, values in rates.items()}
        setting = f"batch {args.batch}, {args.steps} steps, {args.device}, {args.threads} CPU thread(s)"
        print(f"\n{args.preset}, {setting}: images/s")
        for (name, precision), value in medians.items():
            low, high = min(rates[name, precision]), max(rates[name, precision])
            print(f"  {name:28} {precision} {value:8.1f}  ({low:.1f}..{high:.1f})")
        best = {name: max(medians[name, "fp32"], medians[name, "bf16"]) for name in makers}
        for name in ("diffusers", "denoising-diffusion-pytorch"):
            print(f"bare / {name}, best precision of each: {best['bare'] / best[name]:.2f} x")
        if args.job_shards:
            precision = max(PRECISIONS, key=lambda precision: medians["bare", precision])
            ratios = []
            for _ in range(3):
                around = [rate(turns["bare", precision], number) for number in range(5)]
                whole = job(model, args, precision, args.job_shards * 2 * args.batch)
                around += [rate(turns["bare", precision], number) for number in range(5)]
                ratios.append(whole / statistics.median(around))
            shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"job / bare, one worker, {precision}: {statistics.median(ratios):.3f} x  ({shown})")


if __name__ == "__main__":
    main()
