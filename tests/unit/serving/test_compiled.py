"""Compiled loops: ready before the first click, and never older than their source."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.registry import CPUDispatcher

from afterclick.serving import bounds, candidates, context, describing, dots, texts
from afterclick.serving.blend import compile_loops
from afterclick.serving.context import Context
from afterclick.serving.manifest import Publication
from afterclick.serving.memory import Move
from afterclick.serving.records import Interaction, item_hash, pack_interaction
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.settings import ServingSettings
from tests.tiny_release import digest_of, write_tiny_release

SERVING = Path(__file__).parents[3] / "serving"
MODULES = (bounds, candidates, context, describing, dots, texts)


def compiled_functions() -> dict[str, CPUDispatcher]:
    return {
        f"{module.__name__}.{name}": value
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, CPUDispatcher)
    }


@pytest.mark.parametrize("scan", ["exact", "two-stage"])
def test_a_loaded_release_compiles_nothing_more(tmp_path: Path, scan: str) -> None:
    """Compiling takes seconds: a worker does it before it takes clicks, whatever they bring."""
    write_tiny_release(tmp_path / "r1", blend=True)
    publication = Publication(number=1, release="r1", sha256=digest_of(tmp_path / "r1"))
    settings = ServingSettings(provider="cpu", threads=1, scan=scan)
    loaded = LoadedRelease(publication, tmp_path / "r1", settings)
    before = {name: len(own.signatures) for name, own in compiled_functions().items()}
    for name in (
        "context._newest_first",
        "candidates.name_candidates",
        "describing.describe_all",
        "texts._written",
        "bounds._mark",
        "dots._pairs",
    ):
        assert before[f"afterclick.serving.{name}"] == 1
    assert loaded.blend is not None
    assert loaded.memory is not None
    packed = pack_interaction(Interaction(item_hash("i00001"), 1, 2, 3, 4, False))
    for num_users in (1, 3, 70):
        query_BD = loaded.engine.query(loaded.engine.zero_state(num_users))
        for drops in (None, [frozenset({item_hash("i00002")})] * num_users):
            loaded.blend.rank(
                query_BD,
                [Context(packed * 3, 3, 5, 1 << 40)] * num_users,
                loaded.memory,
                loaded.catalog,
                loaded.scanner,
                want=7,
                drops=drops,
            )
        loaded.memory.absorb([Move(f"new{num_users}", 2, 1 << 40, (1, 2, 3))] * 70)
    assert {name: len(own.signatures) for name, own in compiled_functions().items()} == before


def test_an_image_compiles_what_a_release_will_want(tmp_path: Path) -> None:
    """Other types would be compiled for nothing, and a container would start seconds later."""
    compile_loops()
    before = {name: own.signatures for name, own in compiled_functions().items()}
    write_tiny_release(tmp_path / "r1", blend=True)
    publication = Publication(number=1, release="r1", sha256=digest_of(tmp_path / "r1"))
    LoadedRelease(publication, tmp_path / "r1", ServingSettings(provider="cpu", threads=1))
    assert {name: own.signatures for name, own in compiled_functions().items()} == before


def test_a_place_that_cannot_be_written_is_no_error() -> None:
    """A read-only image has nowhere to keep machine code: it is made anew, not missed."""
    code = (
        "import numpy as np; from afterclick.serving.describing import halved as f;"
        "print(f(86_400_000), f.stats.cache_path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["0.5", "None"], done.stderr


def test_compiled_functions_stand_alone_in_their_module() -> None:
    """Kept machine code is made anew when its own file changes: a constant or a function of another
    one would live on as it was. Types may come from anywhere, they are part of a signature.
    """
    seen = 0
    for path in SERVING.glob("*.py"):
        tree = ast.parse(path.read_text())
        foreign = {
            name.asname or name.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("afterclick")
            for name in node.names
        }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(own, ast.Name) and own.id == "compiled" for own in node.decorator_list
            ):
                seen += 1
                used = {
                    inner.id
                    for statement in node.body
                    for inner in ast.walk(statement)
                    if isinstance(inner, ast.Name)
                }
                assert not used & foreign, f"{path.name}: {node.name}"
    assert seen == len(compiled_functions())


def test_compiled_loops_run_without_the_interpreter_lock() -> None:
    """Fold threads share two cores or more: a loop that holds the lock would stop them all."""
    for name, own in compiled_functions().items():
        assert own.targetoptions["nogil"], name
        assert not own.targetoptions.get("fastmath"), name
