"""The walk: every click is asked about by what was made before it."""

import copy
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch

from afterclick.serving.errors import ContractError
from afterclick.serving.features import FEATURES
from afterclick.serving.manifest import ItemRow
from afterclick.serving.memory import memory_of
from afterclick.training.blending import Stage, fit_blend
from afterclick.training.data import Columns, build_log
from afterclick.training.fit import fit
from afterclick.training.text import content_of
from afterclick.training.walk import STAGES, Walk, World, walk
from tests.unit.training.worlds import columns, quick, ring

SETTINGS = quick(epochs=1, blend_events_max=600, blend_epochs=2)


def world_of(log: Columns, details: Mapping[str, ItemRow] | None = None) -> World:
    built = build_log(log, history=50)
    rows = [ItemRow(item_id=item_id, title=item_id[:2]) for item_id in built.item_ids]
    return World(built.sequences, built.item_ids, details or {}, content_of(rows, 64))


def walked(world: World) -> tuple[Walk, list[Stage]]:
    found = walk(world, SETTINGS, history=50)
    return found, list(found.stages)


def test_the_newest_clicks_are_asked_about_once_and_in_order() -> None:
    """A newcomer's first one, too; what is older is what they are answered from."""
    world = world_of(ring())
    found, stages = walked(world)

    times = np.concatenate([stage.asked.time_X for stage in stages])
    assert found.num == len(times) == 600
    assert len(stages) == STAGES
    assert sorted(times.tolist()) == np.sort(world.log.time_P)[-600:].tolist()
    assert all(a.asked.time_X.max() <= b.asked.time_X.min() for a, b in pairwise(stages))
    newcomers = sum(context.clicks == 0 for stage in stages for context in stage.asked.contexts)
    assert newcomers == (world.log.time_P[world.log.start_S1[:-1]] >= np.sort(times)[0]).sum() > 0
    assert len(found.arrivals[0]) == 600


def test_no_stage_has_learnt_from_its_own_clicks() -> None:
    """Other clicks from one stage on: what was asked before it stays as it is, to the bit, and so
    does what is asked in it where the past is the same.
    """
    log = ring()
    _, stages = walked(world_of(log))
    newest = np.argsort(log.time_ms, kind="stable")[-50 * 2 :]
    item = log.item.copy()
    item[newest] = np.roll(item[newest], 7)
    _, others = walked(world_of(log._replace(item=item)))

    for own, other in zip(stages[: STAGES - 2], others, strict=False):
        assert np.array_equal(own.asked.query_XD, other.asked.query_XD)
        vectors = [one.knowledge.catalog.scan_vectors_ND for one in (own, other)]
        assert np.array_equal(*vectors)
    first = stages[STAGES - 2].asked, others[STAGES - 2].asked
    same = [a == b for a, b in zip(first[0].contexts, first[1].contexts, strict=True)]
    assert any(same)
    assert np.array_equal(first[0].query_XD[same], first[1].query_XD[same])
    assert not np.array_equal(stages[-1].asked.query_XD, others[-1].asked.query_XD)


def test_a_model_of_the_oldest_clicks_is_not_trained_again() -> None:
    """What validation was judged by answers the first stage; where it has met what is asked, as a
    short log's has, another one is trained.
    """
    world = world_of(ring())
    oldest = world.log.select(world.log.time_P < np.sort(world.log.time_P)[-600])
    learnt = fit(oldest, None, len(world.item_ids), SETTINGS, content=world.content).model
    scans = []
    for num_learnt in (oldest.num_events, oldest.num_events + 1):
        given = world._replace(learnt=copy.deepcopy(learnt), num_learnt=num_learnt)
        with torch.no_grad():
            given.learnt.bias += 1.0
        scans.append([s.knowledge.catalog.scan_vectors_ND for s in walked(given)[1]])
    plain = [stage.knowledge.catalog.scan_vectors_ND for stage in walked(world)[1]]
    assert np.allclose(scans[0][0][:, -1], plain[0][:, -1] + 1.0)
    assert np.array_equal(scans[1][0], plain[0])
    assert np.array_equal(scans[1][-1], plain[-1])
    assert not np.array_equal(scans[0][-1], plain[-1])


def test_sessions_are_those_that_a_release_of_that_moment_would_have() -> None:
    """And the model of a stage is another one than that of the stage before."""
    world = world_of(ring())
    order = np.argsort(world.log.time_P, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    scans = []
    for number, stage in enumerate(walk(world, SETTINGS, history=50).stages):
        before = world.log.select(rank < len(order) - 600 + 50 * number)
        memory = memory_of(
            world.item_ids, before.start_S1, before.item_P, before.time_P, per_item=256
        )
        own = stage.knowledge.memory.dump()
        for name, array in memory.dump().items():
            if name.startswith("sessions."):
                assert np.array_equal(own[name], array), name
        scans.append(stage.knowledge.catalog.scan_vectors_ND.copy())
    assert all(not np.array_equal(a, b) for a, b in pairwise(scans))


def test_an_item_of_tomorrow_is_not_listed_today() -> None:
    """The catalogue of a whole log knows items that a stage's clicks could not be on."""
    log = ring()
    last_ms = int(log.time_ms.max())
    details = {"tomorrow": ItemRow(item_id="tomorrow", published_ms=last_ms + 1)}
    details["today"] = ItemRow(item_id="today", published_ms=int(log.time_ms.min()))
    built = build_log(log, history=50)
    ids = sorted({*built.item_ids, *details})
    code_of = np.array([ids.index(item_id) for item_id in built.item_ids])
    sequences = built.sequences._replace(item_P=code_of[built.sequences.item_P])
    world = World(sequences, ids, details, None)
    for stage in walk(world, SETTINGS, history=50).stages:
        assert not stage.knowledge.catalog.is_available("tomorrow")
        assert stage.knowledge.catalog.is_available("today")


def test_a_blend_is_fitted_on_it_and_reads_what_is_within_reach() -> None:
    """What followed the last items says nearly all in this world; the features for streams are in,
    those of a frozen memory are left out elsewhere (test_blending.py).
    """
    found = walk(world_of(ring()), SETTINGS, history=50)
    blend = fit_blend(found.stages, found.num, SETTINGS, arrivals=found.arrivals)

    assert blend.spec.features == list(FEATURES)
    assert blend.judged["blend"]["predictions"] == 120
    assert blend.judged["blend"]["hit_rate_20"] > 0.8


def test_nothing_to_learn_from_is_an_error() -> None:
    """No user has two clicks before the first stage."""
    log = columns(*[(f"u{number}", f"i{number % 7}", 1000 + number) for number in range(300)])
    with pytest.raises(ContractError, match="no user has two clicks"):
        next(walk(world_of(log), SETTINGS, history=50).stages)
