"""Chunks of partitions → new records and lists; no I/O, no clock, no Faust.

The result is a pure function of the events, the records before, the partition's popularity and the
inputs in force, and it does not matter how the log was cut into chunks: a user's list answers the
user's own last event, and everything computed in batches gives the bits that it gives alone.

A user's record of another publication is rebuilt from the kept interactions first. Rebuilds run in
calls of their own, grouped by length: one user with 50 steps among 255 with one made the whole call
54 times slower.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

from afterclick.serving.catalog import Catalog
from afterclick.serving.context import Context
from afterclick.serving.manifest import event_code, gap_bucket
from afterclick.serving.memory import BEFORE, Move
from afterclick.serving.records import (
    INTERACTION_BYTES,
    Interaction,
    TopList,
    UserRecord,
    is_repeat,
    item_hash,
    last_hashes,
    list_writer,
    pack_interaction,
    repeat_tag,
    unpack_interactions,
)
from afterclick.serving.settings import ListRules
from afterclick.serving.texts import Ranked, ranked_of
from afterclick.streams.events import FoldEvent
from afterclick.streams.inference import Release, Step, rank_states, run_steps
from afterclick.streams.popularity import Popularity

HOUR_MS = 3600 * 1000


class Inputs(NamedTuple):
    """Everything besides clicks that decides the result, as the inputs list names it."""

    publication: int
    release: str
    sha256: str
    publication_items: tuple[int, ...]
    items: tuple[int, ...]
    rules: ListRules
    signals: int = 0
    """How much of the signals topic the release's memory holds: decides lists only, so each list
    names it and the inputs list does not.
    """


class Counts(NamedTuple):
    """What happened in a chunk, for metrics."""

    clicks: int = 0
    visits: int = 0
    duplicates: int = 0
    steps: int = 0
    unknown_items: int = 0
    rebuilt: int = 0
    resets: int = 0
    forgotten: int = 0
    clocks_replaced: int = 0


class Folded(NamedTuple):
    """What a chunk leaves behind; users that only repeated themselves are not in it."""

    records: dict[str, UserRecord | None]
    """None deletes: the user is forgotten, or never had a record."""
    lists: dict[str, bytes]
    """`encode_list`'s bytes; empty deletes."""
    popularity: dict[int, dict[str, int]]
    """Clicks added per hour and item."""
    counts: Counts
    due: dict[str, tuple[int, int]]
    """Offset and time of the event that a list must answer which was put off."""
    moves: list[tuple[int, Move]]
    """Offset of every click counted, and what it tells of its item; in log order."""


class _Draft:
    """One user's way through a chunk: the record's fields, changed in place, and what happened."""

    __slots__ = (
        "changed",
        "clicks",
        "counted",
        "event_ms",
        "forgotten",
        "interactions",
        "last_ms",
        "listed_at",
        "num_steps",
        "offset",
        "past",
        "popular",
        "publication",
        "resets",
        "state",
        "steps",
        "unknown",
    )

    def __init__(self, record: UserRecord) -> None:
        self.publication = record.publication
        self.num_steps = record.steps
        self.clicks = record.clicks
        self.last_ms = record.last_ms
        self.state = record.state
        self.interactions = record.interactions
        self.past = record.interactions  # before this chunk: what a rebuild runs through
        self.steps: list[Step] = []
        self.counted: list[int] = []  # offsets of the interactions taken
        self.listed_at: int | None = None  # index of the event that the list answers
        self.changed = False
        self.forgotten = False
        self.resets = 0
        self.unknown = 0
        self.offset = -1
        self.event_ms = 0
        self.popular: list[tuple[str, int]] = []

    def clear_state(self, publication: int) -> None:
        """Start the state over under a publication."""
        self.publication, self.state, self.num_steps, self.steps = publication, b"", 0, []

    def forget(self, publication: int) -> None:
        """Start the user over."""
        self.clear_state(publication)
        self.interactions, self.clicks, self.last_ms = b"", 0, 0
        self.changed, self.forgotten = True, True

    def record(self) -> UserRecord:
        """The record after the chunk."""
        return UserRecord(
            self.publication,
            self.num_steps,
            self.clicks,
            self.last_ms,
            self.state,
            self.interactions,
        )


