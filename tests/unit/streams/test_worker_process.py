"""What a worker sets in its process before anything else."""

import subprocess
import sys

import pytest

from afterclick.streams.app import SWITCH_INTERVAL_S
from afterclick.streams.processes import free_port

WORKER = """
import contextlib, sys
from afterclick.serving.errors import UnavailableError
from afterclick.serving.settings import ServingSettings
from afterclick.streams.app import run_worker
from afterclick.streams.settings import StreamsSettings
with contextlib.suppress(UnavailableError):
    run_worker(
        ServingSettings(provider="cpu"),
        StreamsSettings(broker="127.0.0.1:{port}", start_timeout_s=0.1),
    )
print(sys.getswitchinterval())
"""


def test_a_worker_takes_its_switch_interval() -> None:
    """The constant stood there for days and nobody set it: threads waited 5 ms for each other."""
    argv = [sys.executable, "-c", WORKER.format(port=free_port())]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) == pytest.approx(SWITCH_INTERVAL_S)
