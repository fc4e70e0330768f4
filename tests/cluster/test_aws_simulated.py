"""The AWS stack and Ray's start of machines, in a simulated account."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_files import CLUSTER

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
REGION, ACCOUNT, ADDRESS = "us-west-2", "123456789012", "203.0.113.7/32"


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """boto3 in an account in which account.yaml was deployed; keys that Ray makes go into a folder of the test."""
    moto = pytest.importorskip("moto", reason="simulates AWS")
    boto3 = pytest.importorskip("boto3")
    (tmp_path / ".ssh").mkdir()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("HOME", str(tmp_path))
    with moto.mock_aws():
        given = {"MyAddress": ADDRESS, "Email": "me@example.com"}
        boto3.client("cloudformation").create_stack(
            StackName="autodet",
            TemplateBody=(CLUSTER / "aws" / "account.yaml").read_text(),
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
        )
        yield boto3


def started(boto3: Any) -> dict[str, Any]:
    """Kind of machine → the machine, as Ray would start one of each."""
    aws: Any = import_module("ray.autoscaler._private.aws.config")
    provider_of: Any = import_module("ray.autoscaler._private.aws.node_provider").AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    text = (CLUSTER / "aws" / "cluster.yaml").read_text()
    image = boto3.client("ec2").describe_images()["Images"][0]["ImageId"]
    for name, value in (("MY-ACCOUNT", ACCOUNT), ("MY-REGION", REGION), ("MY-AMI", image)):
        text = text.replace(name, value)
    prepared = prepare_config(yaml.safe_load(text))
    config = aws.bootstrap_aws(provider_of.fillout_available_node_types_resources(prepared))
    provider, machines = provider_of(config["provider"], config["cluster_name"]), {}
    for name, kind in config["available_node_types"].items():
        assert kind["resources"]["CPU"] == 8 and kind["resources"]["GPU"] == 1  # what a trial of preset gpu asks for
        tags = {"ray-node-type": "head" if name == "head" else "worker", "ray-node-name": name}
        (machines[name],) = provider.create_node(kind["node_config"], tags, 1).values()
    return machines


def test_machines_start_with_their_roles_behind_the_firewall(account: Any) -> None:
    machines = started(account)
    assert {name: machine.instance_lifecycle for name, machine in machines.items()} == {
        "head": None,
        "spot-l4": "spot",
        "spot-a10g": "spot",
    }
    for name, machine in machines.items():
        role = "autodet-head" if name == "head" else "autodet-worker"
        assert machine.iam_instance_profile["Arn"].endswith(f"/{role}")
        assert [group["GroupName"] for group in machine.security_groups] == ["autodet"]
    (group,) = (group for group in account.resource("ec2").security_groups.all() if group.group_name == "autodet")
    sources = [each["CidrIp"] for rule in group.ip_permissions for each in rule["IpRanges"]]
    assert sources == [ADDRESS]  # Ray adds ssh from everywhere to a group without rules
