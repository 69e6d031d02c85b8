"""What kind of model it is, in a line for a person, from what its config.json says; without torch, as jobs show it."""

import math
from collections.abc import Mapping
from typing import Any

_PREDICTIONS = {
    "eps": "ε-prediction",
    "x_0": "x_0-prediction",
    "v": "v-prediction",
    "residual_eps": "residual ε-prediction",
    "edm": "EDM preconditioning",
}


def kind_of(config: Mapping[str, Any]) -> str:
    """Prediction, process, learned variances and classes of the model that `config` describes, whose fields have been
    checked: 'v-prediction, cosine T = 1,000 with zero terminal SNR, learned σ²'."""
    parts = [_PREDICTIONS[config.get("denoiser", "eps")], _process(config["schedule"])]
    if config["network"].get("learned_variance"):
        parts.append("learned σ²")
    if classes := config["network"].get("num_classes"):
        parts.append(f"{classes:,} classes")
    return ", ".join(parts)


def _process(schedule: Mapping[str, Any]) -> str:
    match name := schedule["name"]:
        case "gamma_linear" | "gamma_learned":
            learned = "learned " if name == "gamma_learned" else ""
            if schedule.get("learned_ends"):
                return "continuous time, learned γ with learned ends"
            low, high = schedule["gamma_min"], schedule["gamma_max"]
            if schedule.get("family") == "exploding":
                return f"continuous time, σ from {math.exp(low / 2):.4g} to {math.exp(high / 2):.4g}"
            return f"continuous time, {learned}γ from {low:g} to {high:g}"
        case "table" | "alpha_sigma":
            named, steps = "own table", len(schedule["betas" if name == "table" else "alpha"])
        case _:
            named, steps = name, schedule["num_timesteps"]
    zero = " with zero terminal SNR" if schedule.get("zero_terminal_snr") else ""
    return f"{named} T = {steps:,}{zero}"
