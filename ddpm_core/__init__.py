"""The mathematics of diffusion models and their networks: torch, numpy, safetensors and jaxtyping only."""
