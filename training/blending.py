"""Fit the blend: what the worker would have listed before each held-out click, and what came.

Candidates and features are made by the worker's own code (serving/blend.py), from the model of the
best epoch and from the memory of the training part. A small network scores each candidate; the
loss is the cross-entropy of the clicked one among its prediction's candidates (listwise softmax,
Cao et al., ICML 2007). Fitted on the older four fifths of the predictions, judged on the newest
one, then fitted on all. Knows no files. Shape letters: X predictions, R rows (candidates), F
features, U units, P positions, D scan vector.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from afterclick.serving import features
from afterclick.serving.blend import Blend, Candidates, gather
from afterclick.serving.candidates import SOURCES
from afterclick.serving.catalog import Catalog
from afterclick.serving.context import Context
from afterclick.serving.engine import F32, I64
from afterclick.serving.features import FEATURES, REACH_FEATURES, TIMED, columns_of
from afterclick.serving.manifest import BlendSpec
from afterclick.serving.memory import Memory
from afterclick.serving.records import INTERACTION_BYTES, Interaction, pack_interaction
from afterclick.serving.rows import Rows, rows_of
from afterclick.serving.scanner import Scanner
from afterclick.training.blend_graph import CLIP, blend_graph
from afterclick.training.candidate_sources import ALL_SOURCES, names_of, needed, only
from afterclick.training.data import UNKNOWN, Held
from afterclick.training.denormals import flushed
from afterclick.training.evaluate import LIST
from afterclick.training.metrics import MISS, NOTHING, Ranking, rates
from afterclick.training.settings import TrainingSettings

JUDGED = 0.2
"""Newest share of the validation predictions that decides about epochs, and about the blend."""

NEGATIVES = 23
"""Candidates drawn for a prediction to be fitted on, beside the clicked one. On the news stream
before its cut 15, 23 and 47 came out alike; the time that is saved is better spent on predictions.
"""

PREDICTIONS_MIN = 200
"""Fewer say too little about some thousand weights."""

USERS = 64
"""Predictions described at once; no result depends on it."""

USERS_LIVE = 8
"""The same where the memory moves on with every such group: what it learns of the others comes that
late, as to a list that stands for some minutes.
"""

BATCH = 256
"""Predictions."""
RATE = 3e-3
"""Falls to 0 in a straight line, so that no epoch need be chosen."""
DROPOUT = 0.1

WITHOUT: dict[str, tuple[str, ...]] = {
    "model": features.MODEL_FEATURES,
    "neighbours": features.NEIGHBOUR_FEATURES,
    "transitions": features.TRANSITION_FEATURES,
    "repeats": features.REPEAT_FEATURES,
    "popularity": features.POPULARITY_FEATURES,
    "publication": features.PUBLICATION_FEATURES,
}
"""What an ablation leaves out, by its row's name; candidates that only this source names, too."""

MODEL_SOURCE = 1 << SOURCES.index("model")

PROBED = 0.2, 0.3
"""Where in the predictions, in order of time, those stand that decide about sources of candidates:
by a network fitted on what comes before them, so that most are described with what is needed only.
Only where the memory is live: a frozen one shows nothing of what is new.
"""
PROBES_MIN = 500
"""Fewer decide nothing: all sources stay."""

LIVE = (64, 80, 60)
"""`older`, `touched` and `newest` of the spec: further candidates where the memory is live. On the
news stream before its cut they lift the share of clicked items that are candidates from 83.9% to
92.7%.
"""

Arrivals = tuple[I64, I64, I64]
"""Moves as `Memory.take` wants them."""


class Asked(NamedTuple):
    """Predictions: who is asked, what the model says, and what came."""

    query_XD: F32
    contexts: list[Context]
    target_X: I64
    """Codes; `UNKNOWN` is a miss."""
    time_X: I64 | None
    """When the target came, ms."""
    drops: list[frozenset[int]] | None = None
    """Hashes of what may not be listed again; None lists everything."""


