"""The Kubernetes manifests pass the Pod Security level "restricted", and agree with the settings and the image.

It is parsed here, without a cluster. The rules are those of the Pod Security Standards, kubernetes.io/docs/concepts/
security/pod-security-standards, as of Kubernetes 1.34.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from firstclaim.setting_faults import PREFIX
from firstclaim.settings import Settings, environment_name

ROOT = Path(__file__).resolve().parents[2]
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text()))
JOB: dict[str, Any] = yaml.safe_load((ROOT / "deploy/kubernetes-migrate.yaml").read_text())

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def _object(kind: str) -> dict[str, Any]:
    [found] = [each for each in OBJECTS if each["kind"] == kind]
    return found


POD: dict[str, Any] = _object("Deployment")["spec"]["template"]["spec"]
[SERVICE] = POD["containers"]
ENVIRONMENT: dict[str, str] = {each["name"]: each["value"] for each in SERVICE["env"]}
LABELS = _object("Deployment")["spec"]["template"]["metadata"]["labels"]


def _of_pod(pod: dict[str, Any]) -> list[str]:
    shared = pod.get("securityContext", {})
    faults = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    faults += [name for name in ("sysctls", "windowsOptions") if shared.get(name)]
    faults += [volume["name"] for volume in pod.get("volumes", []) if not set(volume) - {"name"} <= _VOLUMES]
    return faults


def _of_container(container: dict[str, Any], shared: dict[str, Any]) -> list[str]:
    own = container.get("securityContext", {})
    both = shared | own
    capabilities = own.get("capabilities", {})
    rules = {
        "privileged": not own.get("privileged", False),
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "capabilities": capabilities.get("drop") == ["ALL"]
        and set(capabilities.get("add", ())) <= {"NET_BIND_SERVICE"},
        "runAsNonRoot": both.get("runAsNonRoot") is True,
        "runAsUser": both.get("runAsUser") != 0,
        "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
        "procMount": own.get("procMount", "Default") == "Default",
        "hostPort": not any("hostPort" in port for port in container.get("ports", ())),
    }
    return [name for name, holds in rules.items() if not holds]


def restricted(pod: dict[str, Any]) -> list[str]:
    """What in the pod breaks the level "restricted"."""
    shared = pod.get("securityContext", {})
    containers = [*pod.get("initContainers", ()), *pod["containers"]]
    return _of_pod(pod) + [fault for each in containers for fault in _of_container(each, shared)]


def test_the_pod_passes_the_level_restricted() -> None:
    """Every container of the pod passes, also the migration, and the namespace enforces the level."""
    assert restricted(POD) == []
    labels = _object("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    namespaces = {each["metadata"].get("namespace") for each in OBJECTS if each["kind"] != "Namespace"}
    assert namespaces == {_object("Namespace")["metadata"]["name"]}


def test_the_job_migrates_as_the_init_container_does() -> None:
    """The Job differs from the init container in its Secret alone, and passes the level, in the same namespace."""
    pod = JOB["spec"]["template"]["spec"]
    assert restricted(pod) == []
    assert JOB["metadata"]["namespace"] == _object("Namespace")["metadata"]["name"]
    assert pod["securityContext"] == POD["securityContext"]
    [job] = pod["containers"]
    [init] = POD["initContainers"]
    differing = {key for key in job.keys() | init.keys() if job.get(key) != init.get(key)}
    assert differing == {"env"}
    secrets = [each["env"][0]["valueFrom"]["secretKeyRef"] for each in (init, job)]
    assert [secret["key"] for secret in secrets] == ["DATABASE_URL"] * 2
    assert secrets[0]["name"] != secrets[1]["name"]
    assert JOB["spec"]["template"]["metadata"]["labels"] != LABELS  # or the Service would send it requests


@pytest.mark.parametrize(
    ("weaken", "fault"),
    [
        (lambda pod: pod.update(hostNetwork=True), "hostNetwork"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "seccompProfile"),
        (lambda pod: pod["securityContext"].pop("runAsNonRoot"), "runAsNonRoot"),
        (lambda pod: pod["initContainers"][0].pop("securityContext"), "allowPrivilegeEscalation"),
        (lambda pod: pod["containers"][0]["securityContext"].update(capabilities={}), "capabilities"),
        (lambda pod: pod["volumes"].append({"name": "disk", "hostPath": {"path": "/"}}), "disk"),
    ],
)
def test_a_weaker_pod_does_not_pass(weaken: Callable[[dict[str, Any]], object], fault: str) -> None:
    """The check of this test detects each of the weaknesses that it is for."""
    pod = copy.deepcopy(POD)
    weaken(pod)
    assert fault in restricted(pod)


def test_the_pod_runs_as_the_image_does() -> None:
    """User and group are those of the image, and nothing but /tmp can be written."""
    [user] = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert (str(POD["securityContext"]["runAsUser"]), str(POD["securityContext"]["runAsGroup"])) == user
    for container in (SERVICE, *POD["initContainers"]):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert [mount["mountPath"] for mount in SERVICE["volumeMounts"]] == ["/tmp"]  # noqa: S108


def test_the_connections_of_a_rollout_are_named() -> None:
    """The guide says how many pods run during a rollout, and how many connections all of them may open."""
    given = {name.removeprefix(PREFIX).lower(): value for name, value in ENVIRONMENT.items()}
    each = Settings(**given).postgres_connections  # type: ignore[arg-type]  # pydantic converts the texts
    deployment = _object("Deployment")["spec"]
    pods = deployment["replicas"] + deployment["strategy"]["rollingUpdate"]["maxSurge"]
    guide = " ".join((ROOT / "docs/how-to/kubernetes.md").read_text().split())
    assert f"{pods} pods run, with up to {each} connections to Postgres each: it needs {pods * each}" in guide


def test_a_shutdown_fits_into_the_grace_period() -> None:
    """The pod is killed only after the service's own time for a shutdown, which the settings accept as it is set."""
    given = {name.removeprefix(PREFIX).lower(): value for name, value in ENVIRONMENT.items()}
    settings = Settings(**given)  # type: ignore[arg-type]  # pydantic converts the texts
    assert POD["terminationGracePeriodSeconds"] > settings.shutdown_seconds > settings.drain_seconds > 0
    readiness = SERVICE["readinessProbe"]
    noticed_seconds = readiness["periodSeconds"] * (readiness["failureThreshold"] - 1)
    assert settings.drain_seconds >= noticed_seconds


