"""How many rounds a process folds at the same time where nobody says it."""

import pytest

from afterclick.streams.settings import StreamsSettings, fold_threads


@pytest.mark.parametrize(
    ("cores", "processes", "threads"),
    [(1, 1, 2), (2, 1, 2), (2, 2, 2), (4, 1, 3), (64, 1, 3), (64, 64, 2), (64, 16, 3)],
)
def test_no_more_threads_than_one_interpreter_feeds(
    cores: int, processes: int, threads: int
) -> None:
    """65 on 64 cores would have waited for one lock; with several processes each has a share."""
    assert fold_threads(StreamsSettings(processes=processes), cores) == threads


def test_what_is_set_holds() -> None:
    """Whatever the machine has."""
    assert fold_threads(StreamsSettings(fold_threads=7, processes=2), 2) == 7
