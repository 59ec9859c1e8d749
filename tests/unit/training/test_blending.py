"""The blend from fit to release: the trainer and the worker rank alike."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from afterclick.serving.catalog import Catalog
from afterclick.serving.errors import ConfigError
from afterclick.serving.features import REACH_FEATURES
from afterclick.serving.manifest import BLEND_NAME, MANIFEST_NAME, MEMORY_NAME, ItemRow, ItemTable
from afterclick.serving.memory import memory_of, moves_of
from afterclick.serving.scanner import Scanner
from afterclick.training import blended
from afterclick.training.blending import (
    USERS_LIVE,
    Asked,
    Knowledge,
    Stage,
    asked_of,
    blend_rankings,
    fit_blend,
)
from afterclick.training.cli import evaluate, train
from afterclick.training.data import build_log, held_out, split
from afterclick.training.settings import TrainingSettings
from afterclick.training.walk import STAGES, Walk, World, walk
from tests.unit.training.test_trial import files  # noqa: F401
from tests.unit.training.worlds import quick, ring

SETTINGS = (
    'units = 16\ndim = 16\nepochs = 2\nbatch_events = 128\nthreads = 1\ndevice = "cpu"\n'
    'validation = 0.3\nblend = "on"\nblend_epochs = 4\n'
)


def run(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    (folder / "settings.toml").write_text(SETTINGS)
    train(
        [
            *("--clicks", str(folder / "clicks.csv"), "--test", str(folder / "test.csv")),
            *("--config", str(folder / "settings.toml"), "--json", "--progress", "none", *more),
        ]
    )
    told: dict = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def test_a_release_with_a_blend_is_evaluated_as_its_training_run_was(
    files: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Torch against ONNX graphs and the memory read back from the release: the same rates; and
    what counts is what the release serves, its blend, with the model's own row beside it.
    """
    told = run(files, capsys)["test"]
    evaluate(
        [
            *("--release", "current", "--clicks", str(files / "test.csv"), "--json"),
            *("--train", str(files / "clicks.csv")),
        ]
    )
    found = json.loads(capsys.readouterr().out)

    for rates in (told, told["blend"], found["methods"]["blend"]):
        assert found["test"]["mrr_20"] == pytest.approx(rates["mrr_20"], abs=2e-3)
        assert found["test"]["hit_rate_20"] == pytest.approx(rates["hit_rate_20"], abs=2e-3)
    assert found["methods"]["model"]["mrr_20"] == pytest.approx(told["model"]["mrr_20"], abs=1e-3)
    assert {"blend_without_model", "markov"} <= set(told)
    assert {"blend_model_at_zero", "markov"} <= set(found["methods"])
    assert found["test"]["predictions"] == told["predictions"]
    # What followed what says nearly all in this world, and two epochs of a model do not.
    assert told["blend"]["mrr_20"] > told["model"]["mrr_20"] + 0.05


