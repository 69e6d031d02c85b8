"""One training step of the model, and its resume state: what a worker does between two batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ddpm_core import counter_random
from ddpm_core.denoiser import NO_LABEL, Labels, NetworkDenoiser, Precision, Prediction
from ddpm_core.ema import EMA
from ddpm_core.images import to_model_range
from ddpm_core.objectives import Losses, Objective, objective_named
from ddpm_core.parameterizations import denoiser_named
from pipelines.cli.errors import CheckpointError, ModelError
from pipelines.data.stream import Int64s, MicroBatch, shares
from pipelines.training.config import OptimizationConfig, TrainConfig
from pipelines.training.ranks import ALONE, Ranks


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


def build(config: TrainConfig, image_shape: tuple[int, int, int]) -> NetworkDenoiser:
    """A new denoiser, with a process of its own, for images of shape (H, W, C). Raises ConfigError for images that the
    network cannot take."""
    network = config.network.unet_config(image_shape)
    return denoiser_named(config.diffusion.prediction).build(network, config.diffusion.process())


def objective_of(denoiser: NetworkDenoiser, config: OptimizationConfig) -> Objective:
    """What is minimised. Raises ConfigError where it does not fit the denoiser."""
    return objective_named(config.loss, denoiser, config.min_snr_gamma, config.times, config.vlb_timesteps)


class Learner:
    """Denoiser, objective, optimizer and EMA of one DDP rank.

    t, ε, flips and which labels are dropped are drawn from (seed, pass, row id) alone, of which the pass is the epoch
    unless classes are balanced, times that are spread evenly over a step from (seed, step) and the row's place in the
    global batch. What an objective remembers of a step it is given in the order
    of those places. So a step's numbers depend on its rows and not on how they are divided among ranks.
    """

    def __init__(
        self,
        denoiser: Callable[[], NetworkDenoiser],
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, optimization = config, config.train
        self.device, self.ranks = device, ranks
        self._share = shares(config.batch_size, ranks.world_size)[ranks.rank]
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
        if ranks.world_size > 1:
            self.denoise = nn.parallel.DistributedDataParallel(
                self.denoiser, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        optimizer = torch.optim.AdamW if optimization.optimizer == "adamw" else torch.optim.Adam
        # γ's ends and slopes are no weights that should be small.
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.denoiser.named_parameters():
            decay = optimization.weight_decay if name.startswith("network.") else 0.0
            groups.setdefault(decay, []).append(parameter)
        self.optimizer = optimizer(
            [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
            lr=0.0,
            betas=(0.9, optimization.adam_beta2),
            fused=True,
        )
        self.ema = EMA(self.denoiser.named_weights(), optimization.ema_decay, warmup=True)
        self.objective: Objective = objective_of(self.denoiser, optimization).to(device)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant (Ho et al. 2020, appendix B)."""
        return self.config.train.learning_rate * min(1.0, (step + 1) / max(self.config.train.warmup_steps, 1))

    def step(self, batch: MicroBatch) -> StepResult:
        """Train on this rank's share of one global batch. A collective."""
        rows = batch.rows
        ids, passes, images = (
            torch.tensor(values).to(self.device, non_blocking=True) for values in (rows.ids, rows.passes, rows.images)
        )
        label = self._label(rows.labels, ids, passes)
        if self._has_dropout:
            # Resumable without saved generator states: the masks are a function of (seed, step, rank).
            stream = f"train/dropout/{batch.step}/{self.ranks.rank}"
            low, high = counter_random.stream_key(self.config.seed, stream)
            torch.manual_seed(low | high << 32)
        count = self.config.train.accumulate
        uniforms = self._uniforms(batch.step, ids, passes)
        whole = (to_model_range(images), uniforms, ids, passes, *(() if label is None else (label,)))
        parts = zip(*(values.tensor_split(count) for values in whole), strict=True)
        loss, found = torch.zeros((), device=self.device), []
        moments = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, of_part in enumerate(parts):
            losses = self._losses(*of_part)
            # DDP averages gradients over ranks, so each rank's loss is scaled by the world size.
            part = losses.rows.sum() * (self.ranks.world_size / self.config.batch_size)
            if index == count - 1 or self.ranks.world_size == 1:
                torch.autograd.backward(part)
            else:
                with self.denoise.no_sync():  # type: ignore[attr-defined]
                    torch.autograd.backward(part)
            loss += part.detach()
            values = losses.rows.detach().double()
            moments += torch.stack([values.sum(), values.square().sum()])
            found.append(losses)
        grad_norm = nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.train.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(batch.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(batch.step)
        self._remember(found)
        return StepResult(loss / self.ranks.world_size, grad_norm, moments / self.config.batch_size)

    def _label(self, labels: Int64s | None, ids: Tensor, passes: Tensor) -> Labels | None:
        """What the network is told of its rows, the null class with probability `train.label_dropout` (Ho and Salimans
        2021, algorithm 1): int64 [b] on the device; None for one without classes."""
        if self.denoiser.num_classes is None:
            return None
        assert labels is not None
        drawn = counter_random.uniform(self.config.seed, "train/label", ids, passes, 1)[:, 0]
        told = torch.tensor(labels).to(self.device, non_blocking=True)
        return torch.where(drawn < self.config.train.label_dropout, NO_LABEL, told)

    def _uniforms(self, step: int, ids: Tensor, passes: Tensor) -> Tensor:
        """What this rank's times of a step are made from, float64 [b] in [0, 1)."""
        seed = self.config.seed
        if not self.objective.even:
            return counter_random.uniform(seed, "train/t", ids, passes, 1)[:, 0]
        # frac(u + i / B) (Kingma 2021, VDM, app. I.1), u on the CPU: the step need not wait for a number on a GPU.
        u = float(counter_random.uniform(seed, "train/t/even", torch.tensor([step]), 0, 1))
        places = torch.arange(*self._share, device=self.device, dtype=torch.float64)
        return (places / self.config.batch_size + u).frac()

    def _losses(
        self, x_0: Tensor, uniforms: Tensor, ids: Tensor, passes: Tensor, label: Labels | None = None
    ) -> Losses:
        """The objective's losses of some rows."""
        seed = self.config.seed
        eps = counter_random.normal(seed, "train/eps", ids, passes, tuple(x_0.shape[1:]))
        if self.config.data.random_flip:
            flip = counter_random.uniform(seed, "train/flip", ids, passes, 1)[:, 0] < 0.5
            x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        losses: Losses = self.objective(self.denoise, x_0, uniforms, eps, label)
        return losses

    def _remember(self, found: Sequence[Losses]) -> None:
        """Have an objective with a memory take the whole global batch, in order of the rows' places, on every rank."""
        if not self.objective.remembers:
            return
        low, high = self._share
        whole = torch.zeros(2, self.config.batch_size, dtype=torch.float64, device=self.device)
        for row, name in enumerate(("time", "values")):
            whole[row, low:high] = torch.cat([getattr(losses, name) for losses in found]).double()
        self.ranks.add_up(whole)  # of the others' rows each has zeros
        time, values = whole
        self.objective.observe(time.to(found[0].time.dtype), values.to(found[0].values.dtype))

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
