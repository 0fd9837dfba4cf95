"""What can be known of docker/ without Docker: that its parts fit each other, the docs and this release."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

import b2s
from b2s.cli import COMMANDS, _parser
from tests.servers import INITDB

PROJECT: Final = Path(__file__).resolve().parents[1]
DOCKER: Final = PROJECT / "docker"
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
DOCKERFILE: Final = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
STAYING: Final = [name for name, service in SERVICES.items() if service.get("restart") == "unless-stopped"]
MONITORING: Final = ("prometheus.yml", "alerts.yaml", "rules.yaml", "dashboards", "grafana/provisioning")
"""What compose mounts of docker/monitoring."""


def stage(name: str) -> str:
    """The part of the Dockerfile that makes a target."""
    (found,) = re.findall(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.DOTALL | re.MULTILINE)
    return str(found)


def test_every_image_is_pinned_to_a_release() -> None:
    images = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    images += [service["image"] for service in SERVICES.values()]
    assert [image for image in images if not re.search(r":v?\d+\.\d+", image)] == []


def test_our_own_image_has_the_version_of_the_package() -> None:
    assert {s["image"] for s in SERVICES.values() if s["image"].startswith("b2s:")} == {
        f"b2s:{b2s.__version__}"
    }


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_runs_as_root(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert re.search(r"^USER (?!root)\w+", stage(service["build"]["target"]), re.MULTILINE)
    else:
        assert int(str(service["user"]).split(":")[0]) > 0


@pytest.mark.parametrize("name", STAYING)
def test_whatever_stays_has_a_health_check(name: str) -> None:
    service = SERVICES[name]
    has_own = "build" in service and "HEALTHCHECK" in stage(service["build"]["target"])
    assert has_own or service["healthcheck"]["test"][0] == "CMD"


def test_every_command_of_ours_is_one_that_there_is() -> None:
    checks = [s["healthcheck"]["test"][1:] for s in SERVICES.values() if "healthcheck" in s]
    commands = [s["command"] for s in SERVICES.values() if s["image"].startswith("b2s:")]
    commands += [check[1:] for check in checks if check[0] == "b2s"]
    assert len(commands) == 5
    for words in commands:
        if words[0] in COMMANDS:
            assert _parser(words).parse_args(words).command == words[0]


def test_every_file_that_is_mounted_is_there_or_part_of_the_monitoring() -> None:
    mounts = [v.split(":")[0] for s in SERVICES.values() for v in s.get("volumes", ()) if v.startswith(".")]
    expected = {(DOCKER / "monitoring" / name).resolve() for name in MONITORING}
    for mount in mounts:
        place = (DOCKER / mount).resolve()
        assert place in expected or place.exists(), mount


def test_prometheus_scrapes_the_exporter_where_it_listens() -> None:
    config = yaml.safe_load((DOCKER / "monitoring" / "prometheus.yml").read_text(encoding="utf-8"))
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    command = SERVICES["exporter"]["command"]
    port = command[command.index("--listen") + 1].rpartition(":")[2]
    assert targets["b2s"] == [f"exporter:{port}"]
    mounted = [v.split(":")[1] for v in SERVICES["prometheus"]["volumes"]]
    assert set(config["rule_files"]) <= set(mounted)


def test_passwords_come_from_the_environment_and_each_has_an_example() -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    wanted = set(re.findall(r"\$\{(\w+)", text))
    example = (DOCKER / ".env.example").read_text(encoding="utf-8")
    assert wanted == set(re.findall(r"^(\w+)=", example, re.MULTILINE))


def test_the_settings_of_the_image_are_those_of_the_documentation() -> None:
    settings = dict(re.findall(r'"-c", "([\w.]+)=([^"]+)"', stage("database")))
    clock = (PROJECT / "docs" / "clock.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^([\w.]+) = '?([^'\s]+)'?", clock, re.MULTILINE))
    assert documented == settings


def test_the_page_names_the_images_that_are_used() -> None:
    page = (DOCKER / "README.md").read_text(encoding="utf-8")
    for image in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE):
        assert image in page


def test_the_init_files_are_what_the_tests_of_pg_cron_run() -> None:
    assert "COPY docker/initdb.d/ /docker-entrypoint-initdb.d/" in DOCKERFILE
    assert DOCKER / "initdb.d" == INITDB
    assert [file.name for file in sorted(INITDB.iterdir())] == ["10_pg_cron.sql", "20_roles.sh"]
    assert os.access(INITDB / "20_roles.sh", os.X_OK)


@pytest.mark.parametrize("script", [DOCKER / "smoke.sh", INITDB / "20_roles.sh"], ids=lambda path: path.name)
def test_scripts_are_valid_sh(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True)


def test_what_is_built_from_is_not_ignored() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    needed = {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "transformations.yaml",
        "migrations",
        "plpgsql",
        "python",
    }
    assert needed | {"docker/initdb.d"} == {line[1:] for line in ignored if line.startswith("!")}
