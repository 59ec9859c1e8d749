"""The trainer as the demo runs it: a process of its own, known by the lines it writes.

Imports nothing of training: what it knows are a command's name and its progress as JSON lines.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from afterclick.streams.demo_panel import epoch_text
from afterclick.streams.local import afterclick_argv
from afterclick.streams.processes import Process

TRAINING = {
    "units": "64",
    "dim": "64",
    "epochs": "5",
    "batch-events": "512",
    "learning-rate": "0.006",
    "history": "50",
}
"""Small enough for half a minute on one core, good enough to beat the Markov chain."""

BLEND_EVENTS_MAX = "6000"
"""No more than the newest tenth of the demo's past: no second model has to be trained."""

STOP_TIMEOUT_S = 15.0


class Trainer:
    """`afterclick train` or `schedule` as a process, and the lines it writes."""

    def __init__(self, process: Process, log: Path) -> None:
        self._process, self._log = process, log
        self._read = 0
        self._part = b""
        self.status = "starting"
        """What it does, in words."""
        self.published = 0

    @property
    def running(self) -> bool:
        """Whether the process still runs."""
        return self._process.running

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.exit_code

    def tail(self) -> str:
        """Its last output."""
        return self._process.tail()

    def poll(self) -> list[dict[str, Any]]:
        """Lines of progress since the last call."""
        if not self._log.exists():
            return []
        with self._log.open("rb") as file:
            file.seek(self._read)
            fresh = file.read()
        self._read += len(fresh)
        *lines, self._part = (self._part + fresh).split(b"\n")
        found = []
        for line in lines:
            if not line.startswith(b"{"):  # warnings and the schedule's own log
                continue
            with contextlib.suppress(msgspec.DecodeError):
                found.append(msgspec.json.decode(line, type=dict[str, Any]))
        for figures in found:
            self._take(figures)
        return found

    def _take(self, figures: dict[str, Any]) -> None:
        stage = figures.get("stage")
        if stage == "train":
            self.status = f"reading {figures['events']} clicks"
        elif stage == "fit":
            self.status = epoch_text(figures)
        elif stage == "export":
            self.status = "exporting, checking ONNX against torch"
        elif stage == "published":
            self.status = f"release {figures['release']}, publication {figures['publication']}"
            self.published += 1


@contextlib.contextmanager
def running_trainer(
    verb: str, arguments: Sequence[str], env: Mapping[str, str], folder: Path, *, before_live: bool
) -> Iterator[Trainer]:
    """Run `afterclick train` or `afterclick schedule` on the topics, and end it with the block.

    Args:
        verb: which of the two.
        arguments: beside those of every demo.
        env: `AFTERCLICK_*` settings, all of them.
        folder: for its output.
        before_live: it may have all cores; else half of them, and those after everybody else.
    """
    settings = [f"--{name}={value}" for name, value in TRAINING.items()]
    cores = os.cpu_count() or 1
    threads = cores if before_live else max(1, cores // 2)
    argv = afterclick_argv(
        verb, *arguments, "--topic", "--progress=jsonl", f"--threads={threads}", *settings
    )
    # Beside live clicks the stream goes first.
    if not before_live and (nice := shutil.which("nice")):
        argv = [nice, "-n", "10", *argv]
    own = {k: v for k, v in os.environ.items() if not k.startswith("AFTERCLICK_")}
    own["AFTERCLICK_TRAINING__BLEND_EVENTS_MAX"] = BLEND_EVENTS_MAX
    log = folder / f"{verb}.log"
    process = Process(f"afterclick {verb}", argv, log=log, env={**own, **env})
    try:
        process.start()
        yield Trainer(process, log)
    finally:
        process.terminate(STOP_TIMEOUT_S)
