"""What each kind of spooled record becomes in MLflow; every write may be repeated without harm."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pipelines.storage.location import Location
from pipelines.tracking.registry import find_logged_model, register_model
from pipelines.tracking.spool import Record, SpoolState

if TYPE_CHECKING:
    from mlflow import MlflowClient

ATTEMPT_TAG = "ddpm.attempt"
# Limits of the server.
METRICS_PER_REQUEST, PARAMS_PER_REQUEST, TAGS_PER_REQUEST = 1000, 100, 100
MAX_NOTE_LENGTH, MAX_PARAM_LENGTH, MAX_DIGEST_LENGTH = 8000, 6000, 36

# Names of metrics in runs that were begun before they were changed: MLflow shows metrics in the order of their names,
# and loss and validation now come first. Such a run keeps its own, so that a curve is one.
_FORMER_NAMES = {
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "epoch": "train/epoch",
    **{
        name: f"perf/{name}"
        for name in ("images_per_second", "data_wait_seconds", "data_wait_fraction", "workers", "eta_seconds")
    },
    **{
        f"validation/{sigma2}/terms/{name}": f"validation/{sigma2}/{former}"
        for sigma2 in ("beta", "beta_tilde")
        for name, former in (("prior", "L_T"), ("kl_sum", "L_t_sum"), ("decoder", "L_0"))
    },
}

Item = TypeVar("Item")


class RecordWriter:
    """Writes records to the run that `state` names; `state` learns the steps that were written, and who is champion.

    `notify` is called with one line about something a person should know.
    """

    def __init__(self, client: "MlflowClient", state: SpoolState, notify: Callable[[str], None]) -> None:
        self._client, self._state, self._notify = client, state, notify

    @property
    def _run_id(self) -> str:
        return str(self._state.run_id)

    def write(self, record: Record) -> None:
        """Write one record of any kind; raises what MLflow, the storage or a malformed payload raises."""
        if record.kind == "metrics":
            self.metrics([record])
        else:
            getattr(self, f"_{record.kind}")(record)

    def metrics(self, records: Sequence[Record]) -> None:
        """Write `metrics` records in as few requests as the server allows.

        A step that the run already has is left out: a resumed job reports some steps again, and the curve
        shows each once, with the time at which it was first reported.
        """
        from mlflow.entities import Metric

        last_step = dict(self._state.last_step)
        points: list[Metric] = []
        for record in records:
            step = int(record.payload["step"])
            for name, value in record.payload["values"].items():
                key = _name_in(self._state.last_step, name)
                if value is not None and step > last_step.get(key, -1):
                    points.append(Metric(key, float(value), record.timestamp_ms, step))
                    last_step[key] = step
        for chunk in _chunks(points, METRICS_PER_REQUEST):
            self._client.log_batch(self._run_id, metrics=chunk)
        self._state.last_step = last_step

    def _event(self, record: Record) -> None:
        """Events and fatal errors are for the job's own display."""

    _fatal = _event

    def _start(self, record: Record) -> None:
        self._client.update_run(self._run_id, status="RUNNING")
        self._client.set_tag(self._run_id, ATTEMPT_TAG, str(self._state.attempts + 1))
        self._state.attempts += 1

    def _finish(self, record: Record) -> None:
        self._client.set_terminated(self._run_id, record.payload["status"], record.timestamp_ms)

    def _params(self, record: Record) -> None:
        """Parameters are immutable in MLflow: one that a later attempt changed becomes a tag."""
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        new, changed = [], {}
        for key, value in record.payload["values"].items():
            text = str(value)[:MAX_PARAM_LENGTH]
            if key not in known:
                new.append(Param(key, text))
            elif known[key] != text:
                changed[f"ddpm.changed.{key}"] = text
        for chunk in _chunks(new, PARAMS_PER_REQUEST):
            self._client.log_batch(self._run_id, params=chunk)
        self._set_tags(changed)

    def _tags(self, record: Record) -> None:
        self._set_tags(record.payload["values"])

    def _set_tags(self, values: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        for chunk in _chunks([RunTag(key, str(value)) for key, value in values.items()], TAGS_PER_REQUEST):
            self._client.log_batch(self._run_id, tags=chunk)

    def _note(self, record: Record) -> None:
        # A picture in the description is an artifact of this run, whose id only MLflow knows.
        text = record.payload["markdown"].replace("{run_id}", self._run_id)[:MAX_NOTE_LENGTH]
        self._client.set_tag(self._run_id, "mlflow.note.content", text)

    def _artifact(self, record: Record) -> None:
        with local_copy(record.payload["path"]) as path:
            upload = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            upload(self._run_id, str(path), record.payload.get("artifact_path"))

    def _image(self, record: Record) -> None:
        """One image per key and step: MLflow names the file after both and shows them as a slider."""
        from PIL import Image

        key, step = record.payload["key"], int(record.payload["step"])
        prefix = f"images/{key.replace('/', '~')}+step+{step}+"
        present = (file.path for file in self._client.list_artifacts(self._run_id, "images"))
        if any(path.startswith(prefix) and path.endswith(".webp") for path in present):
            return
        with local_copy(record.payload["path"]) as path, Image.open(path) as image:
            image.load()
            self._client.log_image(self._run_id, image, key=key, step=step, timestamp=record.timestamp_ms)

    def _dataset(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        payload = record.payload
        scheme = urlsplit(payload["uri"]).scheme or "local"
        source = json.dumps({"uri": payload["uri"]})
        dataset = Dataset(payload["name"], payload["digest"][:MAX_DIGEST_LENGTH], scheme, source)
        context = InputTag("mlflow.data.context", payload["context"])
        self._client.log_inputs(self._run_id, [DatasetInput(dataset, [context])])

    def _model(self, record: Record) -> None:
        from mlflow.entities import Metric

        payload, step = record.payload, int(record.payload["step"])
        with local_copy(payload["uri"]) as directory:
            experiment_id = str(self._state.experiment_id)
            model_id, champion = register_model(self._client, self._run_id, experiment_id, payload, directory)
        self._state.champion = champion
        self._notify(f"champion of {payload['name']}: {champion}")
        dataset = payload.get("dataset") or {}
        digest = dataset.get("digest", "")[:MAX_DIGEST_LENGTH] or None
        points = []
        for key, value in (payload.get("metrics") or {}).items():
            timestamp = self._timestamp(key, step, float(value)) or record.timestamp_ms
            points.append(Metric(key, float(value), timestamp, step, model_id, dataset.get("name"), digest))
            self._state.last_step[key] = max(step, self._state.last_step.get(key, -1))
        if points:
            self._client.log_batch(self._run_id, metrics=points)

    def _evaluated(self, record: Record) -> None:
        """Scores of a model that another run made: linked to the model and the data set, and a point, at the model's
        training step, on the curve of the run that trained it. A model that this server does not know gets neither.
        """
        from mlflow.entities import LoggedModelInput, Metric

        payload = record.payload
        model = find_logged_model(self._client, payload["model_id"])
        if model is None:
            return
        inputs = self._client.get_run(self._run_id).inputs
        if model.model_id not in {found.model_id for found in (inputs.model_inputs if inputs else [])}:
            self._client.log_inputs(self._run_id, models=[LoggedModelInput(model.model_id)])
        dataset = payload["dataset"]
        for key, value in payload["values"].items():
            linked = (model.model_id, dataset["name"], dataset["digest"][:MAX_DIGEST_LENGTH])
            known = self._client.get_metric_history(self._run_id, key)
            timestamp = known[0].timestamp if known else record.timestamp_ms
            self._client.log_batch(self._run_id, metrics=[Metric(key, float(value), timestamp, 0, *linked)])
            if model.source_run_id:
                point = Metric(key, float(value), record.timestamp_ms, int(payload["step"]))
                self._client.log_batch(model.source_run_id, metrics=[point])

    def _timestamp(self, key: str, step: int, value: float) -> int | None:
        """When the run got this very point, so that linking it to a model does not double it in the curve."""
        if step > self._state.last_step.get(key, -1):
            return None
        history = self._client.get_metric_history(self._run_id, key)
        same = (int(point.timestamp) for point in history if point.step == step and point.value == value)
        return next(same, None)


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path with the content of `uri`: itself if it is local, a temporary copy otherwise.

    Raises FileNotFoundError when nothing is there, and StorageError when it cannot be read.
    """
    location = Location.parse(uri)
    if not location.exists():
        raise FileNotFoundError(f"{uri}: does not exist any more")
    if location.is_local:
        yield Path(location.path)
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-tracking-") as scratch:
        target = Path(scratch) / location.name
        if location.list():
            location.download_directory(target)
        else:
            target.write_bytes(location.read_bytes())
        yield target


def _name_in(known: Mapping[str, int], name: str) -> str:
    """The name under which a run that has the metrics `known` goes on with a metric."""
    former = _FORMER_NAMES.get(name, name)
    return former if former in known else name


def _chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
