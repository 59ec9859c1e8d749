"""What libraries say again and again while a server is away: once in a while is enough.

Behind a proxy that resets connections, a worker's two Kafka clients wrote 600 lines a second. Knows
no library by name.
"""

import logging
import time
from collections.abc import Callable, Iterable

EVERY_S = 10.0
"""Least time between two lines of one kind: an outage of an hour leaves some thousand lines."""

KINDS_MAX = 1000
"""Kinds of lines remembered; some libraries format addresses into theirs."""


class Repeats(logging.Filter):
    """Lets a line of each kind through every `EVERY_S`, and counts in the next what it kept back.

    Args:
        clock_s: seconds that only grow.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock_s = clock_s
        self._said: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line may pass; a kind is a logger and a message before its arguments."""
        kind, now_s = (record.name, str(record.msg)), self._clock_s()
        said_s, kept = self._said.get(kind, (now_s - EVERY_S, 0))
        if now_s - said_s < EVERY_S:
            self._said[kind] = (said_s, kept + 1)
            return False
        if len(self._said) >= KINDS_MAX:
            self._said.clear()
        self._said[kind] = (now_s, 0)
        if kept:
            record.msg = f"{record.getMessage()} (and {kept} times since it was last shown)"
            record.args = ()
        return True


def keep_back_repeats(libraries: Iterable[str]) -> None:
    """Filter every logger of these packages that exists by now."""
    packages, repeats = tuple(libraries), Repeats()
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in packages:
            logging.getLogger(name).addFilter(repeats)
