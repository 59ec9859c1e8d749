"""Sources of candidates that bring nothing go; what only one of them can name stays."""

import numpy as np
import pytest

from afterclick.serving.blend import gather
from afterclick.serving.candidates import SOURCES
from afterclick.serving.context import Context
from afterclick.serving.manifest import BlendSpec
from afterclick.training import blending
from afterclick.training.blending import Stage, fit_blend
from afterclick.training.candidate_sources import ALL_SOURCES, needed, only
from tests.unit.training.test_blending import question
from tests.unit.training.worlds import quick

BIT = {name: 1 << at for at, name in enumerate(SOURCES)}


def ranks(found: dict[str, int], num: int = 10_000) -> np.ndarray:
    """So many predictions that only one of the named sources hits, one after the other."""
    rank_X = np.full(num, 1000)
    start = 0
    for names, count in found.items():
        rank_X[start : start + count] = sum(BIT[name] for name in names.split("+"))
        start += count
    return rank_X


def asker(found: dict[str, int]) -> object:
    by_X = ranks(found)
    return lambda sources: np.where((by_X < 1000) & (by_X & sources > 0), 1, 1000)


@pytest.mark.parametrize(
    ("found", "left_out"),
    [
        ({"popularity": 4}, {"popularity", "publication"}),
        ({"popularity": 6}, {"publication"}),
        # Either may go, both may not: what is left has to name what both did.
        ({"popularity+publication": 900}, {"popularity"}),
        # Two losses that would each be too small to count: they count together.
        ({"popularity": 4, "publication": 3}, {"publication"}),
        # Whoever offers something of the user's own stays.
        ({}, {"popularity", "publication"}),
    ],
)
def test_what_harms_nothing_is_left_out_one_after_the_other(
    found: dict[str, int], left_out: set[str]
) -> None:
    """A few predictions in 10,000 may be lost, in all."""
    bits = needed(asker({"model": 500, **found}))  # type: ignore[arg-type]
    assert {name for name, bit in BIT.items() if not bits & bit} == left_out


def test_what_only_a_long_list_shows_counts_less_but_counts() -> None:
    """Rank 30 is on a page of fifty: a quarter of a percent may be lost there."""

    def lost(count: int) -> bool:
        def ranked(sources: int) -> np.ndarray:
            named = np.arange(10_000) < (count if sources & BIT["popularity"] else 0)
            return np.where(named, 30, 1000)

        return bool(needed(ranked) & BIT["popularity"])

    assert (lost(24), lost(26)) == (False, True)


def test_a_source_left_out_names_nobody_and_describes_as_before() -> None:
    """Candidates go, features stay."""
    spec = BlendSpec(features=["next", "popular"], older=4, touched=4, newest=4)
    bare = only(spec, ALL_SOURCES & ~BIT["popularity"] & ~BIT["publication"])
    assert bare == BlendSpec(features=spec.features, older=4, popular=False)
    assert only(spec, ALL_SOURCES) == spec


def test_a_blend_does_without_what_its_log_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the ring what follows is all there is to know; most is described after that is found."""
    monkeypatch.setattr(blending, "PROBES_MIN", 20)
    asked, knowledge, arrivals, _ = question()
    sizes: list[int] = []

    def counted(*given: object, **named: object) -> object:
        found = gather(*given, **named)  # type: ignore[arg-type]
        sizes.extend(np.diff(found.pool.begin_B1).tolist())
        return found

    monkeypatch.setattr(blending, "gather", counted)
    num, stages = len(asked.target_X), [Stage(asked, knowledge)]
    blend = fit_blend(stages, num, quick(), arrivals=arrivals)
    assert blend.without == ["popularity", "publication"]
    assert (blend.spec.popular, blend.spec.newest, blend.spec.touched) == (False, 0, 0)
    early, late = sizes[: len(sizes) // 5], sizes[len(sizes) // 2 :]
    assert np.mean(late) < np.mean(early)
    assert blend.judged["blend"]["hit_rate_20"] > 0.9
    assert fit_blend(stages, num, quick(blend_epochs=2)).without == [], "nothing new was in it"


def test_too_few_predictions_decide_nothing() -> None:
    """By chance a source may bring nothing among a hundred clicks."""
    asked, knowledge, arrivals, _ = question()
    blend = fit_blend(
        [Stage(asked, knowledge)], len(asked.target_X), quick(blend_epochs=2), arrivals=arrivals
    )
    assert blend.without == []


def test_a_newcomer_is_offered_what_is_popular_all_the_same() -> None:
    """Whose past says nothing has nothing else; the fallback list is a newcomer's."""
    _, knowledge, _, _ = question()
    memory, catalog, scanner = knowledge
    spec = only(BlendSpec(features=["next", "popular"]), ALL_SOURCES & ~BIT["popularity"])
    rows = blending.rows_of(memory, catalog)
    query_BD = np.zeros((1, 5), np.float32)
    found = gather(spec, query_BD, [Context()], memory, rows, scanner, 1)
    popular = BIT["popularity"]
    named = found.pool.code_R[found.pool.source_R & popular > 0].tolist()
    assert sorted(named) == memory.popular.tolist()
