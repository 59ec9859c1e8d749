"""How the demo looks: a live panel on a terminal, plain lines anywhere else.

Shows what it is told; measures and starts nothing.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol, Self

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from afterclick.streams.probe import Seen
from afterclick.streams.score import Rates

LINE_EVERY_S = 5.0
"""Pause between two plain lines."""

REFRESH_PER_S = 4
ROWS = 10
"""Items and clicks of the watched user that are shown."""

METHODS = {"lists": "list in Redis", "popularity": "popularity, 24 h", "markov": "Markov chain"}


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """The live part at one moment."""

    clicks: int
    clicks_per_s: float
    """Over the last seconds."""
    seen: Seen
    rates: dict[str, Rates]
    trainer: str
    """What the trainer does, in words."""
    user: str
    """The user who is watched."""
    user_clicks: list[tuple[str, bool]]
    """Titles of their last clicks, newest first, and whether each stood in the list before it."""
    user_list: list[str]
    """Titles of their list, best first."""


class Show(Protocol):
    """Where the demo tells what happens; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def step(self, name: str, said: str = "", *, done: bool = False) -> None:
        """Something starts, goes on, or is done."""

    def training(self, line: dict[str, Any]) -> None:
        """One line of the trainer's progress."""

    def note(self, text: str) -> None:
        """Something to keep on the screen."""

    def live(self, moment: Moment) -> None:
        """The live part now; called several times a second."""


class PlainLines:
    """One line per event, for logs and pipes."""

    def __init__(self, console: Console, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._monotonic = monotonic
        self._began_s = monotonic()
        self._said: dict[str, str] = {}
        self._line_s = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, name: str, said: str = "", *, done: bool = False) -> None:
        """A line when it starts and when it is done."""
        text = f"{name}: {said or ('ready' if done else 'starting')}"
        if done or name not in self._said:
            self._print(text)
        self._said[name] = text

    def training(self, line: dict[str, Any]) -> None:
        """Epochs, then the comparison."""
        if line.get("stage") == "fit":
            self._print(f"training: {epoch_text(line)}")
        elif line.get("stage") == "baselines":
            for name, hit_rate, mrr in compared(line):
                self._print(f"validation: {name:<16} HR@20 {hit_rate:5.1%}  MRR@20 {mrr:5.1%}")

    def note(self, text: str) -> None:
        """A line."""
        self._print(text)

    def live(self, moment: Moment) -> None:
        """A line every few seconds."""
        if self._monotonic() - self._line_s < LINE_EVERY_S:
            return
        self._line_s = self._monotonic()
        rates = moment.rates
        rest = ", ".join(
            f"{METHODS[name]} {rates[name].hit_rate_20:.1%}" for name in ("popularity", "markov")
        )
        self._print(
            f"live: {moment.clicks} clicks, {moment.clicks_per_s:.0f}/s, click to list "
            f"{latency_text(moment.seen)}, HR@20 {rates['lists'].hit_rate_20:.1%} ({rest}), "
            f"publication {moment.seen.publication}"
        )
        if moment.user_clicks and moment.user_list:
            self._print(
                f"  {moment.user} clicked “{moment.user_clicks[0][0]}”, "
                f"list begins with “{moment.user_list[0]}”"
            )

    def _print(self, text: str) -> None:
        elapsed_s = self._monotonic() - self._began_s
        self._console.print(
            f"[{elapsed_s:6.1f} s] {text}", markup=False, highlight=False, soft_wrap=True
        )
        self._console.file.flush()


