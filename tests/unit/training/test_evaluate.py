"""Metrics and baselines against examples that were worked out by hand."""

import numpy as np
import pytest
import torch

from afterclick.training.baselines import evaluate_baselines
from afterclick.training.data import UNKNOWN, Held, Sequences, build_log, held_out
from afterclick.training.evaluate import model_ranks, questions, rank_of
from afterclick.training.metrics import MISS, Ranking, rates
from afterclick.training.model import Recommender
from tests.unit.training.worlds import columns, quick, ring


def sequences(*items: list[int]) -> Sequences:
    flat = np.array([item for own in items for item in own], np.int64)
    start = np.cumsum([0, *(len(own) for own in items)])
    return Sequences(start, flat, np.zeros_like(flat), np.zeros_like(flat), None)


def rates_of(rankings: dict[str, Ranking]) -> dict[str, dict[str, float]]:
    return {name: rates(ranking.rank_X) for name, ranking in rankings.items()}


def test_rates_of_four_predictions() -> None:
    """Ranks 1, 2, 21 and a miss: two hits of four; (1 + 1/2) / 4."""
    found = rates(np.array([1, 2, 21, MISS]))

    assert found["hit_rate_20"] == 0.5
    assert found["mrr_20"] == pytest.approx(0.375)
    assert found["hit_rate_1"] == 0.25
    assert found["predictions"] == 4


def test_ties_count_against_us() -> None:
    """A model that scores everything alike must not look good."""
    score = np.array([[1.0, 1.0, 1.0, 0.0], [3.0, 2.0, 2.0, 9.0], [1.0, 1.0, 1.0, 1.0]])

    score[2, 1] = -np.inf
    assert rank_of(torch.from_numpy(score), np.array([0, 1, UNKNOWN])).tolist() == [3, 4, MISS]
    assert rank_of(torch.from_numpy(score), np.array([3, 3, 1])).tolist() == [4, 1, MISS]


def test_a_model_that_knows_nothing_ranks_last() -> None:
    """The same tie rule in the torch path: equal scores give rank N."""
    model = Recommender(30, quick())
    scan_ND = torch.zeros(30, 17)
    held = held_out(sequences([1, 2, 3], [4, 5]), None)

    assert model_ranks(model, held, scan_ND=scan_ND).tolist() == [30, 30, 30]


def test_baselines_of_a_hand_made_log() -> None:
    """a b, a b, a c in training; then a → b (first of its row), a → c (second), d → a."""
    a, b, c, d = range(4)
    train = sequences([a, b], [a, b], [a, c])  # clicks: a 3, b 2, c 1, d 0
    held = held_out(sequences([a, b], [a, c], [d, a], [c, d, c]), None)

    found = rates_of(evaluate_baselines(train, held, 4, history=50))

    # popularity ranks: b 2, c 3, a 1, d 4, c 3
    assert found["popularity"]["mrr_20"] == pytest.approx((1 / 2 + 1 / 3 + 1 + 1 / 4 + 1 / 3) / 5)
    # Markov: b 1, c 2, then popularity: a 1, d 4, c 3
    assert found["markov"]["mrr_20"] == pytest.approx((1 + 1 / 2 + 1 + 1 / 4 + 1 / 3) / 5)
    # with the session's own items d, then c, before popularity: c 2, the others as before,
    # but d → a: d itself stands first (2), and c → d: c itself does (4)
    assert found["markov_session"]["mrr_20"] == pytest.approx(
        (1 + 1 / 2 + 1 / 2 + 1 / 4 + 1 / 2) / 5
    )
    # the session's own items, by popularity beyond: c 3, a 2 (after d), d 4, c 1 of c d (a tie is
    # broken by popularity: c 1, d 0), and a → b is second to a itself
    assert found["session_popularity"]["mrr_20"] == pytest.approx(
        (1 / 2 + 1 / 3 + 1 / 2 + 1 / 4 + 1) / 5
    )


def test_popularity_of_the_last_day_forgets_the_day_before() -> None:
    """News live by it."""
    day = 86_400_000
    log = build_log(
        columns(("u", "a", 0), ("v", "a", 1), ("w", "b", 2 * day), ("w", "a", 2 * day + 1)),
        history=50,
    )
    held = held_out(sequences([0, 1]), None)

    found = rates_of(evaluate_baselines(log.sequences, held, 2, history=50))

    assert found["popularity"]["mrr_20"] == 0.5
    # On the last day both have one click: a tie, which counts against us.
    assert found["popularity_24h"]["mrr_20"] == 0.5


def test_every_target_is_asked_once_and_unknown_items_are_no_steps() -> None:
    """Positions may come in any batch, but each exactly once, with the right number of steps."""
    held = held_out(sequences([1, UNKNOWN, 2, 3], [UNKNOWN, 4], [5] * 40), None)

    asked: dict[int, int] = {}
    for question in questions(held, device=torch.device("cpu")):
        for at, steps in zip(question.at_X.tolist(), question.step_X.tolist(), strict=True):
            assert at not in asked
            asked[at] = steps

    assert sorted(asked) == np.flatnonzero(held.target_P).tolist()
    assert [asked[1], asked[2], asked[3], asked[5], asked[45]] == [1, 1, 2, 0, 39]


def test_padding_never_moves_a_rank() -> None:
    """A short sequence among long ones is ranked as alone."""
    torch.manual_seed(0)
    log = build_log(ring(num_users=9), history=50)
    model = Recommender(len(log.item_ids), quick())
    mixed = sequences(*[list(range(size)) for size in (2, 30, 3, 17)])

    together = model_ranks(model, held_out(mixed, None))

    alone = [
        model_ranks(model, held_out(sequences(list(range(size))), None)) for size in (2, 30, 3, 17)
    ]
    assert together.tolist() == np.concatenate(alone).tolist()


def test_nothing_to_predict_gives_no_ranks() -> None:
    """A validation part of single clicks is empty, not an error."""
    held = Held(sequences([1], [2]), np.zeros(2, bool))

    assert rates(model_ranks(Recommender(5, quick()), held))["predictions"] == 0