def test_the_probes_ask_what_they_are_for() -> None:
    """Start and life depend on /livez, readiness on /readyz, at the port on which the service listens."""
    [port] = SERVICE["ports"]
    assert str(port["containerPort"]) == ENVIRONMENT["FIRSTCLAIM_PORT"]
    for probe, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        assert SERVICE[probe]["httpGet"] == {"path": path, "port": port["name"]}


def test_all_containers_run_one_image() -> None:
    """Migration and service are the same build, under a tag: without one, pods of one Deployment could differ."""
    [image] = {each["image"] for each in (SERVICE, *POD["initContainers"])}
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", image)


def test_the_schemas_are_those_that_the_guide_names() -> None:
    """CI validates the manifests against the versions of Kubernetes that the guide names."""
    [versions] = re.findall(r"^for version in (\S+) (\S+); do$", (ROOT / ".ci/schemas").read_text(), flags=re.MULTILINE)
    guide = " ".join((ROOT / "docs/how-to/kubernetes.md").read_text().split())
    assert "schemas of Kubernetes {} and {}".format(*versions) in guide
    assert "beside bash .ci/schemas &" in (ROOT / ".ci/run").read_text()


def test_every_variable_is_a_setting() -> None:
    """The manifest sets no variable that the service does not read, and no secret in clear text."""
    known = {environment_name(field) for field in Settings.model_fields}
    assert set(ENVIRONMENT) <= known
    migrating = {each["name"] for container in POD["initContainers"] for each in container["env"]}
    assert migrating == {"DATABASE_URL", "FIRSTCLAIM_SCHEMA"}  # all that `migrate` reads
    assert not set(ENVIRONMENT) & {"DATABASE_URL", "REDIS_URL", "STRIPE_WEBHOOK_SECRETS", "FIRSTCLAIM_ADMIN_PASSWORD"}
    assert POD["enableServiceLinks"] is False  # a Service named firstclaim would set FIRSTCLAIM_PORT


def test_service_policy_and_budget_select_the_pods() -> None:
    """Service, NetworkPolicy, PodDisruptionBudget and Deployment mean the same pods and the same port."""
    assert _object("Deployment")["spec"]["selector"]["matchLabels"] == LABELS
    assert _object("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == LABELS
    assert _object("Service")["spec"]["selector"] == LABELS
    policy = _object("NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == LABELS
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    [port] = SERVICE["ports"]
    assert [each["targetPort"] for each in _object("Service")["spec"]["ports"]] == [port["name"]]
    assert [each["port"] for rule in policy["ingress"] for each in rule["ports"]] == [port["name"]]
    assert all(rule.get("from") for rule in policy["ingress"])
    assert {each["port"] for rule in policy["egress"] for each in rule["ports"]} == {53, 5432, 6379, 443}
