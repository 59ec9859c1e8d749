"""The worker as a process, on a real broker and a real Redis."""

import itertools
import json
import time
import urllib.request

import pytest

from afterclick.serving.keys import partition_of
from afterclick.serving.reader import TopK
from afterclick.serving.records import decode_record
from afterclick.streams.events import Click, Item, encode
from afterclick.streams.local import readiness
from tests.doubles import damaged
from tests.service.stage import Stage, some_clicks

pytestmark = pytest.mark.service


def test_from_click_to_list_without_and_with_a_release(stage: Stage) -> None:
    """The whole path: popularity first, then the model by the same worker, then a rollback."""
    with stage.worker() as worker:
        stage.send(some_clicks(60))
        stage.wait_folded()
        with TopK(stage.serving.redis, namespace=stage.serving.namespace) as top_k:
            assert top_k.get("u7").source == "popularity"
            stage.wait(lambda: bool(top_k.get("nobody").items), "a fallback list")
            assert top_k.get("nobody").source == "fallback"
        stage.publish("r1", seed=1)
        stage.wait(lambda: '"publication":1' in readiness(worker.port)[1].replace(" ", ""), "swap")
        stage.send(some_clicks(60, start=60))
        stage.wait_folded()
        first = stage.top("u7")
        stage.publish("r2", seed=2)
        stage.wait(lambda: '"publication":2' in readiness(worker.port)[1].replace(" ", ""), "swap")
        stage.send(some_clicks(60, start=120))
        stage.wait_folded()
        assert stage.top("u7") != first
        assert stage.releases.publish("r1").number == 3
        stage.wait(lambda: '"publication":3' in readiness(worker.port)[1].replace(" ", ""), "swap")
        stage.send(some_clicks(60, start=180))
        stage.wait_folded()
        metrics = urllib.request.urlopen(f"{worker.url}/metrics").read().decode()  # noqa: S310
    assert "afterclick_clicks_total 240.0" in metrics
    assert "afterclick_swaps_total 3.0" in metrics
    report = stage.verify()
    assert report.first_difference is None
    assert (report.records, report.clicks, report.behind) == (40, 240, 0)


def test_a_release_that_fails_its_checks_is_refused_and_the_old_one_stays(stage: Stage) -> None:
    """A torn or tampered release must neither serve nor stop the stream."""
    stage.publish("good", seed=1)
    with stage.worker() as worker:
        stage.send(some_clicks(20))
        stage.wait_folded()
        publication = stage.publish("tampered", seed=2)
        broken = stage.folder / "releases" / "tampered" / "scan_vectors.npy"
        stage.wait(lambda: '"publication":2' in readiness(worker.port)[1].replace(" ", ""), "swap")
        broken.write_bytes(damaged(broken.read_bytes()))
        current = stage.folder / "releases" / "current.json"
        current.write_text(
            json.dumps(
                {
                    "number": publication.number + 1,
                    "release": "tampered",
                    "sha256": publication.sha256,
                }
            )
        )
        stage.wait(lambda: "sha256 of scan_vectors.npy" in readiness(worker.port)[1], "refusal")
        assert readiness(worker.port)[0], "a refused release leaves the worker ready"
        stage.send(some_clicks(20, start=20))
        stage.wait_folded()
    store = stage.store()
    heads = store.read(0, []).head
    store.close()
    assert b'"publication":2' in heads


@pytest.mark.parametrize("topics", [(4, 2)], indirect=True)
def test_two_workers_know_all_items_of_two_partitions_before_their_first_click(
    stage: Stage,
) -> None:
    """An item that only one worker knew would give lists that depend on who holds the partition."""
    stage.publish("r1", seed=1, encoder=True)
    fresh = [Item(item_id=f"fresh{n}", title=f"Item {n}") for n in range(20)]
    fresh += [Item(item_id=f"fresh{n}", categories=[f"c{n % 5}"]) for n in range(20, 40)]
    gone = [Item(item_id=f"i{n:05d}", available=False) for n in range(0, 300, 3)]
    stage.send([*fresh, *gone])
    stage.send(some_clicks(200))
    with stage.worker() as one, stage.worker() as two:
        stage.send(some_clicks(200, start=200))
        stage.wait_folded()
        held = [json.loads(readiness(w.port)[1]) for w in (one, two)]
        for clicked in range(40):
            stage.send([Click(user_id=f"u{clicked}", item_id=f"fresh{clicked}")])
        stage.wait_folded()
    assert sum(len(page["partitions"]) for page in held) == 4
    unavailable = {item.item_id for item in gone}
    for user in range(40):
        assert not unavailable & set(stage.top(f"u{user}"))
    report = stage.verify()
    assert report.first_difference is None
    store = stage.store()
    entries = [entry for p in range(4) for entry in store.inputs(p)]
    records = [
        decode_record(data)
        for p in range(4)
        for user in sorted(store.users(p))
        for data in store.read(p, [user]).records
        if data
    ]
    store.close()
    assert all(sum(entry.items) == 140 for entry in entries), "items came before the first click"
    assert sum(record.steps for record in records) == 440


