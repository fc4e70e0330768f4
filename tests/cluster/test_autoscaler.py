"""Ray's cluster files: held against Ray's own schema, and against what we promise of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from cluster_files import CLUSTER, PYPROJECT, loaded
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

FILES = ("aws/cluster.yaml", "on-premise/cluster.yaml")


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """A file as `ray up` would see it."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def commands(config: dict[str, Any], of: str) -> str:
    return "\n".join(config[f"{of}_start_ray_commands"])


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    assert checked(loaded(name))["cluster_name"] == "autodet"


@pytest.mark.parametrize("name", FILES)
def test_a_misspelt_key_would_show(name: str) -> None:
    with pytest.raises(ValidationError, match="idle_timeout_minute"):
        checked(loaded(name) | {"idle_timeout_minute": 5})


def test_a_mistake_in_a_machine_would_show() -> None:
    config = copy.deepcopy(loaded("aws/cluster.yaml"))
    config["available_node_types"]["spot-l4"]["min_worker"] = 1
    with pytest.raises(ValidationError, match="min_worker"):
        checked(config)
    with pytest.raises(ValueError, match="head_node_type"):
        checked(loaded("aws/cluster.yaml") | {"head_node_type": "nobody"})


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_stays_on_localhost_and_tokens_are_on(name: str) -> None:
    config = loaded(name)
    assert "--dashboard-host=127.0.0.1" in commands(config, "head")
    assert "0.0.0.0" not in (CLUSTER / name).read_text()
    assert any(path.endswith("/.ray/auth_token") for path in config["file_mounts"])
    if "docker" in config:
        assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    else:
        for of in ("head", "worker"):
            assert commands(config, of).count("RAY_AUTH_MODE=token") == 1


def test_the_head_is_on_demand_and_workers_are_spot() -> None:
    config = loaded("aws/cluster.yaml")
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    workers = [kind for name, kind in types.items() if name != config["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"] and head["max_workers"] == 0
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in workers)
    assert all(kind["min_workers"] == 0 < kind["max_workers"] <= config["max_workers"] for kind in workers)


def test_machines_have_roles_and_no_keys() -> None:
    config = loaded("aws/cluster.yaml")
    for name, kind in config["available_node_types"].items():
        profile = "autodet-head" if name == config["head_node_type"] else "autodet-worker"
        assert kind["node_config"]["IamInstanceProfile"] == {"Name": profile}
    assert "AWS_SECRET" not in (CLUSTER / "aws/cluster.yaml").read_text()


def test_account_and_cluster_agree_on_names() -> None:
    account, config = (CLUSTER / "aws/account.yaml").read_text(), loaded("aws/cluster.yaml")
    assert f"GroupName: {config['provider']['security_group']['GroupName']}\n" in account
    assert f'ray-cluster-name": {config["cluster_name"]}' in account
    for kind in config["available_node_types"].values():
        assert f"InstanceProfileName: {kind['node_config']['IamInstanceProfile']['Name']}\n" in account
    image = config["docker"]["image"]
    assert image.endswith(f"/autodet:{PYPROJECT['project']['version']}") and "RepositoryName: autodet\n" in account
    assert f':{PYPROJECT["project"]["version"]}"' in account  # the output that names the image
    assert any("s3://autodet-MY-ACCOUNT-MY-REGION/" in command for command in config["setup_commands"])
    assert 'BucketName: !Sub "autodet-${AWS::AccountId}-${AWS::Region}"' in account


def test_ec2_would_understand_the_machines() -> None:
    pytest.importorskip("botocore", reason="EC2's own description of its calls")
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in loaded("aws/cluster.yaml")["available_node_types"].values():
        call = kind["node_config"] | {"MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(call, shape)
        assert not report.has_errors(), report.generate_report()
    assert ParamValidator().validate({"InstanceTyp": "x", "MinCount": 1, "MaxCount": 1}, shape).has_errors()
