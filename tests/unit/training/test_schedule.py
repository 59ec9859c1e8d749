"""Periodic runs: failures are survived, a signal ends everything."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afterclick.serving.errors import ConfigError
from afterclick.training.schedule import parse_period, run_schedule, train_command


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("15m", 900), ("1h", 3600), ("1d", 86400), ("1.5h", 5400)]
)
def test_periods_are_written_with_a_unit(text: str, seconds: float) -> None:
    """A bare number could be anything."""
    assert parse_period(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "0s", "-1s", "1w", "900d", "1 h"])
def test_other_periods_are_refused(text: str) -> None:
    """And the message says how to write one."""
    with pytest.raises(ConfigError, match="30s, 15m, 1h or 1d"):
        parse_period(text)


def test_a_failed_run_is_followed_by_the_next(tmp_path: Path) -> None:
    """The first dies hard, the second works."""
    code = (
        "import os, pathlib; mark = pathlib.Path('ran');"
        "mark.exists() or (mark.touch(), os.kill(os.getpid(), 9)); pathlib.Path('done').touch()"
    )
    command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {code}"]

    assert run_schedule([], every_s=0.05, runs=2, command=command) == 0
    assert (tmp_path / "done").exists()


def test_the_last_of_a_counted_number_of_runs_decides() -> None:
    """So that a script can tell."""
    command = [sys.executable, "-c", "raise SystemExit(3)"]

    assert run_schedule([], every_s=1.0, runs=1, command=command) == 1


def test_a_run_is_the_verb_train() -> None:
    """In the very Python that schedules."""
    done = subprocess.run(
        [*train_command(["--help"])], capture_output=True, text=True, timeout=60, check=True
    )

    assert "--clicks FILE" in done.stdout


def test_sigterm_ends_the_run_and_the_schedule(tmp_path: Path) -> None:
    """Nothing is left behind when an orchestrator stops the container."""
    mark = tmp_path / "pid"
    run = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; from afterclick.training.schedule import run_schedule;"
        f"sys.exit(run_schedule([], every_s=60, command=[sys.executable, '-c', {run!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        until_s = time.monotonic() + 30
        while not (mark.exists() and mark.read_text()):
            assert time.monotonic() < until_s, "the run did not start"
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(int(mark.read_text()), 0)
    finally:
        process.kill()
        process.wait()
