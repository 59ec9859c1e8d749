"""The simulation finds what it is there to find: each rule, taken out, makes it fail."""

from collections.abc import Callable

import pytest

from afterclick.serving import store
from tests.simulation.releases import Releases
from tests.simulation.run import run_seeds

Patch = Callable[[pytest.MonkeyPatch], None]


def without_line(script: str, line: str) -> Patch:
    """A script of the store without one of its lines."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        text = getattr(store, script)
        assert text.count(line) == 1
        monkeypatch.setattr(store, script, text.replace(line, ""))

    return patch


MUTATIONS: dict[str, tuple[Patch, int]] = {
    "compare-and-set": (
        without_line("COMMIT", "if head ~= ARGV[1] then return head end\n"),
        100,
    ),
}
"""What is taken out, and within how many seeds the simulation must fail."""


@pytest.mark.parametrize("rule", MUTATIONS)
def test_a_rule_taken_out_is_found(
    rule: str, tiny_releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulation that passes without a rule does not test it."""
    patch, seeds = MUTATIONS[rule]
    patch(monkeypatch)
    tally = run_seeds(1, seeds, tiny_releases, stop_at=1)
    assert tally.wrong, f"{tally.seeds} seeds without {rule}"
