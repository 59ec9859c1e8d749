"""Several processes under one: what each is told, and what happens when one ends."""

import signal
import sys
from pathlib import Path

import pytest

from afterclick.streams.processes import Process

PARENT = """
import sys
from afterclick.streams.settings import StreamsSettings
from afterclick.streams.supervisor import supervise
streams = StreamsSettings(processes=2, port={port}, instance={instance!r}, stop_timeout_s=1.0)
leave = lambda _streams, names, _timeout_s: print("left", *names, flush=True)
sys.exit(supervise(streams, [sys.executable, "-c", {member!r}], leave=leave))
"""
TELLS = """
import os, time
names = "PROCESSES", "PORT", "INSTANCE"
told = [os.environ.get(f"AFTERCLICK_STREAMS__{name}", "none") for name in names]
print("told", *told, flush=True)
time.sleep(60)
"""
ENDS = """
import os, sys, time
if os.environ["AFTERCLICK_STREAMS__PORT"] == "7001":
    sys.exit({code})
time.sleep(60)
"""
WAIT_S = 30.0


def parent(folder: Path, member: str, *, port: int = 7000, instance: str = "") -> Process:
    """A supervisor of two processes that run this code."""
    code = PARENT.format(port=port, instance=instance, member=member)
    return Process("supervisor", [sys.executable, "-c", code], log=folder / "log").start()


@pytest.mark.parametrize(
    ("port", "instance", "told"),
    [
        (7000, "shop", ["told 1 7000 shop-0", "told 1 7001 shop-1"]),
        (0, "", ["told 1 0 NAME-0", "told 1 0 NAME-1"]),
    ],
)
def test_each_has_a_port_and_a_name_of_its_own(
    tmp_path: Path, port: int, instance: str, told: list[str]
) -> None:
    """Two members of one name would throw each other out of the group; port 0 takes free ones."""
    process = parent(tmp_path, TELLS, port=port, instance=instance)
    try:
        process.wait_until(lambda: process.tail().count("told") == 2, WAIT_S, "told")
        found = sorted(line for line in process.tail().splitlines() if line.startswith("told"))
        made_up = found[0].split()[-1].removesuffix("-0")
        assert found == [line.replace("NAME", made_up) for line in told]
        assert process.terminate(WAIT_S) == 0
        # Places under a name that was given are kept for whoever comes back by it.
        left = [] if instance else [f"left {made_up}-0 {made_up}-1"]
        assert [line for line in process.tail().splitlines() if line.startswith("left")] == left
    finally:
        process.kill()


def test_one_that_ends_at_once_is_started_again_after_longer_and_longer(tmp_path: Path) -> None:
    """The other one is left alone, and Ctrl-C still ends all."""
    process = parent(tmp_path, ENDS.format(code=3))
    try:
        process.wait_until(lambda: "again in 2 s" in process.tail(), WAIT_S, "started twice")
        said = process.tail()
        assert "worker 2 of 2, port 7001: ended by itself with 3; started again in 1 s" in said
        assert said.count("worker 1 of 2, port 7000: started") == 1
        process.signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()


def test_what_no_new_start_can_help_ends_all_with_its_code(tmp_path: Path) -> None:
    """2: a setting or topic that an operator must change."""
    process = parent(tmp_path, ENDS.format(code=2))
    try:
        assert process.wait(WAIT_S) == 2
        said = process.tail()
        assert "worker 2 of 2, port 7001: ended with 2, which no new start helps" in said
        assert "started again" not in said
    finally:
        process.kill()
