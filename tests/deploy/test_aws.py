"""The stack of deploy/aws, its policies, and ray_cluster.yaml against what Ray asks of EC2.

There is no EC2 here. A server on loopback answers boto3 as EC2 would, so that Ray's own launcher and node provider run
with the file, and says what they asked: that must be in the policies, and nothing else.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl

import pytest
import yaml
from support.cloudformation import ACCOUNT, REGION, STACK, Stack

REPOSITORY = Path(__file__).parents[2]
POLICIES = STACK.policies
AWS = REPOSITORY / "deploy/aws"
CLUSTER = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())

# EC2 lets nobody restrict these to single resources (Service Authorization Reference, Amazon EC2).
WITHOUT_RESOURCES = {
    "ec2:DescribeInstances",
    "ec2:DescribeInstanceTypes",
    "ec2:DescribeKeyPairs",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSubnets",
}
# What may only be done to resources that carry the cluster's tag, or that get it, or only to a role that is named.
GUARDED = {"ec2:TerminateInstances", "ec2:CreateTags", "iam:PassRole"}


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def statements(name: str, action: str) -> list[dict[str, Any]]:
    return [entry for entry in POLICIES[name]["Statement"] if action in listed(entry["Action"])]


def actions(name: str) -> set[str]:
    return {action for entry in POLICIES[name]["Statement"] for action in listed(entry["Action"])}


def test_the_template_is_one_that_cloudformation_takes() -> None:
    command = [str(Path(sys.executable).with_name("cfn-lint")), str(AWS / "stack.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_every_name_follows_the_parameters() -> None:
    """No ARN and no name is written out: another bucket, prefix and cluster are in all of them."""
    other = Stack(Bucket="their-bucket", Prefix="vision/ddpm", Cluster="theirs", Vpc="vpc-7")
    assert re.findall(r"example-bucket|(?<!/)ddpm", str(other.resources)) == []
    assert "arn:aws:s3:::their-bucket/vision/ddpm/*" in str(other.policies)
    assert other.resources["Machines"]["Properties"]["VpcId"] == "vpc-7"
    assert "VpcId" not in STACK.resources["Machines"]["Properties"]  # CloudFormation takes the default one


def test_the_bucket_keeps_what_is_deleted_by_mistake_and_outlives_the_stack() -> None:
    bucket = STACK.resources["Storage"]
    assert (bucket["DeletionPolicy"], bucket["UpdateReplacePolicy"]) == ("RetainExceptOnCreate", "Retain")
    properties = bucket["Properties"]
    assert properties["VersioningConfiguration"] == {"Status": "Enabled"}
    assert set(properties["PublicAccessBlockConfiguration"].values()) == {True}
    rules = properties["LifecycleConfiguration"]["Rules"]
    assert [rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] for rule in rules[:1]] == [1]
    assert all("ExpirationInDays" not in rule for rule in rules)  # nothing that is there is removed by its age


def test_the_cluster_is_made_of_what_the_stack_makes() -> None:
    made = {resource["Type"]: set() for resource in STACK.resources.values()}
    for resource in STACK.resources.values():
        properties = resource["Properties"]
        made[resource["Type"]] |= {properties[key] for key in properties if key.endswith("Name")}
    types = CLUSTER["available_node_types"].values()
    used = {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in types}
    assert used <= made["AWS::IAM::InstanceProfile"]
    assert {CLUSTER["provider"]["security_group"]["GroupName"]} == made["AWS::EC2::SecurityGroup"]
    assert CLUSTER["provider"]["region"] == REGION


def test_there_is_a_policy_for_each_role() -> None:
    roles = {f"trust of {role}" for role in ("HeadRole", "WorkerRole", "MlflowRole")}
    assert set(POLICIES) == {"StorageAccess", "LauncherAccess", "autoscaler", *roles}
    for role in ("HeadRole", "WorkerRole", "MlflowRole"):
        assert STACK.resources[role]["Properties"]["ManagedPolicyArns"] == ["ddpm-storage"]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_are_well_formed(name: str) -> None:
    policy = POLICIES[name]
    assert set(policy) == {"Version", "Statement"}
    assert policy["Version"] == "2012-10-17"
    sids = [entry["Sid"] for entry in policy["Statement"]]
    assert len(set(sids)) == len(sids)
    for entry in policy["Statement"]:
        assert re.fullmatch(r"[A-Za-z0-9]+", entry["Sid"])
        assert entry["Effect"] == "Allow"
        assert set(entry) <= {"Sid", "Effect", "Action", "Resource", "Principal", "Condition"}
        assert ("Resource" in entry) != ("Principal" in entry)
        assert all(re.fullmatch(r"[a-z0-9]+:[A-Z][A-Za-z]+", action) for action in listed(entry["Action"]))


@pytest.mark.parametrize("name", ["LauncherAccess", "StorageAccess", "autoscaler"])
def test_policies_allow_no_more_than_needed(name: str) -> None:
    for entry in POLICIES[name]["Statement"]:
        if "*" in listed(entry["Resource"]):
            assert set(listed(entry["Action"])) <= WITHOUT_RESOURCES
        else:
            assert not set(listed(entry["Action"])) & WITHOUT_RESOURCES
            assert all(re.fullmatch(r"arn:aws:[a-z0-9]+:\S*:\S*:\S+", arn) for arn in listed(entry["Resource"]))
        if set(listed(entry["Action"])) & GUARDED:
            assert entry["Condition"]["StringEquals"]
        assert not {"iam:PassRole", "s3:ListBucket"} & set(listed(entry["Action"])) or "*" not in entry["Resource"][-1]


@pytest.mark.parametrize(("name", "kind"), [("autoscaler", "worker"), ("LauncherAccess", "head")])
def test_each_role_launches_and_gives_a_role_to_its_own_kind_only(name: str, kind: str) -> None:
    (passing,) = statements(name, "iam:PassRole")
    assert passing["Resource"] == f"arn:aws:iam::{ACCOUNT}:role/ddpm-{kind}"
    assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    (instances,) = [entry for entry in statements(name, "ec2:RunInstances") if "Condition" in entry]
    assert instances["Resource"] == f"arn:aws:ec2:{REGION}:{ACCOUNT}:instance/*"
    assert instances["Condition"]["StringEquals"] == {
        "aws:RequestTag/ray-cluster-name": CLUSTER["cluster_name"],
        "aws:RequestTag/ray-node-type": kind,
        "ec2:MetadataHttpTokens": "required",
    }
    for entry in statements(name, "ec2:TerminateInstances"):
        assert entry["Condition"]["StringEquals"]["aws:ResourceTag/ray-cluster-name"] == CLUSTER["cluster_name"]


def test_storage_is_one_prefix_of_one_bucket() -> None:
    (listing,) = statements("StorageAccess", "s3:ListBucket")
    (objects,) = statements("StorageAccess", "s3:GetObject")
    # IfExists: asking for an object that is not there is answered with 404 only to who may list, and such a request has
    # no prefix; without it everything that looks whether something exists would fail with 403.
    assert listing["Condition"] == {"StringLikeIfExists": {"s3:prefix": "ddpm/*"}}
    assert objects["Resource"] == listing["Resource"] + "/ddpm/*"


def test_every_place_that_an_operator_copies_is_in_it() -> None:
    files = [REPOSITORY / "ray_cluster.yaml", REPOSITORY / "docs/operations.md"]
    files += [path for path in (REPOSITORY / "deploy").rglob("*") if path.is_file()]
    named = {
        f"{place}/" for path in files for place in re.findall(r"s3://example-bucket/[^ `'\"\n]*", path.read_text())
    }
    (objects,) = statements("StorageAccess", "s3:GetObject")
    prefix = objects["Resource"].replace("arn:aws:s3:::", "s3://").removesuffix("*")
    assert {place for place in named if not place.startswith(prefix)} == set()
    assert len(named) >= 4


INSTANCE_TYPES = {"m7i.xlarge": (4, 16384, ""), "m7i.2xlarge": (8, 32768, ""), "g6.2xlarge": (8, 32768, "L4")}


class Ec2:
    """Answers of EC2's Query API; `asked` are the requests, in order, as their parameters."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        ec2 = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                ec2.asked.append(dict(parse_qsl(body)))
                answer = ec2.answer(ec2.asked[-1]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def actions(self) -> set[str]:
        """As policies call them."""
        return {f"ec2:{asked['Action']}" for asked in self.asked}

    def answer(self, asked: dict[str, str]) -> str:
        name = asked["Action"]
        content = getattr(self, f"_{name}", lambda asked: "<return>true</return>")(asked)
        return f'<{name}Response xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">{content}</{name}Response>'

    def _DescribeInstanceTypes(self, asked: dict[str, str]) -> str:
        return f"<instanceTypeSet>{''.join(_instance_type(*item) for item in INSTANCE_TYPES.items())}</instanceTypeSet>"

    def _DescribeKeyPairs(self, asked: dict[str, str]) -> str:
        return "<keySet/>"

    def _CreateKeyPair(self, asked: dict[str, str]) -> str:
        return f"<keyName>{asked['KeyName']}</keyName><keyMaterial>a private key</keyMaterial>"

    def _DescribeSubnets(self, asked: dict[str, str]) -> str:
        zone = CLUSTER["provider"]["availability_zone"].split(",")[0]
        return (
            "<subnetSet><item><subnetId>subnet-1</subnetId><vpcId>vpc-1</vpcId><state>available</state>"
            f"<availabilityZone>{zone}</availabilityZone><mapPublicIpOnLaunch>true</mapPublicIpOnLaunch></item></subnetSet>"
        )

    def _DescribeSecurityGroups(self, asked: dict[str, str]) -> str:
        ssh = "<item><ipProtocol>tcp</ipProtocol><fromPort>22</fromPort><toPort>22</toPort></item>"
        return (
            "<securityGroupInfo><item><groupId>sg-1</groupId><groupName>ddpm-ray</groupName><vpcId>vpc-1</vpcId>"
            f"<ipPermissions>{ssh}</ipPermissions></item></securityGroupInfo>"
        )

    def _RunInstances(self, asked: dict[str, str]) -> str:
        return f"<instancesSet>{_INSTANCE}</instancesSet>"

    def _DescribeInstances(self, asked: dict[str, str]) -> str:
        return f"<reservationSet><item><instancesSet>{_INSTANCE}</instancesSet></item></reservationSet>"


_INSTANCE = (
    "<item><instanceId>i-1</instanceId><instanceState><name>running</name></instanceState>"
    "<tagSet><item><key>ray-node-type</key><value>worker</value></item></tagSet></item>"
)


def _instance_type(name: str, size: tuple[int, int, str]) -> str:
    cpus, memory, gpu = size
    gpus = f"<gpuInfo><gpus><item><name>{gpu}</name><count>1</count></item></gpus></gpuInfo>" if gpu else ""
    return (
        f"<item><instanceType>{name}</instanceType><vCpuInfo><defaultVCpus>{cpus}</defaultVCpus></vCpuInfo>"
        f"<memoryInfo><sizeInMiB>{memory}</sizeInMiB></memoryInfo>{gpus}</item>"
    )


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ec2]:
    service = Ec2()
    Thread(target=service.server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", service.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HOME", str(tmp_path))  # the new key pair's place
    from ray.autoscaler._private.aws.utils import client_cache, resource_cache

    for cache in (client_cache, resource_cache):
        cache.cache_clear()
    yield service
    for cache in (client_cache, resource_cache):
        cache.cache_clear()
    service.server.shutdown()
    service.server.server_close()


