"""What the numbers of an evaluation are called: in its manifest, by a person, in MLflow.

The names in `Evaluation.summary["means"]` are made of parts with dots between them: what it is, then the bound as
`ddpm_core.likelihood.bounds` names it (`beta_tilde`, `steps_50.beta_tilde`, `continuous`, `steps_50`, each also with
`given_label` before it), then `clipped`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ddpm_core.likelihood import GIVEN_LABEL, untold_name

BASELINES = {
    "png": "PNG file",
    "webp": "WebP file, lossless",
    "histogram": "independent pixels (histogram of the training images)",
}
_SIGMA2 = {"beta": "β", "beta_tilde": "β̃", "learned": "learned", "optimal": "optimal"}
_DECODERS = {"gaussian": "discretised Gaussian", "softmax": "softmax decoder"}
# How the likelihood of the ODE makes densities of levels.
_FLOWS = {"gaussian": "uniform dequantisation", "softmax": "softmax decoder"}
_WHAT = {
    "bits_per_dim": "bits/dim",
    "label_tells": "bits/dim that the label tells",
    "L_T": "L_T",
    "L_0": "L_0",
    "L_t_sum": "sum of the L_{t-1}",
}
# The bits/dim of the bound that is asked for, by one name for models of every kind: of -log2 p(x), of -log2 p(x | c).
BOUND_METRIC, GIVEN_LABEL_METRIC = "bpd/bound", "bpd/given_label"


def label_of(name: str, summary: Mapping[str, Any]) -> str:
    """What a person calls a number of `summary["means"]`: a bound by its variances, T and decoder.

    `summary["bound"]` has T (null: continuous time) and the decoder; in evaluations of before there is none.
    `summary["labels"]` is there of a model that was trained with labels.

    >>> label_of("bits_per_dim.beta_tilde.clipped", {"bound": {"num_timesteps": 1000, "decoder": "gaussian"}})
    'bits/dim, σ² = β̃, T = 1,000, discretised Gaussian, x̂₀ clipped'
    >>> label_of("bits_per_dim.steps_50.beta_tilde", {"bound": {"num_timesteps": 1000, "decoder": "gaussian"}})
    'bits/dim, σ² = β̃, T = 50, discretised Gaussian of T = 1,000'
    >>> label_of("bits_per_dim.beta_tilde", {})
    'bits/dim, σ² = β̃'
    >>> vdm = {"bound": {"num_timesteps": None, "decoder": "softmax"}}
    >>> [label_of(name, vdm) for name in ("bits_per_dim.continuous", "bits_per_dim.steps_50")]
    ['bits/dim, continuous time, softmax decoder', 'bits/dim, T = 50, softmax decoder']
    >>> both = {"labels": "both", "label_names": ["cat", "dog"]}
    >>> label_of("bits_per_dim.given_label.continuous", both), label_of("bits_per_dim.continuous", both)
    ('bits/dim given the label, continuous time', 'bits/dim of the null class, continuous time')
    >>> label_of("label_tells.continuous", both), label_of("by_label.1.bits_per_dim.given_label.continuous", both)
    ('bits/dim that the label tells, continuous time', 'label dog, bits/dim given the label, continuous time')
    """
    what, *rest = name.split(".")
    if what == "bits_per_dim" and rest[0] in BASELINES:
        return f"bits/dim of {BASELINES[rest[0]]}"
    bound = summary.get("bound", {})
    if what == "ode":
        of_what = f", {_FLOWS[bound['decoder']]}" if bound and rest[0] == "bits_per_dim" else ""
        told = " given the label" if "given_label" in rest else ""
        return f"ODE {_WHAT.get(rest[0], rest[0].replace('_', ' '))}{told}{of_what}"
    if what == "by_label":
        return f"{label_name(rest[0], summary)}, {label_of('.'.join(rest[1:]), summary)}"
    own = bound.get("num_timesteps")
    steps = next((int(part.removeprefix("steps_")) for part in rest if part.startswith("steps_")), own)
    words = ["diffusion term" if what == "L_t_sum" and "continuous" in rest else _WHAT[what]]
    if what == "bits_per_dim" and summary.get("labels"):
        words[0] += " given the label" if "given_label" in rest else " of the null class"
    words += [f"σ² = {_SIGMA2[part]}" for part in rest if part in _SIGMA2]
    if what in ("bits_per_dim", "label_tells", "L_t_sum"):
        words += ["continuous time"] if "continuous" in rest else [f"T = {steps:,}"] if steps else []
    if what in ("bits_per_dim", "label_tells", "L_0") and bound:
        # the softmax decoder knows gamma_0 alone, the Gaussian the step before
        of_another = f" of T = {own:,}" if bound["decoder"] == "gaussian" and steps != own else ""
        words.append(_DECODERS[bound["decoder"]] + of_another)
    return ", ".join([*words, *(["x̂₀ clipped"] if "clipped" in rest else [])])


def label_name(label: str, summary: Mapping[str, Any]) -> str:
    """What a person calls a label, by its number and the names in `summary`.

    >>> [label_name(label, {"label_names": ["cat", "dog"]}) for label in ("1", "2", "-1")]
    ['label dog', 'label 2', 'no label']
    """
    names = summary.get("label_names") or []
    return "no label" if label == "-1" else f"label {names[int(label)] if int(label) < len(names) else label}"


def metric_of(name: str, bound: str, label_names: Sequence[str] = ()) -> str:
    """The metric in MLflow that is a mean of `Evaluation.summary`, of an evaluation whose headline is `bound`.

    MLflow puts metrics in the order of their names, and on a narrow page cuts the titles of their charts after seven
    characters: what tells one from the others comes early, and the headline's name is the first of all.

    >>> metric_of("bits_per_dim.beta", "beta"), metric_of("bits_per_dim.beta", "beta_tilde")
    ('bits_per_dim/beta', 'bpd/beta')
    >>> metric_of("bits_per_dim.steps_50.beta_tilde", "beta"), metric_of("L_0.beta", "beta")
    ('bpd/50_steps', 'terms/decoder')
    >>> metric_of("L_0.beta.clipped", "beta"), metric_of("by_label.7.bits_per_dim.beta", "beta")
    ('clip/decoder', 'label/7')
    >>> metric_of("bits_per_dim.steps_50.optimal", "steps_50.beta")
    'bpd/optimal'
    >>> metric_of("bits_per_dim.steps_1000", "continuous")
    'bpd/1k_steps'
    >>> told = "given_label.continuous"
    >>> [metric_of(f"bits_per_dim.{name}", told) for name in (told, "continuous", "given_label.steps_50", "png")]
    ['bits_per_dim/given_label.continuous', 'bpd/bound', 'bpd/50_steps_given_label', 'bpd/png']
    >>> metric_of("label_tells.continuous", told), metric_of(f"by_label.1.L_0.{told}", told, ["Bag", "T-shirt/top"])
    ('tells/bpd', 'label/1_T-shirt_top')
    >>> metric_of("ode.bits_per_dim", "continuous"), metric_of("ode.bits_per_dim.given_label", told)
    ('ode/bits_per_dim', 'ode/bits_per_dim_given_label')
    """
    what, *rest = name.split(".")
    if name == f"bits_per_dim.{bound}":
        return f"bits_per_dim/{bound}"
    if what == "ode":
        return "ode/" + "_".join(rest)
    if what == "by_label":
        word = re.sub(r"[^\w .-]", "_", label_names[int(rest[0])]) if 0 <= int(rest[0]) < len(label_names) else ""
        return f"label/{rest[0]}" + (f"_{word}" if word and word != rest[0] else "")
    if what == "label_tells":
        return "tells/bpd"
    if what == "bits_per_dim" and GIVEN_LABEL + ".".join(rest) == bound:
        return BOUND_METRIC
    told = "_given_label" if "given_label" in rest else ""
    rest, bound = [part for part in rest if part != "given_label"], untold_name(bound)
    term = {"L_T": "prior", "L_t_sum": "kl_sum", "L_0": "decoder", "bits_per_dim": "bpd"}[what]
    if rest[-1:] == ["clipped"]:
        return f"clip/{term}"
    if what != "bits_per_dim":
        return f"terms/{term}"
    steps = re.fullmatch(r"steps_(\d+)", rest[0])
    if steps and not bound.startswith(f"{rest[0]}."):
        return f"bpd/{steps[1].removesuffix('000') + 'k' if steps[1].endswith('000') else steps[1]}_steps{told}"
    return f"bpd/{rest[-1]}{told}"
