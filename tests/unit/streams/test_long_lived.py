"""What a worker loads is kept from the garbage collector, which would stop all threads for it."""

import gc
import weakref

import pytest

from afterclick.serving.memory import Move
from afterclick.serving.records import UserRecord, decode_record, encode_record
from afterclick.streams.events import Click, decode_click, encode
from afterclick.streams.record import Record
from afterclick.streams.runtime import long_lived


def test_the_collector_neither_runs_meanwhile_nor_looks_at_it_later() -> None:
    """A collection among 20,000 items' parts took 40 to 110 ms in which no click was folded."""
    collected: list[str] = []
    note = lambda phase, _: collected.append(phase)  # noqa: E731 - called with two arguments
    frozen = gc.get_freeze_count()
    gc.callbacks.append(note)
    try:
        with long_lived():
            made = [[n] for n in range(100_000)]
        assert collected == []
        assert gc.get_freeze_count() - frozen >= len(made)
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()


def test_what_failed_to_load_is_collected_as_ever() -> None:
    """A worker that is offered broken releases for days must not grow."""
    frozen = gc.get_freeze_count()
    with pytest.raises(ValueError, match="broken"), long_lived():
        raise ValueError("broken")
    assert gc.get_freeze_count() == frozen
    assert gc.isenabled()


def test_cycles_do_not_pile_up_for_ever() -> None:
    """Each release leaves some; after years of swaps they would be gigabytes."""

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    try:
        with long_lived():
            left = weakref.ref(Cycle())
        gc.collect()
        assert left() is not None, "what long_lived(look=True) is for"
        with long_lived(look=True):
            pass
        assert left() is None
    finally:
        gc.unfreeze()


def test_it_looks_at_no_user_that_a_worker_remembers_and_at_no_click_on_its_way() -> None:
    """20,000 cached users made a whole look take 8 ms, and clicks a small one of every hundred."""
    key, value = encode(Click(user_id="u", item_id="i", event_id="e"))
    record = Record(1, 2, key, value)
    event = decode_click(record.key, record.value, offset=1, record_ms=2)
    user = decode_record(encode_record(UserRecord(1, 1, 1, 1, bytes(1024), bytes(14))))
    move = Move("i", 1, 2, (3, 4))
    assert not any(map(gc.is_tracked, (record, event, user, move)))
