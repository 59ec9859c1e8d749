"""The house rules that a machine can hold: lint, types, imports, packaging, what may be committed.

Run as tests, so that `pytest` is the one command. The pages are held by test_docs.py.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ROOMS = ("serving", "streams", "training")
BIN = Path(sys.executable).parent

COMMITTED_BYTES_MAX = 300_000
"""Text is far below it; a data file, a model or a picture of some size is not."""


def run(*argv: str | Path, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in argv],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=280,
    )


def committed() -> list[Path]:
    """Files that git tracks and that are there."""
    listed = run("git", "ls-files", "-z")
    assert listed.returncode == 0, listed.stderr
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def pyproject() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("argv", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_has_nothing_to_say(argv: list[str]) -> None:
    """One style, so that a diff shows what changed and nothing else."""
    done = run(BIN / "ruff", *argv, ".")

    assert done.returncode == 0, done.stdout + done.stderr


def test_types_are_strict() -> None:
    """py.typed promises applications that these types are checked."""
    done = run(BIN / "mypy", MYPYPATH=".typing")

    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_run_one_way() -> None:
    """A worker image without torch, and a reader without Kafka, rest on these contracts."""
    done = run(BIN / "lint-imports", "--no-cache")

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("room", "line", "contract"),
    [
        ("serving", "import torch", "serving and streams never import torch"),
        ("serving", "import afterclick.streams.events", "imports run one way"),
        ("serving", "import kafka", "serving knows no Kafka"),
        ("training", "import afterclick.serving.store", "training never touches"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, room: str, line: str, contract: str) -> None:
    """A contract that watches the wrong package would pass for ever."""
    for name in ROOMS:
        shutil.copytree(ROOT / name, tmp_path / "afterclick" / name)
    (tmp_path / "afterclick" / room / "planted.py").write_text(f"{line}\n")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    done = run(BIN / "lint-imports", "--no-cache", cwd=tmp_path, PYTHONPATH=str(tmp_path))

    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(re.escape(contract) + r".* BROKEN", done.stdout), done.stdout


def test_the_version_is_the_newest_of_the_changelog() -> None:
    """Who upgrades reads the changelog, and must find what was installed at its top."""
    project = pyproject()["project"]
    assert isinstance(project, dict)
    entries = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "docs" / "changelog.md").read_text(), re.M)

    assert entries
    assert entries[0] == project["version"] == importlib.metadata.version("afterclick")


def test_no_committed_file_names_a_place_on_this_machine() -> None:
    """It would lead nowhere on any other."""
    places = re.compile(rb"/(work|root|farm)/")  # the pattern itself has no such path in it

    assert not [str(path) for path in committed() if places.search(path.read_bytes())]


def test_nothing_binary_or_large_is_committed() -> None:
    """Data and models stay out of the history, which nobody can make smaller again."""
    files = {path: path.read_bytes() for path in committed()}

    assert not [str(path) for path, content in files.items() if b"\0" in content]
    assert not [str(path) for path, content in files.items() if len(content) > COMMITTED_BYTES_MAX]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the working tree, built beside it: setuptools leaves `build/` where it works."""
    source = tmp_path_factory.mktemp("source")
    for name in ROOMS:
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = tmp_path_factory.mktemp("wheel")
    argv = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = run(sys.executable, *argv, "-w", built, source)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = built.glob("afterclick-*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def requirements(wheel: zipfile.ZipFile, extra: str) -> set[str]:
    """Names that an extra brings directly, or the base install for ''."""
    found = set()
    for text in metadata(wheel).get_all("Requires-Dist", []):
        one = Requirement(text)
        with_extra = one.marker is None or one.marker.evaluate({"extra": extra})
        without = one.marker is None or one.marker.evaluate({"extra": ""})
        if with_extra and (not extra or not without):
            found.add(canonicalize_name(one.name))
    return found


def test_the_wheel_holds_the_three_rooms_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """A top-level `serving` would shadow an application's own."""
    names = wheel.namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}

    assert tops == {"afterclick"}
    assert {name for name in names if name.endswith("py.typed")} == {
        f"afterclick/{room}/py.typed" for room in ROOMS
    }
    for room in ROOMS:
        modules = {f"afterclick/{room}/{path.name}" for path in (ROOT / room).glob("*.py")}
        assert modules <= set(names)


def test_the_wheel_imports_without_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """What is tested from the checkout must also be there when installed."""
    wheel.extractall(tmp_path)
    code = "import afterclick.serving.reader as r; print(r.__file__)"

    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))

    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_the_base_install_is_the_reader_alone(wheel: zipfile.ZipFile) -> None:
    """Nobody should install 335 MB to read a list."""
    assert requirements(wheel, "") == {"msgspec", "redis"}


def test_the_extras_are_those_that_the_pages_name(wheel: zipfile.ZipFile) -> None:
    """`pip install 'afterclick[worker]'` is in error messages; a lost extra would only warn."""
    assert set(metadata(wheel).get_all("Provides-Extra", [])) == {
        "api",
        "worker",
        "gpu",
        "index",
        "train",
        "local",
        "dev",
    }


@pytest.mark.parametrize(("extra", "has_torch"), [("worker", False), ("train", True)])
def test_torch_comes_with_training_and_never_with_a_worker(
    wheel: zipfile.ZipFile, extra: str, has_torch: bool
) -> None:
    """Followed through what is installed: a dependency's dependency counts as much."""
    todo, seen = requirements(wheel, extra) - {"afterclick"}, set[str]()
    if "afterclick" in requirements(wheel, extra):  # `train` contains `worker`
        todo |= requirements(wheel, "worker")
    while todo:
        name = todo.pop()
        seen.add(name)
        try:
            listed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system than this one
        needed = [Requirement(text) for text in listed]
        todo |= {
            canonicalize_name(one.name)
            for one in needed
            if one.marker is None or one.marker.evaluate({"extra": ""})
        } - seen

    assert "numpy" in seen
    assert ("torch" in seen) == has_torch
