"""The mathematics of DDPM and its epsilon-network: torch, numpy and safetensors only."""
