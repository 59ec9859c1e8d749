"""Ask as the live stream would have: a model and a session index that are made anew as time goes
on, always asked about clicks that they have not met.

The blend of a live stream needs more predictions than a validation part has, and the model that is
weighed there must be as old as the one that is served. So the newest part of the log is cut into
stages; the model of each has learnt from what came before it, and the memory takes in every click
after its turn. Knows no files. Shape letters: P positions, N items, M moves.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from afterclick.serving.catalog import Catalog
from afterclick.serving.manifest import ItemRow, ItemTable
from afterclick.serving.memory import Memory, memory_of, moves_of
from afterclick.serving.scanner import Scanner
from afterclick.training.blending import Arrivals, Asked, Knowledge, Stage, asked_of
from afterclick.training.data import UNKNOWN, Held, Sequences, windows
from afterclick.training.evaluate import model_queries
from afterclick.training.export import Tables, build_tables
from afterclick.training.fit import fit
from afterclick.training.model import Recommender
from afterclick.training.settings import TrainingSettings
from afterclick.training.text import Content

SHARE_MAX = 0.7
"""Of the log that is asked about at most: what is left has to make a model and a memory."""

STAGES = 12

LEARNT = 3
"""Stages before it that a stage's model goes on learning from, for one epoch."""


def knowledge_of(memory: Memory, tables: Tables) -> Knowledge:
    """What a worker would have in force with these tables."""
    catalog = Catalog(ItemTable(items=tables.rows), tables.step_ND, tables.scan_ND)
    return Knowledge(memory, catalog, Scanner(catalog.scan_vectors_ND, provider="cpu", threads=1))


class World(NamedTuple):
    """What there is to be asked about; codes are rows of `item_ids`."""

    log: Sequences
    """With times."""
    item_ids: Sequence[str]
    details: Mapping[str, ItemRow]
    content: Content | None
    learnt: Recommender | None = None
    """A model of the log's oldest clicks. It answers the first stage where it has met none of what
    is asked; else one is trained for that.
    """
    num_learnt: int = 0
    """How many these are."""


class Walk(NamedTuple):
    """For `blending.fit_blend`."""

    num: int
    """Predictions of all stages."""
    stages: Iterator[Stage]
    """In order of time; each is made when it is asked for, and moves the session index on."""
    arrivals: Arrivals
    """What the memory takes in meanwhile."""


def walk(
    world: World, settings: TrainingSettings, *, history: int, filter_seen: bool = False
) -> Walk:
    """Cut the newest `blend_events_max` clicks into stages; first clicks of a user count, too.

    Raises:
        ContractError: before the first stage there is nothing to learn from.
    """
    log = world.log
    assert log.time_P is not None
    order_P = np.argsort(log.time_P, kind="stable")
    rank_P = np.empty_like(order_P)
    rank_P[order_P] = np.arange(len(order_P))
    num = min(settings.blend_events_max, round(SHARE_MAX * len(order_P)))
    begin = len(order_P) - num
    first = log.select(rank_P < begin)
    memory = memory_of(
        world.item_ids, first.start_S1, first.item_P, first.time_P, per_item=settings.blend_sessions
    )
    item_M, ms_M, before_M3 = moves_of(log.start_S1, log.item_P, log.time_P)
    arrivals = item_M[begin:], ms_M[begin:], before_M3[begin:]
    bounds = np.linspace(begin, len(order_P), STAGES + 1).astype(np.int64)

    def stages() -> Iterator[Stage]:
        model = world.learnt if world.num_learnt <= begin else None
        known_N = np.zeros(len(world.item_ids), bool)
        for low, high in pairwise(bounds.tolist()):
            if low == high:
                continue
            before = log.select(rank_P < low)
            if model is None:
                newest = before
                model = _learnt(newest, world, settings, None)
            elif low == begin:
                newest = log.select(rank_P < world.num_learnt)
            else:
                since = low - LEARNT * (high - low)
                newest = log.select((rank_P < low) & (rank_P >= since))
                model = _learnt(newest, world, settings, model)
            known_N |= np.bincount(newest.item_P, minlength=len(known_N)) > 0
            memory.index(before.start_S1, before.item_P, before.time_P, settings.blend_sessions)
            held = Held(log, (rank_P >= low) & (rank_P < high))
            asked, tables = questions_of(model, held, known_N, world, memory, history, filter_seen)
            tables = tables._replace(rows=_published_by(tables.rows, int(ms_M[high - 1])))
            yield Stage(asked, knowledge_of(memory, tables))

    return Walk(num, stages(), arrivals)


def _learnt(
    part: Sequences, world: World, settings: TrainingSettings, model: Recommender | None
) -> Recommender:
    """A model of this part; with `model` it goes on from there, as a warm start would."""
    if model is not None and not len(windows(part, settings.history)[0]):
        return model  # nobody clicked twice
    state = None if model is None else model.state_dict()

    def start(fresh: Recommender) -> None:
        if state is not None:
            fresh.load_state_dict(state)

    if state is not None:
        rate = settings.learning_rate * settings.final_rate
        settings = msgspec.structs.replace(settings, epochs=1, learning_rate=rate)
    content = world.content
    return fit(part, None, len(world.item_ids), settings, content=content, start=start).model


def questions_of(
    model: Recommender,
    held: Held,
    known_N: npt.NDArray[np.bool_],
    world: World,
    memory: Memory,
    history: int,
    filter_seen: bool,
) -> tuple[Asked, Tables]:
    """What a model is asked, and the tables that it answers with.

    Args:
        model: as it is.
        held: what is predicted.
        known_N: items that the model has met; it does not step on those that say nothing, either.
        world: its items.
        memory: knows the items.
        history: interactions that a record keeps.
        filter_seen: what stands earlier in the sequence may not be listed.
    """
    tables = build_tables(model, world.item_ids, known_N, world.details)
    if world.content is not None:
        known_N = known_N | world.content.speaking(known_N)
    sequences = held.sequences
    item_P = sequences.item_P
    known_P = (item_P != UNKNOWN) & known_N[np.maximum(item_P, 0)]
    stepped_P = np.where(known_P, item_P, UNKNOWN)
    step_ND = torch.from_numpy(tables.step_ND).to(model.bias.device)
    stepped = Held(sequences._replace(item_P=stepped_P), held.target_P)
    query_XD = model_queries(model, stepped, step_ND)
    return asked_of(held, query_XD, memory, history=history, filter_seen=filter_seen), tables


def _published_by(rows: Sequence[ItemRow], end_ms: int) -> list[ItemRow]:
    """What is published later may not be listed yet."""
    return [
        row if (row.published_ms or 0) <= end_ms else msgspec.structs.replace(row, available=False)
        for row in rows
    ]
