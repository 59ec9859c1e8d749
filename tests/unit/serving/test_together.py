"""Calls that are asked for at the same time become one; nobody is forgotten."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from afterclick.serving.together import Together


def test_who_comes_while_a_call_runs_shares_the_next_one() -> None:
    """Eight at once: the first alone, the other seven together."""
    began, go_on = threading.Event(), threading.Event()
    calls: list[int] = []

    def answer(asked: Sequence[int]) -> list[int]:
        calls.append(len(asked))
        began.set()
        go_on.wait(10)
        return [2 * number for number in asked]

    together = Together(answer)
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(together.ask, 0)
        began.wait(10)
        others = [threads.submit(together.ask, number) for number in range(1, 8)]
        while len(together._asking) < 7:
            pass
        go_on.set()
        assert [future.result(10) for future in [first, *others]] == list(range(0, 16, 2))
    assert calls == [1, 7]


@pytest.mark.parametrize("turns", [1, 3])
def test_everybody_gets_their_own_answer(turns: int) -> None:
    """A thousand questions from sixteen threads, at one or at three calls a time."""
    together = Together(lambda asked: [number * number for number in asked], turns=turns)
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(together.ask, range(1000))) == [n * n for n in range(1000)]


def test_an_error_reaches_all_who_shared_the_call_and_nobody_else() -> None:
    """A waiting thread that hears nothing would stop its partition for ever."""

    def answer(asked: Sequence[int]) -> list[int]:
        if any(number < 0 for number in asked):
            raise ValueError("negative")
        return list(asked)

    together = Together(answer)
    with pytest.raises(ValueError, match="negative"):
        together.ask(-1)
    assert together.ask(1) == 1
