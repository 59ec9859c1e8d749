"""Periodic training: each run a process of its own, so that its crash touches nobody.

Knows no training: a run is `afterclick train` with the arguments it is given. Runs never overlap;
one that takes longer than the period is followed by the next at the following multiple.
"""

import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from afterclick.serving.errors import ConfigError

PERIOD_MIN_S = 1.0
PERIOD_MAX_S = 366 * 86400.0

RETRY_S = 60.0
"""A failed run is tried again after so long, if the next one is not due before: a log that is empty
at the first start should not cost an hour.
"""

STOP_TIMEOUT_S = 10.0
"""A run that does not end within this time after SIGTERM is killed; a release appears whole or not
at all, so nothing breaks.
"""

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

log = logging.getLogger(__name__)


def parse_period(text: str) -> float:
    """Seconds of `30s`, `15m`, `1h`, `1d`.

    Raises:
        ConfigError: another form, or less than a second.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    period_s = float(found[1]) * _UNITS_S[found[2]] if found else 0.0
    if not PERIOD_MIN_S <= period_s <= PERIOD_MAX_S:
        raise ConfigError(
            f"--every: expected a time from 1s to 366d like 30s, 15m, 1h or 1d, got {text!r}"
        )
    return period_s


def train_command(arguments: Sequence[str]) -> list[str]:
    """Command line of one run, in this very Python."""
    code = "import sys; from afterclick.serving.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, "train", *arguments]


def run_schedule(
    arguments: Sequence[str],
    *,
    every_s: float,
    runs: int | None = None,
    command: Sequence[str] | None = None,
) -> int:
    """Run until stopped by SIGTERM or SIGINT, or for a number of runs.

    Args:
        arguments: of `afterclick train`.
        every_s: from one start to the next.
        runs: stop after so many; None never does.
        command: what to run instead of `afterclick train`, for tests.

    Returns:
        0; 1 where the last run of a limited number failed.

    Must be called from the main thread, because it takes the two signals while it runs.
    """
    argv = list(command) if command is not None else train_command(arguments)
    stop = threading.Event()
    child: list[subprocess.Popen[bytes]] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        for process in child:
            process.terminate()

    caught = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, on_signal) for number in caught}
    try:
        return _loop(argv, every_s, runs, stop, child)
    finally:
        for process in child:
            _end(process)
        for number, handler in before.items():
            signal.signal(number, handler)


def _loop(
    argv: list[str],
    every_s: float,
    runs: int | None,
    stop: threading.Event,
    child: list[subprocess.Popen[bytes]],
) -> int:
    begun_s = time.monotonic()
    done = 0
    code = 0
    while not stop.is_set():
        started_s = time.monotonic()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        child[:] = [process]
        if stop.is_set():  # the signal came before the handler could see this child
            process.terminate()
        code = _wait(process, stop)
        child.clear()
        done += 1
        took_s = time.monotonic() - started_s
        if stop.is_set():
            break
        if code:
            log.error("run %d failed with exit code %d after %.1f s", done, code, took_s)
        else:
            log.info("run %d ended after %.1f s", done, took_s)
        if runs is not None and done >= runs:
            return 1 if code else 0
        # On the grid of the first start: a long run does not shift those after it.
        left_s = every_s - (time.monotonic() - begun_s) % every_s
        if code:
            left_s = min(left_s, RETRY_S)
        log.info("next run in %.0f s", left_s)
        stop.wait(left_s)
    log.info("stopped after %d runs", done)
    return 0


def _wait(process: "subprocess.Popen[bytes]", stop: threading.Event) -> int:
    """Exit code; once stopped the process has `STOP_TIMEOUT_S` to end."""
    while True:
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            if stop.is_set():
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
