"""KubeRay's manifests: held against the fields of its resource definitions, and against what we promise of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_files import PYPROJECT, ROOT, documents, flags_of, loaded, ray_version
from jsonschema import Draft202012Validator

SCHEMA = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())
CLUSTER, JOB = "kubernetes/raycluster.yaml", "kubernetes/rayjob.yaml"


def problems(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay's definition of a kind has against a manifest."""
    schema = {"$ref": f"#/$defs/{manifest['kind']}", "$defs": SCHEMA["$defs"]}
    return [error.message for error in Draft202012Validator(schema).iter_errors(manifest)]


def spec_of(name: str) -> dict[str, Any]:
    """The cluster that a manifest describes."""
    spec: dict[str, Any] = loaded(name)["spec"]
    inner: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return inner


def pods(name: str) -> Iterator[dict[str, Any]]:
    spec = spec_of(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


def containers(name: str) -> Iterator[dict[str, Any]]:
    for pod in pods(name):
        yield from (*pod["initContainers"], *pod["containers"])


@pytest.mark.parametrize("name", [CLUSTER, JOB])
def test_kuberay_knows_every_field(name: str) -> None:
    assert problems(loaded(name)) == []


def test_mistakes_would_show() -> None:
    job = json.loads(json.dumps(loaded(JOB)))  # aliases become copies
    job["spec"]["backofLimit"] = 1
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "tokens"
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    del worker["groupName"]
    worker["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "24 GB"
    assert len(problems(job)) == 4


def test_both_describe_the_same_cluster() -> None:
    assert spec_of(CLUSTER) == spec_of(JOB)
    assert loaded(CLUSTER)["metadata"] == loaded(JOB)["metadata"]


def test_one_image_of_the_version_that_ray_has() -> None:
    assert spec_of(JOB)["rayVersion"] == ray_version()
    images = {container["image"] for container in containers(JOB)}
    assert images == {f"MY-REGISTRY/autodet:{PYPROJECT['project']['version']}"}


def test_gpus_and_memory_are_guaranteed() -> None:
    for container in containers(JOB):
        resources = container["resources"]
        assert resources["limits"] == resources["requests"]
    assert all(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1 for pod in pods(JOB))
    assert not any("nvidia.com/gpu" in pod["initContainers"][0]["resources"]["limits"] for pod in pods(JOB))


def test_tokens_are_on_and_nothing_is_offered_to_the_world() -> None:
    spec = spec_of(JOB)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    ports = {port["name"]: port["containerPort"] for port in next(pods(JOB))["containers"][0]["ports"]}
    assert ports == {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}  # without Ray Client's 10001
    policy = documents("kubernetes/namespace.yaml")[2]["spec"]
    open_ports = [[port["port"] for port in rule.get("ports", [])] for rule in policy["ingress"]]
    assert policy["podSelector"] == {} and open_ports == [[], [8265], [8080]]
    assert all("from" in rule for rule in policy["ingress"])


def test_pods_have_no_privileges() -> None:
    for pod in pods(JOB):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert pod["serviceAccountName"] == "autodet"
    for container in containers(JOB):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert [pod.get("automountServiceAccountToken", True) for pod in pods(JOB)] == [True, False]


def test_the_head_keeps_off_spot_machines() -> None:
    affinity = next(pods(JOB))["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]
    assert {expression["operator"] for expression in term["matchExpressions"]} == {"NotIn"}
    workers = list(pods(JOB))[1]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    spot = {expression["key"] for each in workers for expression in each["preference"]["matchExpressions"]}
    assert spot == {expression["key"] for expression in term["matchExpressions"]}


def test_data_is_fetched_to_where_the_command_reads_it() -> None:
    words = shlex.split(loaded(JOB)["spec"]["entrypoint"])
    for pod in pods(JOB):
        fetch = pod["initContainers"][0]
        assert fetch["command"][-1] == words[words.index("--data") + 1]
        assert Path(fetch["command"][1]).relative_to("/home/ray/autodet") == Path("cluster/fetch_data.py")
        assert (
            fetch["volumeMounts"] == pod["containers"][0]["volumeMounts"] == [{"name": "local", "mountPath": "/local"}]
        )
        assert [volume["name"] for volume in pod["volumes"]] == ["local"]


def test_the_command_starts_or_goes_on() -> None:
    spec = loaded(JOB)["spec"]
    words = shlex.split(spec["entrypoint"])
    script = ROOT / Path(words[1]).relative_to("/home/ray/autodet")
    options = {word for word in words if word.startswith("--")}
    assert words[0] == "python" and script.exists()
    assert {"--or-resume", "--output"} <= options and words[words.index("--address") + 1] == "auto"
    assert options <= flags_of(script)
    assert spec["backoffLimit"] > 0 and spec["activeDeadlineSeconds"] > 0 and spec["shutdownAfterJobFinishes"]


def test_the_command_fits_the_machines() -> None:
    words = shlex.split(loaded(JOB)["spec"]["entrypoint"])
    most = sum(group["maxReplicas"] for group in spec_of(JOB)["workerGroupSpecs"])
    assert int(words[words.index("--workers") + 1]) == most + 1  # the head trains as well
    cpus = {pod["containers"][0]["resources"]["limits"]["cpu"] for pod in pods(JOB)}
    assert cpus == {words[words.index("--cpus-per-trial") + 1]}