class _Way:
    """One partition's way through a fold: its users' drafts, and what else happened."""

    def __init__(self, part: int, inputs: Inputs, *, put_off: bool) -> None:
        self.partition, self.inputs, self.put_off = part, inputs, put_off
        self.drafts: dict[str, _Draft] = {}
        self.moves: list[tuple[int, Move]] = []
        self.added: dict[int, dict[str, int]] = {}
        self.counts = dict.fromkeys(Counts._fields, 0)

    @cached_property
    def moved(self) -> list[_Draft]:
        """Whoever did more than repeat himself, once all events are in."""
        return [
            draft for draft in self.drafts.values() if draft.changed or draft.listed_at is not None
        ]


class Part(NamedTuple):
    """One partition's share of a fold."""

    partition: int
    events: Sequence[FoldEvent]
    """Valid clicks, in log order."""
    records: Mapping[str, UserRecord | None]
    """The record of every user in `events`, None for a user without one."""
    inputs: Inputs
    """In force for all of these events."""
    popularity: Popularity
    """As of the first event; it is moved past the last one."""
    put_off: bool = False
    """Scan nothing now; name the lists that are due instead. Lists without a release cost no scan
    and can only be made at their event.
    """


def fold(parts: Sequence[Part], *, release: Release | None, catalog: Catalog) -> list[Folded]:
    """Fold events in log order; several partitions share steps and scan, and nothing else.

    Args:
        parts: at most one of a partition, all under the same publication and rules.
        release: the loaded release of that publication; None only for publication 0.
        catalog: items as of the parts' `inputs.items`; the release's own where there is one.
    """
    first = parts[0].inputs
    assert (release is None) == (first.publication == 0)
    assert all(
        part.inputs._replace(publication_items=first.publication_items) == first for part in parts
    ), "nobody swaps in between"
    ways = [_way(part, catalog, rank=release is None) for part in parts]
    if release is not None:
        _rebuild(ways, release)
        _advance([draft for way in ways for draft in way.moved], release)
    return _finish(ways, release)


def renew(
    users: Mapping[str, tuple[UserRecord | None, int, int]],
    *,
    partition: int,
    inputs: Inputs,
    release: Release,
) -> Folded:
    """Make lists anew that answer an earlier event, rebuilding records of another publication.

    What comes out is what `fold` would have given at that event, had `inputs` been in force.

    Args:
        users: record, and offset and time of the event that the list answers.
        partition: whose users these are.
        inputs: in force now.
        release: the loaded release of `inputs.publication`.

    Returns:
        lists of all, records of those with a past.
    """
    way = _Way(partition, inputs, put_off=False)
    for user_id, (record, offset, event_ms) in users.items():
        draft = way.drafts[user_id] = _Draft(record or UserRecord())
        draft.listed_at, draft.offset, draft.event_ms = 0, offset, event_ms
    _rebuild([way], release)
    return _finish([way], release)[0]


def _way(part: Part, catalog: Catalog, *, rank: bool) -> _Way:
    """Everything of a partition's events that needs no graph."""
    way = _Way(part.partition, part.inputs, put_off=part.put_off)
    drafts, counts = way.drafts, way.counts
    for at, event in enumerate(part.events):
        draft = drafts.get(event.user_id)
        if draft is None:
            draft = drafts[event.user_id] = _Draft(part.records[event.user_id] or UserRecord())
        counts["clocks_replaced"] += event.clock_replaced
        outcome = _apply(draft, event, part.inputs, catalog, way.moves)
        counts[outcome] += 1
        if outcome in ("clicks", "visits"):
            draft.listed_at = at
        elif outcome == "forgotten":
            draft.listed_at = None
    counts["resets"] = sum(draft.resets for draft in drafts.values())
    counts["unknown_items"] = sum(draft.unknown for draft in drafts.values())
    way.added = _count(part.events, drafts, part.inputs, part.popularity, catalog, rank=rank)
    if not rank:
        counts["steps"] = sum(len(draft.steps) for draft in way.moved)
    return way


