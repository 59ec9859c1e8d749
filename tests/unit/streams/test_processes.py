"""Child processes: none outlives its parent, none waits for ever, and a failed one says why."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from afterclick.serving.errors import UnavailableError
from afterclick.streams.processes import PORTS, Process, free_port

ENDS_WITHIN_MS = 20_000
"""Far above the milliseconds it takes, for a busy machine; a leaked child would run for minutes."""

FOREVER = ["sleep", "300"]

# A child that starts a grandchild, both for minutes; prints the grandchild's id.
FAMILY = ["sh", "-c", "sleep 300 & echo $!; wait"]

PARENT = """
import sys
from pathlib import Path
from afterclick.streams.processes import Process
family = Process("family", ["sh", "-c", "sleep 300 & echo $!; wait"], log=Path(sys.argv[1]))
family.start()
family.wait_until(lambda: family.tail() != "", 20)
sys.stdout.write(f"{family.pid} {family.tail()}\\n")
sys.stdout.flush()
sys.stdin.readline()
"""


def ends(pidfd: int) -> bool:
    """Wait until the process behind the descriptor is gone."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    ended = bool(poll.poll(ENDS_WITHIN_MS))
    os.close(pidfd)
    return ended


def is_ready(process: Process) -> bool:
    return process.tail() != ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None])
def test_children_and_grandchildren_end_with_the_parent(
    tmp_path: Path, number: signal.Signals | None
) -> None:
    """A broker left behind by a killed test run would hold its memory until somebody notices."""
    argv = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        child, grandchild = (os.pidfd_open(int(text)) for text in parent.stdout.readline().split())

        if number is None:  # its program just comes to its end
            parent.communicate("\n", timeout=30)
        else:
            parent.send_signal(number)

        assert ends(child)
        assert ends(grandchild)


def test_a_terminal_s_ctrl_c_does_not_reach_a_child(tmp_path: Path) -> None:
    """The parent stops its children in order; a broker gone first would make the worker fail."""
    process = Process("child", FOREVER, log=tmp_path / "log").start()
    try:
        assert os.getpgid(process.pid) != os.getpgid(0)
        assert os.getsid(process.pid) != os.getsid(0)
    finally:
        process.kill()


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """Stopping has an end, whatever the child thinks of it."""
    argv = ["sh", "-c", "trap '' TERM; echo deaf; sleep 300 & wait; sleep 300"]
    process = Process("deaf", argv, log=tmp_path / "log").start()
    process.wait_until(lambda: is_ready(process), 20)

    assert process.terminate(timeout_s=0.2) == -signal.SIGKILL
    assert not process.running


def test_a_kill_takes_the_whole_group(tmp_path: Path) -> None:
    """kill -9 of a start script alone would leave the server running."""
    process = Process("family", FAMILY, log=tmp_path / "log").start()
    process.wait_until(lambda: is_ready(process), 20)
    grandchild = os.pidfd_open(int(process.tail()))

    process.kill()

    assert process.exit_code == -signal.SIGKILL
    assert ends(grandchild)


def test_a_paused_one_can_be_stopped(tmp_path: Path) -> None:
    """A test that failed while its worker was frozen must not hang in its own end."""
    argv = ["sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done"]
    process = Process("frozen", argv, log=tmp_path / "log").start()
    process.wait_until(lambda: is_ready(process), 20)

    process.pause()

    assert process.terminate(timeout_s=20) == 7


def test_one_that_ends_too_early_is_reported_with_its_words(tmp_path: Path) -> None:
    """`did not start` alone sends people to look for a log they do not know of."""
    argv = ["sh", "-c", "echo no such setting; exit 3"]
    process = Process("server", argv, log=tmp_path / "log").start()

    with pytest.raises(UnavailableError) as caught:
        process.wait_until(lambda: False, 20)

    assert str(caught.value) == (
        "server: ended with 3 before it was ready; it said:\nno such setting"
    )


def test_one_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    """Every wait has an end, and names what was waited for."""
    process = Process("server", FOREVER, log=tmp_path / "log").start()
    try:
        with pytest.raises(UnavailableError, match=r"server: not ready within 0\.1 s"):
            process.wait_until(lambda: False, 0.1)
        with pytest.raises(UnavailableError, match=r"server: still runs after 0\.1 s"):
            process.wait(0.1)
    finally:
        process.kill()


def test_one_that_ended_can_be_started_again(tmp_path: Path) -> None:
    """Fault tests kill a worker twenty times; its log keeps all, an error shows the last start."""
    log = tmp_path / "log"
    process = Process("server", ["sh", "-c", "echo run $$"], log=log)

    first = process.start().pid
    process.wait(20)
    second = process.start().pid
    process.wait(20)

    assert log.read_text().splitlines() == [f"run {first}", f"run {second}"]
    assert process.tail() == f"run {second}"


def test_one_that_runs_is_not_started_twice(tmp_path: Path) -> None:
    """Two servers on one folder would damage its files."""
    process = Process("server", FOREVER, log=tmp_path / "log").start()
    try:
        with pytest.raises(UnavailableError, match="already runs"):
            process.start()
    finally:
        process.kill()


def test_a_free_port_lies_below_those_of_outgoing_connections() -> None:
    """A server that is down for a moment must find its port free when it comes back."""
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    assert free_port() in PORTS
    assert PORTS.stop <= ephemeral
