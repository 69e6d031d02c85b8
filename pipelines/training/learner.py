"""One training step of the ε-model, and its resume state: what a worker does between two batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ddpm_core import noise
from ddpm_core.config import UNetConfig
from ddpm_core.diffusion import q_sample
from ddpm_core.ema import EMA
from ddpm_core.errors import CheckpointError
from ddpm_core.images import to_model_range
from ddpm_core.losses import eps_mse, loss_weights
from ddpm_core.schedule import NoiseSchedule
from ddpm_core.unet import UNet
from pipelines.data.stream import MicroBatch
from pipelines.training.config import OptimizationConfig


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device.

    `loss`: this rank's part of the global batch's mean loss; the sum over ranks is the loss.
    `grad_norm`: L2 norm of the global gradient before clipping.
    """

    loss: Tensor
    grad_norm: Tensor


class Learner:
    """Network, optimizer and EMA of one DDP rank.

    t, ε and flips of a row are drawn from (seed, epoch, row id) alone, so a step's numbers depend on its rows
    and not on how they are divided among ranks.
    """

    def __init__(
        self,
        unet_config: UNetConfig,
        schedule: NoiseSchedule,
        config: OptimizationConfig,
        random_flip: bool,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.schedule, self.random_flip = config, schedule, random_flip
        self.device, self.rank, self.world_size = device, rank, world_size
        torch.manual_seed(config.seed)
        self.unet = UNet(unet_config).to(device)
        if device.type == "cuda":
            self.unet = self.unet.to(memory_format=torch.channels_last)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.network: Callable[[Tensor, Tensor], Tensor] = self.unet
        if config.compile:
            self.network = torch.compile(self.unet)
        if world_size > 1:
            self.network = nn.parallel.DistributedDataParallel(
                self.network, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        optimizer = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = optimizer(self.unet.parameters(), lr=0.0, weight_decay=config.weight_decay, fused=True)
        self.ema = EMA(self.unet, config.ema_decay, warmup=True)
        self.weights = loss_weights(config.loss, schedule, gamma=config.min_snr_gamma).to(device, torch.float32)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant (Ho et al. 2020, appendix B)."""
        return self.config.learning_rate * min(1.0, (step + 1) / max(self.config.warmup_steps, 1))

    def step(self, batch: MicroBatch) -> StepResult:
        """Train on this rank's share of one global batch."""
        ids, epochs, images = (
            torch.tensor(values).to(self.device, non_blocking=True)
            for values in (batch.ids, batch.epochs, batch.images)
        )
        if self.config_has_dropout:
            # Resumable without saved generator states: the masks are a function of (seed, step, rank).
            low, high = noise.stream_key(self.config.seed, f"train/dropout/{batch.step}/{self.rank}")
            torch.manual_seed(low | high << 32)
        count = self.config.accumulate
        parts = zip(*(values.tensor_split(count) for values in (to_model_range(images), ids, epochs)), strict=True)
        loss = torch.zeros((), device=self.device)
        for index, (x_0, part_ids, part_epochs) in enumerate(parts):
            part = self._loss(x_0, part_ids, part_epochs)
            if index == count - 1 or self.world_size == 1:
                torch.autograd.backward(part)
            else:
                with self.network.no_sync():  # type: ignore[attr-defined]
                    torch.autograd.backward(part)
            loss += part.detach()
        grad_norm = nn.utils.clip_grad_norm_(self.unet.parameters(), self.config.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(batch.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(batch.step)
        # DDP averages gradients over ranks, so each rank's loss is scaled by the world size (see _loss).
        return StepResult(loss / self.world_size, grad_norm)

    def _loss(self, x_0: Tensor, ids: Tensor, epochs: Tensor) -> Tensor:
        """Σ over rows of w(t) ‖ε - ε_θ(x_t, t)‖²/D, times world size / global batch (Ho et al. 2020, eq. 14)."""
        seed = self.config.seed
        t = noise.randint(seed, "train/t", ids, epochs, self.schedule.num_timesteps)
        eps = noise.normal(seed, "train/eps", ids, epochs, tuple(x_0.shape[1:]))
        if self.random_flip:
            flip = noise.uniform(seed, "train/flip", ids, epochs, 1)[:, 0] < 0.5
            x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        x_t = q_sample(self.schedule, x_0, t, eps)
        with self.autocast():
            eps_pred = self.network(x_t, t)
        rows = self.weights[t] * eps_mse(eps, eps_pred.float())
        return rows.sum() * (self.world_size / self.config.batch_size)

    @property
    def config_has_dropout(self) -> bool:
        """Whether a step draws dropout masks."""
        return self.unet.config.dropout > 0

    def autocast(self) -> torch.autocast:
        """The precision the network runs in."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled={"fp32": False, "bf16": True}[self.config.precision]
        )

    def eps_fn(self, unet: UNet) -> Callable[[Tensor, Tensor], Tensor]:
        """A network as the samplers and the likelihood call it, in evaluation mode and training's precision."""
        unet.eval()

        def call(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.inference_mode(), self.autocast():
                eps: Tensor = unet(x_t, t)
                return eps.float()

        return call

    def ema_unet(self) -> UNet:
        """A copy of the network with the EMA weights."""
        unet = UNet(self.unet.config).to(self.device)
        self.ema.copy_to(unet)
        return unet

    def state(self) -> dict[str, bytes]:
        """Resume state as safetensors files; the EMA is in the model beside it."""
        moments = {}
        for name, parameter in self.unet.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                moments[f"{key}/{name}"] = value.detach().cpu().contiguous()
        weights = {name: value.detach().cpu().contiguous() for name, value in self.unet.state_dict().items()}
        return {"weights.safetensors": save_tensors(weights), "optimizer.safetensors": save_tensors(moments)}

    @torch.no_grad()
    def load(self, weights: bytes, optimizer: bytes, ema: bytes) -> None:
        """Take up the state that `state` and the model's ema.safetensors hold.

        Raises:
            CheckpointError: They belong to another network.
        """
        try:
            self.unet.load_state_dict(load_tensors(weights))
            self.ema.load_state_dict(load_tensors(ema))
            moments = load_tensors(optimizer)
            for name, parameter in self.unet.named_parameters():
                # fused Adam keeps every entry, its step count too, on the parameter's device, and the moments in
                # the parameter's memory layout (channels-last on GPUs), which safetensors does not keep
                state = {"step": moments[f"step/{name}"].to(self.device)}
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.empty_like(parameter).copy_(moments[f"{key}/{name}"])
                self.optimizer.state[parameter] = state
        except (RuntimeError, KeyError, SafetensorError) as error:
            text = str(error).splitlines()[0]
            raise CheckpointError(f"checkpoint does not fit the network: {text}") from error