def _apply(
    draft: _Draft,
    event: FoldEvent,
    inputs: Inputs,
    catalog: Catalog,
    moves: list[tuple[int, Move]],
) -> str:
    """Take one event into a draft, and its move; the name of the count it belongs to."""
    rules = inputs.rules
    if event.event == "forget":
        draft.forget(inputs.publication)
        return "forgotten"
    if event.event != "visit":
        gap_ms = max(0, event.event_ms - draft.last_ms) if draft.interactions else 0
        reset = bool(rules.idle_ttl_s and gap_ms > rules.idle_ttl_s * 1000)
        code, gap = event_code(event.event), 0 if reset else gap_bucket(gap_ms)
        interaction = Interaction(
            item_hash(event.item_id),
            repeat_tag(event.event, event.event_id, event.event_ms),
            code,
            gap,
            event.event_ms // HOUR_MS % 24,
            reset,
        )
        packed = pack_interaction(interaction)
        if is_repeat(draft.interactions, packed):
            return "duplicates"
        if reset:
            draft.resets += 1
            draft.clear_state(inputs.publication)
        before = () if reset else last_hashes(draft.interactions, BEFORE)
        moves.append((event.offset, Move(event.item_id, code, event.event_ms, before)))
        draft.interactions = (draft.interactions + packed)[-rules.history * INTERACTION_BYTES :]
        draft.clicks += 1
        draft.last_ms = max(draft.last_ms, event.event_ms)
        row = catalog.row(event.item_id)
        if row is None:
            draft.unknown += 1
        else:
            draft.steps.append(Step(row, code, gap, interaction.hour))
        draft.counted.append(event.offset)
        draft.changed, draft.forgotten = True, False
    draft.offset, draft.event_ms = event.offset, event.event_ms
    return "visits" if event.event == "visit" else "clicks"


def _count(
    events: Sequence[FoldEvent],
    drafts: Mapping[str, _Draft],
    inputs: Inputs,
    popularity: Popularity,
    catalog: Catalog,
    *,
    rank: bool,
) -> dict[int, dict[str, int]]:
    """Move the popularity past the events; with `rank`, take every user's list on the way.

    Popularity moves with every click, so a list is taken right at its user's own last event:
    otherwise it would depend on where the chunk ends.
    """
    counted = {offset for draft in drafts.values() for offset in draft.counted}
    added: dict[int, dict[str, int]] = {}
    for at, event in enumerate(events):
        if event.offset in counted:
            bucket = popularity.add(event.item_id, event.event_ms)
            if bucket is not None:
                hour = added.setdefault(bucket, {})
                hour[event.item_id] = hour.get(event.item_id, 0) + 1
        draft = drafts[event.user_id]
        if rank and draft.listed_at == at:
            drop = _Seen(_hashes(draft)) if inputs.rules.filter_seen else ()
            draft.popular = popularity.top(
                inputs.rules.k + inputs.rules.margin, available=catalog.is_available, drop=drop
            )
    return added


def _rebuild(ways: Sequence[_Way], release: Release) -> None:
    """Give records of another publication the state that this release gives their past."""
    pasts: list[tuple[_Draft, list[Step]]] = []
    for way in ways:
        before, publication = list(way.inputs.publication_items), way.inputs.publication
        for draft in way.moved:
            if draft.publication == publication:
                continue  # of this release, or forgotten or reset within this chunk
            past: list[Step] = []
            way.counts["rebuilt"] += bool(draft.past)
            for kept in unpack_interactions(draft.past):
                if kept.reset:
                    past = []
                row = release.catalog.row_of_hash(kept.item_hash, before)
                if row is not None:
                    past.append(Step(row, kept.event, kept.gap, kept.hour))
            draft.publication, draft.num_steps, draft.state = publication, len(past), b""
            if past:
                pasts.append((draft, past))
    states = run_steps([past for _, past in pasts], [b""] * len(pasts), release)
    for (draft, _), state in zip(pasts, states, strict=True):
        draft.state = state


