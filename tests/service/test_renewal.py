"""Lists made later by a real worker: renewed while users are away, put off under load."""

import re
import urllib.request

import pytest

from afterclick.serving.reader import TopK
from afterclick.streams.local import Worker
from tests.service.stage import Stage, some_clicks

pytestmark = [pytest.mark.service, pytest.mark.anybroker]


def metric(worker: Worker, name: str) -> float:
    """Value of one metric without labels."""
    page = urllib.request.urlopen(f"{worker.url}/metrics").read().decode()  # noqa: S310
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    assert found, f"{name} is not on the page"
    return float(found[1])


def test_users_who_are_away_get_lists_of_the_new_release(stage: Stage) -> None:
    """Without a click: who comes back tomorrow must not read what an old release thought."""
    stage.publish("r1", seed=1)
    with (
        stage.worker() as worker,
        TopK(stage.serving.redis, namespace=stage.serving.namespace) as top_k,
    ):
        stage.send(some_clicks(80))
        stage.wait_folded()
        users = [f"u{n}" for n in range(40)]
        before = top_k.get_many(users)
        stage.publish("r2", seed=2)
        stage.wait(
            lambda: all(top.publication == 2 for top in top_k.get_many(users)), "all lists renewed"
        )
        after = top_k.get_many(users)
        assert [top.offset for top in after] == [top.offset for top in before]
        assert all(a.items != b.items for a, b in zip(after, before, strict=True))
        assert metric(worker, "afterclick_renewed_lists_total") == 40
        report = stage.verify()
        assert report.first_difference is None
        assert (report.renewed, report.lists) == (40, 40)
        stage.send(some_clicks(80, start=80))
        stage.wait_folded()
    report = stage.verify()
    assert report.first_difference is None
    assert report.clicks == 160


def test_a_backlog_advances_states_first_and_leaves_no_list_due(stage: Stage) -> None:
    """Behind the budget every click is folded and its list made once, when nothing waits."""
    stage.publish("r1", seed=1)
    stage.send(some_clicks(4000))
    budget = {
        "AFTERCLICK_STREAMS__LATENCY_BUDGET_MS": "1",
        "AFTERCLICK_STREAMS__CHUNK_RECORDS_MAX": "64",
    }
    with stage.worker(**budget) as worker:
        stage.wait_folded()
        assert metric(worker, "afterclick_put_off_lists_total") > 100
        store = stage.store()
        stage.wait(lambda: not any(store.due_users(p, 1) for p in stage.ends()), "nothing due")
        store.close()
        assert metric(worker, "afterclick_clicks_total") == 4000
    report = stage.verify()
    assert report.first_difference is None
    assert (report.clicks, report.lists, report.put_off) == (4000, 40, 0)