class Knowledge(NamedTuple):
    """What is counted and what is scored, beside the questions."""

    memory: Memory
    catalog: Catalog
    scanner: Scanner


class Stage(NamedTuple):
    """Questions that one model and one session index answer."""

    asked: Asked
    knowledge: Knowledge
    """Its memory is that of all stages."""


class Scorer(NamedTuple):
    """One way to score candidates."""

    scores: Callable[[F32], F32]
    """From all features (R, F) to scores (R,)."""
    sources: int = ALL_SOURCES
    """Bits of the sources whose candidates are ranked."""


class Fitted(NamedTuple):
    """A blend that was fitted."""

    spec: BlendSpec
    net: "Net"
    scorers: dict[str, Scorer]
    """`blend`, and ablations by their rows' names."""
    judged: dict[str, dict[str, float]]
    """Rates on the judged fifth: `model_judged`, `blend`, `blend_without_…`."""
    sample_RF: F32
    """Some rows with all features, for the self-test."""
    without: list[str]
    """Sources of candidates that this log does without."""

    @property
    def helps(self) -> bool:
        """Whether the blend beats the model alone where both were judged."""
        return self.judged["blend"]["mrr_20"] > self.judged["model_judged"]["mrr_20"]


class Net(nn.Module):
    """Normalised, clipped features through two hidden layers to a score."""

    def __init__(self, mean_F: Tensor, scale_F: Tensor, units: int) -> None:
        super().__init__()
        self.register_buffer("mean_F", mean_F)
        self.register_buffer("scale_F", scale_F)
        self.layers = nn.ModuleList(
            [
                nn.Linear(len(mean_F), units),
                nn.Linear(units, max(units // 2, 1)),
                nn.Linear(max(units // 2, 1), 1),
            ]
        )

    def forward(self, feature_RF: Tensor) -> Tensor:
        """(R,) scores."""
        mean_F, scale_F = self.get_buffer("mean_F"), self.get_buffer("scale_F")
        x = ((feature_RF - mean_F) * scale_F).clamp(-CLIP, CLIP)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number < len(self.layers) - 1:
                x = nn.functional.dropout(nn.functional.relu(x), DROPOUT, self.training)
        return x[:, 0]


_Judged = tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8], int]
"""Of all candidates, and where the clicked one stands; negative where it is none of them."""


class _Examples(NamedTuple):
    """Predictions to fit on, with as many candidates each: the clicked one first."""

    feature_XKF: npt.NDArray[np.float16]
    source_XK: npt.NDArray[np.uint8]
    """0 where a prediction has no further candidate."""


def asked_of(
    held: Held,
    query_XD: F32,
    memory: Memory,
    *,
    history: int,
    filter_seen: bool = False,
) -> Asked:
    """Questions as a worker's records would put them.

    Args:
        held: what is predicted; codes are the memory's, or `UNKNOWN`.
        query_XD: the model's query before each target, in order of position.
        memory: knows the items.
        history: interactions that a record keeps.
        filter_seen: what stands earlier in the sequence may not be listed.
    """
    sequences = held.sequences
    kind = np.dtype([("hash", "<u8"), ("tag", "<u4"), ("traits", "<u2")])
    packed_P = np.zeros(sequences.num_events, kind)
    known = sequences.item_P != UNKNOWN
    packed_P["hash"][known] = memory.hash_N[sequences.item_P[known]]
    packed_P["traits"] = sequences.event_P | sequences.gap_P << 5
    data = packed_P.tobytes()
    assert len(pack_interaction(Interaction(0, 0, 0, 0, 0, False))) == kind.itemsize
    at_X = np.flatnonzero(held.target_P)
    start_X = sequences.start_S1[sequences.sequence_numbers()[at_X]]
    begin_X = np.maximum(start_X, at_X - history)
    if sequences.time_P is None:
        last_X = at_X - 1
    else:  # a newcomer has no last time, and is asked now
        last_X = sequences.time_P[np.where(at_X > start_X, at_X - 1, at_X)]
    contexts = [
        Context(data[begin * INTERACTION_BYTES : end * INTERACTION_BYTES], clicks, now, now)
        for begin, end, clicks, now in zip(
            begin_X.tolist(),
            at_X.tolist(),
            (at_X - start_X).tolist(),
            (np.zeros_like(at_X) if sequences.time_P is None else last_X).tolist(),
            strict=True,
        )
    ]
    drops = None
    if filter_seen:
        hash_P = packed_P["hash"]
        drops = [
            frozenset(hash_P[begin:end].tolist())
            for begin, end in zip(start_X.tolist(), at_X.tolist(), strict=True)
        ]
    time_X = None if sequences.time_P is None else sequences.time_P[at_X]
    return Asked(query_XD, contexts, sequences.item_P[at_X], time_X, drops)


def fit_blend(
    stages: Iterable[Stage],
    num: int,
    settings: TrainingSettings,
    *,
    arrivals: Arrivals | None = None,
    timed: bool = True,
) -> Fitted:
    """Fit, judge, and fit again on everything.

    Args:
        stages: predictions, stage after stage in order of time where the memory is live.
        num: of the predictions.
        settings: of the run.
        arrivals: moves that the memory takes in as time goes on, in order of time; None freezes it.
            A live memory has moved on when this returns.
        timed: whether there are times.
    """
    unfit = {*(() if timed else TIMED), *(REACH_FEATURES if arrivals is None else ())}
    names = [name for name in FEATURES if name not in unfit]
    spec = BlendSpec(features=names, sessions=settings.blend_sessions)
    if arrivals is not None:
        older, touched, newest = LIVE
        spec = msgspec.structs.replace(spec, older=older, touched=touched, newest=newest)
    rng = np.random.default_rng([settings.seed, 1])
    late_from = num - max(1, round(num * JUDGED))
    examples = _Examples(
        np.zeros((num, 1 + NEGATIVES, len(FEATURES)), np.float16),
        np.zeros((num, 1 + NEGATIVES), np.uint8),
    )
    judged: list[_Judged] = []
    model_ranks: list[int] = []
    kept, is_live = ALL_SOURCES, arrivals is not None
    probe_from, probe_to = (round(share * num) if is_live else 0 for share in PROBED)
    described = _described(stages, lambda: spec, arrivals)
    for place, (_, target, own, source_R, codes) in enumerate(described):
        if place == probe_to:
            if len(judged) >= PROBES_MIN:
                kept = _needed(examples, np.arange(probe_from), columns_of(names), judged, settings)
                spec = only(spec, kept)
            judged = []
        at = np.flatnonzero(codes == target)
        if probe_from <= place < probe_to or place >= late_from:
            judged.append((own.astype(np.float16), source_R, int(at[0]) if len(at) else -1))
        if place >= late_from:
            # Exact as far as `spec.model`: whatever the model ranks above a target is a candidate.
            score_R = own[:, columns_of(["model"])[0]]
            model_ranks.append(int((score_R >= score_R[at[0]]).sum()) if len(at) else MISS)
        if len(at):
            others = rng.permutation(len(codes))[: NEGATIVES + 1]
            rows = np.concatenate([at, others[others != at[0]][:NEGATIVES]])
            examples.feature_XKF[place, : len(rows)] = own[rows]
            examples.source_XK[place, : len(rows)] = source_R[rows]
    wanted: dict[str, tuple[str, ...]] = {"blend": (), "blend_without_model": WITHOUT["model"]}
    if settings.blend_ablations:
        wanted |= {f"blend_without_{name}": left_out for name, left_out in WITHOUT.items()}
    nets, scorers = {}, {}
    rates_by = {"model_judged": rates(np.array(model_ranks, np.int64))}
    for row, left_out in wanted.items():
        columns = columns_of([name for name in names if name not in left_out])
        sources = kept & sum(
            1 << bit for bit, source in enumerate(SOURCES) if WITHOUT.get(source) != left_out
        )
        early = _fit_one(examples, np.arange(late_from), columns, sources, settings)
        rates_by[row] = rates(_ranks(_scored(early, columns, judged), judged, sources))
        nets[row] = _fit_one(examples, np.arange(num), columns, sources, settings)
        scorers[row] = Scorer(partial(_score, nets[row], columns), sources)
    sample_RF = np.ascontiguousarray(examples.feature_XKF[:8, :8].reshape(64, -1), np.float32)
    without = names_of(ALL_SOURCES & ~kept)
    return Fitted(spec, nets["blend"], scorers, rates_by, sample_RF, without)


def blend_rankings(
    asked: Asked,
    knowledge: Knowledge,
    spec: BlendSpec,
    scorers: Mapping[str, Scorer],
    *,
    arrivals: Arrivals | None = None,
) -> dict[str, Ranking]:
    """Rank every target with each of the networks; the memory is as `fit_blend` takes it."""
    num = len(asked.target_X)
    found = {
        name: Ranking(np.full(num, MISS), np.full((num, LIST), NOTHING, np.int64))
        for name in scorers
    }
    described = _described([Stage(asked, knowledge)], lambda: spec, arrivals)
    for number, target, own, source_R, codes in described:
        for name, scorer in scorers.items():
            kept = np.flatnonzero(source_R & scorer.sources)
            score_R = scorer.scores(own[kept])
            best = np.argsort(-score_R, kind="stable")[:LIST]
            found[name].top_XK[number, : len(best)] = codes[kept[best]]
            at = np.flatnonzero(codes[kept] == target)
            if len(at):
                found[name].rank_X[number] = (score_R >= score_R[at[0]]).sum()
    return found


def model_at_zero(blend: Blend) -> Scorer:
    """A release's blend with the model's weight at 0: its features count as missing, and what only
    it names is no candidate.
    """
    scores = partial(blend.scores, without=features.MODEL_FEATURES)
    return Scorer(scores, ALL_SOURCES & ~MODEL_SOURCE)


def graph_of(net: Net) -> bytes:
    """The network as `blend.onnx`."""
    layers = [
        (layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy())
        for layer in net.layers
        if isinstance(layer, nn.Linear)
    ]
    graph = blend_graph(net.get_buffer("mean_F").numpy(), net.get_buffer("scale_F").numpy(), layers)
    data: bytes = graph.SerializeToString()
    return data


def _described(
    stages: Iterable[Stage], spec: Callable[[], BlendSpec], arrivals: Arrivals | None
) -> Iterator[tuple[int, int, F32, npt.NDArray[np.uint8], I64]]:
    """Number, target, features, sources and codes of every prediction's candidates.

    Numbers count on from stage to stage; within one they come in order of time.
    """
    size = USERS if arrivals is None else USERS_LIVE
    taken, first = 0, 0
    for asked, (memory, catalog, scanner) in stages:
        order, rows = _order(asked), rows_of(memory, catalog)
        for begin in range(0, len(order), size):
            part = order[begin : begin + size]
            if arrivals is not None and asked.time_X is not None:
                until = int(np.searchsorted(arrivals[1], asked.time_X[part[0]]))
                memory.take(*(column[taken:until] for column in arrivals))
                taken = max(taken, until)
            found = _candidates(asked, part, memory, rows, scanner, spec())
            pool, feature_RF = found.pool, np.ascontiguousarray(found.feature_RF)
            for at, number in enumerate(part.tolist()):
                own = slice(pool.begin_B1[at], pool.begin_B1[at + 1])
                yield (
                    first + number,
                    int(asked.target_X[number]),
                    feature_RF[own],
                    pool.source_R[own],
                    pool.code_R[own],
                )
        first += len(order)


def _order(asked: Asked) -> I64:
    """Predictions in order of time, where there is one."""
    if asked.time_X is None:
        return np.arange(len(asked.target_X))
    return np.argsort(asked.time_X, kind="stable")


def _candidates(
    asked: Asked, part: I64, memory: Memory, rows: Rows, scanner: Scanner, spec: BlendSpec
) -> Candidates:
    return gather(
        spec,
        asked.query_XD[part],
        [asked.contexts[number] for number in part.tolist()],
        memory,
        rows,
        scanner,
        LIST,
        None if asked.drops is None else [asked.drops[number] for number in part.tolist()],
    )


@flushed()
def _fit_one(
    examples: _Examples,
    part_X: I64,
    columns: list[int],
    sources: int,
    settings: TrainingSettings,
) -> Net:
    """A network fitted on some of the examples."""
    kept_XK = examples.source_XK & sources > 0
    # A clicked item that none of the sources names is no example, nor is one without rivals.
    part_X = part_X[kept_XK[part_X, 0] & (kept_XK[part_X].sum(axis=1) > 1)]
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng([settings.seed, 2])
    some_X = rng.permutation(part_X)[:4096]
    some_RF = examples.feature_XKF[some_X][kept_XK[some_X]][:, columns].astype(np.float32)
    mean_F = torch.from_numpy(some_RF.mean(axis=0))
    scale_F = torch.from_numpy(1.0 / (some_RF.std(axis=0) + 1e-3))
    net = Net(mean_F, scale_F, settings.blend_units)
    feature_XKF = examples.feature_XKF
    if len(columns) < feature_XKF.shape[2]:
        feature_XKF = feature_XKF[:, :, columns]
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=settings.blend_decay)
    total, step = settings.blend_epochs * -(-len(part_X) // BATCH), 0
    net.train()
    for _ in range(settings.blend_epochs):
        order = rng.permutation(part_X)
        for begin in range(0, len(order), BATCH):
            members = order[begin : begin + BATCH]
            for group in optimiser.param_groups:
                group["lr"] = RATE * (1.0 - step / total)
            step += 1
            x_XKF = torch.from_numpy(feature_XKF[members]).float()
            score_XK = net(x_XKF.flatten(0, 1)).view(x_XKF.shape[:2])
            score_XK = score_XK.masked_fill(~torch.from_numpy(kept_XK[members]), -1e9)
            first_X = torch.zeros(len(members), dtype=torch.long)
            loss = nn.functional.cross_entropy(score_XK, first_X)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    net.eval()
    return net


def _needed(
    examples: _Examples,
    part_X: I64,
    columns: list[int],
    probes: Sequence[_Judged],
    settings: TrainingSettings,
) -> int:
    """Sources of candidates, by a network that is fitted on some of the examples."""
    net = _fit_one(examples, part_X, columns, ALL_SOURCES, settings)
    scores = _scored(net, columns, probes)
    return needed(lambda sources: _ranks(scores, probes, sources))


def _scored(net: Net, columns: list[int], judged: Sequence[_Judged]) -> list[F32]:
    return [_score(net, columns, own.astype(np.float32)) for own, _, _ in judged]


def _ranks(scores: Sequence[F32], judged: Sequence[_Judged], sources: int) -> I64:
    """Of what was clicked, among the candidates that some of these sources name."""
    rank_X = np.full(len(judged), MISS)
    for number, (score_R, (_, source_R, at)) in enumerate(zip(scores, judged, strict=True)):
        if at >= 0 and source_R[at] & sources:
            rank_X[number] = ((score_R >= score_R[at]) & (source_R & sources > 0)).sum()
    return rank_X


@torch.no_grad()
def _score(net: Net, columns: list[int], feature_RF: F32) -> F32:
    score_R: F32 = net(torch.from_numpy(feature_RF[:, columns])).numpy()
    return score_R
