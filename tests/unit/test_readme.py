"""The README's first screen is true: what it pastes is what the programs print."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_it_is_short() -> None:
    """Five minutes is what a newcomer gives it."""
    assert len(README.splitlines()) <= 150


def test_the_pasted_line_of_the_demo_has_the_fields_that_the_demo_prints() -> None:
    """A pasted output that the program no longer gives misleads; the demo's own test runs it."""
    pasted = [line.strip() for line in README.splitlines() if line.strip().startswith('{"clicks"')]
    assert len(pasted) == 1
    printed = json.loads(pasted[0])
    promised = {
        "clicks": int,
        "clicks_per_s": float,
        "hit_rate_20": float,
        "mrr_20": float,
        "popularity_hit_rate_20": float,
        "markov_hit_rate_20": float,
        "swaps": int,
        "first_list_s": float,
    }
    assert {name: type(printed[name]) for name in promised} == promised
    assert set(printed["latency_ms"]) == {"p50", "p99"}
    live = (ROOT / "streams" / "demo_live.py").read_text() + (
        ROOT / "streams" / "demo.py"
    ).read_text()
    assert not [name for name in printed if f'"{name}"' not in live]


def test_its_measured_table_stands_in_a_report() -> None:
    """No number without its command: the report beside the code has both."""
    text = README.partition("**Measured:**")[2].partition("\n## ")[0]
    names = re.findall(r"benchmarks/results/[\w.-]+\.md", text)
    assert names
    report = (ROOT / names[0]).read_text()
    cells = "".join(line for line in text.splitlines() if line.startswith("|"))
    figures = re.findall(r"\d[\d,]*\.?\d*", cells)
    assert figures
    assert not [figure for figure in figures if figure not in report]


def test_its_links_lead_somewhere() -> None:
    """Relative links name files of the repository."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