def _advance(drafts: list[_Draft], release: Release) -> None:
    moving = [draft for draft in drafts if draft.steps]
    states = run_steps(
        [draft.steps for draft in moving], [draft.state for draft in moving], release
    )
    for draft, state in zip(moving, states, strict=True):
        draft.state = state
        draft.num_steps += len(draft.steps)


def _finish(ways: Sequence[_Way], release: Release | None) -> list[Folded]:
    """Records of everybody who moved, and the lists, scanned for all at once."""
    listed = [
        {}
        if way.put_off and release is not None
        else {user: draft for user, draft in way.drafts.items() if draft.listed_at is not None}
        for way in ways
    ]
    wanting = [draft for users in listed for draft in users.values()]
    if release is None:
        ranked = [
            ranked_of([item for item, _ in draft.popular], [float(s) for _, s in draft.popular])
            for draft in wanting
        ]
    else:
        ranked = _rank(wanting, ways[0].inputs.rules, release)
    rankings = iter(ranked)
    return [
        _folded(way, {user: next(rankings) for user in users}, release)
        for way, users in zip(ways, listed, strict=True)
    ]


def _folded(way: _Way, rankings: dict[str, Ranked], release: Release | None) -> Folded:
    records: dict[str, UserRecord | None] = {}
    lists: dict[str, bytes] = {}
    due: dict[str, tuple[int, int]] = {}
    write = _list_writer(way, "popularity" if release is None else "model")
    for user_id, draft in way.drafts.items():
        if not draft.changed and draft.listed_at is None:
            continue
        records[user_id] = None  # forgotten, or a visitor without a past
        if draft.interactions:
            draft.publication = way.inputs.publication
            records[user_id] = draft.record()
        if draft.listed_at is None:
            lists[user_id] = b""
        elif user_id in rankings:
            lists[user_id] = write(rankings[user_id].text, draft.offset, draft.event_ms)
        else:
            due[user_id] = draft.offset, draft.event_ms
    return Folded(records, lists, way.added, Counts(**way.counts), due, way.moves)


def _list_writer(
    way: _Way, source: Literal["model", "popularity"]
) -> Callable[[bytes, int, int], bytes]:
    inputs = way.inputs
    return list_writer(
        TopList(
            items=[],
            scores=[],
            source=source,
            release=inputs.release,
            publication=inputs.publication,
            items_offset=list(inputs.items),
            partition=way.partition,
            offset=0,
            event_ms=0,
            signals=inputs.signals,
        ),
        scores=inputs.rules.list_scores,
    )


def _rank(drafts: list[_Draft], rules: ListRules, release: Release) -> list[Ranked]:
    if not drafts:
        return []
    states_BS = release.engine.unpacked([draft.state for draft in drafts])
    seen = [_hashes(draft) for draft in drafts] if rules.filter_seen else None
    contexts = [
        Context(draft.interactions, draft.clicks, draft.last_ms, draft.event_ms) for draft in drafts
    ]
    return rank_states(
        states_BS, release, want=rules.k + rules.margin, seen=seen, contexts=contexts,
        head=rules.head,
    )  # fmt: skip


def _hashes(draft: _Draft) -> frozenset[int]:
    return frozenset(kept.item_hash for kept in unpack_interactions(draft.interactions))


class _Seen:
    """The items of a user's history, asked by id."""

    def __init__(self, hashes: frozenset[int]) -> None:
        self._hashes = hashes

    def __contains__(self, item_id: object) -> bool:
        return item_hash(str(item_id)) in self._hashes
