"""What `kubectl kustomize` makes of a directory, where there is no kubectl: as much of it as deploy/ uses."""

import json
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
_Objects = dict[tuple[str, str], Manifest]
_KNOWN = {"apiVersion", "kind", "resources", "components", "configMapGenerator", "patches", "replacements", "images"}
_LOCAL = "config.kubernetes.io/local-config"


def render(directory: Path) -> list[Manifest]:
    """The objects, without the suffixes that Kustomize gives to the names of config maps.

    Raises:
        AssertionError, LookupError, FileNotFoundError: It refers to what is not there.
    """
    objects: _Objects = {}
    _build(directory, objects)
    return [made for made in objects.values() if _LOCAL not in made["metadata"].get("annotations", {})]


def load(path: Path) -> list[Manifest]:
    """The documents of a file; what YAML's aliases share is copied."""
    return json.loads(json.dumps(list(yaml.safe_load_all(path.read_text()))))


def containers(value: Any) -> list[Manifest]:
    """Every container, at any depth."""
    if isinstance(value, list):
        return [found for item in value for found in containers(item)]
    if not isinstance(value, dict):
        return []
    return value.get("containers", []) + [found for item in value.values() for found in containers(item)]


def _build(directory: Path, objects: _Objects) -> None:
    (content,) = load(directory / "kustomization.yaml")
    assert set(content) <= _KNOWN, f"{directory}: this renderer does not know {set(content) - _KNOWN}"
    for resource in content.get("resources", []):
        made: _Objects = {}
        if (directory / resource).is_dir():
            _build(directory / resource, made)
        else:
            made = {
                (document["kind"], document["metadata"]["name"]): document for document in load(directory / resource)
            }
        assert not set(made) & set(objects), f"{directory}: {resource} is there already"
        objects |= made
    for component in content.get("components", []):
        _build(directory / component, objects)
    for generator in content.get("configMapGenerator", []):
        _generate(generator, objects)
    for patch in content.get("patches", []):
        for made in _selected(objects, patch["target"]):
            for operation in yaml.safe_load(patch["patch"]):
                assert operation["op"] == "add"
                _add(made, operation["path"], operation["value"])
    for image in content.get("images", []):
        found = [one for one in containers(list(objects.values())) if one["image"].rpartition(":")[0] == image["name"]]
        assert found, f"{directory}: no container has the image {image['name']}"
        for container in found:
            container["image"] = f"{image['newName']}:{image['newTag']}"
    for replacement in content.get("replacements", []):
        _replace(replacement, objects)


def _generate(generator: Manifest, objects: _Objects) -> None:
    key = "ConfigMap", generator["name"]
    assert (key in objects) == (generator.get("behavior") == "merge"), f"{key}: there, or not there, already"
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": {}}
    data = objects.setdefault(key, made)["data"]
    data |= dict(literal.split("=", 1) for literal in generator["literals"])


def _selected(objects: _Objects, selector: Manifest) -> list[Manifest]:
    found = [
        made
        for (kind, name), made in objects.items()
        if kind == selector["kind"] and selector.get("name", name) == name
    ]
    assert found, f"{selector}: hits nothing"
    return found


def _add(made: Any, path: str, value: Any) -> None:
    *parents, last = path.split("/")[1:]
    place = _at(made, parents)
    if isinstance(place, list):
        assert last == "-"
        place.append(value)
    else:
        assert last not in place, f"{path}: is there already"
        place[last] = value


def _replace(replacement: Manifest, objects: _Objects) -> None:
    (source,) = _selected(objects, replacement["source"])
    value = _at(source, replacement["source"]["fieldPath"].split("."))
    for target in replacement["targets"]:
        for made in _selected(objects, target["select"]):
            for path in target["fieldPaths"]:
                *parents, last = path.split(".")
                place = _at(made, parents)
                assert last in place or target.get("options", {}).get("create"), f"{path}: is not there"
                place[last] = json.loads(json.dumps(value))


def _at(value: Any, path: list[str]) -> Any:
    for step in path:
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value
