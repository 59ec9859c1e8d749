"""Smaller releases: what is lost and gained is told, and every one of them may be served."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from afterclick.serving.engine import Engine
from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.manifest import QUERY_NAME, STEP_NAME
from afterclick.serving.releases import ReleaseStore
from afterclick.serving.settings import ServingSettings
from afterclick.training import compress as module
from afterclick.training.cli import load_release
from afterclick.training.cli_compress import compress as verb
from afterclick.training.compress import Compressed, Job, compress, describe
from afterclick.training.pipeline import train_release
from afterclick.training.smaller_graphs import matrices_int8
from afterclick.training.sources import source_of
from tests.unit.training.worlds import quick, ring


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A trained release of the ring; tests must not publish another one."""
    serving = ServingSettings(
        releases=str(tmp_path_factory.mktemp("releases")), provider="cpu", threads=1
    )
    source = source_of("ring", ring(num_items=20))
    name = train_release(source, quick(), serving, publish=False).release
    loaded = load_release(name, serving)
    return Job(loaded, Path(serving.releases) / name, source, ring(num_items=20, seed=1), serving)


def stored(job: Job, found: Compressed) -> Path:
    return Path(job.serving.releases) / found.release


def test_int8_is_a_quarter_of_the_bytes_and_close(job: Job) -> None:
    """Recurrent weights and the query's matrix; lists hardly move; the self-test loads it."""
    found = compress(job, "int8")

    assert found.after.hit_rate_20 > found.before.hit_rate_20 - 0.02
    kinds = {
        name: {node.op_type for node in onnx.load(stored(job, found) / name).graph.node}
        for name in (STEP_NAME, QUERY_NAME)
    }
    assert "DequantizeLinear" in kinds[STEP_NAME] & kinds[QUERY_NAME]
    assert "QuantizeLinear" in kinds[QUERY_NAME]
    assert not any("Dynamic" in kind for kind in kinds[STEP_NAME] | kinds[QUERY_NAME])
    weights = onnx.load(stored(job, found) / STEP_NAME).graph.initializer
    recurrent = [w for w in weights if w.name.endswith("_int8")]
    assert len(recurrent) == 2
    again = load_release(found.release, job.serving)
    assert again.manifest.compression is not None
    assert again.manifest.compression.of == job.teacher.manifest.release
    assert set(again.manifest.compression.metrics) == {"before", "after"}


def test_pruned_weights_are_zero_and_deflate(job: Job) -> None:
    """Half of every matrix, its smallest entries; the bytes on the wire follow."""
    found = compress(job, "prune", share=0.5)

    tensors = {t.name: numpy_helper.to_array(t)
               for t in onnx.load(stored(job, found) / STEP_NAME).graph.initializer}  # fmt: skip
    for name in ("W0", "R0"):
        assert (tensors[name] == 0).mean() == pytest.approx(0.5, abs=0.01)
    assert found.after.packed_bytes < 0.8 * found.before.packed_bytes
    assert found.after.state_bytes == found.before.state_bytes
    with pytest.raises(ConfigError, match="between 0 and 1"):
        compress(job, "prune", share=1.0)


def test_a_smaller_model_learns_from_the_release(job: Job) -> None:
    """Half the state, and better than the same model alone: the lesson is in the loss."""
    small = quick(units=8, epochs=2)
    alone = train_release(job.source, small, job.serving, publish=False, test=job.test)

    found = compress(job, "distill", settings=small)

    assert found.after.state_bytes == found.before.state_bytes / 2
    assert found.after.mrr_20 > alone.test["mrr_20"]  # type: ignore[operator]
    manifest = load_release(found.release, job.serving).manifest
    assert manifest.compression is not None
    assert manifest.compression.detail["units"] == 8


def test_scales_that_depend_on_the_batch_never_leave(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic int8, which is what this gate is for; nothing is stored."""
    from onnxruntime.quantization import quantize_dynamic

    def dynamic(model: onnx.ModelProto, feeds: object) -> onnx.ModelProto:
        path = Path(job.serving.releases) / "dynamic.onnx"
        onnx.save(model, str(path))
        quantize_dynamic(path, path, op_types_to_quantize=["MatMul"])
        found = onnx.load(str(path))
        path.unlink()
        return found

    monkeypatch.setattr(module, "matrices_int8", dynamic)
    before = ReleaseStore(job.serving.releases).list()

    with pytest.raises(ContractError, match="who shares the batch"):
        compress(job, "int8")
    assert ReleaseStore(job.serving.releases).list() == before


def test_int8_weights_are_unpacked_at_load(job: Job, tmp_path: Path) -> None:
    """Users together and alone get the same bits; unpacked per call they did not (measured)."""
    found = compress(job, "int8")
    loaded = load_release(found.release, job.serving)
    engine = Engine(stored(job, found), loaded.manifest, provider="cpu", threads=1)
    rng = np.random.default_rng(0)
    state_BS = rng.uniform(-1, 1, (40, loaded.manifest.state_floats)).astype(np.float32)
    x_TBE = rng.standard_normal((3, 40, loaded.manifest.step_dim)).astype(np.float32)
    codes = np.zeros((3, 40), np.int64)

    def advance(users: slice) -> np.ndarray:
        return engine.advance(
            state_BS[users],
            np.ascontiguousarray(x_TBE[:, users]),
            np.full(len(state_BS[users]), 3, np.int32),
            event_TB=codes[:, users],
            gap_TB=codes[:, users],
        )

    together = advance(slice(0, 40))
    for user in range(40):
        assert np.array_equal(advance(slice(user, user + 1))[0], together[user])


def test_the_verb_prints_a_table_and_publishes(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By files, as an operator runs it."""
    monkeypatch.setenv("AFTERCLICK_SERVING__RELEASES", job.serving.releases)
    for name, seed in (("train", 0), ("test", 1)):
        world = ring(num_items=20, seed=seed)
        assert world.time_ms is not None
        rows = [
            f"{u},{i},{t}" for u, i, t in zip(world.user, world.item, world.time_ms, strict=True)
        ]
        (tmp_path / f"{name}.csv").write_text("user_id,item_id,timestamp_ms\n" + "\n".join(rows))
    argv = [job.teacher.manifest.release, "--method", "prune", "--share", "0.3", "--publish"]
    argv += ["--train", str(tmp_path / "train.csv"), "--test", str(tmp_path / "test.csv")]

    assert verb([*argv, "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    current = ReleaseStore(job.serving.releases).current()
    assert current is not None
    assert (current.release, current.number) == (result["release"], result["publication"])
    found = compress(job, "prune", share=0.3)
    table = describe(found)
    assert all(word in table for word in ("HR@20", "graphs deflated", "step, one user"))


def test_static_scales_come_from_the_histories(job: Job) -> None:
    """Of values never seen there is no scale: an empty calibration is an error, not a guess."""
    graph = onnx.load(job.folder / QUERY_NAME)
    with pytest.raises(ValueError, match="No data"):
        matrices_int8(graph, [])
