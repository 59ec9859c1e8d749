"""An event loop whose time, threads and processes are simulated: the same seed gives the same run.

Time jumps to whatever is due next. Work that production gives to a thread runs as a greenlet,
which gives way inside `Process.wait`: that is where every call to a simulated server lets others
go first. Between two such calls nothing else runs, which is no loss: what a process does there
nobody sees.
"""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet


class StuckError(AssertionError):
    """Nothing is due any more, and the run has not ended."""


class VirtualLoop(asyncio.BaseEventLoop):
    """asyncio on simulated time."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self._clock_resolution = 1e-6
        self._selector = self
        self.problems: list[str] = []
        """Exceptions that nobody took."""
        self.set_exception_handler(
            lambda _, context: self.problems.append(repr(context.get("exception") or context))
        )

    def time(self) -> float:
        """Seconds since the run began."""
        return self.now_s

    def select(self, timeout: float | None) -> list[Any]:
        """What a selector does, which is to wait."""
        if timeout is None:
            raise StuckError("nothing is due any more")
        self.now_s += timeout
        return []

    def _process_events(self, _: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def run_in_executor(self, _: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Start a simulated thread of the process that asks."""
        future = self.create_future()
        process = _process.get()

        def run() -> None:
            try:
                result = func(*args)
            except GreenletExit:
                return
            except Exception as error:  # noqa: BLE001 - handed on to whoever waits
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)
            finally:
                process.threads.pop(thread, None)

        thread = greenlet(run)
        process.threads[thread] = future
        self.call_soon(thread.switch)
        return future


class Process:
    """What dies together: tasks and threads of one worker."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen_until_s = 0.0
        self.threads: dict[greenlet, asyncio.Future[Any]] = {}
        self._loop = loop
        self._tasks: list[asyncio.Task[Any]] = []
        self._context = contextvars.copy_context()
        self._context.run(_process.set, self)

    def start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run a coroutine as part of this process."""
        task = self._loop.create_task(work, context=self._context.copy())
        self._tasks.append(task)
        return task

    def wait(self, seconds: float) -> None:
        """Give way, from a thread; a frozen process comes back when it thaws."""
        thread = getcurrent()
        due_s = self._loop.now_s + seconds
        while True:
            timer = self._loop.call_at(max(due_s, self.frozen_until_s), thread.switch)
            try:
                thread.parent.switch()
            except GreenletExit:
                timer.cancel()
                raise
            if self._loop.now_s >= self.frozen_until_s:
                return

    async def thawed(self) -> None:
        """Wait, from a task, until the process is not frozen."""
        while self._loop.now_s < self.frozen_until_s:  # noqa: ASYNC110 - it may freeze again
            await asyncio.sleep(self.frozen_until_s - self._loop.now_s)

    def adopt(self, tasks: "list[asyncio.Task[Any]]") -> None:
        """Take tasks that production code started."""
        self._tasks += tasks

    def kill(self) -> None:
        """As SIGKILL: no clean-up of it reaches anybody."""
        self.alive = False
        for thread, future in list(self.threads.items()):
            thread.throw(GreenletExit)
            future.cancel()
        self.threads.clear()
        for task in self._tasks:
            task.cancel()


_process: contextvars.ContextVar[Process] = contextvars.ContextVar("process")
