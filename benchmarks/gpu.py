"""The engine alone on a GPU, beside what the card could do at most: `python -m benchmarks.gpu`.

One click a user: step, query, scan, top-K, by the product's own `Engine` and `Scanner`, item matrix
and top-K on the device, states and answers on the host. Random vectors: they do not change the
work. Beside clicks a second stand two floors of one batch's scan: bytes over bandwidth and
operations over rate, of the card that `--card` names; and how far lists are from the CPU's. Prints
the machine, a table, one JSON line. `--provider cpu` runs the same on a CPU, which proves the
harness and measures nothing about GPUs.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from afterclick.serving.engine import F32, Engine
from afterclick.serving.manifest import read_manifest
from afterclick.serving.scanner import Scanner
from benchmarks.report import machine, tell
from tests.tiny_release import write_tiny_release

UNITS = 128
WANT = 71
SCORES_MAX = 1 << 30
"""Scores of one scan: 4 GiB on the device, so that 10 million items take batches of 107."""
TOLERANCE = {"fp32": 5e-2, "fp16": 5e-2}
"""Largest difference of a score to the CPU's float32: scores are about 10, fp16 has 11 bits, and
so has TF32, in which ONNX Runtime lets a GPU multiply float32 unless told otherwise.
"""


class Card(NamedTuple):
    """What its maker says, dense."""

    bytes_per_s: float
    fp32_per_s: float
    fp16_per_s: float


CARDS = {
    "h100": Card(3.35e12, 67e12, 989e12),
    "h200": Card(4.8e12, 67e12, 989e12),
    "a100": Card(2.04e12, 19.5e12, 312e12),
    "t4": Card(0.32e12, 8.1e12, 65e12),
}


def floors_ms(card: Card, items: int, users: int, precision: str) -> tuple[float, float]:
    """One batch's scan at least: (bytes over bandwidth, operations over rate).

    Bytes: the matrix once, and the scores written once and read once, because the product and
    top-K are two kernels.
    """
    dim = UNITS + 1
    moved = items * dim * (2 if precision == "fp16" else 4) + 2 * 4 * users * items
    rate = card.fp16_per_s if precision == "fp16" else card.fp32_per_s
    return 1e3 * moved / card.bytes_per_s, 1e3 * 2 * users * items * dim / rate


def measure(
    folder: Path, vectors: F32, provider: str, precision: str, *, users: int, seconds: float
) -> dict[str, Any]:
    """Clicks a second and ms a batch at one size; how far answers are from the CPU's."""
    engine = Engine(folder, read_manifest(folder), provider=provider, threads=0)
    scanner = Scanner(vectors, provider=provider, threads=0, precision=precision)
    num_users = max(2, min(users, SCORES_MAX // len(vectors)))
    rng = np.random.default_rng(1)
    x_TBE = rng.standard_normal((1, num_users, engine.manifest.step_dim)).astype(np.float32)
    codes_TB = rng.integers(0, 4, (1, num_users))
    lens_B = np.ones(num_users, np.int32)
    state_BS = engine.zero_state(num_users)
    step_s: list[float] = []
    scan_s: list[float] = []
    until_s = 0.0
    while not until_s or time.perf_counter() < until_s or len(scan_s) < 3:
        begun_s = time.perf_counter()
        state_BS = engine.advance(state_BS, x_TBE, lens_B, event_TB=codes_TB, gap_TB=codes_TB)
        q_BD = engine.query(state_BS)
        stepped_s = time.perf_counter()
        scanner.top(q_BD, WANT)
        ended_s = time.perf_counter()
        if until_s:  # the first batch also makes arenas, and sends the matrix
            step_s.append(stepped_s - begun_s)
            scan_s.append(ended_s - stepped_s)
        else:
            until_s = time.perf_counter() + seconds
    batch_s = statistics.median([sum(pair) for pair in zip(step_s, scan_s, strict=True)])
    checked = q_BD[:4]
    scores, rows = scanner.top(checked, WANT)
    own, own_rows = Scanner(vectors, provider="cpu", threads=0).top(checked, WANT)
    same = np.mean([np.isin(*pair).mean() for pair in zip(own_rows, rows, strict=True)])
    return {
        "items": len(vectors),
        "precision": precision,
        "users_a_batch": num_users,
        "clicks_per_s": round(num_users / batch_s),
        "batch_ms": round(1e3 * batch_s, 3),
        "step_ms": round(1e3 * statistics.median(step_s), 3),
        "scan_ms": round(1e3 * statistics.median(scan_s), 3),
        "batches": len(scan_s),
        "same_rows": round(float(same), 4),
        "score_difference": round(float(np.abs(np.sort(scores) - np.sort(own)).max()), 6),
    }


def table(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    lines = [
        "| items | precision | users a batch | clicks/s | batch, ms | of it steps | scan "
        "| floor: bytes | operations | scan ÷ floor | rows as on the CPU | largest difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        floor = max(row["floor_bytes_ms"], row["floor_operations_ms"])
        lines.append(
            f"| {row['items']:,} | {row['precision']} | {row['users_a_batch']} "
            f"| {row['clicks_per_s']:,} | {row['batch_ms']} | {row['step_ms']} | {row['scan_ms']} "
            f"| {row['floor_bytes_ms']} | {row['floor_operations_ms']} "
            f"| {row['scan_ms'] / floor:.1f} | {row['same_rows']} | {row['score_difference']} |"
        )
    return lines


def _card_name() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
    except OSError:
        return "no GPU"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "no GPU"


def main(argv: Sequence[str] | None = None) -> int:
    """Clicks a second of the engine alone, beside the card's floor."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=main.__doc__)
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--card", choices=tuple(CARDS), default="h100", help="whose floors")
    parser.add_argument("--items", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--users", type=int, default=256, help="of a batch")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--report", action="store_true", help="write it to benchmarks/results/")
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(arguments)
    name, words = machine("")
    words = f"{_card_name()}; {words}"
    print(f"machine: {words}")
    rows = []
    precisions = ("fp32", "fp16") if given.provider == "cuda" else ("fp32",)
    with tempfile.TemporaryDirectory(prefix="afterclick-gpu-") as place:
        folder = Path(place, "r1")
        write_tiny_release(folder, num_items=300, units=UNITS, seed=given.seed)
        for items in given.items:
            rng = np.random.default_rng(given.seed)
            vectors = rng.standard_normal((items, UNITS + 1), dtype=np.float32)
            for precision in precisions:
                row = measure(
                    folder,
                    vectors,
                    given.provider,
                    precision,
                    users=given.users,
                    seconds=given.seconds,
                )
                floors = floors_ms(CARDS[given.card], items, row["users_a_batch"], precision)
                row["floor_bytes_ms"], row["floor_operations_ms"] = (
                    round(floor, 4) for floor in floors
                )
                rows.append(row)
    far = [row for row in rows if row["score_difference"] > TOLERANCE[row["precision"]]]
    result = {
        "machine": name,
        "gpu": _card_name(),
        "provider": given.provider,
        "card": given.card,
        "rows": rows,
        "failures": [f"{row['items']} items, {row['precision']}: lists differ" for row in far],
    }
    lines = table(result)
    tell("gpu", "gpu", arguments, (name, words), result, lines, report=given.report)
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
