"""`afterclick evaluate`: a release by its ONNX graphs, beside every baseline."""

import json
from pathlib import Path

import numpy as np
import pytest

from afterclick.serving.errors import ConfigError
from afterclick.training.baselines import BASELINES
from afterclick.training.cli import evaluate, train
from afterclick.training.trial import without_last
from tests.unit.training.worlds import columns, ring

SETTINGS = 'units = 16\ndim = 16\nepochs = 2\nbatch_events = 128\nthreads = 1\ndevice = "cpu"\n'


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Training and held-out clicks, and small settings."""
    monkeypatch.setenv("AFTERCLICK_SERVING__RELEASES", str(tmp_path / "releases"))
    monkeypatch.setenv("AFTERCLICK_SERVING__PROVIDER", "cpu")
    for name, seed in (("clicks", 0), ("test", 1)):
        world = ring(seed=seed)
        assert world.time_ms is not None
        rows = [
            f"{u},{i},{t}" for u, i, t in zip(world.user, world.item, world.time_ms, strict=True)
        ]
        (tmp_path / f"{name}.csv").write_text("session,item,time\n" + "\n".join(rows))
    (tmp_path / "settings.toml").write_text(SETTINGS)
    return tmp_path


def test_a_release_is_ranked_as_its_training_run_ranked_it(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX graphs stepped one by one against torch on padded batches: the same ranks, and the same
    baselines counted on the same clicks.
    """
    clicks, test = str(files / "clicks.csv"), str(files / "test.csv")
    config = ["--config", str(files / "settings.toml")]
    train(["--clicks", clicks, "--test", test, "--json", "--progress", "none", *config])
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    told = trained["test"]
    picture = files / "plots" / "table.png"

    code = evaluate(
        [
            *("--release", "current", "--clicks", test, "--train", clicks, "--json"),
            *("--plot", str(picture)),
        ]
    )

    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["test"]["predictions"] == told["predictions"] > 0
    assert found["test"]["hit_rate_20"] == pytest.approx(told["hit_rate_20"], abs=1e-3)
    assert found["test"]["mrr_20"] == pytest.approx(told["mrr_20"], abs=1e-3)
    assert set(found["methods"]) == {"model", *BASELINES}
    assert found["validation"] == trained["metrics"], "settings are chosen by these"
    for name in BASELINES:
        assert found["methods"][name]["mrr_20"] == pytest.approx(told[name]["mrr_20"]), name
    for name, values in found["methods"].items():
        low, high = found["intervals"][name]["mrr_20"]
        assert low <= values["mrr_20"] <= high
        assert 0 < values["coverage"] <= 1
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_settings_are_trained_and_evaluated_without_a_release(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CSV of session, item and time goes through without code, and nothing is published."""
    clicks, test = str(files / "clicks.csv"), str(files / "test.csv")

    evaluate(["--config", str(files / "settings.toml"), "--clicks", test, "--train", clicks])

    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:]] == ["model", *BASELINES]
    assert not (files / "releases").exists()


def test_leave_one_out_predicts_each_user_s_last_click_and_no_seen_item(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MovieLens: one prediction a user, learnt from nothing later; a seen item is never right."""
    evaluate(
        [
            *("--config", str(files / "settings.toml"), "--clicks", str(files / "clicks.csv")),
            *("--mode", "leave-one-out", "--filter-seen", "--json"),
        ]
    )

    found = json.loads(capsys.readouterr().out)
    assert found["test"]["predictions"] == 120
    assert found["filter_seen"] is True
    world = ring(seed=0)
    last = dict(zip(world.user, world.item, strict=True))
    past: dict[str, list[str]] = {}
    for user, item in zip(world.user, world.item, strict=True):
        past.setdefault(user, []).append(item)
    new = np.mean([last[user] not in past[user][:-1] for user in last])
    for values in found["methods"].values():
        assert values["hit_rate_20"] <= new, "a last item that was seen cannot be found"


def test_the_last_click_on_an_item_is_what_is_left_out() -> None:
    """A visit after it names no item."""
    given = columns(
        ("u", "a", 1), ("v", "b", 2), ("u", "c", 3), ("u", "", 4, "visit"), ("v", "d", 5)
    )

    assert without_last(given).item.tolist() == ["a", "b", ""]


def test_what_to_evaluate_must_be_said_once() -> None:
    """Neither a release nor settings, or both; and how to ask for the defaults."""
    with pytest.raises(ConfigError, match=r"either --release.*/dev/null"):
        evaluate(["--clicks", "x.csv"])
