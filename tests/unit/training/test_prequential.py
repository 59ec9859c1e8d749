"""Prequential evaluation: what is judged, in which order, by the worker's own path."""

import json
from pathlib import Path

import pytest

from afterclick.serving.errors import ConfigError
from afterclick.streams.events import Click
from afterclick.training import prequential
from afterclick.training.cli import evaluate
from afterclick.training.prequential import Pace, Renewals
from tests.unit.training.worlds import ring

HOUR_MS = 3600 * 1000
START_MS = 1_700_000_000_000


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten hours of clicks in which users go on; a new item of a known category late."""
    monkeypatch.setenv("AFTERCLICK_SERVING__PROVIDER", "cpu")
    monkeypatch.setenv("AFTERCLICK_SERVING__RELEASES", str(tmp_path / "releases"))
    write_clicks(tmp_path / "clicks.csv", num_users=40)
    items = [f"i{n:03d},c{n % 3},{START_MS}" for n in range(40)]
    items.append(f"new,c0,{START_MS + 9 * HOUR_MS}")
    (tmp_path / "items.csv").write_text("item_id,categories,published_ms\n" + "\n".join(items))
    (tmp_path / "settings.toml").write_text(
        'units = 16\ndim = 16\nepochs = 2\nbatch_events = 128\nthreads = 1\ndevice = "cpu"\n'
    )
    return tmp_path


def write_clicks(path: Path, num_users: int) -> None:
    world = ring(num_users=num_users, length=12)
    rows = [
        f"{user},{item},{START_MS + at * 10 * HOUR_MS // len(world.user)}"
        for at, (user, item) in enumerate(zip(world.user, world.item, strict=True))
    ]
    path.write_text("user_id,item_id,timestamp_ms\n" + "\n".join(rows))


def live(files: Path, *arguments: str) -> list[str]:
    return [
        *("--mode", "live", "--clicks", str(files / "clicks.csv"), "--json"),
        *("--items", str(files / "items.csv"), "--config", str(files / "settings.toml")),
        *("--from", str((START_MS + 5 * HOUR_MS) / 1000), *arguments),
    ]


def test_every_live_click_is_judged_once_and_releases_are_swapped_in(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the clicks are live; a release every two hours; the rates are those of the lists that
    were given, compared with clicks that no list had seen yet.
    """
    judged: list[tuple[list[str], str]] = []
    place = prequential._place

    def watch(items: list[str], item: str) -> int:
        judged.append((items, item))
        return place(items, item)

    monkeypatch.setattr(prequential, "_place", watch)

    assert evaluate(live(files, "--retrain-every", "2h")) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["test"]["predictions"] == 240
    assert found["releases"] == 3
    assert [point["hours"] for point in found["curve"]] == [2, 4, 6]
    assert sum(point["clicks"] for point in found["curve"]) == 240
    assert set(found["methods"]) == set(prequential.METHODS)
    columns = [name for name in ("standing", "at_click") if name in found["methods"]]
    for number, name in enumerate(columns):
        lists = judged[number::2]
        hits = [item in items for items, item in lists]
        assert all(len(items) == 20 for items, _ in lists)
        assert found["methods"][name]["hit_rate_20"] == pytest.approx(sum(hits) / len(hits))
    assert not (files / "releases").exists(), "nothing of an evaluation is published"
    assert found["pace"] == {
        "retrain_every_h": 2,
        "renew_every_s": 300,
        "renew_users_max": 10_000,
    }
    assert found["us_per_list"] > 0


def test_only_lists_that_somebody_is_judged_by_are_renewed() -> None:
    """The others would be replaced unseen: judged is the same, the work a hundredth."""
    clicks = [
        Click(user_id=user, item_id="i", timestamp_ms=second * 1000)
        for user, second in (("a", 10), ("b", 290), ("c", 310), ("a", 900))
    ]
    renewals = Renewals(clicks, Pace(renew_every_s=300, renew_users_max=2), 0)
    recent = ["c", "b", "a"]

    def due(second: int, *, at_once: bool = False) -> list[str]:
        return renewals.due(lambda limit: recent[:limit], second * 1000, at_once=at_once)

    assert due(10) == ["b"], "a is not among the two users who clicked last"
    assert due(290) == []
    assert due(290, at_once=True) == ["b"], "a release starts a pass of its own"
    assert due(310) == ["c"]
    recent[:] = ["a", "c"]
    assert due(900) == ["a"], "after a silence one pass, the last"
    assert Renewals(clicks, Pace(renew_users_max=0), 0).due(lambda limit: recent, 10_000) == []


def test_lists_know_everybodys_clicks_and_the_curve_is_drawn(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a blend: the memory hears each click, the newcomer's list is the blend's, too; and it is
    fitted with a memory that does, without being told.
    """
    memories: list[str] = []
    train_release = prequential.train_release

    def watch(source, settings, *arguments, **named):
        memories.append(settings.blend_memory)
        return train_release(source, settings, *arguments, **named)

    monkeypatch.setattr(prequential, "train_release", watch)
    write_clicks(files / "clicks.csv", num_users=80)
    config = files / "settings.toml"
    config.write_text(config.read_text() + 'blend = "on"\nvalidation = 0.5\n')
    png = files / "curve.png"

    assert evaluate(live(files, "--retrain-every", "0", "--plot", str(png))) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["releases"] == 1
    assert memories == ["live"]
    assert found["methods"]["at_click"]["hit_rate_20"] > 0.5
    assert {"at_click_without_model", "at_click_model_at_zero"} <= set(found["methods"])
    at_zero = found["methods"]["at_click_model_at_zero"]
    assert at_zero["predictions"] == found["test"]["predictions"]
    assert at_zero["mrr_20"] != found["test"]["mrr_20"]
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_live_needs_to_know_where_live_begins(files: Path) -> None:
    """There is no sensible default for the cut."""
    with pytest.raises(ConfigError, match="--from"):
        evaluate(["--mode", "live", "--clicks", str(files / "clicks.csv")])
