"""docker-compose.yml and the Dockerfiles name only what exists; no Docker engine is needed.

Where the compose client is installed it checks the file too; all promises below hold without it.
"""

import importlib.metadata
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from afterclick.serving.settings import serving_settings
from afterclick.streams.local import afterclick_argv
from afterclick.streams.local_kafka import VERSION
from afterclick.streams.settings import streams_settings
from afterclick.training.settings import training_settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
TRAINER = ROOT / "docker" / "trainer.Dockerfile"

SERVICE_KEYS = {
    *("build", "cap_drop", "command", "depends_on", "environment", "healthcheck", "image"),
    *("ports", "read_only", "restart", "security_opt", "stop_grace_period", "tmpfs"),
    *("user", "volumes"),
}
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}

PINNED = re.compile(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*")


def lines(dockerfile: Path, instruction: str) -> list[str]:
    """Arguments of every such instruction, continued lines joined."""
    text = dockerfile.read_text().replace("\\\n", " ")
    return re.findall(rf"^{instruction}\s+(.+)$", text, re.MULTILINE)


def commands() -> list[list[str]]:
    """Every `afterclick …` that compose or an image runs."""
    found = [SERVICES[name]["command"] for name in OURS]
    found += [yaml.safe_load(lines(dockerfile, "CMD")[-1]) for dockerfile in DOCKERFILES]
    checks = [
        service["healthcheck"]["test"] for service in SERVICES.values() if "healthcheck" in service
    ]
    return found + [check[2:] for check in checks if check[:2] == ["CMD", "afterclick"]]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_exists_with_its_options(command: list[str]) -> None:
    """A renamed verb or flag would be noticed by the first user otherwise."""
    verbs = {entry.name for entry in importlib.metadata.entry_points(group="afterclick.commands")}
    assert command[0] in verbs

    explained = [command[0]]
    if len(command) > 1 and not command[1].startswith("-"):
        explained.append(command[1])
    pages = [explained, ["train"]] if explained == ["schedule"] else [explained]
    told = ""
    for page in pages:
        done = subprocess.run(
            afterclick_argv(*page, "--help"), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        told += done.stdout

    for option in command:
        assert not option.startswith("--") or re.search(rf"{option}\b", told), option


@pytest.mark.parametrize("name", OURS)
def test_every_setting_exists_and_its_value_is_accepted(name: str) -> None:
    """A setting nobody reads is a promise that nobody keeps: the process would refuse to start."""
    environment = {key: str(value) for key, value in SERVICES[name]["environment"].items()}
    prefixes = ("AFTERCLICK_SERVING__", "AFTERCLICK_STREAMS__", "AFTERCLICK_TRAINING__")

    assert all(key.startswith(prefixes) for key in environment)
    serving = serving_settings(environment)
    streams = streams_settings(environment)
    training_settings(environment, None, {})
    assert serving.redis.partition("://")[2].partition(":")[0] in SERVICES
    assert streams.broker.partition(":")[0] in SERVICES


def test_worker_and_trainer_are_told_the_same() -> None:
    """A trainer that publishes elsewhere than the worker looks is silent for ever."""
    told = [SERVICES[name]["environment"] for name in OURS]

    assert told.count(told[0]) == len(told)


def test_the_releases_are_one_volume_that_only_the_trainer_writes() -> None:
    """Both sides of the hand-over, where the settings say it is."""
    folder = SERVICES["worker"]["environment"]["AFTERCLICK_SERVING__RELEASES"]

    assert SERVICES["trainer"]["volumes"] == [f"releases:{folder}"]
    assert SERVICES["worker"]["volumes"] == [f"releases:{folder}:ro"]
    for dockerfile in DOCKERFILES:  # a fresh volume takes its owner from the image's folder
        assert any(
            "-o afterclick -g afterclick" in run and folder in run
            for run in lines(dockerfile, "RUN")
        )


def test_what_must_outlive_a_restart_is_on_a_declared_volume() -> None:
    """Log, records and releases."""
    used = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
    }

    assert used == set(COMPOSE["volumes"]) == {"kafka", "redis", "releases"}
    assert SERVICES["kafka"]["environment"]["KAFKA_LOG_DIRS"] in SERVICES["kafka"]["volumes"][0]


def test_every_image_is_pinned() -> None:
    """What was tested is what runs."""
    images = [service["image"] for service in SERVICES.values()]
    images += [base.partition(" ")[0] for file in DOCKERFILES for base in lines(file, "FROM")]

    assert not [image for image in images if not PINNED.fullmatch(image)]


def test_our_images_carry_our_version() -> None:
    """An image of the version before must not be taken for this one."""
    version = importlib.metadata.version("afterclick")

    assert {SERVICES[name]["image"] for name in OURS} == {
        f"afterclick-worker:{version}",
        f"afterclick-trainer:{version}",
    }


def test_kafka_is_the_version_that_the_tests_run_on() -> None:
    """make test-kafka would prove something else."""
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{VERSION}"


def test_nobody_is_root() -> None:
    """A hole in one process must not own its container."""
    users = {name: str(service.get("user", "root")) for name, service in SERVICES.items()}
    assert not [name for name, user in users.items() if user.partition(":")[0] in ("root", "0")]

    for dockerfile in DOCKERFILES:
        (user,) = lines(dockerfile, "USER")
        assert user == users["worker"] == users["trainer"] == "10001:10001"


@pytest.mark.parametrize("name", OURS)
def test_ours_can_write_nothing_but_their_volume(name: str) -> None:
    """And get no rights that they do not start with."""
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_redis_keeps_every_key_and_logs_its_writes() -> None:
    """Without `noeviction` the worker refuses to start; without the log a restart loses all."""
    options = dict(
        zip(SERVICES["redis"]["command"][1::2], SERVICES["redis"]["command"][2::2], strict=True)
    )

    assert options["--maxmemory-policy"] == "noeviction"
    assert options["--appendonly"] == "yes"


def test_every_service_that_stays_has_a_health_check_and_comes_back() -> None:
    """`docker compose ps` must tell the truth."""
    staying = {name: service for name, service in SERVICES.items() if name != "topics"}

    assert not [name for name, service in staying.items() if "healthcheck" not in service]
    assert {service["restart"] for service in staying.values()} == {"unless-stopped"}


def test_services_wait_for_what_they_need() -> None:
    """The worker refuses to start without topics; restart loops at start would hide others."""
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in SERVICES
            ends = needed == "topics"
            assert how["condition"] == (
                "service_completed_successfully" if ends else "service_healthy"
            )
    assert set(SERVICES["worker"]["depends_on"]) == {"topics", "redis"}
    assert set(SERVICES["trainer"]["depends_on"]) == {"topics"}


def test_a_worker_has_time_to_stop_by_itself() -> None:
    """Docker's kill would come before its own deadline."""
    grace_s = int(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))

    assert grace_s > streams_settings({}).stop_timeout_s


