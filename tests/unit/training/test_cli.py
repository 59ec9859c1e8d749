"""`afterclick train` from files to a published release, as its users and the demo see it."""

import json
from pathlib import Path

import pytest

from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.manifest import ENCODER_NAME, FILES, MANIFEST_NAME
from afterclick.serving.releases import ReleaseStore
from afterclick.training import export
from afterclick.training.cli import train
from tests.unit.training.worlds import ring

SMALL = [
    "--epochs",
    "2",
    "--units",
    "16",
    "--dim",
    "16",
    "--batch-events",
    "128",
    "--threads",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Clicks, items and a test file, with the releases' folder in the environment."""
    monkeypatch.setenv("AFTERCLICK_SERVING__RELEASES", str(tmp_path / "releases"))
    for name, seed in (("clicks", 0), ("test", 1)):
        world = ring(seed=seed)
        assert world.time_ms is not None
        rows = [
            f"{u},{i},{t}" for u, i, t in zip(world.user, world.item, world.time_ms, strict=True)
        ]
        (tmp_path / f"{name}.csv").write_text("user_id,item_id,timestamp_ms\n" + "\n".join(rows))
    (tmp_path / "items.csv").write_text("item_id,title,categories\ni000,一,x\nnew,二,x\n")
    return tmp_path


def test_files_become_a_published_release(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Progress as JSON lines, the result as the last one."""
    code = train(
        [
            *("--clicks", str(files / "clicks.csv"), "--items", str(files / "items.csv")),
            *("--test", str(files / "test.csv"), "--progress", "jsonl", "--json", *SMALL),
        ]
    )

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stages = [line["stage"] for line in lines[:-1]]
    assert code == 0
    expected = ["train", "fit", "fit", "fit", "baselines", "test", "export", "published", "report"]
    assert stages == expected
    result = lines[-1]
    assert set(result["test"]) >= {"hit_rate_20", "mrr_20", "predictions", "markov", "popularity"}
    assert 0 < result["test"]["mrr_20"] <= result["test"]["hit_rate_20"] <= 1
    assert result["publication"] == 1
    assert Path(result["report"]).read_bytes()[:4] == b"\x89PNG"
    store = ReleaseStore(str(files / "releases"))
    assert store.list() == [result["release"]]
    folder = files / "releases" / result["release"]
    assert {path.name for path in folder.iterdir()} == {*FILES, ENCODER_NAME, MANIFEST_NAME}
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert {"model", "popularity", "popularity_24h", "markov"} <= set(manifest["metrics"])
    assert manifest["snapshot"]["source"] == "clicks.csv"
    assert manifest["num_items"] == 41


def test_a_log_of_one_user_is_told_apart_from_a_good_one(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong user column gave a release without a figure, and no word."""
    lines = (files / "clicks.csv").read_text().splitlines()
    same = [line.partition(",")[2] for line in lines[1:]]
    text = "\n".join(["user_id,item_id,timestamp_ms", *(f"u,{rest}" for rest in same)])
    (files / "one.csv").write_text(text)
    for name, told in (("clicks", False), ("one", True)):
        caplog.clear()
        assert train(["--no-publish", "--clicks", str(files / f"{name}.csv"), *SMALL]) == 0
        assert ("all clicks belong to one user" in caplog.text) == told


def test_without_publishing_the_current_release_stays(files: Path) -> None:
    """The release is there to be looked at, no worker takes it."""
    clicks = ["--clicks", str(files / "clicks.csv"), "--progress", "none", "--no-publish"]

    assert train([*clicks, *SMALL]) == 0

    store = ReleaseStore(str(files / "releases"))
    assert store.current() is None
    assert len(store.list()) == 1


def test_a_refused_release_leaves_nothing_behind(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder, no staging, no publication; an impossible tolerance stands for a broken graph."""
    monkeypatch.setattr(export, "TOLERANCE", -1.0)

    with pytest.raises(ContractError, match="export gate, random histories"):
        train(["--clicks", str(files / "clicks.csv"), "--progress", "none", *SMALL])

    store = ReleaseStore(str(files / "releases"))
    assert store.list() == []
    assert store.current() is None
    assert not list((files / "releases").glob(".staging-*"))


@pytest.mark.parametrize(
    "argv", [[], ["--topic", "--clicks", "x.csv"], ["--topic", "--items", "x"]]
)
def test_a_run_says_where_its_clicks_are(argv: list[str]) -> None:
    """Exactly one source."""
    with pytest.raises(ConfigError, match="--clicks"):
        train(argv)


def test_a_warm_run_begins_where_the_published_release_ended(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer passes, and a first loss far below that of a run from chance."""
    argv = ["--clicks", str(files / "clicks.csv"), "--progress", "none", "--json", *SMALL]
    config = files / "warm.toml"
    config.write_text("warm_start = true\nwarm_epochs = 1\n")
    train(argv)
    cold = json.loads(capsys.readouterr().out)["curve"]

    train([*argv, "--config", str(config)])

    warm = json.loads(capsys.readouterr().out)["curve"]
    assert [epoch["final"] for epoch in warm] == [False, True]
    assert warm[0]["loss"] < cold[0]["loss"] - 0.3
