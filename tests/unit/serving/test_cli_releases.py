"""`afterclick releases` on a real folder: list, publish, roll back, show."""

import json
from pathlib import Path

import pytest

from afterclick.serving.cli import main
from tests.tiny_release import write_tiny_release


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "releases"
    monkeypatch.setenv("AFTERCLICK_SERVING__RELEASES", str(folder))
    return folder


def test_a_rollback_is_publishing_the_old_release_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way back must be one command that is safe at 3 a.m., and it gets a number of its own."""
    for seed, name in enumerate(("old", "new")):
        write_tiny_release(root / name, num_items=30, seed=seed)

    for name in ("old", "new", "old"):
        assert main(["releases", "publish", name]) == 0
    assert main(["releases", "list"]) == 0

    assert capsys.readouterr().out.splitlines() == [
        "published old as number 1",
        "published new as number 2",
        "published old as number 3",
        "new",
        "old  * number 3",
    ]


def test_a_release_that_is_not_there_is_refused_and_the_old_one_stays(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typing error must not leave workers without a release."""
    write_tiny_release(root / "old", num_items=30)
    main(["releases", "publish", "old"])

    assert main(["releases", "publish", "odl"]) == 1

    assert "no release 'odl'" in capsys.readouterr().err
    assert json.loads((root / "current.json").read_text())["release"] == "old"


def test_show_tells_the_published_release_unless_another_is_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in force, and how good it was, without opening files."""
    write_tiny_release(root / "r1", num_items=30)
    write_tiny_release(root / "r2", num_items=40)
    main(["releases", "publish", "r1"])
    capsys.readouterr()

    assert main(["releases", "show"]) == 0
    shown = capsys.readouterr().out
    assert main(["releases", "show", "r2", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)

    assert "release   r1\n" in shown
    assert "items     30\n" in shown
    assert (manifest["release"], manifest["num_items"]) == ("r2", 40)


def test_an_empty_place_says_what_to_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing a newcomer sees must not be a traceback."""
    assert main(["releases", "list"]) == 0
    assert "no releases yet" in capsys.readouterr().err

    assert main(["releases", "show"]) == 2
    assert "nothing is published" in capsys.readouterr().err


def test_a_published_release_that_is_gone_is_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers that start now would have nothing to load."""
    write_tiny_release(root / "r1", num_items=30)
    main(["releases", "publish", "r1"])
    (root / "r1").rename(root.parent / "elsewhere")
    capsys.readouterr()

    main(["releases", "list"])

    assert "number 1 is r1, which is not here" in capsys.readouterr().err