def resolved() -> dict[str, Any]:
    """The file as `ray up` hands it to the head: everything looked up that it leaves open."""
    from ray.autoscaler._private.commands import _bootstrap_config

    return _bootstrap_config(yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text()), no_config_cache=True)


def test_ray_up_resolves_the_file_with_the_launchers_rights(ec2: Ec2, tmp_path: Path) -> None:
    config = resolved()
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert (types["spot-gpu"]["resources"]["GPU"], types["data"]["resources"]["CPU"]) == (1, 8)
    assert all(kind["node_config"]["SecurityGroupIds"] == ["sg-1"] for kind in types.values())
    assert all(kind["node_config"]["KeyName"] == "ddpm-ray" for kind in types.values())
    key = tmp_path / ".ssh/ddpm-ray.pem"
    assert (config["auth"]["ssh_private_key"], key.stat().st_mode & 0o777) == (str(key), 0o600)
    assert ec2.actions <= actions("LauncherAccess")
    assert "ec2:CreateSecurityGroup" not in ec2.actions  # it would open SSH to everybody


@pytest.mark.parametrize(
    ("node_type", "kind", "policy"),
    [("head", "head", "LauncherAccess"), ("spot-gpu", "worker", "autoscaler"), ("data", "worker", "autoscaler")],
)
def test_machines_are_launched_tagged_and_ended_with_the_policys_rights(
    ec2: Ec2, node_type: str, kind: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private.aws import node_provider
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setattr(node_provider, "TAG_BATCH_DELAY", 0)
    config = resolved()
    ec2.asked.clear()
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    provider.create_node(
        config["available_node_types"][node_type]["node_config"],
        {"ray-node-type": kind, "ray-user-node-type": node_type, "ray-node-name": f"ray-ddpm-{kind}"},
        1,
    )
    (launch,) = [asked for asked in ec2.asked if asked["Action"] == "RunInstances"]
    assert provider.non_terminated_nodes({"ray-node-type": kind}) == ["i-1"]
    provider.set_node_tags("i-1", {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(["i-1"])
    # Nothing else, and all of it is needed: what is allowed beyond is what `ray up` asks, tested above, and not of EC2.
    assert ec2.actions <= actions(policy)
    assert ec2.actions == {action for action in actions("autoscaler") if action.startswith("ec2:")}

    tags = {launch[f"TagSpecification.1.Tag.{n}.Key"]: launch[f"TagSpecification.1.Tag.{n}.Value"] for n in range(1, 5)}
    assert (tags["ray-cluster-name"], tags["ray-node-type"]) == (CLUSTER["cluster_name"], kind)
    assert launch["TagSpecification.1.ResourceType"] == "instance"
    assert launch["MetadataOptions.HttpTokens"] == "required"
    assert launch["IamInstanceProfile.Name"] == f"ddpm-{kind}"
    assert launch.get("InstanceMarketOptions.MarketType") == ("spot" if node_type == "spot-gpu" else None)
    image = launch["ImageId"].removeprefix("resolve:ssm:")
    (reading,) = statements(policy, "ssm:GetParameters")
    allowed = [arn.partition("parameter")[2].removesuffix("*") for arn in listed(reading["Resource"])]
    assert any(image.startswith(path) for path in allowed)
