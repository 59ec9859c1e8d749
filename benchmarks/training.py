"""Clicks per second that the trainer learns from, beside the arithmetic of GRU4Rec in plain torch.

    python -m benchmarks.training [--clicks FILE] [--events 120000] [--runs 3] [--threads 0]

The rival is written from the papers (Hidasi et al. 2016, Hidasi & Karatzoglou 2018), not from their
code: session-parallel mini-batches of 128, one GRU step of 512 units each, the next item against
the batch's own and 2,048 sampled ones, cross-entropy with logQ, Adagrad on the touched rows. Every
round runs all configurations one after the other on the same clicks. The ratio is of events per
second of CPU in the same round: on a machine that others use, too, the clock tells how long one
waited for them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from afterclick.training.data import I64, Columns, Sequences, build_log
from afterclick.training.fit import fit
from afterclick.training.settings import TrainingSettings
from afterclick.training.sources import read_columns
from benchmarks.report import machine

BATCH, UNITS, SAMPLES, RATE = 128, 512, 2048, 0.07
"""Of the rival: what `../shared` measured as about 6,400 events/s on two cores."""

SAMPLES_AHEAD = 200
"""Batches whose samples the rival draws at once, as its authors do."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.set_flush_denormal(True)
    sequences, num_items = _clicks(options)
    predictions = sequences.num_events - sequences.num_sequences
    shared = {
        "epochs": 1,
        "batch_events": 1024,
        "validation": 0.0,
        "device": "cpu",
        "threads": options.threads,
    }
    ours = {
        "ours, 512 units, 2,048 items": TrainingSettings(
            units=512, dim=512, softmax_items=2048, **shared
        ),
        "ours, defaults": TrainingSettings(**shared),
        "ours, 2,048 items": TrainingSettings(softmax_items=2048, **shared),
        "ours, 1,024 items": TrainingSettings(softmax_items=1024, **shared),
        "ours, vectors of 64": TrainingSettings(dim=64, **shared),
    }
    contestants: dict[str, Callable[[], object]] = {
        "GRU4Rec's arithmetic, 512 units, 2,048 samples": lambda: _rival(sequences, num_items),
        **{
            name: (lambda settings=settings: fit(sequences, None, num_items, settings))
            for name, settings in ours.items()
        },
    }
    short, words = machine("")
    print(words)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {predictions:,} "
        f"predictions of {sequences.num_sequences:,} sessions over {num_items:,} items"
    )
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.runs):
        for name, run in contestants.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            run()
            wall[name].append(predictions / (time.perf_counter() - wall_s))
            cpu[name].append(predictions / (time.process_time() - cpu_s))
    rival = next(iter(contestants))
    print(f"\n| | events/s, median of {options.runs} | per second of CPU | ÷ the first row |")
    print("|---|---|---|---|")
    result = {}
    for name in contestants:
        pairs = zip(cpu[name], cpu[rival], strict=True)
        ratio = statistics.median(own / its for own, its in pairs)
        rates = statistics.median(wall[name]), statistics.median(cpu[name])
        print(f"| {name} | {rates[0]:,.0f} | {rates[1]:,.0f} | {ratio:.2f} |")
        result[name] = {"events_per_s": rates[0], "per_cpu_s": rates[1], "ratio": ratio}
    print(msgspec.json.encode({"machine": short, "rows": result}).decode())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clicks", type=Path, help="a file of sessions; default: made up")
    parser.add_argument("--events", type=int, default=120_000, help="newest clicks that are used")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    return parser.parse_args()


def _clicks(options: argparse.Namespace) -> tuple[Sequences, int]:
    """The newest sessions, over the items of the whole file."""
    columns = _made_up(options.events) if options.clicks is None else read_columns(options.clicks)
    log = build_log(columns, history=50)
    sequences = log.sequences
    first = int(np.searchsorted(sequences.start_S1, sequences.num_events - options.events))
    keep = np.arange(sequences.num_events) >= sequences.start_S1[first]
    return sequences.select(keep), len(log.item_ids)


def _made_up(num_events: int) -> Columns:
    """Sessions of yoochoose's mean length over as many items, popularity by Zipf."""
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(0, num_events // 4, num_events))
    item = np.minimum(rng.zipf(1.2, num_events), 17_376)
    names = np.array([str(number) for number in range(17_377)], object)
    sessions = np.array([f"s{number}" for number in range(num_events // 4)], object)
    return Columns(sessions[user], names[item], np.full(num_events, "click", object), None, None)


def _rival(sequences: Sequences, num_items: int) -> float:
    """One epoch; the mean loss, so that nothing of it can be left out."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    item_P, start_S1 = sequences.item_P, sequences.start_S1
    share_N = np.bincount(item_P, minlength=num_items) ** 0.2
    share_N = share_N / share_N.sum()
    log_share_N = torch.from_numpy(np.log(np.maximum(share_N, 1e-12)).astype(np.float32))
    items_ND = torch.randn(num_items, UNITS) * 0.05
    bias_N = torch.zeros(num_items)
    tables = [(items_ND, torch.zeros_like(items_ND)), (bias_N, torch.zeros_like(bias_N))]
    cell = nn.GRUCell(UNITS, UNITS)
    adagrad = torch.optim.Adagrad(cell.parameters(), lr=RATE)
    size_S = sequences.sizes()
    waiting = iter(np.flatnonzero(size_S > 1).tolist())
    slot_B = np.array([next(waiting) for _ in range(BATCH)])
    at_B = start_S1[slot_B].copy()
    h_BH = torch.zeros(BATCH, UNITS)
    drawn: I64 = np.zeros((0, SAMPLES), np.int64)
    total = torch.zeros(())
    steps = 0
    while True:
        if not len(drawn):
            wanted = (SAMPLES_AHEAD, SAMPLES)
            drawn = np.searchsorted(np.cumsum(share_N)[:-1], rng.random(wanted))
        samples, drawn = drawn[0], drawn[1:]
        target = torch.from_numpy(np.concatenate([item_P[at_B + 1], samples]))
        item = torch.from_numpy(item_P[at_B])
        input_BD, output_CD = items_ND[item], items_ND[target]
        bias_C = bias_N[target]
        for leaf in (input_BD, output_CD, bias_C):
            leaf.requires_grad_()
        h_BH = cell(input_BD, h_BH)
        dropped_BH = functional.dropout(h_BH, 0.2)
        score_BC = torch.addmm(bias_C - log_share_N[target], dropped_BH, output_CD.T)
        loss = functional.cross_entropy(score_BC, torch.arange(BATCH))
        adagrad.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adagrad.step()
        at = torch.cat([item, target])
        grads = (torch.cat([_grad(input_BD), _grad(output_CD)]), _grad(bias_C))
        for (table, squares), rows, grad in zip(tables, (at, target), grads, strict=True):
            squares.index_add_(0, rows, grad.square())
            table.index_add_(0, rows, -RATE * grad / (squares[rows] + 1e-6).sqrt())
        total += loss.detach()
        steps += 1
        h_BH = h_BH.detach()
        at_B += 1
        for slot in np.flatnonzero(at_B + 1 >= start_S1[slot_B + 1]).tolist():
            session = next(waiting, None)
            if session is None:
                return float(total) / steps
            slot_B[slot], at_B[slot] = session, start_S1[session]
            h_BH[slot] = 0


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


if __name__ == "__main__":
    main()