def test_settings_are_evaluated_with_their_blend_s_ablations(
    files: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refitted without a part, which a release alone does not hold; and each row is its own."""
    monkeypatch.setenv("AFTERCLICK_TRAINING__BLEND_ABLATIONS", "true")
    (files / "settings.toml").write_text(SETTINGS)
    evaluate(
        [
            *("--config", str(files / "settings.toml"), "--clicks", str(files / "clicks.csv")),
            *("--mode", "leave-one-out", "--json"),
        ]
    )
    rows = json.loads(capsys.readouterr().out)["methods"]

    assert list(rows)[:3] == ["blend", "blend_model_at_zero", "blend_without_model"]
    assert rows["blend_without_model"] != rows["blend_model_at_zero"]
    assert rows["blend_without_transitions"]["mrr_20"] < rows["blend"]["mrr_20"]


def test_a_release_without_a_blend_has_none_of_its_files(
    files: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`off` is off, `auto` asks for predictions enough, and `on` says what it lacks."""
    (files / "few.toml").write_text(SETTINGS.replace("0.3", "0.1"))
    with pytest.raises(ConfigError, match="raise `validation`"):
        run(files, capsys, "--config", str(files / "few.toml"))
    for text in (SETTINGS.replace('"on"', '"off"'), SETTINGS.replace('0.3\nblend = "on"', "0.1")):
        (files / "few.toml").write_text(text)
        told = run(files, capsys, "--config", str(files / "few.toml"))
        folder = files / "releases" / told["release"]
        assert not (folder / BLEND_NAME).exists()
        assert not (folder / MEMORY_NAME).exists()
        assert told["test"]["model"]["mrr_20"] == told["test"]["mrr_20"]


def test_a_warm_run_s_blend_is_walked_with_models_from_chance(
    files: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They have no weights to begin with: one pass at a low rate would make none of them good."""
    told: list[TrainingSettings] = []

    def spied(world: World, settings: TrainingSettings, **given: Any) -> Walk:
        told.append(settings)
        return walk(world, settings, **given)

    monkeypatch.setattr(blended, "walk", spied)
    (files / "settings.toml").write_text(
        SETTINGS + 'blend_memory = "live"\nblend_events_max = 600\nwarm_start = true\n'
        "warm_epochs = 1\n"
    )
    argv = ["--clicks", str(files / "clicks.csv"), "--progress", "none", "--json"]
    for _ in range(2):
        train([*argv, "--config", str(files / "settings.toml")])
    curve = json.loads(capsys.readouterr().out.splitlines()[-1])["curve"]

    assert [epoch["final"] for epoch in curve] == [False, True], "it was warm"
    assert told[0] == told[1]
    assert told[1].epochs == 2


def test_a_live_blend_is_fitted_stage_by_stage_and_shipped(
    files: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every stage is told, all predictions come in them, and the release reads what is in reach."""
    (files / "settings.toml").write_text(
        SETTINGS + 'blend_memory = "live"\nblend_events_max = 600\nsplit = "events"\n'
    )
    train(
        [
            *("--clicks", str(files / "clicks.csv"), "--json", "--progress", "jsonl"),
            *("--config", str(files / "settings.toml")),
        ]
    )
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    walked = [line for line in told[:-1] if line["stage"] == "walk"]
    assert [line["number"] for line in walked] == list(range(1, STAGES + 1))
    assert sum(line["predictions"] for line in walked) == 600
    manifest = json.loads((files / "releases" / told[-1]["release"] / MANIFEST_NAME).read_text())
    assert {"reach", "reach_day"} <= set(manifest["blend"]["features"])
    assert manifest["metrics"]["blend"]["predictions"] == 120


def question(seed: int = 0) -> tuple[Asked, Knowledge, tuple, int]:
    """A ring world without a model: its queries say nothing."""
    log = build_log(ring(seed=seed), history=50)
    sequences, num = log.sequences, len(log.item_ids)
    part, held = split(sequences, 0.4, "sequences")
    assert held is not None
    memory = memory_of(log.item_ids, part.start_S1, part.item_P, part.time_P, per_item=50)
    scan_ND = np.zeros((num, 5), np.float32)
    table = ItemTable(items=[ItemRow(item_id=item_id) for item_id in log.item_ids])
    catalog = Catalog(table, scan_ND[:, :4], scan_ND)
    scanner = Scanner(catalog.scan_vectors_ND, provider="cpu", threads=1)
    query_XD = np.zeros((int(held.target_P.sum()), 5), np.float32)
    asked = asked_of(held_out(held.sequences, None), query_XD, memory, history=50)
    later = held.sequences
    arrivals = moves_of(later.start_S1, later.item_P, later.time_P)
    return asked, Knowledge(memory, catalog, scanner), arrivals, memory.moves


def test_a_live_memory_knows_no_click_that_has_not_come_yet() -> None:
    """A move that was absorbed before its own prediction would be a leak, and a triumph."""
    asked, knowledge, arrivals, before = question()
    num = len(asked.target_X)
    settings = quick(blend_epochs=2)
    blend = fit_blend([Stage(asked, knowledge)], num, settings, arrivals=arrivals)
    assert asked.time_X is not None
    newest = np.sort(asked.time_X)[(len(asked.time_X) - 1) // USERS_LIVE * USERS_LIVE]
    assert knowledge.memory.moves - before == (arrivals[1] < newest).sum()
    assert blend.judged["blend"]["predictions"] == round(0.2 * len(asked.target_X))


def test_a_prediction_is_ranked_whoever_else_is_asked() -> None:
    """One at a time or all at once, and the same network twice: the same ranks."""
    asked, knowledge, _, _ = question()
    stages, num = [Stage(asked, knowledge)], len(asked.target_X)
    blend = fit_blend(stages, num, quick(blend_epochs=2))
    again = fit_blend(stages, num, quick(blend_epochs=2))
    assert msgspec.json.encode(blend.judged) == msgspec.json.encode(again.judged)
    assert not set(REACH_FEATURES) & set(blend.spec.features), (
        "a frozen memory does not pay for them"
    )
    whole = blend_rankings(asked, knowledge, blend.spec, blend.scorers)["blend"]
    for number in range(5):
        own = slice(number, number + 1)
        one = asked._replace(
            query_XD=asked.query_XD[own],
            contexts=asked.contexts[own],
            target_X=asked.target_X[own],
            time_X=None if asked.time_X is None else asked.time_X[own],
        )
        alone = blend_rankings(one, knowledge, blend.spec, blend.scorers)["blend"]
        assert alone.rank_X[0] == whole.rank_X[number]
    hits = (whole.rank_X <= 3).mean()
    assert hits > 0.7, "nine of ten clicks follow the ring, and the transitions know it"
