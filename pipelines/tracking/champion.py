"""Who is champion: the version of a registered model that `models:/NAME@champion` stands for, and when that changes.

The first version of a name is champion at once. A later one takes over when it is better beyond doubt: by the
validation at the end of its training (`settle_champion`), or by an evaluation on the same data (`promote_if_better`).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ddpm_core.likelihood import GIVEN_LABEL, untold_name
from pipelines.cli.errors import TrackingError
from pipelines.tracking.client import mlflow_client, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

MODEL_ID_TAG = "ddpm.model_id"
CHAMPION = "champion"
DECISION_TAG = "ddpm.champion"
IMAGES_METRIC = "eval/num_images"
_ONE_DRAW = "promote: one draw tells no Monte-Carlo error; evaluate both with more --draws"
_SHA256 = re.compile(r"^(\w{12})\w+")  # of which a person is shown the beginning
# The bound of each kind of model where its user asks for no other: variances given, variances learned, continuous time.
_OF_ITS_KIND = frozenset({"beta_tilde", "learned", "continuous"})
_Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point


def comparable(bound: str, other: str) -> bool:
    """Whether models may be compared by these bounds, which are named as in `ddpm_core.likelihood.bounds`.

    By one bound always. By two only where each is that of its kind: then no bound serves both models, a table of betas
    having no continuous time and a VDM no beta. Every bound is, decoder and prior included, an upper bound of -log2 p
    of the same 8-bit images, so the lower one is of the model that codes them in fewer bits. Variances and numbers of
    steps that somebody chose are about that choice, and compete with none but themselves. A bound given the label is
    one of -log2 p(x | c), to which no bound of -log2 p(x) compares.

    >>> comparable("steps_50.beta_tilde", "steps_50.beta_tilde"), comparable("continuous", "beta_tilde")
    (True, True)
    >>> comparable("beta", "beta_tilde"), comparable("continuous", "steps_50")
    (False, False)
    >>> comparable("given_label.continuous", "given_label.learned"), comparable("given_label.continuous", "continuous")
    (True, False)
    """
    if bound.startswith(GIVEN_LABEL) != other.startswith(GIVEN_LABEL):
        return False
    bound, other = untold_name(bound), untold_name(other)
    return bound == other or {bound, other} <= _OF_ITS_KIND


def told(bound: str) -> str:
    """A bound's name as part of a sentence.

    >>> told("beta_tilde"), told("continuous"), told("steps_50.beta_tilde"), told("steps_50")
    ('σ² = beta_tilde', 'continuous time', '50 steps, σ² = beta_tilde', '50 steps')
    >>> told("given_label.continuous")
    'given the label, continuous time'
    """
    words = {"continuous": "continuous time", "given_label": "given the label"}
    return ", ".join(
        words.get(part) or (f"{part.removeprefix('steps_')} steps" if part.startswith("steps_") else f"σ² = {part}")
        for part in bound.split(".")
    )


@dataclass(frozen=True)
class Validation:
    """What a training measured of its last model: mean bits/dim of `num_images` images, the first of the data set.

    `standard_error` is over images; None when there is one image, which tells none. `sigma2` names the bound.
    """

    bits_per_dim: float
    standard_error: float | None
    num_images: int
    sigma2: str
    dataset_id: str

    @classmethod
    def of_result(cls, scores: Mapping[str, Any] | None) -> Self | None:
        """From `validation` of a training's result; None without one, or if it does not say of which data set."""
        if not scores or not scores.get("dataset_id"):
            return None
        error = scores["standard_error"]
        error = None if error is None or not math.isfinite(error) else float(error)
        return cls(scores["total"], error, scores["num_images"], scores["sigma2"], scores["dataset_id"])

    @classmethod
    def of_tags(cls, tags: Mapping[str, str]) -> Self | None:
        """From the tags of a registered version; None for one registered without."""
        try:
            error = tags.get("validation.standard_error")
            return cls(
                float(tags["validation.bits_per_dim"]),
                None if error is None else float(error),
                int(tags["validation.num_images"]),
                tags["validation.sigma2"],
                tags["validation.dataset_id"],
            )
        except (KeyError, ValueError):
            return None

    @property
    def tags(self) -> dict[str, str]:
        """Of the registered version, as `of_tags` reads them."""
        return {f"validation.{name}": str(value) for name, value in vars(self).items() if value is not None}

    @property
    def half_width(self) -> float:
        """Of the 95% interval; infinite when the error is not known."""
        return math.inf if self.standard_error is None else _Z_95 * self.standard_error

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.bits_per_dim:.4f}{error} bits/dim ({self.num_images} validation images, {told(self.sigma2)})"


