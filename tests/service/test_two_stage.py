"""The scan in two stages in a worker, and a replay that was not told of it."""

import pytest

from afterclick.serving.index import SURVIVORS
from afterclick.streams.events import Click, Item
from afterclick.streams.verify import verify
from tests.service.stage import Stage, some_clicks

pytestmark = [pytest.mark.service, pytest.mark.anybroker]


def test_a_replay_takes_the_scan_that_the_lists_were_made_with(stage: Stage) -> None:
    """Scores of the two differ in their last bits, so the settings of `verify` must not decide."""
    stage.publish("r1", seed=1, num_items=4 * SURVIVORS)
    with stage.worker(AFTERCLICK_SERVING__SCAN="two-stage"):
        stage.send([Item(item_id="fresh", categories=["c1"]), *some_clicks(100)])
        stage.wait_folded()
        stage.send([Click(user_id="u1", item_id="fresh")])
        stage.wait_folded()

    store = stage.store()
    assert {entry.rules.scan for p in (0, 1) for entry in store.inputs(p)} == {"two-stage"}
    store.close()
    report = verify(stage.serving, stage.streams)
    assert (report.clicks, report.differences) == (101, 0), report.first_difference
