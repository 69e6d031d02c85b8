"""deploy/aws/stack.yaml as CloudFormation makes it from parameters.json: resources with every reference resolved."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

AWS = Path(__file__).parents[2] / "deploy/aws"
REGION, ACCOUNT = "us-west-2", "111122223333"


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short functions, each as a pair of its name and its argument."""


def _function(loader: yaml.SafeLoader, name: str, node: yaml.Node) -> tuple[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        return name, loader.construct_scalar(node)
    assert isinstance(node, yaml.SequenceNode)
    return name, loader.construct_sequence(node, deep=True)


_Loader.add_multi_constructor("!", _function)  # type: ignore[no-untyped-call]


class Stack:
    """The resources by their logical names, resolved."""

    def __init__(self, **parameters: str) -> None:
        self._template = yaml.load((AWS / "stack.yaml").read_text(), _Loader)
        given = {**json.loads((AWS / "parameters.json").read_text())["Parameters"], **parameters}
        values = {name: given.get(name, entry.get("Default")) for name, entry in self._template["Parameters"].items()}
        assert None not in values.values()
        assert given.keys() <= values.keys()
        for name, entry in self._template["Parameters"].items():
            assert not values[name] or re.fullmatch(entry.get("AllowedPattern", ".*"), values[name])
        self._values = {
            **values,
            "AWS::Partition": "aws",
            "AWS::Region": REGION,
            "AWS::AccountId": ACCOUNT,
            "AWS::NoValue": None,
        }
        self.resources: dict[str, Any] = self._resolve(self._template["Resources"])

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        """Policy documents by the names of their policies, and the trust of machines in each role."""
        found = {}
        for name, resource in self.resources.items():
            properties = resource["Properties"]
            if resource["Type"] == "AWS::IAM::ManagedPolicy":
                found[name] = properties["PolicyDocument"]
            if resource["Type"] == "AWS::IAM::Role":
                found[f"trust of {name}"] = properties["AssumeRolePolicyDocument"]
                found.update({each["PolicyName"]: each["PolicyDocument"] for each in properties.get("Policies", ())})
        return found

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, dict):
            found = {key: self._resolve(each) for key, each in value.items()}
            return {key: each for key, each in found.items() if each is not None}
        if isinstance(value, list):
            return [self._resolve(each) for each in value]
        if isinstance(value, tuple):
            return getattr(self, f"_{value[0]}")(value[1])
        return value

    def _Ref(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        properties = self._template["Resources"][name]["Properties"]
        (own,) = [properties[key] for key in properties if key.endswith("Name")]  # as it is for these kinds, or its ARN
        return self._resolve(own)

    def _Sub(self, text: str) -> str:
        return re.sub(r"\$\{([\w:]+)\}", lambda found: str(self._Ref(found[1])), text)

    def _GetAtt(self, path: str) -> str:
        name, _, attribute = path.partition(".")
        return f"arn:aws:iam::{ACCOUNT}:role/{self._Ref(name)}" if attribute == "Arn" else self._Ref(name)

    def _If(self, arguments: list[Any]) -> Any:
        condition, then, otherwise = arguments
        return self._resolve(then if self._resolve(self._template["Conditions"][condition]) else otherwise)

    def _Not(self, arguments: list[Any]) -> bool:
        return not self._resolve(arguments[0])

    def _Equals(self, arguments: list[Any]) -> bool:
        one, other = self._resolve(arguments)
        return bool(one == other)


STACK = Stack()