def settle_champion(client: "MlflowClient", version: "ModelVersion") -> str:
    """Give a new version the alias `champion` if there is no champion, or if its validation is better than that one's.

    Better means that the 95% intervals do not touch, both on the same images by bounds that are `comparable`. It is
    decided once for a version: the tag `ddpm.champion` keeps what was decided and why, and whoever moves the alias
    afterwards has the last word.

    Returns:
        Which version is champion and why, for a person.
    """
    name, number = version.name, str(version.version)
    holder = client.get_registered_model(name).aliases.get(CHAMPION)
    if DECISION_TAG in version.tags:
        return f"version {holder}" if holder else "none, the alias was taken away"
    if holder is None:
        better, decision = True, f"version {number}: the first of {name}"
    elif str(holder) == number:  # by an attempt that was killed before it was noted
        better, decision = True, f"now version {number}"
    else:
        better, why = _is_better(version, client.get_model_version(name, str(holder)))
        decision = f"now version {number}, was {holder}: {why}" if better else f"stays version {holder}: {why}"
    if better:
        client.set_registered_model_alias(name, CHAMPION, number)
    _note(client, version, decision)
    return decision


def _note(client: "MlflowClient", version: "ModelVersion", decision: str) -> None:
    """Keep in the version's description, and last in its tag, what was decided of it."""
    measured = str(version.description).split(". Champion: ")[0]
    client.update_model_version(version.name, str(version.version), description=f"{measured}. Champion: {decision}")
    client.set_model_version_tag(version.name, str(version.version), DECISION_TAG, decision)


def _is_better(version: "ModelVersion", holder: "ModelVersion") -> tuple[bool, str]:
    mine, its = Validation.of_tags(version.tags), Validation.of_tags(holder.tags)
    evaluate = "compare them with jobs/evaluate.py --promote"
    for found, which in ((mine, version.version), (its, holder.version)):
        if found is None:
            return False, f"version {which} has no validation on record; {evaluate}"
        if found.standard_error is None:
            return False, f"one validation image tells no error of version {which}; {evaluate}"
    assert mine is not None
    assert its is not None
    for what in ("dataset_id", "num_images", "sigma2"):
        a, b = getattr(mine, what), getattr(its, what)
        if not (comparable(a, b) if what == "sigma2" else a == b):
            a, b = (_SHA256.sub(r"\1", str(value)) for value in (a, b))
            return False, f"validated differently, {what} {b} and {a} for version {version.version}; {evaluate}"
    a, b = (f"{found.bits_per_dim:.4f} ± {found.half_width:.4f}" for found in (mine, its))
    if mine.bits_per_dim + mine.half_width < its.bits_per_dim - its.half_width:
        bounds = "" if mine.sigma2 == its.sigma2 else f", bounds {mine.sigma2} and {its.sigma2}"
        return True, f"{a} bits/dim is below its {b} (95%, the same {mine.num_images} validation images{bounds})"
    return False, f"{a} bits/dim of version {version.version} is not clearly below its {b} (95%); {evaluate}"


@dataclass(frozen=True)
class _Contest:
    """A registered version and the champion of its name; `metrics` are the champion's evaluation by `bound`, None where
    there is nothing to compare: no champion, or the version is it already."""

    client: "MlflowClient"
    mine: "ModelVersion"
    holder: "ModelVersion | None"
    metrics: Mapping[str, float] | None
    bound: str

    def kind(self, num_images: int | None) -> str:
        """Which intervals are compared, if `num_images` are evaluated."""
        return "given_images" if self.metrics and self.metrics.get(IMAGES_METRIC) == num_images else "data_set"

    def interval(self, kind: str) -> tuple[float, float] | None:
        """The champion's."""
        return _interval(self.metrics or {}, kind, self.bound)