def test_nothing_listens_beyond_this_machine() -> None:
    """Neither Kafka nor Redis asks for a password here."""
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert ports
    assert not [port for port in ports if not port.startswith("127.0.0.1:")]


def test_dockerfiles_copy_what_is_there_and_not_ignored() -> None:
    """A build that fails at its third step costs somebody a morning."""
    kept = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for dockerfile in DOCKERFILES:
        copied = [
            source
            for copy in lines(dockerfile, "COPY")
            if not copy.startswith("--from")
            for source in copy.split()[:-1]
        ]
        assert set(copied) == kept
        assert not [source for source in copied if not (ROOT / source).exists()]


def test_only_the_trainer_s_image_installs_training() -> None:
    """Two gigabytes of torch in every worker would be paid at every deployment."""
    for dockerfile in DOCKERFILES:
        text = dockerfile.read_text()
        default = re.search(r"^ARG EXTRA=(\w+)", text, re.MULTILINE)
        (extras,) = re.findall(r'pip install --no-cache-dir "\.\[(.+)\]"', text)
        if dockerfile == TRAINER:
            assert extras == "train"
        else:
            assert (extras, default and default[1]) == ("${EXTRA},api", "worker")
            assert 'RUN ! /opt/afterclick/bin/python -c "import torch"' in text


def test_every_dockerfile_is_used_by_a_service() -> None:
    """One that nobody builds rots."""
    used = {ROOT / SERVICES[name]["build"]["dockerfile"] for name in OURS}

    assert used == set(DOCKERFILES)


def test_the_compose_client_accepts_the_file_where_there_is_one() -> None:
    """Its own reading of the format, on machines that have it; needs no engine."""
    for client in (["docker", "compose"], ["docker-compose"]):
        try:
            there = subprocess.run([*client, "version"], capture_output=True, timeout=60)
        except FileNotFoundError:
            continue
        if there.returncode == 0:
            done = subprocess.run(
                [*client, "-f", str(ROOT / "docker-compose.yml"), "config", "--quiet"],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            return
    # Without a client, the part of the format that is used here: no key that compose lacks.
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"name", "services", "volumes"}
    for service in SERVICES.values():
        assert set(service) <= SERVICE_KEYS
        assert set(service.get("healthcheck", {})) <= HEALTH_KEYS


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_machine_code_is_made_with_the_image_and_kept_where_it_may_change(dockerfile: Path) -> None:
    """Else every start takes the seconds of a compiler; a file system may be read-only."""
    (kept,) = re.findall(r"NUMBA_CACHE_DIR=(\S+)", dockerfile.read_text())
    assert kept in lines(dockerfile, "VOLUME")
    assert kept in lines(dockerfile, "RUN")[-2]
    assert "compile_loops()" in lines(dockerfile, "RUN")[-1]
    text = dockerfile.read_text()
    assert text.index("USER") < text.index("compile_loops") < text.index("VOLUME")
