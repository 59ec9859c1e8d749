"""How a training run tells what it does: bars on a terminal, JSON lines for a program, or lines.

Knows no training: a stage is a name with figures.
"""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Teller(Protocol):
    """Whatever listens to a run."""

    def stage(self, name: str, **figures: Any) -> None:
        """Something is done, or begins."""

    def share(self, done: float) -> None:
        """Share of the epoch in progress; called often."""


class Silent:
    """Says nothing."""

    def stage(self, name: str, **figures: Any) -> None:
        """Nothing."""

    def share(self, done: float) -> None:
        """Nothing."""


class JsonLines:
    """One JSON object a stage: `{"stage":"fit","epoch":1,…}`."""

    def __init__(self, write: Callable[[str], Any] | None = None) -> None:
        self._write = write or _write_out

    def stage(self, name: str, **figures: Any) -> None:
        """Write one line, at once."""
        line = msgspec.json.encode({"stage": name, **figures}).decode()
        self._write(line + "\n")

    def share(self, done: float) -> None:
        """Nothing: stages are enough for a program."""


class Bars:
    """A bar over the epochs, and a line for every stage; on no terminal only the lines."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._epochs_done = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, **figures: Any) -> None:
        """Print a line; an epoch also moves the bar."""
        if name == "train":
            self._task = self._progress.add_task("training", total=figures["epochs"])
        if name == "fit" and self._task is not None:
            self._epochs_done = figures["epoch"]
            self._progress.update(self._task, completed=self._epochs_done)
        if name == "export" and self._task is not None:
            self._progress.update(self._task, visible=False)
        shown = "  ".join(f"{key} {_shown(key, value)}" for key, value in figures.items())
        self._console.print(f"{name:<10} {shown}", highlight=False, markup=False, soft_wrap=True)

    def share(self, done: float) -> None:
        """Move the bar within an epoch."""
        if self._task is not None:
            self._progress.update(self._task, completed=self._epochs_done + done)


def _shown(key: str, value: Any) -> str:
    if isinstance(value, float):
        is_rate = key.startswith(("hit_rate", "mrr"))
        return f"{100 * value:.1f}%" if is_rate else f"{value:.4g}"
    return "-" if value is None else str(value)


def _write_out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
