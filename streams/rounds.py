"""Chunks that wait, of any partition, are folded in one go: a round.

Whoever has clicks asks; once a slot is free, a round takes all who ask by then, up to about as many
records as one scan gains from. So nobody is delayed while little comes, and under load rounds grow
instead of their number: most of what one costs does not depend on its size.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol

from afterclick.serving.errors import ContractError
from afterclick.serving.scanner import USERS_MAX
from afterclick.streams.gate import Gate
from afterclick.streams.lockstep import Folder, LockstepStore, Steps, in_step
from afterclick.streams.partition import Moved

RECORDS_MAX = USERS_MAX
"""Of a round of several partitions: more gain nothing, and would wait for each other."""


class Member(Protocol):
    """A partition as a round sees it."""

    @property
    def num_waiting(self) -> int:
        """Records that it would bring."""

    def take(self) -> Callable[[], Steps[Moved]] | None:
        """Take what waits, now that it is folded; None if nothing does any more. What comes back
        begins the fold, and begins it anew should it be called again.
        """


class _Waiting(NamedTuple):
    member: Member
    done: "asyncio.Future[Moved | None]"


class Rounds:
    """Shared by a worker's partitions.

    Args:
        store: of all of them.
        folding: `fold.fold`, or something around it.
        gate: held during a round.
        threads: where it runs.
        slots: rounds, and renewals, at the same time.
        start: begins a task.
    """

    def __init__(
        self,
        store: LockstepStore,
        folding: Folder,
        gate: Gate,
        threads: ThreadPoolExecutor | None,
        slots: int,
        *,
        start: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"] = asyncio.create_task,
    ) -> None:
        self._store, self._folding, self._gate, self._threads = store, folding, gate, threads
        self._slots = asyncio.Semaphore(slots)
        self._start = start
        self._waiting: deque[_Waiting] = deque()
        self._next: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A slot, with nothing swapped meanwhile."""
        async with self._slots, self._gate.shared():
            yield

    async def fold(self, member: Member) -> Moved | None:
        """Take part in the next round; None if nothing waited any more when it began.

        Raises:
            AfterclickError: what stopped this partition's fold.
        """
        one = _Waiting(member, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        self._call()
        try:
            return await asyncio.shield(one.done)
        except asyncio.CancelledError:
            if one in self._waiting:
                self._waiting.remove(one)
            else:  # a thread may be writing: it must not go on behind the next owner's back
                await asyncio.gather(one.done, return_exceptions=True)
            raise

    def _call(self) -> None:
        if self._next is None:
            self._next = self._start(self._round())
            self._tasks.add(self._next)
            self._next.add_done_callback(self._tasks.discard)

    async def _round(self) -> None:
        taken: list[tuple[_Waiting, Callable[[], Steps[Moved]]]] = []
        try:
            async with self.turn():
                self._next = None
                taken = self._taken()
                if self._waiting:
                    self._call()
                if taken:
                    begins = [begin for _, begin in taken]
                    loop = asyncio.get_running_loop()
                    outcomes = await loop.run_in_executor(self._threads, self._work, begins)
                    for (one, _), outcome in zip(taken, outcomes, strict=True):
                        if isinstance(outcome, Exception):
                            one.done.set_exception(outcome)
                        else:
                            one.done.set_result(outcome)
        except Exception as error:  # noqa: BLE001 - a partition that hears nothing waits for ever
            for one, _ in taken:
                if not one.done.done():
                    one.done.set_exception(error)
        finally:
            for one, _ in taken:
                one.done.cancel()  # nobody's: all are done, unless this task was ended

    def _taken(self) -> list[tuple[_Waiting, Callable[[], Steps[Moved]]]]:
        taken: list[tuple[_Waiting, Callable[[], Steps[Moved]]]] = []
        num = 0
        while self._waiting:
            num += self._waiting[0].member.num_waiting
            if taken and num > RECORDS_MAX:
                break
            one = self._waiting.popleft()
            begin = one.member.take()
            if begin is None:
                one.done.set_result(None)
            else:
                taken.append((one, begin))
        return taken

    def _work(self, begins: list[Callable[[], Steps[Moved]]]) -> list[Moved | Exception]:
        outcomes = in_step([begin() for begin in begins], self._store, self._folding)
        if len(begins) > 1:
            # What one partition's bytes broke is no reason to refuse those it was folded with.
            for at, outcome in enumerate(outcomes):
                if isinstance(outcome, ContractError):
                    (outcomes[at],) = in_step([begins[at]()], self._store, self._folding)
        return outcomes