def test_a_new_item_is_stepped_soon_after_its_event(stage: Stage) -> None:
    """News is worth most in its first minute; a title is all that is known of it."""
    stage.publish("r1", seed=1, encoder=True)
    store = stage.store()
    with stage.worker():
        stage.send(some_clicks(20))
        stage.wait_folded()
        sent_s, tries = time.monotonic(), itertools.count()

        def stepped() -> bool:
            user = f"reader{next(tries)}"
            stage.send([Click(user_id=user, item_id="news")])
            stage.wait_folded()
            found = [store.read(p, [user]).records[0] for p in (0, 1)]
            return any(decode_record(data).steps for data in found if data)

        stage.send([Item(item_id="news", title="Item 7 again")])
        stage.wait(stepped, "the new item has a row")
        took_s = time.monotonic() - sent_s
    store.close()
    # A second is promised; the rest is for a machine that does five things at once.
    assert took_s < 5


def test_bad_input_costs_itself_only(stage: Stage) -> None:
    """Every kind of poison beside good clicks: a dead letter with its reason, nothing else lost."""
    stage.publish("r1", seed=1)
    good = Click(user_id="u1", item_id="i00001", timestamp_ms=1_700_000_000_000)
    future = Click(user_id="u1", item_id="i00002", timestamp_ms=4_102_444_800_000)
    poison = [
        (b"u1", b"\xff\x00 not json", b"json"),
        (b"u1", b'{"user_id": 7, "item_id": "i1"}', b"schema"),
        (b"u1", b'{"item_id": "i1"}', b"schema"),
        (b"u2", b'{"user_id": "u1", "item_id": "i1"}', b"wrong-key"),
        (None, b'{"user_id": "u1", "item_id": "i1"}', b"null-key"),
        (b"u1", None, b"null-value"),
        (b"u1", b'{"user_id": "u1"}', b"missing-item"),
        (b"u1", b'{"user_id": "u1", "item_id": "' + b"x" * 900_000 + b'"}', b"schema"),
    ]
    with stage.worker() as worker:
        stage.send([good])
        for key, value, _ in poison:
            stage.send_raw(key, value)
        stage.send([future])
        stage.wait_folded()
        metrics = urllib.request.urlopen(f"{worker.url}/metrics").read().decode()  # noqa: S310
    letters = stage.dead_letters()
    assert [letter["afterclick.reason"] for letter in letters] == [r for _, _, r in poison]
    assert [letter["value"] for letter in letters] == [value or b"" for _, value, _ in poison]
    assert "afterclick_clock_replaced_total 1.0" in metrics
    report = stage.verify()
    assert report.first_difference is None
    assert report.clicks == 2


def test_a_value_of_ten_megabytes_is_a_dead_letter(stage: Stage) -> None:
    """A broker may take it; one record must not stop a partition."""
    value = b'{"user_id": "u1", "item_id": "i1", "context": {"x": "' + b"x" * (10 << 20) + b'"}}'
    try:
        stage.send_raw(b"u1", value)
    except Exception as error:  # noqa: BLE001 - a broker that refuses it is fine too
        assert "large" in repr(error).lower()  # noqa: PT017
        return
    with stage.worker():
        stage.send([Click(user_id="u1", item_id="i00001")])
        stage.wait_folded()
    (letter,) = stage.dead_letters()
    assert letter["afterclick.reason"] == b"too-large"
    assert (
        letter["value"] == value or letter["afterclick.omitted_bytes"] == str(len(value)).encode()
    )
    assert stage.verify().clicks == 1


def test_forget_empties_the_record_and_the_list(stage: Stage) -> None:
    """A forgotten user is a stranger again, and stays one in a replay."""
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(some_clicks(40, users=4))
        stage.wait_folded()
        stage.send([Click(user_id="u1", event="forget")])
        stage.wait_folded()
    store = stage.store()
    assert "u1" not in {user for p in (0, 1) for user in store.users(p)}
    store.close()
    with TopK(stage.serving.redis, namespace=stage.serving.namespace) as top_k:
        assert top_k.get("u1").source in ("fallback", "none")
    assert stage.verify().first_difference is None


def test_clicks_in_the_wrong_partition_are_counted(stage: Stage) -> None:
    """librdkafka's default partitioner, or a producer that knows an old partition count: the user
    would have two pasts, and nobody would know.
    """
    click = Click(user_id="u1", item_id="i00001")
    right = partition_of("u1", 2)
    with stage.worker() as worker:
        stage.send_raw(*encode(click), partition=right)
        stage.send_raw(*encode(click), partition=1 - right)
        stage.wait_folded()
        metrics = urllib.request.urlopen(f"{worker.url}/metrics").read().decode()  # noqa: S310
    assert "afterclick_misplaced_clicks_total 1.0" in metrics
