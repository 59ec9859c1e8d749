"""Clicks a second while a backlog is drained, from how far somebody says they are."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

POLL_S = 0.01


class Rate(NamedTuple):
    """One timed drain."""

    clicks_per_s: float
    clicks: int
    seconds: float
    complete: bool
    """Whether the backlog was drained to its end, not cut by the time limit."""


class Drain:
    """Watches from a thread, because the first clicks pass while a worker is still starting.

    Args:
        done: clicks taken so far.
        total: clicks of the backlog.
        warm_up: clicks that pass before the clock starts.
        limit_s: the clock stops then.
        start_timeout_s: longest wait for the warm-up to pass.
    """

    def __init__(
        self,
        done: Callable[[], int],
        *,
        total: int,
        warm_up: int,
        limit_s: float,
        start_timeout_s: float = 120.0,
    ) -> None:
        self._done, self._total, self._warm_up = done, total, warm_up
        self._limit_s, self._start_timeout_s = limit_s, start_timeout_s
        self._rate: Rate | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> Rate:
        """The rate, once it is known.

        Raises:
            RuntimeError: nothing moved in time.
        """
        self._thread.join()
        if self._rate is None:
            raise RuntimeError(f"drain: {self._error}") from self._error
        return self._rate

    def _run(self) -> None:
        try:
            self._rate = self._watch()
        except Exception as error:  # noqa: BLE001 - handed to whoever asks for the result
            self._error = error

    def _watch(self) -> Rate:
        until_s = time.perf_counter() + self._start_timeout_s
        while (first := self._done()) < self._warm_up:
            if time.perf_counter() > until_s:
                raise TimeoutError(f"{first} of {self._warm_up} warm-up clicks in time")
            self._stop.wait(POLL_S)
        begun_s = time.perf_counter()
        while True:
            now = self._done()
            took_s = time.perf_counter() - begun_s
            if now >= self._total or took_s > self._limit_s:
                return Rate((now - first) / took_s, now - first, took_s, now >= self._total)
            self._stop.wait(POLL_S)
