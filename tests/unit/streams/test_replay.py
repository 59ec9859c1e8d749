"""What of a log is sent, in which order and when; the broker's part is in tests/contract."""

import pyarrow as pa
import pytest

from afterclick.serving.errors import ConfigError
from afterclick.streams.events import Click
from afterclick.streams.files import CLICKS_SCHEMA
from afterclick.streams.replay import Pace, between, clicks_of, main, paced, positive


def log(*times_ms: int | None) -> pa.Table:
    rows = [
        {"user_id": f"u{n}", "item_id": "i", "timestamp_ms": t, "event": "click", "event_id": None}
        for n, t in enumerate(times_ms)
    ]
    return pa.Table.from_pylist(rows, schema=CLICKS_SCHEMA)


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 50.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, wait_s: float) -> None:
        self.now_s += wait_s


def sent_at(pace: Pace, *times_ms: int | None) -> list[float]:
    clock = Clock()
    clicks = paced(clicks_of(log(*times_ms)), pace, monotonic=clock.monotonic, sleep=clock.sleep)
    return [round(clock.now_s - 50.0, 6) for _ in clicks]


def test_speed_follows_event_time():
    """A minute at speed 60 is a second, counted from the log's first click, whatever its year."""
    assert sent_at(Pace(speed=60), 1_000_000, 1_060_000, 1_060_000, 1_180_000) == [0, 1, 1, 3]


def test_rate_is_even_and_needs_no_times():
    """Load tests want a rate, and benchmarks come without times."""
    assert sent_at(Pace(rate=4), None, None, None) == [0, 0.25, 0.5]


def test_without_a_pace_nothing_waits():
    """The default is as fast as possible."""
    assert sent_at(Pace(), 1_000, 9_000_000) == [0, 0]


def test_a_late_click_leaves_at_once_and_the_pace_recovers():
    """A stall must not stretch the whole replay, nor leave clicks out."""
    clock = Clock()
    times = []
    for click in paced(
        clicks_of(log(0, 1000, 2000, 3000)),
        Pace(speed=1),
        monotonic=clock.monotonic,
        sleep=clock.sleep,
    ):
        times.append(clock.now_s - 50.0)
        if click.user_id == "u0":
            clock.now_s += 2.5

    assert times == [0, 2.5, 2.5, 3.0]


def test_clicks_carry_what_the_file_said():
    """A missing event id stays missing on the wire."""
    (click,) = clicks_of(log(7))

    assert click == Click(user_id="u0", item_id="i", timestamp_ms=7)


def test_a_part_of_the_log_by_time():
    """`from` is in, `to` is out: two neighbouring parts make the whole."""
    whole = log(1000, 1500, 2000, 2500)

    first, second = between(whole, None, 2.0), between(whole, 2.0, None)

    assert first.column("timestamp_ms").to_pylist() == [1000, 1500]
    assert second.column("timestamp_ms").to_pylist() == [2000, 2500]
    assert between(whole, 1.5, 2.5).num_rows == 2


def test_limits_need_times():
    """Leaving clicks without a time silently out would lose them."""
    with pytest.raises(ConfigError, match=r"--from and --to: .* 1 of 2 have none"):
        between(log(1000, None), 1.0, None)


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan"])
def test_a_pace_must_be_a_number_above_0(text):
    """`--rate 0` would never end."""
    with pytest.raises(Exception, match="must be a number above 0"):
        positive(text)


def test_speed_and_rate_exclude_each_other(tmp_path, capsys):
    """One of them would be ignored."""
    with pytest.raises(SystemExit):
        main([str(tmp_path / "log.csv"), "--speed", "2", "--rate", "3"])
    assert "not allowed with" in capsys.readouterr().err
