"""The cluster manifests: Kubernetes' own schemas for what is Kubernetes', strict keys for KubeRay's and Kueue's kinds.

The fields of KubeRay's and Kueue's kinds below are those of their Go types (ray.io/v1 of KubeRay 1.6,
kueue.x-k8s.io/v1beta2); their CRDs come in no package. Pod templates are checked as pods, strictly, unknown keys included.
"""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from places import CONFIGS, REPOSITORY

CLUSTER = CONFIGS / "cluster"
KUBERNETES = "1.31"
SPEC_OF_RAY_CLUSTER = {
    "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs", "upgradeStrategy", "authOptions",
}  # fmt: skip
HEAD = {"template", "headService", "enableIngress", "resources", "labels", "rayStartParams", "serviceType"}
WORKERS = {
    "suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "resources", "labels",
    "rayStartParams", "template", "scaleStrategy", "numOfHosts",
}  # fmt: skip
AUTOSCALER = {
    "resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode", "version", "env",
    "envFrom", "volumeMounts",
}  # fmt: skip
SPEC_OF_RAY_JOB = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
    "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
    "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
    "preRunningDeadlineSeconds", "shutdownAfterJobFinishes", "suspend",
}  # fmt: skip
SPEC_OF_RAY_SERVICE = {
    "rayClusterDeletionDelaySeconds", "serveService", "upgradeStrategy", "managedBy", "serveConfigV2", "rayClusterConfig",
    "excludeHeadPodFromServeSvc",
}  # fmt: skip
KUEUE = "kueue.x-k8s.io/v1beta2"
SPEC_OF_QUEUE = {
    "resourceGroups", "cohortName", "queueingStrategy", "namespaceSelector", "flavorFungibility", "preemption",
    "admissionChecksStrategy", "stopPolicy", "fairSharing", "admissionScope",
}  # fmt: skip
SPEC_OF_LOCAL_QUEUE = {"clusterQueue", "stopPolicy", "fairSharing"}
SPEC_OF_FLAVOR = {"nodeLabels", "nodeTaints", "tolerations", "topologyName"}


def load(name: str) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all((CLUSTER / name).read_text()) if item]


def everything() -> list[dict[str, Any]]:
    names = sorted(path.name for path in CLUSTER.glob("*.yaml") if path.name != "ray-up.yaml")
    return [item for name in names for item in load(name)]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [item for item in everything() if item["kind"] == kind]


def ray_cluster_specs() -> dict[str, dict[str, Any]]:
    (cluster,), (job,), (service,) = of_kind("RayCluster"), of_kind("RayJob"), of_kind("RayService")
    return {
        "RayCluster": cluster["spec"],
        "RayJob": job["spec"]["rayClusterSpec"],
        "RayService": service["spec"]["rayClusterConfig"],
    }