def check_promotable(
    tracking_uri: str,
    name: str,
    experiment: str,
    model_id: str,
    dataset_id: str,
    num_images: int | None,
    bound: str,
    draws_known: bool,
) -> None:
    """Refuse, before anything is computed, a promotion that is bound to fail after it.

    Args:
        tracking_uri: Of MLflow.
        name: Registered name of the model.
        experiment: Name of the MLflow experiment with the measurements of the champion.
        model_id: Hash of the model.
        dataset_id: Content hash of the data set.
        num_images: How many of its images will be evaluated; None if that is decided on the way.
        bound: Name of the bound that is compared.
        draws_known: Whether the evaluation will tell its Monte-Carlo error.

    Raises:
        TrackingError: As of `promote_if_better`.
    """
    contest = _contest(tracking_uri, name, experiment, model_id, dataset_id, bound)
    kind = contest.kind(num_images)
    known = draws_known and contest.interval(kind) is not None
    if contest.metrics is not None and kind == "given_images" and not known:
        raise TrackingError(_ONE_DRAW)


def promote_if_better(
    tracking_uri: str,
    name: str,
    experiment: str,
    model_id: str,
    dataset_id: str,
    num_images: int,
    bound: str,
    intervals: Mapping[str, Sequence[float] | None],
) -> str:
    """Give the registered version of `model_id` the alias `champion` if its 95% interval is below the champion's.

    The champion's is that of its newest finished evaluation on the same data set by the same bound or, where it has
    none, by another one that is `comparable`. If both have scored the same images, which equal numbers of the fixed
    order are, the intervals for given images are compared: the choice of images is common to both. Otherwise those for
    the data set.

    Args:
        tracking_uri: Of MLflow.
        name: Registered name of the model.
        experiment: Name of the MLflow experiment with the measurements of the champion.
        model_id: Hash of the model.
        dataset_id: Content hash of the data set.
        num_images: How many of its images were evaluated.
        bound: Name of the bound that is compared.
        intervals: Of the model: `given_images` and `data_set`, (low, high).

    Returns:
        What was done and why, for a person.

    Raises:
        TrackingError: The model is not registered, it or the champion has no such interval, or MLflow does not answer.
    """
    contest = _contest(tracking_uri, name, experiment, model_id, dataset_id, bound)
    mine, holder = contest.mine, contest.holder
    if holder is not None and contest.metrics is None:
        return f"version {holder.version} is the champion already"
    if holder is not None:
        kind = contest.kind(num_images)
        interval, its = intervals[kind], contest.interval(kind)
        if interval is None or its is None:
            raise TrackingError(_ONE_DRAW)
        if not interval[1] < its[0]:
            mine_shown, other = (f"{low:.4f}..{high:.4f}" for low, high in (interval, its))
            return f"stays version {holder.version}: {mine_shown} is not below its {other}"
    decision = f"now version {mine.version}" + (f", was {holder.version}" if holder else "")
    bounds = "" if contest.bound == bound else f", bounds {bound} and {contest.bound}"
    with _mlflow_errors():
        contest.client.set_registered_model_alias(name, CHAMPION, str(mine.version))
        _note(contest.client, mine, f"{decision}: by an evaluation on data set {dataset_id[:12]}{bounds}")
    return decision


def _contest(tracking_uri: str, name: str, experiment: str, model_id: str, dataset_id: str, bound: str) -> _Contest:
    client = mlflow_client(tracking_uri)
    with _mlflow_errors():
        newest, holder = _version_and_holder(client, name, model_id)
        if holder is None or holder.tags.get(MODEL_ID_TAG) == model_id:
            return _Contest(client, newest, holder, None, bound)
        found, metrics = _measured(client, name, experiment, holder.tags.get(MODEL_ID_TAG, ""), dataset_id, bound)
        return _Contest(client, newest, holder, metrics, found)


def _version_and_holder(client: "MlflowClient", name: str, model_id: str) -> "tuple[ModelVersion, ModelVersion | None]":
    """The newest registered version that is a model, and the champion of its name."""
    versions = client.search_model_versions(f"name='{name}'")
    mine = [version for version in versions if version.tags.get(MODEL_ID_TAG) == model_id]
    if not mine:
        raise TrackingError(f"promote: no version of {name!r} in MLflow is the model {model_id[:12]}; register it")
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    holder = next((version for version in versions if str(version.version) == str(champion)), None)
    return max(mine, key=lambda version: int(version.version)), holder


@contextmanager
def _mlflow_errors() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise TrackingError(f"promote: MLflow does not answer as needed ({reason(error)}); run it again") from error


def interval_metrics(kind: str, bound: str) -> tuple[str, str]:
    """Names of the two metrics that are the ends of a 95% interval of bits/dim, of the bound that is so named."""
    return f"low/{kind}.{bound}", f"high/{kind}.{bound}"


