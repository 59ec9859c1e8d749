"""A release that was replaced is gone at once: its matrices, and ONNX Runtime's own memory."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from afterclick.serving.blend import compile_loops
from afterclick.serving.manifest import MANIFEST_NAME, Publication, sha256_of
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.settings import ServingSettings
from afterclick.streams.inference import rank_states
from tests.tiny_release import write_tiny_release


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("scan", ["exact", "two-stage"])
def test_nothing_of_a_release_waits_for_the_collector(
    blend: bool, scan: str, tmp_path: Path
) -> None:
    """A worker keeps what it loads out of the collector's sight, so a cycle would stay for ever."""
    folder = tmp_path / "r1"
    write_tiny_release(folder, num_items=300, units=8, blend=blend)
    publication = Publication(number=1, release="r1", sha256=sha256_of(folder / MANIFEST_NAME))
    settings = ServingSettings(provider="cpu", threads=1, k=5, margin=2, scan=scan)
    compile_loops()  # numba's exceptions would keep the frames that called it
    gc.collect()
    gc.disable()
    try:
        release = LoadedRelease(publication, folder, settings)
        release.refresh()
        rank_states(
            np.zeros((3, release.engine.zero_state(1).shape[1]), np.float32), release, want=5
        )
        parts = {name: weakref.ref(part) for name, part in vars(release).items() if _holds(part)}
        assert {"engine", "catalog", "scanner"} <= set(parts)
        del release
        assert [name for name, part in parts.items() if part() is not None] == []
    finally:
        gc.enable()


def _holds(part: object) -> bool:
    return type(part).__module__.startswith("afterclick.serving") and hasattr(part, "__weakref__")
