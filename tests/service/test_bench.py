"""`make bench` itself, small: the whole harness with real broker, Redis, worker and rivals."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.service
def test_the_last_line_holds_every_promised_field() -> None:
    """Issue 3 names them; scripts read that line. A wrong answer makes it end with 1."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench", "--quick", "--items", "2000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    for name in (
        "",
        "one_process_",
        "again_",
        "blend_",
        "engine_",
        "matmul_",
        "do_nothing_agent_",
        "naive_",
    ):
        assert result[f"{name}clicks_per_s"] > 0
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p99"]
    assert 0 < result["idle_latency_ms"]["p50"] <= result["idle_latency_ms"]["p99"]
    for found in (result["blend_idle_latency_ms"], *result["blend_latency_ms_by_share"].values()):
        assert 0 < found["p50"] <= found["p99"]
    swapped = result["swap_latency_ms"]
    assert swapped["swaps_total"] > 0
    assert sum(swapped["histogram"]) == swapped["clicks"]
    assert set(result["ratios"]) == {
        "end_to_end_of_engine",
        "engine_of_matmul",
        "end_to_end_of_do_nothing",
        "end_to_end_of_naive",
        "end_to_end_of_one_process",
        "blend_of_plain",
        "idle_p50_of_hop",
    }
    assert result["processes"] == 2
    assert result["hop_ms"]["p50"] > 0
    assert result["failures"] == []
    assert re.search(r"machine: .* Redis \d+\.\d\S* \(\S+\); ", done.stderr)
