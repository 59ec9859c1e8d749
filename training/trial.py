"""A finished release before held-out clicks: its ONNX graphs ranked beside every baseline.

Knows no command line and trains nothing. Shape letters: X predictions, N items of the vocabulary
(the release's and the training part's), P positions, B sequences, S floats of state.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import torch

from afterclick.serving.engine import F32
from afterclick.serving.errors import ContractError
from afterclick.serving.past import past_of_rows
from afterclick.serving.records import item_hash
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.scanner import MASKED
from afterclick.serving.settings import ServingSettings
from afterclick.streams.events import NO_ITEM_EVENTS
from afterclick.training.baselines import drop_seen, evaluate_baselines
from afterclick.training.blending import (
    Knowledge,
    Scorer,
    asked_of,
    blend_rankings,
    model_at_zero,
)
from afterclick.training.candidate_sources import ALL_SOURCES
from afterclick.training.data import (
    I64,
    UNKNOWN,
    Columns,
    Held,
    Sequences,
    build_log,
    held_out,
    recode,
)
from afterclick.training.evaluate import CELLS_MAX, LIST, ranking_of
from afterclick.training.metrics import (
    NOTHING,
    OF_TEST,
    Ranking,
    coverage,
    diversity,
    gini,
    intervals,
    novelty,
    rates,
)

Mode = Literal["session", "leave-one-out"]

HEADLINE = ("hit_rate_20", "mrr_20", "predictions")


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What an evaluation found; the last line of `afterclick evaluate --json`."""

    release: str
    mode: str
    filter_seen: bool
    ties: str = "against"
    """Every item with the target's score stands before it."""
    num_items: int
    """Ranked: the release's items and those of the training part."""
    test: dict[str, float]
    """`hit_rate_20`, `mrr_20` and `predictions` of the release as served, as fractions: of its
    blend where it has one.
    """
    methods: dict[str, dict[str, float]]
    """Every metric of the release (`blend`; `blend_model_at_zero`: the same with the model's weight
    at 0; `model`: alone), of blends refitted without a part (`blend_without_…`) where the release
    was trained for this evaluation, and of every baseline.
    """
    intervals: dict[str, dict[str, tuple[float, float]]]
    """95% bootstrap over sessions, or users, of every rate."""
    validation: dict[str, dict[str, float]]
    """What the release's training run measured on its own validation part: settings are to be
    chosen by these, not by `test`.
    """


class _Question(NamedTuple):
    item_ids: list[str]
    train: Sequences | None
    held: Held


def evaluate_release(
    loaded: LoadedRelease,
    clicks: Columns,
    train: Columns | None,
    serving: ServingSettings,
    *,
    mode: Mode = "session",
    filter_seen: bool = False,
    seed: int = 0,
    refitted: Mapping[str, Scorer] | None = None,
) -> Trial:
    """Rank held-out clicks with a release and with every baseline.

    Args:
        loaded: the release; its catalogue is ranked as it was exported.
        clicks: `session`: held-out sequences, every click after a sequence's first is predicted;
            `leave-one-out`: everything, each user's last click is predicted from those before.
        train: what baselines may count, and the release was trained on; with `leave-one-out` it is
            `clicks` without the last ones. None leaves most baselines out.
        serving: rules of the fold.
        mode: which of the two.
        filter_seen: leave items that stand earlier in the sequence out of every list.
        seed: of the bootstrap.
        refitted: further scorers of the same candidates, by their rows' names.

    Raises:
        ContractError: there is nothing to predict.
    """
    if mode == "leave-one-out":
        train = without_last(clicks)
    question = _question(loaded.catalog.ids, clicks, train, serving, mode)
    held, num_items = question.held, len(question.item_ids)
    row_N = np.array([_row(loaded, item_id) for item_id in question.item_ids], np.int64)
    vector_ND = np.where(
        row_N[:, None] >= 0, loaded.catalog.step_vectors_NE[np.maximum(row_N, 0)], np.float32(0)
    )
    query_XD = release_queries(loaded, held, row_N)
    own = {
        **blend_rows(
            loaded,
            held,
            question.item_ids,
            query_XD,
            history=serving.history,
            filter_seen=filter_seen,
            refitted=refitted or {},
        ),
        "model": release_ranking(loaded, held, row_N, query_XD, filter_seen=filter_seen),
    }
    rankings = {
        **own,
        **evaluate_baselines(
            question.train,
            held,
            num_items,
            history=serving.history,
            vector_ND=vector_ND,
            filter_seen=filter_seen,
        ),
    }
    clicks_N = None
    if question.train is not None:
        known = question.train.item_P[question.train.item_P != UNKNOWN]
        clicks_N = np.bincount(known, minlength=num_items).astype(np.float64)
    methods = {}
    for name, ranking in rankings.items():
        methods[name] = {
            **rates(ranking.rank_X),
            "coverage": coverage(ranking.top_XK, num_items),
            "gini": gini(ranking.top_XK, num_items),
            "diversity": diversity(ranking.top_XK, vector_ND),
        }
        if clicks_N is not None:
            methods[name]["novelty"] = novelty(ranking.top_XK, clicks_N)
    group_X = held.sequences.sequence_numbers()[held.target_P]
    return Trial(
        release=loaded.publication.release,
        mode=mode,
        filter_seen=filter_seen,
        num_items=num_items,
        test={name: methods[next(iter(own))][name] for name in HEADLINE},
        methods=methods,
        intervals={
            name: intervals(ranking.rank_X, group_X, seed=seed)
            for name, ranking in rankings.items()
        },
        validation={
            name: figures
            for name, figures in loaded.manifest.metrics.items()
            if not name.startswith(OF_TEST)
        },
    )


