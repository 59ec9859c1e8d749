"""Whose lists are made anew, and when."""

from afterclick.streams.renewal import BATCH_USERS, Basis, Renewal

OLD, NEW = Basis(1, (5,)), Basis(2, (5,))


def passes(renewal: Renewal, basis: Basis, users: list[str], now_s: float) -> list[str]:
    """All users of what is left, batch by batch."""
    found: list[str] = []
    while batch := renewal.batch(basis, lambda limit: users[:limit], now_s):
        found += batch
    return found


def test_a_publication_starts_a_pass_at_once_in_bounded_batches() -> None:
    """Newest first, each once, and never more at a time than a click may wait for."""
    users = [f"u{n}" for n in range(3 * BATCH_USERS)]
    renewal = Renewal(2 * BATCH_USERS + 1, 60, OLD, now_s=0)
    assert not renewal.pending(OLD, 1)
    assert renewal.pending(NEW, 1)
    assert renewal.batch(NEW, lambda limit: users[:limit], 1) == users[:BATCH_USERS]
    assert passes(renewal, NEW, users, 1) == users[BATCH_USERS : 2 * BATCH_USERS + 1]
    assert not renewal.pending(NEW, 2)


def test_items_start_a_pass_only_so_often() -> None:
    """A catalogue that moves every second must not keep the worker renewing for ever."""
    renewal = Renewal(10, 60, OLD, now_s=0)
    moved = Basis(1, (6,))
    assert passes(renewal, moved, ["u"], now_s=59) == []
    assert passes(renewal, moved, ["u"], now_s=60) == ["u"]
    assert passes(renewal, Basis(1, (7,)), ["u"], now_s=100) == []


def test_zero_users_never_renew() -> None:
    """The setting's off position."""
    assert not Renewal(0, 60, OLD, now_s=0).pending(NEW, 1)
