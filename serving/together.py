"""Small calls that are asked for at the same time become one.

Chunks of several partitions come at about the same moment, and most of what a small call costs does
not grow with it. Only for answers that do not depend on who shares the call. Knows no engine.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class _Ask(Generic[Q, A]):
    """A question, and its answer once there is one."""

    def __init__(self, question: Q) -> None:
        self.question = question
        self.answers: list[A] = []
        self.error: Exception | None = None
        self.done = threading.Event()


class Together(Generic[Q, A]):
    """Answers what several threads ask; whoever comes while `turns` calls run waits for the next.

    Args:
        answer: one answer for each of some questions, in their order.
        turns: calls at the same time.
    """

    def __init__(self, answer: Callable[[Sequence[Q]], Sequence[A]], *, turns: int = 1) -> None:
        self._answer = answer
        self._turns = threading.Semaphore(turns)
        self._guard = threading.Lock()
        self._asking: list[_Ask[Q, A]] = []

    def ask(self, question: Q) -> A:
        """The answer, perhaps from a call that somebody else made.

        Raises:
            Exception: what `answer` raised; everybody who shared the call hears of it.
        """
        if not self._asking and self._turns.acquire(blocking=False):
            try:  # nobody else is here, nor does anybody need to hear of this
                return self._answer([question])[0]
            finally:
                self._turns.release()
        ask: _Ask[Q, A] = _Ask(question)
        with self._guard:
            self._asking.append(ask)
        with self._turns:
            with self._guard:
                asking = self._asking
                if ask in asking:
                    self._asking = []
            if ask in asking:
                self._answer_all(asking)
        ask.done.wait()  # taken by another call that is not through yet
        if ask.error is not None:
            raise ask.error
        return ask.answers[0]

    def _answer_all(self, asking: list[_Ask[Q, A]]) -> None:
        try:
            answers = self._answer([ask.question for ask in asking])
            for ask, answer in zip(asking, answers, strict=True):
                ask.answers.append(answer)
        except Exception as error:  # noqa: BLE001 - all who asked must hear of it
            for ask in asking:
                ask.error = error
        finally:
            for ask in asking:
                ask.done.set()