def release_ranking(
    loaded: LoadedRelease, held: Held, row_N: I64, query_XD: F32, *, filter_seen: bool = False
) -> Ranking:
    """Rankings by the model alone.

    Args:
        loaded: the release.
        held: what is predicted.
        row_N: the catalogue's row of each item code, negative where it has none.
        query_XD: as `release_queries` gave them.
        filter_seen: as in `evaluate_release`.
    """
    at_X = np.flatnonzero(held.target_P)
    rank_X = np.zeros(len(at_X), np.int64)
    top_XK = np.zeros((len(at_X), LIST), np.int64)
    for begin in range(0, len(at_X), size := max(1, CELLS_MAX // len(row_N))):
        part = slice(begin, begin + size)
        score_XN = _scores(loaded, query_XD[part], row_N)
        if filter_seen:
            drop_seen(score_XN, held.sequences, at_X[part])
        found = ranking_of(torch.from_numpy(score_XN), held.sequences.item_P[at_X[part]])
        rank_X[part], top_XK[part] = found
    return Ranking(rank_X, top_XK)


def blend_rows(
    loaded: LoadedRelease,
    held: Held,
    item_ids: Sequence[str],
    query_XD: F32,
    *,
    history: int,
    refitted: Mapping[str, Scorer],
    filter_seen: bool = False,
) -> dict[str, Ranking]:
    """Rankings by the release's blend, by the same with the model's weight at 0, and by others.

    The memory stands as it was exported. Empty for a release without a blend.
    """
    if loaded.blend is None or loaded.memory is None:
        return {}
    loaded.memory.know(item_ids)
    code_N = np.array([loaded.memory.code_of_hash[item_hash(i)] for i in item_ids], np.int64)
    item_P = held.sequences.item_P
    coded_P = np.where(item_P == UNKNOWN, UNKNOWN, code_N[np.maximum(item_P, 0)])
    coded = Held(held.sequences._replace(item_P=coded_P), held.target_P)
    asked = asked_of(coded, query_XD, loaded.memory, history=history, filter_seen=filter_seen)
    item_of_code = np.full(loaded.memory.num_items, NOTHING)
    item_of_code[code_N] = np.arange(len(code_N))
    found = blend_rankings(
        asked,
        Knowledge(loaded.memory, loaded.catalog, loaded.scanner),
        loaded.blend.spec,
        {
            "blend": Scorer(loaded.blend.scores, ALL_SOURCES),
            "blend_model_at_zero": model_at_zero(loaded.blend),
            **refitted,
        },
    )
    return {
        name: Ranking(rank_X, np.where(top_XK == NOTHING, NOTHING, item_of_code[top_XK]))
        for name, (rank_X, top_XK) in found.items()
    }


def release_queries(loaded: LoadedRelease, held: Held, row_N: I64) -> F32:
    """(X, D) queries before every target by a release's own graphs, in order of position.

    States are stepped from zero as a worker steps them.
    """
    sequences = held.sequences
    hour_P = sequences.hours()
    row_P = np.where(sequences.item_P == UNKNOWN, -1, row_N[np.maximum(sequences.item_P, 0)])
    known_P = row_P >= 0
    before_P1 = np.concatenate([[0], np.cumsum(known_P)])
    place_K = np.flatnonzero(known_P)
    begin_S = before_P1[sequences.start_S1[:-1]]
    size_S = before_P1[sequences.start_S1[1:]] - begin_S
    at_X = np.flatnonzero(held.target_P)
    sequence_X = sequences.sequence_numbers()[at_X]
    step_X = before_P1[at_X] - begin_S[sequence_X]
    order_X = np.argsort(step_X, kind="stable")
    bound = np.searchsorted(step_X[order_X], np.arange(int(step_X.max(initial=0)) + 2))
    state_SS = loaded.engine.zero_state(sequences.num_sequences)
    query_XD = np.zeros((len(at_X), loaded.manifest.scan_dim), np.float32)
    for step in range(len(bound) - 1):
        asked = order_X[bound[step] : bound[step + 1]]
        if len(asked):
            past = None
            if length := loaded.manifest.inputs.past:
                ago_XM = step_X[asked][:, None] - 1 - np.arange(length)
                at_XM = place_K[begin_S[sequence_X[asked]][:, None] + np.maximum(ago_XM, 0)]
                rows_XM = np.where(ago_XM >= 0, row_P[at_XM], -1)
                past = past_of_rows(rows_XM, loaded.catalog.step_vectors_NE)
            query_XD[asked] = loaded.engine.query(state_SS[sequence_X[asked]], past)
        moving = np.flatnonzero(size_S > step)
        if len(moving):
            position = place_K[begin_S[moving] + step]
            state_SS[moving] = loaded.engine.advance(
                state_SS[moving],
                loaded.catalog.step_vectors_NE[row_P[position]][None],
                np.ones(len(moving), np.int32),
                event_TB=sequences.event_P[position][None],
                gap_TB=sequences.gap_P[position][None],
                hour_TB=hour_P[position][None],
            )
    return query_XD


def without_last(columns: Columns) -> Columns:
    """Everything but each user's last click on an item."""
    last: dict[str, int] = {}
    for at, (user, event) in enumerate(zip(columns.user, columns.event, strict=True)):
        if event not in NO_ITEM_EVENTS:
            last[user] = at
    keep = np.ones(len(columns.user), bool)
    keep[list(last.values())] = False
    return columns.select(keep)


def describe(trial: Trial) -> str:
    """A table for people, in percent but for the last two columns."""
    count = int(trial.test["predictions"])
    seen = ", seen items left out" if trial.filter_seen else ""
    lines = [
        f"release {trial.release}, {trial.mode}{seen}: {count} predictions over "
        f"{trial.num_items} items, ties count against us, [95%] over sessions or users",
        f"{'':<19}{'HR@20':>6}{'':15}{'MRR@20':>7}{'':15}{'NDCG@20':>8}{'HR@10':>7}"
        f"{'NDCG@10':>8}{'cover':>7}{'Gini':>7}{'divers':>7}{'bits':>6}",
    ]
    for method, values in trial.methods.items():
        ends = trial.intervals[method]
        text = f"{method:<19}"
        for name in ("hit_rate_20", "mrr_20"):
            low, high = (100 * end for end in ends[name])
            text += f"{100 * values[name]:6.1f} [{low:5.1f}, {high:5.1f}] "
        for name in ("ndcg_20", "hit_rate_10", "ndcg_10", "coverage"):
            text += f"{100 * values[name]:7.1f}"
        text += f"{values['gini']:7.2f}{values['diversity']:7.2f}"
        text += f"{values['novelty']:6.1f}" if "novelty" in values else ""
        lines.append(text)
    return "\n".join(lines) + "\n"


def _question(
    release_ids: list[str],
    clicks: Columns,
    train: Columns | None,
    serving: ServingSettings,
    mode: Mode,
) -> _Question:
    rules = {"history": serving.history, "idle_ttl_s": serving.idle_ttl_s}
    known = None if train is None else build_log(train, **rules)
    item_ids = sorted({*release_ids, *(known.item_ids if known else ())})
    sequences = recode(build_log(clicks, **rules), item_ids)
    target_P = None
    if mode == "leave-one-out":
        target_P = np.zeros(sequences.num_events, bool)
        target_P[sequences.start_S1[1:] - 1] = True
    held = held_out(sequences, target_P)
    if not held.target_P.any():
        raise ContractError(
            "evaluate: no sequence of the clicks has two, so there is nothing to predict",
            reason="no-transitions",
        )
    return _Question(item_ids, None if known is None else recode(known, item_ids), held)


def _row(loaded: LoadedRelease, item_id: str) -> int:
    row = loaded.catalog.row(item_id)
    return -1 if row is None else row


def _scores(loaded: LoadedRelease, query_XD: F32, row_N: I64) -> F32:
    """(X, N) scores by item code; -inf where the release cannot or may not list an item."""
    row_score_X = loaded.scanner.scores(query_XD)
    score_XN: F32 = row_score_X[:, np.maximum(row_N, 0)]
    score_XN[:, row_N < 0] = -np.inf
    score_XN[score_XN <= MASKED / 2] = -np.inf
    return score_XN