def _interval(metrics: Mapping[str, float], kind: str, bound: str) -> tuple[float, float] | None:
    former = f"eval_ci/{kind}.{bound}.low", f"eval_ci/{kind}.{bound}.high"  # in evaluations of version 0.1
    for low, high in (interval_metrics(kind, bound), former):
        if low in metrics and high in metrics:
            return metrics[low], metrics[high]
    return None


def _measured(
    client: "MlflowClient", name: str, experiment: str, model_id: str, dataset_id: str, bound: str
) -> tuple[str, Mapping[str, float]]:
    """The metrics of the newest finished evaluation of a model on a data set by this bound, or else by a `comparable`
    one; and that one's name."""
    runs = _search(
        client,
        experiment,
        f"tags.`{MODEL_ID_TAG}` = '{model_id}' AND tags.`ddpm.dataset_id` = '{dataset_id}' "
        "AND attributes.status = 'FINISHED'",
    )
    usual = [prefix + other for other in sorted(_OF_ITS_KIND) for prefix in ("", GIVEN_LABEL)]
    others = [other for other in usual if other != bound and comparable(bound, other)]
    for wanted in ([bound], others):
        for run in runs:
            for found in wanted:
                if _interval(run.data.metrics, "population", found) is not None:
                    return found, run.data.metrics
    kind = " (with sigma2 auto, should it be a model of another kind)" if others else ""
    raise TrackingError(
        f"promote: the champion of {name!r} has no evaluation on data set {dataset_id[:12]} with {told(bound)}; "
        f"evaluate models:/{name}@{CHAMPION} the same way first{kind}"
    )


def promote_by_metric(
    tracking_uri: str,
    name: str,
    experiment: str,
    model_id: str,
    metrics: tuple[str, str],
    interval: tuple[float, float] | None,
) -> str:
    """Give the registered version of `model_id` the alias `champion` if its interval of a number of which less is
    better is below the champion's, that of its newest finished comparison with the same `metrics`.

    Args:
        tracking_uri: Of MLflow.
        name: Registered name of the model.
        experiment: Name of the MLflow experiment with the measurements of the champion.
        model_id: Hash of the model.
        metrics: Names of the metrics that are the two ends of the interval; they say how it was measured.
        interval: (low, high); None only asks whether there will be something to compare with.

    Returns:
        What was done and why, for a person.

    Raises:
        TrackingError: The model is not registered, the champion has no such interval, or MLflow does not answer.
    """
    client = mlflow_client(tracking_uri)
    with _mlflow_errors():
        mine, holder = _version_and_holder(client, name, model_id)
        if holder is not None and holder.tags.get(MODEL_ID_TAG) == model_id:
            return f"version {holder.version} is the champion already"
        its = None if holder is None else _ends(client, name, experiment, holder.tags.get(MODEL_ID_TAG, ""), metrics)
        if interval is None:
            return ""
        if holder is not None and its is not None and not interval[1] < its[0]:
            shown, other = (f"{low:.4g}..{high:.4g}" for low, high in (interval, its))
            return f"stays version {holder.version}: {shown} is not below its {other}"
        decision = f"now version {mine.version}" + (f", was {holder.version}" if holder else "")
        client.set_registered_model_alias(name, CHAMPION, str(mine.version))
        _note(client, mine, f"{decision}: by {metrics[0].removeprefix('low/')}")
    return decision


def _search(client: "MlflowClient", experiment: str, criteria: str) -> "Sequence[Run]":
    """Runs of the experiment of this name, the newest first; none where there is no such experiment."""
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id], criteria, order_by=["attributes.start_time DESC"]) if found else []


def _ends(
    client: "MlflowClient", name: str, experiment: str, model_id: str, metrics: tuple[str, str]
) -> tuple[float, float]:
    runs = _search(client, experiment, f"tags.`{MODEL_ID_TAG}` = '{model_id}' AND attributes.status = 'FINISHED'")
    for run in runs:
        if all(metric in run.data.metrics for metric in metrics):
            return run.data.metrics[metrics[0]], run.data.metrics[metrics[1]]
    raise TrackingError(
        f"promote: the champion of {name!r} has no {metrics[0].removeprefix('low/')}; compare samples of "
        f"models:/{name}@{CHAMPION} in the same way first (jobs/quality.py)"
    )