class LivePanel:
    """The whole demo on one screen of a terminal."""

    def __init__(self, console: Console, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._monotonic = monotonic
        self._began_s = monotonic()
        self._steps: dict[str, tuple[str, bool, float]] = {}
        self._epochs: list[dict[str, Any]] = []
        self._compared: list[tuple[str, float, float]] = []
        self._moment: Moment | None = None
        self._spinner = Spinner("dots")
        self._live = Live(
            console=console, refresh_per_second=REFRESH_PER_S, get_renderable=self._render
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def step(self, name: str, said: str = "", *, done: bool = False) -> None:
        """A row with a spinner until it is done."""
        self._steps[name] = (said, done, self._monotonic() - self._began_s)

    def training(self, line: dict[str, Any]) -> None:
        """Rows of the table of epochs."""
        if line.get("stage") == "train" and self._moment is None:
            self._epochs.clear()
        elif line.get("stage") == "fit" and self._moment is None:
            self._epochs.append(line)
        elif line.get("stage") == "baselines":
            self._compared = compared(line)

    def note(self, text: str) -> None:
        """A line above the panel that scrolls away with the terminal."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def live(self, moment: Moment) -> None:
        """The panel."""
        self._moment = moment

    def _render(self) -> RenderableType:
        if self._moment is None:
            parts: list[RenderableType] = [self._step_table()]
            if self._epochs:
                parts.append(self._training_table())
            return Group(*parts)
        return _moment_panel(self._moment, self._compared, self._monotonic() - self._began_s)

    def _step_table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, (said, done, at_s) in self._steps.items():
            mark: RenderableType = Text("✓", style="green") if done else self._spinner
            table.add_row(mark, name, Text(said, style="dim"), f"{at_s:.1f} s" if done else "")
        return table

    def _training_table(self) -> Table:
        table = Table(title="training", title_justify="left")
        for name in ("epoch", "loss", "HR@20", "MRR@20"):
            table.add_column(name, justify="right")
        for line in self._epochs:
            hit_rate, mrr = line.get("hit_rate_20"), line.get("mrr_20")
            table.add_row(
                "all data" if line.get("final") else f"{line['epoch']}",
                f"{line['loss']:.3f}",
                "" if hit_rate is None else f"{hit_rate:.1%}",
                "" if mrr is None else f"{mrr:.1%}",
            )
        for name, hit_rate, mrr in self._compared:
            table.add_row(name, "", f"{hit_rate:.1%}", f"{mrr:.1%}", style="dim")
        return table


def new_show() -> Show:
    """The one that fits stdout."""
    console = Console(emoji=False)  # `:top:` in a key is not a picture
    return LivePanel(console) if console.is_terminal else PlainLines(console)


def epoch_text(line: dict[str, Any]) -> str:
    """One epoch in words."""
    name = "all data" if line.get("final") else f"epoch {line['epoch']}"
    text = f"{name} of {line['epochs']}, loss {line['loss']:.3f}"
    if line.get("hit_rate_20") is not None:
        text += f", HR@20 {line['hit_rate_20']:.1%}, MRR@20 {line['mrr_20']:.1%}"
    return text


def compared(line: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Model, popularity and Markov of the trainer's stage `baselines`: name, HR@20, MRR@20."""
    return [
        (name, figures["hit_rate_20"], figures["mrr_20"])
        for name, figures in line.items()
        if isinstance(figures, dict) and name in ("model", "popularity", "popularity_24h", "markov")
    ]


def latency_text(seen: Seen) -> str:
    """`p50 3.1 ms, p99 8.0 ms`."""
    if seen.latency_ms_p50 is None or seen.latency_ms_p99 is None:
        return "not measured yet"
    return f"p50 {seen.latency_ms_p50:.1f} ms, p99 {seen.latency_ms_p99:.1f} ms"


def _moment_panel(
    moment: Moment, validation: list[tuple[str, float, float]], elapsed_s: float
) -> RenderableType:
    seen = moment.seen
    head = Table.grid(padding=(0, 3))
    head.add_row(f"{moment.clicks} clicks", f"{moment.clicks_per_s:.0f}/s", latency_text(seen))
    head.add_row(
        f"publication {seen.publication}", f"{seen.swaps} swaps", f"release {seen.release}"
    )
    rates = Table(title="live, of the list that stood before each click", title_justify="left")
    for name in ("", "HR@20", "MRR@20", "last 500", "validation HR@20"):
        rates.add_column(name, justify="left" if not name else "right")
    trained = {name: hit_rate for name, hit_rate, _ in validation}
    trained["lists"] = trained.get("model", 0.0)
    for name, title in METHODS.items():
        found = moment.rates[name]
        rates.add_row(
            title,
            f"{found.hit_rate_20:.1%}",
            f"{found.mrr_20:.1%}",
            f"{found.recent_hit_rate_20:.1%}",
            f"{trained[name]:.1%}" if trained.get(name) else "",
            style="bold" if name == "lists" else "",
        )
    user = Table(expand=True, title=f"user {moment.user}", title_justify="left")
    user.add_column("last clicks (✓ stood in the list)", ratio=1, no_wrap=True)
    user.add_column("list now", ratio=1, no_wrap=True)
    for row in range(ROWS):
        click = Text()
        if row < len(moment.user_clicks):
            text, hit = moment.user_clicks[row]
            click = Text(f"{'✓' if hit else ' '} {text}", style="green" if hit else "")
        listed = f"{row + 1:>2} {moment.user_list[row]}" if row < len(moment.user_list) else ""
        user.add_row(click, Text(listed))
    trainer = Text(f"trainer: {moment.trainer}", style="dim")
    title = f"Afterclick, {elapsed_s:.0f} s; Ctrl-C stops everything"
    return Panel(Group(head, rates, user, trainer), title=title)