def check_pod(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def quantity(text: Any) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(m|Mi|Gi)?", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {None: 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


@pytest.mark.parametrize(
    "item",
    [i for i in everything() if i["apiVersion"] in ("v1", "apps/v1", "networking.k8s.io/v1")],
    ids=lambda i: f"{i['kind']}-{i['metadata']['name']}",
)
def test_kubernetes_own_kinds_fit_its_schemas(item: dict[str, Any]) -> None:
    kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_the_schemas_refuse_an_unknown_key() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod({"spec": {"containers": [{"name": "a", "image": "b", "imagePullPolice": "Always"}]}})


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_a_ray_cluster_has_known_keys_and_valid_pods(kind: str) -> None:
    spec = ray_cluster_specs()[kind]
    assert set(spec) <= SPEC_OF_RAY_CLUSTER
    assert {"rayStartParams", "template"} <= set(spec["headGroupSpec"]) <= HEAD
    assert spec["headGroupSpec"]["serviceType"] in ("ClusterIP", "NodePort", "LoadBalancer")
    autoscaler = spec.get("autoscalerOptions", {})
    assert set(autoscaler) <= AUTOSCALER
    assert autoscaler.get("upscalingMode", "Default") in ("Default", "Aggressive", "Conservative")
    check_pod(spec["headGroupSpec"]["template"])
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["cpu", "gpu"]
    for group in spec["workerGroupSpecs"]:
        assert {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= set(group) <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        check_pod(group["template"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_every_container_has_the_token_and_cannot_gain_privileges(kind: str) -> None:
    spec = ray_cluster_specs()[kind]
    assert spec["authOptions"] == {"mode": "token", "secretName": "focus-ray-token"}  # the operator's own way to it
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            env = {item["name"]: item for item in container["env"]}
            assert env["RAY_AUTH_MODE"]["value"] == "token"
            assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "focus-ray-token"
            assert container["securityContext"]["runAsNonRoot"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert set(container["resources"]["limits"]) >= {"cpu", "memory"}


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_only_an_autoscaler_may_call_the_kubernetes_api(kind: str) -> None:
    spec = ray_cluster_specs()[kind]
    assert not any(account["automountServiceAccountToken"] for account in of_kind("ServiceAccount"))
    head = spec["headGroupSpec"]["template"]["spec"]
    assert head.get("automountServiceAccountToken", False) == spec.get("enableInTreeAutoscaling", False)
    assert not any("automountServiceAccountToken" in g["template"]["spec"] for g in spec["workerGroupSpecs"])


def test_no_manifest_holds_a_secret() -> None:
    assert of_kind("Secret") == []
    for path in CLUSTER.glob("*.yaml"):
        assert not re.search(
            r"(AWS_SECRET_ACCESS_KEY|auth_token|RAY_AUTH_TOKEN)\s*[:=]\s*['\"]?[A-Za-z0-9]{12,}", path.read_text()
        )


def test_the_job_waits_in_its_teams_queue_and_fits_its_quota() -> None:
    (job,) = of_kind("RayJob")
    assert set(job["spec"]) <= SPEC_OF_RAY_JOB
    check_pod(job["spec"]["submitterPodTemplate"])
    labels = job["metadata"]["labels"]
    local = next(q for q in of_kind("LocalQueue") if q["metadata"]["name"] == labels["kueue.x-k8s.io/queue-name"])
    assert local["metadata"]["namespace"] == job["metadata"]["namespace"]
    assert labels["kueue.x-k8s.io/priority-class"] in [c["metadata"]["name"] for c in of_kind("WorkloadPriorityClass")]
    assert job["spec"]["suspend"]
    assert job["spec"]["shutdownAfterJobFinishes"]  # KubeRay and Kueue refuse a job that waits without it
    queue = next(q for q in of_kind("ClusterQueue") if q["metadata"]["name"] == local["spec"]["clusterQueue"])
    quota = {
        resource["name"]: quantity(resource["nominalQuota"])
        for group in queue["spec"]["resourceGroups"]
        for resource in group["flavors"][0]["resources"]
    }
    spec = job["spec"]["rayClusterSpec"]
    assert not spec.get("enableInTreeAutoscaling", False)  # Kueue refuses it
    pods = [(1, spec["headGroupSpec"]["template"]), (1, job["spec"]["submitterPodTemplate"])]
    pods += [(group["replicas"], group["template"]) for group in spec["workerGroupSpecs"]]
    for name, limit in quota.items():
        requested = sum(
            count * quantity(container["resources"]["requests"].get(name, 0))
            for count, template in pods
            for container in template["spec"]["containers"]
        )
        assert 0 < requested <= limit, name


def test_the_command_of_the_job_is_valid() -> None:
    from focus_ray.cli.main import build_parser
    from focus_ray.fitting.settings import load_config
    from focus_ray.settings.standard import find_config

    (job,) = of_kind("RayJob")
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "focus_ray.cli"]
    arguments = build_parser().parse_args(words[3:])
    config = load_config(find_config(arguments.config, "run"), arguments.override)
    assert (config.name, config.cluster.team) == ("auto", "press")


def test_every_team_has_queues_flavors_and_a_namespace_that_exist() -> None:
    flavors = {flavor["metadata"]["name"] for flavor in of_kind("ResourceFlavor")}
    namespaces = {item["metadata"]["name"]: item["metadata"].get("labels", {}) for item in of_kind("Namespace")}
    queues = {queue["metadata"]["name"]: queue["spec"] for queue in of_kind("ClusterQueue")}
    assert {item["apiVersion"] for item in everything() if "kueue" in item["apiVersion"]} == {KUEUE}
    assert all(set(flavor.get("spec", {})) <= SPEC_OF_FLAVOR for flavor in of_kind("ResourceFlavor"))
    for spec in queues.values():
        assert set(spec) <= SPEC_OF_QUEUE
        for group in spec["resourceGroups"]:
            for flavor in group["flavors"]:
                assert flavor["name"] in flavors
                assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
                assert all(
                    set(r) <= {"name", "nominalQuota", "borrowingLimit", "lendingLimit"} for r in flavor["resources"]
                )
        assert spec["queueingStrategy"] in ("StrictFIFO", "BestEffortFIFO")
        assert spec["preemption"].keys() <= {"reclaimWithinCohort", "withinClusterQueue", "borrowWithinCohort"}
        assert spec["preemption"]["reclaimWithinCohort"] in ("Never", "LowerPriority", "Any")
        assert spec["preemption"]["withinClusterQueue"] in ("Never", "LowerPriority", "LowerOrNewerEqualPriority")
        assert spec["cohortName"] == "plant"  # else borrowingLimit is refused
    for local in of_kind("LocalQueue"):
        assert set(local["spec"]) <= SPEC_OF_LOCAL_QUEUE
        selector = queues[local["spec"]["clusterQueue"]]["namespaceSelector"]["matchLabels"]
        assert selector.items() <= namespaces[local["metadata"]["namespace"]].items()
    for item in of_kind("WorkloadPriorityClass"):
        assert set(item) <= {"apiVersion", "kind", "metadata", "value", "description"}
        assert isinstance(item["value"], int)


def test_every_used_namespace_is_created_with_its_account_and_policy() -> None:
    created = {item["metadata"]["name"] for item in of_kind("Namespace")}
    used = {item["metadata"]["namespace"] for item in everything() if "namespace" in item["metadata"]}
    assert used <= created
    for kind in ("ServiceAccount", "NetworkPolicy", "ConfigMap"):
        assert {item["metadata"]["namespace"] for item in of_kind(kind)} == created


def policy(name: str, namespace: str) -> dict[str, Any]:
    return next(
        item["spec"]
        for item in of_kind("NetworkPolicy")
        if (item["metadata"]["name"], item["metadata"]["namespace"]) == (name, namespace)
    )


def admits(rule: dict[str, Any], port: int, protocol: str = "TCP") -> bool:
    """Returns whether a rule of a network policy covers a port; a rule without ports covers all ports."""
    return "ports" not in rule or any(
        item["protocol"] == protocol and item["port"] <= port <= item.get("endPort", item["port"])
        for item in rule["ports"]
    )


def test_clients_reach_the_port_of_serve_through_the_front_proxy_alone() -> None:
    (proxy,) = of_kind("Deployment")
    labels = proxy["spec"]["template"]["metadata"]["labels"]
    assert proxy["spec"]["selector"]["matchLabels"] == labels == of_kind("Service")[0]["spec"]["selector"]
    peers = [peer for rule in policy("ray-pods", "vision")["ingress"] if admits(rule, 8000) for peer in rule["from"]]
    operator = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}}
    assert peers == [operator, {"podSelector": {"matchLabels": labels}}]
    proxy_policy = policy("focus-ray-proxy", "vision")
    assert proxy_policy["podSelector"]["matchLabels"] == labels
    assert [port for port in (80, 8000, 8080, 8443, 8444) if admits(proxy_policy["ingress"][0], port)] == [8443]


def test_the_front_proxy_reads_its_configuration_and_certificate_where_nginx_looks_for_them() -> None:
    (proxy,) = of_kind("Deployment")
    pod = proxy["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (folder,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "configuration")
    assert container["command"] == ["nginx", "-p", "/tmp/", "-c", f"{folder}/nginx.conf"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    sources = next(volume["projected"]["sources"] for volume in pod["volumes"] if volume["name"] == "configuration")
    assert [source["configMap"]["name"] for source in sources if "configMap" in source] == [
        "focus-ray-nginx",  # made of serve/nginx.conf by a command: one source
        "focus-ray-place",
    ]
    (secret,) = (source["secret"] for source in sources if "secret" in source)
    text = (REPOSITORY / "serve" / "nginx.conf").read_text()
    assert {item["path"] for item in secret["items"]} == set(re.findall(r"tls/[\w.]+(?=;)", text))
    place = next(item["data"] for item in of_kind("ConfigMap") if item["metadata"]["name"] == "focus-ray-place")
    assert f"include {next(iter(place))};" in text
    (service,) = of_kind("RayService")
    where = f"{service['metadata']['name']}-serve-svc.{service['metadata']['namespace']}.svc:8000"
    assert f"server {where};" in place["place.conf"]


@pytest.mark.parametrize("namespace", ["vision", "team-press", "team-weld"])
def test_ray_reaches_its_own_nodes_names_and_s3_and_no_more(namespace: str) -> None:
    spec = policy("ray-pods", namespace)
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    nodes, names, storage = spec["egress"]
    assert nodes["to"] == [{"podSelector": spec["podSelector"]}]
    assert admits(names, 53, "UDP")
    endpoint = next(
        item["data"]["AWS_ENDPOINT_URL"] for item in of_kind("ConfigMap") if item["metadata"]["namespace"] == namespace
    )
    assert admits(storage, int(endpoint.rpartition(":")[2]))
    assert "ipBlock" in storage["to"][0]


def test_only_heads_with_an_autoscaler_reach_the_kubernetes_api() -> None:
    reach = {
        (item["metadata"]["namespace"], tuple(item["spec"]["podSelector"]["matchLabels"].items()))
        for item in of_kind("NetworkPolicy")
        if any(admits(rule, 6443) and "ipBlock" in rule["to"][0] for rule in item["spec"]["egress"])
    }
    assert reach == {("vision", (("ray.io/node-type", "head"),))}


@pytest.mark.parametrize("namespace", ["vision", "team-press", "team-weld"])
def test_a_metrics_scraper_is_admitted_to_the_metrics_alone(namespace: str) -> None:
    monitoring = [
        rule
        for rule in policy("ray-pods", namespace)["ingress"]
        if "app.kubernetes.io/name" in str(rule["from"]) and "monitoring" in str(rule["from"])
    ]
    assert [[port["port"] for port in rule["ports"]] for rule in monitoring] == [[8080]]
    (monitor,) = of_kind("PodMonitor")
    assert monitor["spec"]["podMetricsEndpoints"][0]["portNumber"] == 8080
    assert monitor["spec"]["selector"] == policy("ray-pods", "vision")["podSelector"]


def test_the_services_serve_config_fits_rays_schema() -> None:
    from ray.serve.schema import ServeDeploySchema

    (service,) = of_kind("RayService")
    assert {"rayClusterConfig"} <= set(service["spec"]) <= SPEC_OF_RAY_SERVICE
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    parsed = ServeDeploySchema.model_validate(config)
    assert set(config) <= set(ServeDeploySchema.model_fields)  # Ray itself ignores what it does not know
    (application,) = config["applications"]
    assert set(application) <= set(type(parsed.applications[0]).model_fields)
    assert parsed.applications[0].args["registry"].startswith("s3://")


def test_ray_up_fits_rays_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    validate_config(prepare_config(config))
    assert config["head_node_type"] in config["available_node_types"]
    assert sum(node.get("max_workers", 0) for node in config["available_node_types"].values()) <= config["max_workers"]
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config({**config, "max_worker": 3}))


def test_ray_up_runs_the_image_and_installs_nothing() -> None:
    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    assert "setup_commands" not in config
    images = [config["docker"]["image"]]
    images += [node["docker"]["worker_image"] for node in config["available_node_types"].values() if "docker" in node]
    assert [image.rpartition("-")[2] for image in images] == ["cpu", "cuda"]


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_nodes_with_gpus_and_only_they_run_the_cuda_variant_as_the_images_user(kind: str) -> None:
    spec = ray_cluster_specs()[kind]
    templates = [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    if kind == "RayJob":
        templates.append(of_kind("RayJob")[0]["spec"]["submitterPodTemplate"])
    for template in templates:
        for container in template["spec"]["containers"]:
            variant = "cuda" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
            assert container["image"].endswith(f"-{variant}")
            security = container["securityContext"]
            assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, 1000, 0)
