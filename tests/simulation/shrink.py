"""The smallest plan that still fails: faults, clicks and changes are taken out while it does."""

from collections.abc import Callable
from typing import Any

from tests.simulation.plan import Plan

RUNS_MAX = 600
"""Tries; a run takes some 30 ms."""


def shrink(plan: Plan, fails: Callable[[Plan], bool]) -> Plan:
    """A shorter plan for which `fails` holds, as it must for the plan given."""
    tries = 0

    def still(shorter: Plan) -> bool:
        nonlocal tries
        tries += 1
        return tries <= RUNS_MAX and fails(shorter)

    if still(plan._replace(storms=False)):
        plan = plan._replace(storms=False)
    before = None
    while before != plan and tries <= RUNS_MAX:
        before = plan
        for name in ("faults", "appends", "changes"):
            plan = _without(plan, name, still)
    return plan


def _without(plan: Plan, name: str, still: Callable[[Plan], bool]) -> Plan:
    """Take parts out of one list, large ones first."""
    parts: list[Any] = getattr(plan, name)
    size = max(1, len(parts) // 2)
    while size:
        at = 0
        while at < len(parts):
            fewer = parts[:at] + parts[at + size :]
            shorter = plan._replace(**{name: fewer})
            if still(shorter):
                plan, parts = shorter, fewer
            else:
                at += size
        size //= 2
    return plan
