"""Large catalogues: both scans beside scoring all: `python -m benchmarks.catalogues`.

On trained vectors (`benchmarks.vectors`, whose folder is given): recall of the two-stage scan, CPU
a user in batches, one user alone, memory and how long the index takes, at 20,000 items up to all;
with `--huge` 10 million, made of the trained ones and noise, for memory and cost only. Then what a
user costs against items, users of a batch, K, H and history, in one plot. One thread; CPU time of
the process, because a shared machine's wall clock says more of the others. Prints the machine,
tables, one JSON line.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from afterclick.serving.best import best_rows
from afterclick.serving.engine import F32, Engine
from afterclick.serving.index import SURVIVORS, TwoStageScanner
from afterclick.serving.manifest import read_manifest
from afterclick.serving.scanner import SCORES_MAX, USERS_MAX, Scanner
from afterclick.serving.sessions import graph_of, session_of
from benchmarks.report import machine, tell
from tests.tiny_release import write_tiny_release

SCANS = ("all_scored", "exact", "two_stage")
WANT = 71
"""K + margin + 1, what a fold asks for by default."""
K = 50
REPEATS = 3
SIZES = (20_000, 100_000, 300_000)
HUGE = 10_000_000
NOISE = 0.02
CONSTANT_MAX = 1 << 30
"""Bytes; a graph holds less than 2 GiB."""


def cpu_us(call: Callable[[], object], users: int, repeats: int = REPEATS) -> float:
    """Median CPU µs a user, after one call that is not counted."""
    call()
    taken = []
    for _ in range(repeats):
        begun_s = time.process_time()
        call()
        taken.append((time.process_time() - begun_s) / users * 1e6)
    return statistics.median(taken)


def scan_all(scanner: Scanner, q_BD: F32, want: int = WANT) -> tuple[np.ndarray, np.ndarray]:
    """All users, in batches that a worker would make."""
    size = scanner.users_max
    found = [scanner.top(q_BD[at : at + size], want) for at in range(0, len(q_BD), size)]
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))  # type: ignore[return-value]


def all_scored(vectors: F32, q_BD: F32) -> Callable[[], None]:
    """The rival: ONNX Runtime's product with every row, a constant that is packed at load as far as
    a graph holds it, then the best of all scores; in batches that leave 64 MB of scores.
    """
    info, (num_rows, dim) = helper.make_tensor_value_info, vectors.shape
    feed, constants = {"items": vectors}, []
    if vectors.nbytes < CONSTANT_MAX:
        feed, constants = {}, [numpy_helper.from_array(vectors, "items")]
    graph = graph_of(
        [helper.make_node("Gemm", ["q", "items"], ["scores"], transB=1)],
        [info(name, TensorProto.FLOAT, [None, dim]) for name in ("q", *feed)],
        [info("scores", TensorProto.FLOAT, ["B", num_rows])],
        constants,
    )
    session = session_of(graph, "cpu", 1)
    size = max(2, min(USERS_MAX, SCORES_MAX // num_rows))

    def scan() -> None:
        for at in range(0, len(q_BD), size):
            best_rows(session.run(None, {"q": q_BD[at : at + size], **feed})[0], WANT)

    return scan


def catalogue(vectors: F32, q_BD: F32, *, repeats: int = REPEATS) -> dict[str, Any]:
    """Both scans over one catalogue."""
    all_us = cpu_us(all_scored(vectors, q_BD), len(q_BD), repeats)
    exact = Scanner(vectors, provider="cpu", threads=1)
    begun_s = time.process_time()
    two = TwoStageScanner(vectors, threads=1)
    build_s = time.process_time() - begun_s
    users = len(q_BD)
    exact_us = cpu_us(lambda: scan_all(exact, q_BD), users, repeats)
    two_us = cpu_us(lambda: scan_all(two, q_BD), users, repeats)
    found, expected = scan_all(two, q_BD)[1], scan_all(exact, q_BD)[1]
    alone = [two.top(q_BD[at : at + 1], WANT)[1][0] for at in range(min(8, users))]
    return {
        "items": len(vectors),
        "all_scored_us_a_user": round(all_us),
        "exact_us_a_user": round(exact_us),
        "two_stage_us_a_user": round(two_us),
        "exact_times_faster": round(all_us / exact_us, 2),
        "two_stage_times_faster": round(all_us / two_us, 2),
        "exact_alone_us": round(cpu_us(lambda: exact.top(q_BD[:1], WANT), 1, repeats)),
        "two_stage_alone_us": round(cpu_us(lambda: two.top(q_BD[:1], WANT), 1, repeats)),
        "recall_10": recall(expected, found, 10),
        "recall_50": recall(expected, found, K),
        "alone_is_batch": all(np.array_equal(*pair) for pair in zip(alone, found, strict=False)),
        "matrix_mb": round(vectors.nbytes / 1e6, 1),
        "lists_read": round(two.lists_read, 3),
        "index_mb": round(two.index_bytes / 1e6, 1),
        "index_cpu_s": round(build_s, 2),
    }


def recall(expected: np.ndarray, found: np.ndarray, k: int) -> float:
    """Share of the k truly best rows that are among the k found."""
    pairs = zip(expected[:, :k], found[:, :k], strict=True)
    return round(float(np.mean([np.isin(one, other).mean() for one, other in pairs])), 4)


def survivors(vectors: F32, q_BD: F32) -> list[list[float]]:
    """Survivors, recall@50 and CPU µs a user of the two-stage scan."""
    expected = scan_all(Scanner(vectors, provider="cpu", threads=1), q_BD)[1]
    found = []
    for num in (SURVIVORS // 2, SURVIVORS, 2 * SURVIVORS):
        two = TwoStageScanner(vectors, threads=1, survivors=num)
        us = cpu_us(lambda two=two: scan_all(two, q_BD), len(q_BD), 1)  # type: ignore[misc]
        found.append([num, recall(expected, scan_all(two, q_BD)[1], K), round(us)])
    return found


def curves(vectors: F32, q_BD: F32, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """CPU µs a user against one thing at a time; 20,000 items, a batch of 256, K 50 otherwise."""
    small = vectors[: SIZES[0]]
    exact = Scanner(small, provider="cpu", threads=1)
    found: dict[str, Any] = {
        "items": [[row["items"], *(row[f"{scan}_us_a_user"] for scan in SCANS)] for row in rows],
        "users of a batch": [
            [users, cpu_us(lambda users=users: exact.top(_users(q_BD, users), WANT), users)]  # type: ignore[misc]
            for users in (1, 4, 16, 64, 256)
        ],
        "K": [
            [k, cpu_us(lambda k=k: exact.top(_users(q_BD, 256), k + 21), 256)]  # type: ignore[misc]
            for k in (10, 50, 200, 1000)
        ],
        "H": [],
        "history": [],
    }
    rng = np.random.default_rng(0)
    for units in (64, 128, 256, 512):
        wide_ND = rng.standard_normal((SIZES[0], units + 1)).astype(np.float32)
        q = rng.standard_normal((256, units + 1)).astype(np.float32)
        scanner = Scanner(wide_ND, provider="cpu", threads=1)
        found["H"].append([units, cpu_us(lambda s=scanner, q=q: s.top(q, WANT), 256)])  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="afterclick-catalogues-") as name:
        folder = Path(name, "r1")
        write_tiny_release(folder, num_items=300, units=128)
        engine = Engine(folder, read_manifest(folder), provider="cpu", threads=1)
        for steps in (1, 10, 50, 200):
            x_TBE = rng.standard_normal((steps, 64, engine.manifest.step_dim)).astype(np.float32)
            codes_TB = np.zeros((steps, 64), np.int64)
            lens_B = np.full(64, steps, np.int32)

            def rebuild(x: F32 = x_TBE, codes: Any = codes_TB, lens: Any = lens_B) -> None:
                engine.advance(engine.zero_state(64), x, lens, event_TB=codes, gap_TB=codes)

            found["history"].append([steps, cpu_us(rebuild, 64)])
    return {
        name: [[at, *(round(float(us), 1) for us in rest)] for at, *rest in points]
        for name, points in found.items()
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """One panel for each, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "afterclick"})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.6), sharey=False)
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        columns = list(zip(*points, strict=True))
        words = [scan.replace("_", " ") for scan in SCANS] if len(columns) > 2 else [""]
        for label, column in zip(words, columns[1:], strict=True):
            axis.loglog(columns[0], column, marker="o", label=label)
        axis.set_xlabel(name if name != "history" else "history replayed, steps")
        axis.grid(visible=True, which="both", alpha=0.3)
        if len(words) > 1:
            axis.legend()
    axes[0].set_ylabel("CPU µs a user, one thread")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def table(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    lines = [
        f"Vectors: `{msgspec.json.encode(result['vectors']).decode()}`",
        "",
        "| items | all scored, µs a user | exact | times faster | two-stage | times faster "
        "| one user alone: exact, µs | two-stage | its recall@10 | recall@50 | lists read "
        "| matrix, MB | index, MB | index, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = ("all_scored_us_a_user", "exact_us_a_user", "exact_times_faster")
    names += ("two_stage_us_a_user", "two_stage_times_faster", "exact_alone_us")
    names += ("two_stage_alone_us", "recall_10", "recall_50")
    names += ("lists_read", "matrix_mb", "index_mb", "index_cpu_s")
    for row in result["catalogues"]:
        lines.append(
            f"| {row['items']:,} | " + " | ".join(f"{row[name]:,}" for name in names) + " |"
        )
    lines += [
        "",
        f"| survivors, {result['vectors']['items']:,} items | recall@50 | µs a user |",
        "|---|---|---|",
    ]
    lines += [f"| {num:,} | {share} | {us:,} |" for num, share, us in result["survivors"]]
    lines += ["", "| CPU µs a user against | |", "|---|---|"]
    for name, points in result["curves"].items():
        words = ", ".join(
            f"{at:,}: {' / '.join(f'{us:,.0f}' for us in us_)}" for at, *us_ in points
        )
        lines.append(f"| {name} | {words} |")
    return lines


def _users(q_BD: F32, num: int) -> F32:
    return q_BD[np.arange(num) % len(q_BD)]


def _huge(vectors: F32, seed: int) -> F32:
    """`HUGE` rows near the trained ones, made in pieces: noise for all at once is 10 GB."""
    rng = np.random.default_rng(seed)
    rows_ND = np.empty((HUGE, vectors.shape[1]), np.float32)
    for start in range(0, HUGE, 100_000):
        part = rows_ND[start : start + 100_000]
        rng.standard_normal(out=part, dtype=np.float32)
        part *= NOISE
        part += vectors[rng.integers(0, len(vectors), len(part))]
    return rows_ND


def main(argv: Sequence[str] | None = None) -> int:
    """Both scans at several sizes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.catalogues", description=main.__doc__
    )
    parser.add_argument("vectors", type=Path, help="folder that benchmarks.vectors wrote")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="below all of them")
    parser.add_argument("--users", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--huge", action="store_true", help="10 million items too: 7 GB of memory")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--report", action="store_true", help="write it to benchmarks/results/")
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(arguments)
    name, words = machine("")
    print(f"machine: {words}")
    vectors = np.load(given.vectors / "scan.npy", allow_pickle=False)
    q_BD = np.load(given.vectors / "queries.npy", allow_pickle=False)[: given.users]
    about = msgspec.json.decode((given.vectors / "vectors.json").read_bytes())
    # Part of a catalogue is drawn from all of it: its first rows would be the most clicked.
    mixed = np.random.default_rng(given.seed).permutation(len(vectors))
    rows = []
    for size in [size for size in given.sizes if size < len(vectors)] + [len(vectors)]:
        part = vectors if size == len(vectors) else vectors[np.sort(mixed[:size])]
        rows.append(catalogue(part, q_BD, repeats=given.repeats))
        print(msgspec.json.encode(rows[-1]).decode(), file=sys.stderr, flush=True)
    if given.huge:
        rows.append(catalogue(_huge(vectors, given.seed), q_BD[:16], repeats=1))
        print(msgspec.json.encode(rows[-1]).decode(), file=sys.stderr, flush=True)
    result = {
        "machine": name,
        "vectors": about,
        "users": len(q_BD),
        "catalogues": rows,
        "survivors": survivors(vectors, q_BD),
        "curves": curves(vectors, q_BD, rows),
    }
    lines = table(result)
    path = tell(
        "catalogues", "catalogues", arguments, (name, words), result, lines, report=given.report
    )
    if path is not None:
        plot(result["curves"], path.with_suffix(".svg"))
    return 0 if all(row["alone_is_batch"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
