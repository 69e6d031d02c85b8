"""The networks of two public implementations, at the size of one of ours."""

import torch

from ddpm_core.config import UNetConfig
from ddpm_core.networks.unet import UNet, count_parameters


def diffusers_unet(config: UNetConfig) -> torch.nn.Module:
    """diffusers' UNet2DModel with the same levels, widths, blocks and attention."""
    from diffusers import UNet2DModel

    widths = tuple(config.base_channels * m for m in config.channel_multipliers)
    attention = [config.height_width[0] >> level in config.attention_resolutions for level in range(len(widths))]
    return UNet2DModel(
        sample_size=config.height_width,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        layers_per_block=config.num_res_blocks,
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        norm_num_groups=config.num_groups,
        dropout=config.dropout,
    )


def lucidrains_diffusion(config: UNetConfig, sampling_timesteps: int | None = None) -> torch.nn.Module:
    """denoising-diffusion-pytorch's GaussianDiffusion, its Unet's width chosen to match the number of parameters."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    target = count_parameters(UNet(config))

    def make(dim: int) -> torch.nn.Module:
        mults, dropout = config.channel_multipliers, config.dropout
        return Unet(dim=dim, dim_mults=mults, channels=config.in_channels, dropout=dropout)

    with torch.device("meta"):
        sizes = {dim: count_parameters(make(dim)) for dim in range(8, 2 * config.base_channels, 2)}
    return GaussianDiffusion(
        make(min(sizes, key=lambda dim: abs(sizes[dim] - target))),
        image_size=config.height_width,
        objective="pred_noise",
        beta_schedule="linear",
        sampling_timesteps=sampling_timesteps,
    )
