"""An outage must not fill a disk with one sentence, and must not go unseen either."""

import logging

import pytest

from afterclick.streams.repeats import EVERY_S, KINDS_MAX, Repeats, keep_back_repeats


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def line(message: str, *args: object, name: str = "library.part") -> logging.LogRecord:
    return logging.LogRecord(name, logging.ERROR, "", 0, message, args, None)


def test_a_line_comes_once_and_then_again_with_the_number_kept_back() -> None:
    """Whoever reads the log sees that it still goes on, and how fast."""
    clock = Clock()
    repeats = Repeats(clock)
    assert repeats.filter(line("no answer from %s", "a"))
    assert not any(repeats.filter(line("no answer from %s", "b")) for _ in range(50))
    clock.now_s += EVERY_S
    again = line("no answer from %s", "c")
    assert repeats.filter(again)
    assert again.getMessage() == "no answer from c (and 50 times since it was last shown)"


def test_other_lines_pass() -> None:
    """What is new must be seen at once, from another part too."""
    repeats = Repeats(Clock())
    assert repeats.filter(line("no answer"))
    assert repeats.filter(line("refused"))
    assert repeats.filter(line("no answer", name="library.other"))


def test_a_library_that_never_says_the_same_twice_takes_no_memory() -> None:
    """Everything has a limit."""
    repeats = Repeats(Clock())
    for number in range(3 * KINDS_MAX):
        repeats.filter(line(f"connection {number} lost"))
    assert len(repeats._said) <= KINDS_MAX


def test_the_loggers_of_a_package_are_filtered_and_no_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Our own lines are few, and each counts."""
    noisy, ours = logging.getLogger("noisylib.net"), logging.getLogger("noisylibrary")
    keep_back_repeats(["noisylib"])
    for _ in range(3):
        noisy.error("lost")
        ours.error("lost")
    assert [record.name for record in caplog.records].count("noisylib.net") == 1
    assert [record.name for record in caplog.records].count("noisylibrary") == 3
