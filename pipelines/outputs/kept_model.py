"""Checking the model that an output keeps."""

from ddpm_core.kind import kind_of
from ddpm_core.model import model_from_bytes
from pipelines.cli.errors import DDPMError
from pipelines.models.kept import stored_model
from pipelines.outputs.kind import Findings, Manifest
from pipelines.storage.location import Location


def check_model(location: Location, model_id: str, manifest: Manifest, found: Findings) -> list[tuple[str, str]]:
    """Whether the model that the output keeps is the request's `model_id`; rows that say where it came from."""
    lineage = manifest["lineage"]
    data = lineage["dataset"] or {}
    return [
        ("model", check_kept(location / "model", model_id, manifest["model"]["uri"], lineage["step"], found)),
        ("trained on", f"data set {data.get('id')} ({data.get('uri')})"),
        ("code", f"{manifest['code_version']}; the model was trained by {lineage['code_version']}"),
    ]


def check_kept(directory: Location, model_id: str, uri: str, step: int | None, found: Findings) -> str:
    """Whether `directory` holds the model `model_id`; says what it is, and the `uri` and training `step` it came of."""
    kind = ""
    try:
        stored = stored_model(directory)
        stored_id = stored.model_id if stored else "missing"
    except DDPMError as error:
        stored, stored_id = None, str(error)
    if stored is None or stored_id != model_id:
        found.problems.append(f"{directory}: is not the model {model_id[:12]} of the request ({stored_id})")
    else:
        try:
            kind = f", {kind_of(model_from_bytes(stored.files, where=str(directory)).config)}"
        except DDPMError as error:
            found.problems.append(str(error))
    return f"{model_id} ({uri}, step {step}){kind}"
