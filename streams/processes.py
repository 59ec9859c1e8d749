"""Child processes that never outlive their parent: started, probed, ended in bounded time.

A child leads its own session, so that Ctrl-C in a terminal reaches the parent alone, which then
stops its children in order. A watchdog process kills whatever is left when the parent is gone, even
after kill -9: it holds the reading end of a pipe that only the parent writes to. (PR_SET_PDEATHSIG
is not used: it fires when the *thread* that forked ends, and covers no grandchildren.)
Knows nothing of what the children are.
"""

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from secrets import randbelow
from typing import IO, Self

from afterclick.serving.errors import UnavailableError

STOP_TIMEOUT_S = 10.0
"""How long a child may take to end after SIGTERM before it is killed."""

KILL_TIMEOUT_S = 10.0
"""How long the kernel may take to end a killed child; longer means a stuck disk."""

PROBE_EVERY_S = 0.02
"""Pause between two looks whether a child is ready."""

LOG_TAIL_BYTES = 2000
"""How much of a failed child's output an error shows."""

PORTS = range(15000, 32000)
"""Below Linux's ephemeral range, so that no outgoing connection takes the port of a server that is
down for a moment and comes back.
"""


class Process:
    """One child process and its process group; it can be started again after it ended.

    Args:
        name: how errors call it.
        argv: program and arguments; no shell is involved.
        log: file that stdout and stderr are appended to; None leaves them where the parent's go.
        env: the whole environment; None inherits.
        cwd: its working folder.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name, self.argv, self.log, self.env, self.cwd = name, list(argv), log, env, cwd
        self._child: subprocess.Popen[bytes] | None = None
        self._log_begin = 0

    @property
    def pid(self) -> int:
        """Process id, and group id, of the last start."""
        if self._child is None:
            raise UnavailableError(f"{self.name}: not started")
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return None if self._child is None else self._child.poll()

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> Self:
        """Start it; a log is appended to."""
        if self.running:
            raise UnavailableError(f"{self.name}: already runs as process {self.pid}")
        with contextlib.ExitStack() as stack:
            out = None
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                out = stack.enter_context(self.log.open("ab"))
                self._log_begin = out.tell()
            self._child = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out and subprocess.STDOUT,
                env=None if self.env is None else dict(self.env),
                cwd=self.cwd,
                start_new_session=True,
            )
        _watch(self)
        return self

    def wait_until(self, ready: Callable[[], bool], timeout_s: float, what: str = "ready") -> None:
        """Return once `ready()` is true.

        Raises:
            UnavailableError: the process ended, or was not ready in time; shows its last output.
        """
        until_s = time.monotonic() + timeout_s
        while not ready():
            if not self.running:
                raise UnavailableError(
                    f"{self.name}: ended with {self.exit_code} before it was {what}{self._said()}"
                )
            if time.monotonic() >= until_s:
                raise UnavailableError(
                    f"{self.name}: not {what} within {timeout_s:g} s{self._said()}"
                )
            time.sleep(PROBE_EVERY_S)

    def wait(self, timeout_s: float) -> int:
        """Wait until it ends by itself and return its exit code.

        Raises:
            UnavailableError: it still runs after `timeout_s`; it is left running.
        """
        if self._child is None:
            raise UnavailableError(f"{self.name}: not started")
        try:
            code = self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise UnavailableError(
                f"{self.name}: still runs after {timeout_s:g} s{self._said()}"
            ) from None
        self._forget_group()
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group; none is sent once it ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def kill(self) -> None:
        """Kill the whole group with SIGKILL and wait; does nothing when it has ended."""
        if self._child is None:
            return
        self.signal(signal.SIGKILL)
        self._child.wait(KILL_TIMEOUT_S)
        self._forget_group()

    def terminate(self, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """Ask it to end, kill it after `timeout_s`; its exit code, None if never started."""
        if self._child is None:
            return None
        self.signal(signal.SIGCONT)  # a paused process would not see SIGTERM
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout_s)
        self.kill()
        return self._child.returncode

    def pause(self) -> None:
        """Stop its clock (SIGSTOP): how a worker becomes a zombie that wakes up later."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run on after `pause`."""
        self.signal(signal.SIGCONT)

    def tail(self) -> str:
        """Last output since the last start, as far as its log has it."""
        if self.log is None or not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_begin, end - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip()

    def _said(self) -> str:
        tail = self.tail()
        return f"; it said:\n{tail}" if tail else "; it said nothing"

    def _forget_group(self) -> None:
        """End what is left of the group; from then on the watchdog leaves the number alone."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            _unwatch(self)


def free_port(num: int = 1) -> int:
    """Find a TCP port of 127.0.0.1 that nothing listens on at this moment; the first of `num` such
    in a row.
    """
    for _ in range(200):
        port = PORTS[randbelow(len(PORTS) - num + 1)]
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for at in range(num):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port + at))
            return port
    raise UnavailableError(f"ports {PORTS.start} to {PORTS.stop - 1} of 127.0.0.1: all taken")


def listening(port: int) -> bool:
    """Whether something accepts connections on 127.0.0.1:port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


_WATCHDOG = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    group = int(line[1:])
    groups.add(group) if line[0] == "+" else groups.discard(group)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""

_lock = threading.Lock()
_watched: dict[int, Process] = {}
_watchdog: tuple[int, subprocess.Popen[str]] | None = None
"""Process id it was started by, so that a forked child starts its own, and the watchdog."""


def _watch(process: Process) -> None:
    with _lock:
        _watched[process.pid] = process
        _tell(f"+{process.pid}\n")


def _unwatch(process: Process) -> None:
    with _lock:
        if _watched.pop(process.pid, None):
            _tell(f"-{process.pid}\n")


def _tell(line: str) -> None:
    global _watchdog
    if _watchdog is None or _watchdog[0] != os.getpid():
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHDOG],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        if _watchdog is None:
            atexit.register(_end_all)
        _watchdog = (os.getpid(), child)
    pipe: IO[str] | None = _watchdog[1].stdin
    assert pipe is not None
    with contextlib.suppress(BrokenPipeError):  # somebody killed it; stopping in order still works
        pipe.write(line)
        pipe.flush()


def _end_all() -> None:
    """Stop what a program left running when it ended; newest first."""
    if _watchdog is None or _watchdog[0] != os.getpid():
        return
    for process in reversed(list(_watched.values())):
        process.terminate(STOP_TIMEOUT_S)
    child = _watchdog[1]
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
    child.wait(KILL_TIMEOUT_S)
