"""Training speed side by side: ddpm_core's bare loop and two public implementations.

    uv run --group bench benchmarks/train.py                        # Fashion-MNIST's network, CPU
    uv run --group bench benchmarks/train.py --preset cifar10 --device cuda --peak-tflops 989
    python benchmarks/train.py --contenders bare                    # needs torch, safetensors, jaxtyping

All contenders get the same image size, batch size and, within 5 %, number of parameters, on the same
uint8 images in memory, and do what their own training loop does in a step: noise, loss, backward pass,
gradient clipping, optimizer, EMA. They take turns within one process (A B C A B C ...), so that a
machine that is busy for a while slows all of them; compare the ratios, not the rates.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peers
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ddpm_core import counter_random
from ddpm_core.config import UNetConfig
from ddpm_core.ema import EMA
from ddpm_core.images import to_model_range
from ddpm_core.networks.unet import count_parameters, forward_flops
from ddpm_core.objectives import objective_named
from ddpm_core.parameterizations import EpsDenoiser
from ddpm_core.process.discrete import DiscreteProcess

PRESETS = {
    "digits": UNetConfig(8, 1, 32, (1, 2), 1, (4,), dropout=0.0, num_groups=8),
    "fashion": UNetConfig(28, 1, 32, (1, 2, 2), 1, (7,), dropout=0.0, num_groups=8),
    "fashion-large": UNetConfig(28, 1, 48, (1, 2, 2), 2, (7,), dropout=0.0, num_groups=16),
    "cifar10": UNetConfig(),
}
Step = Callable[[torch.Tensor, int], object]


@dataclass(frozen=True)
class Setting:
    """What every contender is given."""

    config: UNetConfig
    device: torch.device
    bf16: bool

    def autocast(self) -> torch.autocast:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def bare(setting: Setting) -> tuple[torch.nn.Module, Step]:
    """(a) ddpm_core alone: counter-based noise, L_simple, fused AdamW, foreach EMA."""
    process = DiscreteProcess.linear()
    denoiser = EpsDenoiser.build(setting.config, process).to(setting.device)
    denoiser.precision = "bf16" if setting.bf16 else "fp32"
    if setting.device.type == "cuda":
        denoiser.network.to(memory_format=torch.channels_last)
    objective = objective_named("simple", denoiser).to(setting.device)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=2e-4, fused=True)
    ema = EMA(denoiser.named_weights(), 0.9999)

    def step(images: torch.Tensor, number: int) -> object:
        x_0 = to_model_range(images)
        ids = torch.arange(len(images), device=images.device)
        uniforms = counter_random.uniform(0, "t", ids, number, 1)[:, 0]
        eps = counter_random.normal(0, "eps", ids, number, tuple(x_0.shape[1:]))
        loss = objective(denoiser, x_0, uniforms, eps).rows.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        ema.update(number)
        return loss

    return denoiser, step


def diffusers(setting: Setting) -> tuple[torch.nn.Module, Step]:
    """(c) diffusers' UNet2DModel of the same widths, in the loop of its unconditional training example."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    unet = peers.diffusers_unet(setting.config).to(setting.device)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, foreach=True)
    ema.to(setting.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    learning_rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)

    def step(images: torch.Tensor, number: int) -> object:
        clean = images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()
        eps = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=clean.device)
        with setting.autocast():
            eps_pred = unet(scheduler.add_noise(clean, eps, t), t).sample
        loss = torch.nn.functional.mse_loss(eps_pred.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        learning_rate.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        return loss

    return unet, step


def lucidrains(setting: Setting) -> tuple[torch.nn.Module, Step]:
    """(c) denoising-diffusion-pytorch's Unet, its width chosen to match, in the loop of its Trainer."""
    from ema_pytorch import EMA as EmaPytorch

    diffusion = peers.lucidrains_diffusion(setting.config).to(setting.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EmaPytorch(diffusion, beta=0.995, update_every=10)

    def step(images: torch.Tensor, number: int) -> object:
        with setting.autocast():
            loss = diffusion(images.permute(0, 3, 1, 2).float().div(255.0).contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return loss

    return diffusion.model, step


CONTENDERS = {"bare": bare, "diffusers": diffusers, "denoising-diffusion-pytorch": lucidrains}


def main() -> None:
    """Run the contenders in turns and print their rates and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="fashion")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=2, help="training steps per turn")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--job-steps", type=int, default=0, help="also (b): the whole job, one worker, so many steps")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bf16, for the FLOPs utilisation")
    args = parser.parse_args()
    device, config = torch.device(args.device), PRESETS[args.preset]
    height, width = config.height_width
    images = torch.randint(0, 256, (args.batch, height, width, config.in_channels), dtype=torch.uint8).to(device)

    steps: dict[tuple[str, str], Step] = {}
    for name in args.contenders:
        for precision in ("fp32", "bf16"):
            torch.manual_seed(0)
            network, step = CONTENDERS[name](Setting(config, device, precision == "bf16"))
            network.train()
            steps[name, precision] = step
        print(f"{name}: {count_parameters(network):,} parameters")

    def turn(step: Step, first: int) -> float:
        start = time.perf_counter()
        for number in range(first, first + args.steps):
            step(images, number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return args.batch * args.steps / (time.perf_counter() - start)

    rates: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for step in steps.values():
        turn(step, 0)  # warm-up: allocators, kernel selection, optimizer state
    for number in range(args.rounds):
        for key, step in steps.items():
            rates[key].append(turn(step, (number + 1) * args.steps))

    medians = {key: statistics.median(values) for key, values in rates.items()}
    print(f"\n{args.preset}, batch {args.batch}, {device}, {torch.get_num_threads()} CPU threads: images/s")
    for (name, precision), rate in medians.items():
        low, high = min(rates[name, precision]), max(rates[name, precision])
        utilisation = ""
        if args.peak_tflops and name == "bare":
            utilisation = f"  {3 * forward_flops(config) * rate / args.peak_tflops / 1e10:.1f} % of peak FLOPs"
        print(f"  {name:28} {precision} {rate:9.1f}  ({low:.1f}..{high:.1f}){utilisation}")
    best = {name: max(medians[name, "fp32"], medians[name, "bf16"]) for name in args.contenders}
    for name in args.contenders:
        if name != "bare" and "bare" in best:
            print(f"bare / {name}, best precision of each: {best['bare'] / best[name]:.2f} x")
    if args.job_steps:
        from job import job_rate  # needs the whole project; the rest of this file only ddpm_core

        precision = "bf16" if medians["bare", "bf16"] > medians["bare", "fp32"] else "fp32"
        step = steps["bare", precision]
        turns = max(1, args.job_steps // args.steps // 2)
        bare_rates, job_rates = [statistics.median(turn(step, 0) for _ in range(turns))], []
        for _ in range(args.rounds):
            job_rates.append(job_rate(config, args.batch, args.job_steps, precision, int(device.type == "cuda")))
            bare_rates.append(statistics.median(turn(step, 0) for _ in range(turns)))
        ratios = [rate / ((a + b) / 2) for rate, a, b in zip(job_rates, bare_rates[:-1], bare_rates[1:], strict=True)]
        print(f"\nwhole job, 1 worker, {precision}: {statistics.median(job_rates):.1f} images/s after its first tenth")
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"job / bare (mean of bare before and after each job): {statistics.median(ratios):.3f} x  ({shown})")


if __name__ == "__main__":
    main()
