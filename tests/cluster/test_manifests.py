"""The cluster manifests fit the schemas of Kubernetes; the kinds of KubeRay and Kueue have known fields only.

The fields come from the Go types of KubeRay 1.6 (ray.io/v1) and Kueue (kueue.x-k8s.io/v1beta2), whose CRDs are in no
package. Pod templates are checked as pods.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml
from places import CONFIGS, REPOSITORY
from ray.autoscaler._private.util import prepare_config, validate_config

from focus_ray.cli.main import build_parser
from focus_ray.fitting.settings import load_config
from focus_ray.settings.standard import find_config_file

CLUSTER = CONFIGS / "cluster"
KUBERNETES = "1.31"
# kind or part of a kind -> its fields
FIELDS = {
    "cluster": "suspend managedBy autoscalerOptions headServiceAnnotations enableInTreeAutoscaling headGroupSpec rayVersion "
    "gcsFaultToleranceOptions workerGroupSpecs upgradeStrategy authOptions",
    "head": "template headService enableIngress resources labels rayStartParams serviceType",
    "workers": "suspend groupName replicas minReplicas maxReplicas idleTimeoutSeconds resources labels rayStartParams template "
    "scaleStrategy numOfHosts",
    "autoscaler": "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode version env envFrom "
    "volumeMounts",
    "RayJob": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector managedBy "
    "submitterConfig deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus "
    "entrypointNumGpus ttlSecondsAfterFinished preRunningDeadlineSeconds shutdownAfterJobFinishes suspend",
    "RayService": "rayClusterDeletionDelaySeconds serveService upgradeStrategy managedBy serveConfigV2 rayClusterConfig "
    "excludeHeadPodFromServeSvc",
    "ClusterQueue": "resourceGroups cohortName queueingStrategy namespaceSelector flavorFungibility preemption "
    "admissionChecksStrategy stopPolicy fairSharing admissionScope",
    "LocalQueue": "clusterQueue stopPolicy fairSharing",
    "ResourceFlavor": "nodeLabels nodeTaints tolerations topologyName",
}
MANIFESTS = [
    item
    for path in sorted(CLUSTER.glob("*.yaml"))
    if path.name != "ray-up.yaml"
    for item in yaml.safe_load_all(path.read_text())
    if item
]
NAMESPACES = ["team-press", "team-weld", "vision"]


def list_manifests(kind: str) -> list[dict[str, Any]]:
    return [item for item in MANIFESTS if item["kind"] == kind]


(JOB,), (SERVICE,), (PROXY,) = list_manifests("RayJob"), list_manifests("RayService"), list_manifests("Deployment")
CLUSTERS = {
    "RayCluster": list_manifests("RayCluster")[0]["spec"],
    "RayJob": JOB["spec"]["rayClusterSpec"],
    "RayService": SERVICE["spec"]["rayClusterConfig"],
}
each_cluster = pytest.mark.parametrize("spec", CLUSTERS.values(), ids=CLUSTERS)


def list_node_groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def find_manifest(kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
    key = (name, namespace)
    items = (
        item for item in list_manifests(kind) if (item["metadata"]["name"], item["metadata"].get("namespace")) == key
    )
    return next(items)


def check_pod(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "item",
    [item for item in MANIFESTS if item["apiVersion"] in ("v1", "apps/v1", "networking.k8s.io/v1")],
    ids=lambda item: f"{item['kind']}-{item['metadata']['name']}",
)
def test_kubernetes_own_kinds_fit_its_schemas(item: dict[str, Any]) -> None:
    kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.parametrize("kind", ["RayJob", "RayService", "ClusterQueue", "LocalQueue", "ResourceFlavor"])
def test_kinds_of_kuberay_and_kueue_have_known_fields(kind: str) -> None:
    assert {key for item in list_manifests(kind) for key in item.get("spec", {})} <= set(FIELDS[kind].split())


@each_cluster
def test_a_ray_cluster_has_known_fields_and_valid_pods(spec: dict[str, Any]) -> None:
    assert set(spec) <= set(FIELDS["cluster"].split())
    assert set(spec["headGroupSpec"]) <= set(FIELDS["head"].split())
    assert set(spec.get("autoscalerOptions", {})) <= set(FIELDS["autoscaler"].split())
    for group in spec["workerGroupSpecs"]:
        assert {"groupName", "rayStartParams"} <= set(group) <= set(FIELDS["workers"].split())
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in list_node_groups(spec):
        check_pod(group["template"])
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@each_cluster
def test_every_container_has_the_token_few_privileges_and_the_image_of_its_hardware(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token", "secretName": "focus-ray-token"}  # the operator's own way to it
    for group in list_node_groups(spec):
        for container in group["template"]["spec"]["containers"]:
            env = {item["name"]: item for item in container["env"]}
            assert env["RAY_AUTH_MODE"]["value"] == "token"
            assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "focus-ray-token"
            security, limits = container["securityContext"], container["resources"]["limits"]
            assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, 1000, 0)
            assert not security["allowPrivilegeEscalation"]
            assert {"cpu", "memory"} <= set(limits)
            assert container["image"].endswith("-cuda" if "nvidia.com/gpu" in limits else "-cpu")


@each_cluster
def test_only_an_autoscaler_may_call_the_kubernetes_api(spec: dict[str, Any]) -> None:
    assert not any(account["automountServiceAccountToken"] for account in list_manifests("ServiceAccount"))
    has_autoscaler = spec.get("enableInTreeAutoscaling", False)
    head, *workers = (group["template"]["spec"] for group in list_node_groups(spec))
    assert head.get("automountServiceAccountToken", False) == has_autoscaler
    assert not any("automountServiceAccountToken" in worker for worker in workers)


def test_no_manifest_holds_a_secret() -> None:
    assert list_manifests("Secret") == []
    secret = r"(AWS_SECRET_ACCESS_KEY|auth_token|RAY_AUTH_TOKEN)\s*[:=]\s*['\"]?[A-Za-z0-9]{12,}"
    assert [path.name for path in CLUSTER.glob("*.yaml") if re.search(secret, path.read_text())] == []


def parse_quantity(text: Any) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(m|Mi|Gi)?", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {None: 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def test_the_job_waits_in_its_teams_queue_and_fits_its_quota() -> None:
    labels, spec = JOB["metadata"]["labels"], CLUSTERS["RayJob"]
    assert find_manifest("WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"])
    assert (JOB["spec"]["suspend"], JOB["spec"]["shutdownAfterJobFinishes"]) == (True, True)  # required by Kueue
    assert not spec.get("enableInTreeAutoscaling", False)  # Kueue refuses it
    local = find_manifest("LocalQueue", labels["kueue.x-k8s.io/queue-name"], JOB["metadata"]["namespace"])
    queue = find_manifest("ClusterQueue", local["spec"]["clusterQueue"])
    check_pod(JOB["spec"]["submitterPodTemplate"])
    pods = [(1, spec["headGroupSpec"]["template"]), (1, JOB["spec"]["submitterPodTemplate"])]
    pods += [(group["replicas"], group["template"]) for group in spec["workerGroupSpecs"]]
    for group in queue["spec"]["resourceGroups"]:
        for resource in group["flavors"][0]["resources"]:
            requested = sum(
                count * parse_quantity(container["resources"]["requests"].get(resource["name"], 0))
                for count, template in pods
                for container in template["spec"]["containers"]
            )
            assert 0 < requested <= parse_quantity(resource["nominalQuota"]), resource["name"]


def test_the_command_of_the_job_is_valid_and_continues_its_run_if_it_runs_again() -> None:
    words = JOB["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "focus_ray.cli"]
    arguments = build_parser().parse_args(words[3:])
    config = load_config(find_config_file(arguments.config, "run"), arguments.override)
    assert (config.name, config.cluster.team) == (JOB["metadata"]["name"], "press")
    assert arguments.resume
    assert JOB["spec"]["backoffLimit"] > 0


def test_queues_have_flavors_and_admit_the_namespaces_of_their_teams() -> None:
    for queue in list_manifests("ClusterQueue"):
        assert queue["spec"]["cohortName"] == "plant"  # otherwise borrowingLimit is refused
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                assert find_manifest("ResourceFlavor", flavor["name"])
                assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
    for local in list_manifests("LocalQueue"):
        labels = find_manifest("Namespace", local["metadata"]["namespace"])["metadata"]["labels"]
        selector = find_manifest("ClusterQueue", local["spec"]["clusterQueue"])["spec"]["namespaceSelector"]
        assert selector["matchLabels"].items() <= labels.items()


def test_every_used_namespace_is_created_with_its_account_and_policy() -> None:
    assert {item["metadata"]["namespace"] for item in MANIFESTS if "namespace" in item["metadata"]} <= set(NAMESPACES)
    assert sorted(item["metadata"]["name"] for item in list_manifests("Namespace")) == NAMESPACES
    for kind in ("ServiceAccount", "NetworkPolicy", "ConfigMap"):
        assert {item["metadata"]["namespace"] for item in list_manifests(kind)} == set(NAMESPACES)


def does_rule_cover_port(rule: dict[str, Any], port: int, protocol: str = "TCP") -> bool:
    """Returns whether a rule of a network policy covers a port; a rule without ports covers all ports."""
    return "ports" not in rule or any(
        item["protocol"] == protocol and item["port"] <= port <= item.get("endPort", item["port"])
        for item in rule["ports"]
    )


def list_peers_at_port(rules: list[dict[str, Any]], port: int) -> Iterator[dict[str, Any]]:
    for rule in rules:
        if does_rule_cover_port(rule, port):
            yield from rule["from"]


def test_clients_reach_the_port_of_serve_through_the_front_proxy_alone() -> None:
    labels = PROXY["spec"]["template"]["metadata"]["labels"]
    assert PROXY["spec"]["selector"]["matchLabels"] == labels == list_manifests("Service")[0]["spec"]["selector"]
    peers = list(list_peers_at_port(find_manifest("NetworkPolicy", "ray-pods", "vision")["spec"]["ingress"], 8000))
    operator = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}}
    assert peers == [operator, {"podSelector": {"matchLabels": labels}}]
    policy = find_manifest("NetworkPolicy", "focus-ray-proxy", "vision")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert [port for port in (80, 8000, 8080, 8443, 8444) if does_rule_cover_port(policy["ingress"][0], port)] == [8443]


def test_the_front_proxy_reads_its_configuration_and_certificate_where_nginx_looks_for_them() -> None:
    pod = PROXY["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (folder,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "configuration")
    assert container["command"] == ["nginx", "-p", "/tmp/", "-c", f"{folder}/nginx.conf"]
    sources = next(volume["projected"]["sources"] for volume in pod["volumes"] if volume["name"] == "configuration")
    # focus-ray-nginx is made of serve/nginx.conf by a command
    names = [source["configMap"]["name"] for source in sources if "configMap" in source]
    assert names == ["focus-ray-nginx", "focus-ray-place"]
    (secret,) = (source["secret"] for source in sources if "secret" in source)
    text = (REPOSITORY / "serve" / "nginx.conf").read_text()
    assert {item["path"] for item in secret["items"]} == set(re.findall(r"tls/[\w.]+(?=;)", text))
    ((file, content),) = find_manifest("ConfigMap", "focus-ray-place", "vision")["data"].items()
    assert f"include {file};" in text
    name, namespace = SERVICE["metadata"]["name"], SERVICE["metadata"]["namespace"]
    assert f"server {name}-serve-svc.{namespace}.svc:8000;" in content


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_ray_reaches_its_own_nodes_names_and_s3_and_is_measured_by_the_monitoring_alone(namespace: str) -> None:
    spec = find_manifest("NetworkPolicy", "ray-pods", namespace)["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    nodes, names, storage = spec["egress"]
    assert nodes["to"] == [{"podSelector": spec["podSelector"]}]
    assert does_rule_cover_port(names, 53, "UDP")
    (endpoint,) = (
        item["data"]["AWS_ENDPOINT_URL"]
        for item in list_manifests("ConfigMap")
        if item["metadata"]["namespace"] == namespace and "AWS_ENDPOINT_URL" in item["data"]
    )
    assert does_rule_cover_port(storage, int(endpoint.rpartition(":")[2]))
    assert "ipBlock" in storage["to"][0]
    monitoring = [rule for rule in spec["ingress"] if "monitoring" in str(rule["from"])]
    assert [[port["port"] for port in rule["ports"]] for rule in monitoring] == [[8080]]
    (monitor,) = (item["spec"] for item in list_manifests("PodMonitor"))
    assert monitor["podMetricsEndpoints"][0]["portNumber"] == 8080
    assert monitor["selector"] == spec["podSelector"]


def test_only_heads_with_an_autoscaler_reach_the_kubernetes_api() -> None:
    reach = [
        (policy["metadata"]["namespace"], policy["spec"]["podSelector"]["matchLabels"])
        for policy in list_manifests("NetworkPolicy")
        if any(does_rule_cover_port(rule, 6443) and "ipBlock" in rule["to"][0] for rule in policy["spec"]["egress"])
    ]
    assert reach == [("vision", {"ray.io/node-type": "head"})]


def test_the_service_keeps_its_cluster_state_in_redis_with_a_password_from_a_secret() -> None:
    options = CLUSTERS["RayService"]["gcsFaultToleranceOptions"]
    assert set(options) <= {"redisUsername", "redisPassword", "externalStorageNamespace", "redisAddress"}
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "focus-ray-redis", "key": "password"}
    policy = find_manifest("NetworkPolicy", "ray-redis", "vision")["spec"]
    assert does_rule_cover_port(policy["egress"][0], int(options["redisAddress"].rpartition(":")[2]))


def test_ingress_replicas_on_separate_nodes_fit_the_node_groups() -> None:
    ingress = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])["applications"][0]["args"]["ingress"]
    num_nodes = sum(group["maxReplicas"] for group in CLUSTERS["RayService"]["workerGroupSpecs"])
    assert ingress["min_replicas"] > ingress["max_replicas_per_node"]
    assert ingress["max_replicas"] <= ingress["max_replicas_per_node"] * num_nodes


def test_ray_up_fits_rays_schema_and_runs_the_images() -> None:
    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    validate_config(prepare_config(config))
    nodes = config["available_node_types"]
    assert config["head_node_type"] in nodes
    assert sum(node.get("max_workers", 0) for node in nodes.values()) <= config["max_workers"]
    assert "setup_commands" not in config
    images = [config["docker"]["image"]]
    images += [node["docker"]["worker_image"] for node in nodes.values() if "docker" in node]
    assert [image.rpartition("-")[2] for image in images] == ["cpu", "cuda"]
