"""The rules of tests/conftest.py, tried on tests written for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, body: str, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """pytest on one test file under the rules."""
    (folder / "test_it.py").write_text(f"import pytest\n{body}")
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}
    argv = ["-q", "-p", "tests.conftest", "-c", "pyproject.toml", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *argv, *options, str(folder)],
        cwd=ROOT,
        env={**inherited, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


def outcome(folder: Path, body: str, *options: str, **environ: str) -> str:
    """pytest's summary of one test file under the rules."""
    done = run(folder, body, *options, **environ)
    return done.stdout.strip().splitlines()[-1].partition(" in ")[0]


@pytest.mark.parametrize("marker", ["service", "realdata", "demo"])
def test_a_skipped_service_test_fails_in_ci_and_only_there(tmp_path: Path, marker: str) -> None:
    """A green run must not be one in which nothing was asked."""
    body = f"@pytest.mark.{marker}\ndef test_it():\n    pytest.skip('not here')\n"

    assert outcome(tmp_path, body) == "1 skipped"
    assert outcome(tmp_path, body, CI="true") == "1 failed"


def test_other_tests_may_be_skipped_in_ci(tmp_path: Path) -> None:
    """One that concerns another system than this one, for example."""
    body = "def test_it():\n    pytest.skip('not here')\n"

    assert outcome(tmp_path, body, CI="true") == "1 skipped"


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    """pytest reports both alike."""
    body = "@pytest.mark.service\n@pytest.mark.xfail\ndef test_it():\n    assert False\n"

    assert outcome(tmp_path, body, CI="true") == "1 xfailed"


@pytest.mark.parametrize(
    ("options", "summary"),
    [([], "2 passed, 1 deselected"), (["--broker", "kafka"], "1 passed, 2 deselected")],
)
def test_kafka_s_tests_run_on_kafka_alone(tmp_path: Path, options: list[str], summary: str) -> None:
    """And with it nothing that would only repeat itself."""
    body = (
        "@pytest.mark.kafka\ndef test_kafka():\n    pass\n"
        "@pytest.mark.service\ndef test_redis():\n    pass\n"
        "def test_unit():\n    pass\n"
    )

    assert outcome(tmp_path, body, *options) == summary


def test_settings_of_the_shell_do_not_reach_a_test(tmp_path: Path) -> None:
    """A developer who has AFTERCLICK_SERVING__K=5 exported would see other failures than CI."""
    body = "import os\ndef test_it():\n    assert 'AFTERCLICK_SERVING__K' not in os.environ\n"

    assert outcome(tmp_path, body, AFTERCLICK_SERVING__K="5") == "1 passed"


def test_a_warning_is_an_error(tmp_path: Path) -> None:
    """Until it is named in pyproject.toml, for a third-party module."""
    body = "import warnings\ndef test_it():\n    warnings.warn('old')\n"

    assert outcome(tmp_path, body) == "1 failed"


@pytest.mark.parametrize(("options", "code"), [([], 1), (["--broker", "kafka"], 0)])
def test_a_socket_left_to_the_collector_is_forgiven_on_kafka_alone(
    tmp_path: Path, options: list[str], code: int
) -> None:
    """After the last test too, when pytest's own filters are those from before our rules."""
    marker = "kafka" if options else "service"
    body = f"""
import gc, socket
KEPT = []
@pytest.fixture(autouse=True, scope="session")
def dropped_at_the_end():
    yield
    gc.disable()
    KEPT.clear()
@pytest.mark.{marker}
def test_it():
    cycle = [socket.socket()]
    cycle.append(cycle)
    KEPT.append(cycle)
"""

    done = run(tmp_path, body, *options)

    assert "1 passed" in done.stdout
    assert done.returncode == code, done.stderr
