"""One training step of the ε-model, and its resume state: what a worker does between two batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ddpm_core import counter_random
from ddpm_core.denoiser import NetworkDenoiser, Precision, Prediction
from ddpm_core.ema import EMA
from ddpm_core.images import to_model_range
from ddpm_core.objectives import Losses, Objective, objective_named
from pipelines.cli.errors import CheckpointError, ModelError
from pipelines.data.stream import MicroBatch
from pipelines.training.config import TrainConfig


@dataclass(frozen=True)
class StepResult:
    """What a step gives, on the device.

    `loss`: scalar, this rank's part of the global batch's mean loss; the sum over ranks is the loss.
    `grad_norm`: scalar, L2 norm of the global gradient before clipping.
    `moments`: float64 [2], this rank's part of the mean over the global batch of its rows' losses and of their squares.
    """

    loss: Tensor
    grad_norm: Tensor
    moments: Tensor


class Learner:
    """Network, optimizer and EMA of one DDP rank.

    t, ε and flips of a row are drawn from (seed, epoch, row id) alone, so a step's numbers depend on its rows
    and not on how they are divided among ranks.
    """

    def __init__(
        self,
        denoiser: Callable[[], NetworkDenoiser],
        config: TrainConfig,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, optimization = config, config.train
        self.device, self.rank, self.world_size = device, rank, world_size
        torch.manual_seed(config.seed)
        self._build = denoiser
        self.denoiser = denoiser().to(device)
        self.denoiser.precision = cast(Precision, config.precision)  # settled by now
        if device.type == "cuda":
            self.denoiser.network.to(memory_format=torch.channels_last)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if optimization.compile:
            self.denoiser.network.compile()
        self.denoise: Callable[..., Prediction] = self.denoiser
        if world_size > 1:
            self.denoise = nn.parallel.DistributedDataParallel(
                self.denoiser, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        optimizer = torch.optim.AdamW if optimization.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = optimizer(
            self.denoiser.parameters(), lr=0.0, weight_decay=optimization.weight_decay, fused=True
        )
        self.ema = EMA(self.denoiser.named_weights(), optimization.ema_decay, warmup=True)
        objective = objective_named(optimization.loss, self.denoiser, optimization.min_snr_gamma)
        self.objective: Objective = objective.to(device)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant (Ho et al. 2020, appendix B)."""
        return self.config.train.learning_rate * min(1.0, (step + 1) / max(self.config.train.warmup_steps, 1))

    def step(self, batch: MicroBatch) -> StepResult:
        """Train on this rank's share of one global batch."""
        ids, epochs, images = (
            torch.tensor(values).to(self.device, non_blocking=True)
            for values in (batch.ids, batch.epochs, batch.images)
        )
        if self._has_dropout:
            # Resumable without saved generator states: the masks are a function of (seed, step, rank).
            low, high = counter_random.stream_key(self.config.seed, f"train/dropout/{batch.step}/{self.rank}")
            torch.manual_seed(low | high << 32)
        count = self.config.train.accumulate
        parts = zip(*(values.tensor_split(count) for values in (to_model_range(images), ids, epochs)), strict=True)
        loss = torch.zeros((), device=self.device)
        moments = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, (x_0, part_ids, part_epochs) in enumerate(parts):
            rows = self._losses(x_0, part_ids, part_epochs)
            # DDP averages gradients over ranks, so each rank's loss is scaled by the world size.
            part = rows.sum() * (self.world_size / self.config.batch_size)
            if index == count - 1 or self.world_size == 1:
                torch.autograd.backward(part)
            else:
                with self.denoise.no_sync():  # type: ignore[attr-defined]
                    torch.autograd.backward(part)
            loss += part.detach()
            values = rows.detach().double()
            moments += torch.stack([values.sum(), values.square().sum()])
        grad_norm = nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.train.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(batch.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(batch.step)
        return StepResult(loss / self.world_size, grad_norm, moments / self.config.batch_size)

    def _losses(self, x_0: Tensor, ids: Tensor, epochs: Tensor) -> Tensor:
        """The objective's loss of each row."""
        seed = self.config.seed
        uniforms = counter_random.uniform(seed, "train/t", ids, epochs, 1)[:, 0]
        eps = counter_random.normal(seed, "train/eps", ids, epochs, tuple(x_0.shape[1:]))
        if self.config.data.random_flip:
            flip = counter_random.uniform(seed, "train/flip", ids, epochs, 1)[:, 0] < 0.5
            x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        losses: Losses = self.objective(self.denoise, x_0, uniforms, eps)
        return losses.rows

    @property
    def _has_dropout(self) -> bool:
        """Whether a step draws dropout masks."""
        return self.denoiser.network.config.dropout > 0

    def averaged(self) -> NetworkDenoiser:
        """A copy of the denoiser with the averaged weights, in evaluation mode and training's precision."""
        denoiser = self._build().to(self.device)
        self.ema.copy_to(denoiser.named_weights())
        return denoiser.in_precision(self.denoiser.precision)

    def state(self) -> dict[str, bytes]:
        """Resume state as safetensors files; the EMA is in the model beside it.

        `objective.safetensors` is there only if the objective remembers something.
        """
        moments = {}
        for name, parameter in self.denoiser.named_weights().items():
            for key, value in self.optimizer.state[parameter].items():
                moments[f"{key}/{name}"] = value.detach().cpu().contiguous()
        files = {"weights": dict(self.denoiser.named_weights()), "optimizer": moments}
        if remembered := dict(self.objective.state_dict()):
            files["objective"] = remembered
        return {
            f"{name}.safetensors": save_tensors({key: value.detach().cpu().contiguous() for key, value in held.items()})
            for name, held in files.items()
        }

    @torch.no_grad()
    def load(self, weights: bytes, optimizer: bytes, ema: bytes, objective: bytes | None = None) -> None:
        """Take up the state that `state` and the model's ema.safetensors hold; `objective` where `state` has it.

        Raises:
            CheckpointError: They belong to another network.
        """
        try:
            stored = load_tensors(weights)
            for name, parameter in self.denoiser.named_weights().items():
                parameter.copy_(stored[name])
            self.ema.load_state_dict(load_tensors(ema))
            self.objective.load_state_dict({} if objective is None else load_tensors(objective))
            moments = load_tensors(optimizer)
            for name, parameter in self.denoiser.named_weights().items():
                # fused Adam keeps every entry, its step count too, on the parameter's device, and the moments in
                # the parameter's memory layout (channels-last on GPUs), which safetensors does not keep
                state = {"step": moments[f"step/{name}"].to(self.device)}
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.empty_like(parameter).copy_(moments[f"{key}/{name}"])
                self.optimizer.state[parameter] = state
        except ModelError as error:
            raise CheckpointError(str(error)) from error
        except (RuntimeError, KeyError, SafetensorError) as error:
            text = str(error).splitlines()[0]
            raise CheckpointError(f"checkpoint does not fit the network: {text}") from error
