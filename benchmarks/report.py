"""The machine in words, the table, and the report with its command; never a host's name."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime

from afterclick.serving.errors import ConfigError
from afterclick.streams.local import redis_program
from benchmarks.ground import ROOT, Options

RESULTS = ROOT / "benchmarks" / "results"


def machine(name: str) -> tuple[str, str]:
    """Short name for files (`2-core-amd-epyc`), and a line that says more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        model = found.group(1).strip() if found else model
    short = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|cpu|@.*", "", model.lower())).strip("-")
    load = os.getloadavg()[0]
    words = (
        f"{cores} cores, {model}, load {load:.1f} before; Python {platform.python_version()}, "
        f"ONNX Runtime {onnxruntime.__version__}, {_redis()}; "
        "broker, worker, Redis, load and reader share them"
    )
    return name or f"{cores}-core-{short}", words


def _redis() -> str:
    """Version and allocator of the Redis that is started here: bytes and speed go with both."""
    try:
        asked = subprocess.run([redis_program(), "--version"], capture_output=True, check=True)
    except (ConfigError, OSError, subprocess.CalledProcessError):
        return "no Redis"
    version, allocator = re.findall(r"(?:v|malloc)=(\S+)", asked.stdout.decode())
    return f"Redis {version} ({allocator})"


def table(result: dict[str, Any], runs: int) -> list[str]:
    """Rates with their ratios, then latencies, as Markdown."""
    ratios, spread = result["ratios"], result.get("spread", {})

    def rate(key: str) -> str:
        low_high = spread.get(key)
        text = f"{result[key]:,.0f}"
        return f"{text} ({low_high[0]:,.0f}–{low_high[1]:,.0f})" if low_high else text

    def ratio(key: str) -> str:
        low_high = spread.get(key)
        text = f"{ratios[key]:.2f}"
        return f"{text} ({low_high[0]:.2f}–{low_high[1]:.2f})" if low_high else text

    head = "clicks/s" if runs == 1 else f"clicks/s, median of {runs} (lowest–highest)"
    lines = [
        f"| | {head} | end to end ÷ this |",
        "|---|---|---|",
        f"| bare ONNX matrix product | {rate('matmul_clicks_per_s')} | |",
        f"| engine alone | {rate('engine_clicks_per_s')} | {ratio('end_to_end_of_engine')} |",
        f"| **end to end, {result['processes']} processes** | **{rate('clicks_per_s')}** | |",
        f"| the same, one process | {rate('one_process_clicks_per_s')} "
        f"| {ratio('end_to_end_of_one_process')} |",
        f"| **again**, broker warm, all of the log | {rate('again_clicks_per_s')} | |",
        f"| right after it, with a blend | {rate('blend_clicks_per_s')} "
        f"| blend ÷ none: **{ratio('blend_of_plain')}** |",
        f"| do-nothing Faust agent, {result['processes']} processes "
        f"| {rate('do_nothing_agent_clicks_per_s')} "
        f"| {ratio('end_to_end_of_do_nothing')} |",
        f"| naive app, one process | {rate('naive_clicks_per_s')} "
        f"| {ratio('end_to_end_of_naive')} |",
        "",
        f"engine ÷ matrix product: {ratio('engine_of_matmul')}",
        "",
        "| click → list, ms | clicks/s | p50 | p90 | p99 | p99.9 | max | clicks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    idle = result["idle_latency_ms"]
    hop = {"rate": idle["rate"], **result["hop_ms"]}
    rows = [("click → a consumer that does nothing", hop), ("idle", idle)]
    rows += [(f"{share} of it", found) for share, found in result["latency_ms_by_share"].items()]
    rows.append(("half of the maximum", result["latency_ms"]))
    rows.append(("with a blend: idle", result["blend_idle_latency_ms"]))
    rows += [
        (f"with a blend: {share} of its maximum", found)
        for share, found in result["blend_latency_ms_by_share"].items()
    ]
    for words, found in rows:
        cells = " | ".join(f"{found[q]}" for q in ("rate", "p50", "p90", "p99", "p99_9", "max"))
        lines.append(f"| {words} | {cells} | {found['clicks']} |")
    lines += ["", f"idle p50 ÷ that of a consumer that does nothing: {ratio('idle_p50_of_hop')}"]
    lines += ["", f"sender behind its schedule, p99: {result['latency_ms']['sender_lag_p99']} ms"]
    checks = result["failures"] or ["every click applied exactly once; every list verified"]
    return [*lines, "", *(f"- {words}" for words in checks)]


def write_report(
    name: str,
    words: str,
    arguments: Sequence[str],
    options: Options,
    result: dict[str, Any],
    lines: list[str],
) -> Path:
    """Write the page of `make bench`."""
    command = f'make bench ARGS="{" ".join(arguments)}"'
    lines = [f"Options: `{msgspec.json.encode(options).decode()}`", "", *lines]
    return write_page("end-to-end", name, words, command, result, lines)


def tell(
    what: str,
    module: str,
    arguments: Sequence[str],
    machine_words: tuple[str, str],
    result: dict[str, Any],
    lines: list[str],
    *,
    report: bool,
) -> Path | None:
    """End a benchmark: the table, the page where it is asked for, and one line of JSON last.

    Returns:
        The page.
    """
    print("\n".join(lines))
    path = None
    if report:
        command = " ".join([f"python -m benchmarks.{module}", *arguments])
        path = write_page(what, *machine_words, command, result, lines)
    print(msgspec.json.encode(result).decode())
    return path


def write_page(
    what: str, name: str, words: str, command: str, result: dict[str, Any], lines: list[str]
) -> Path:
    """Write `results/<what>_<machine>_<date>.md`; a report of the same day is replaced."""
    path = RESULTS / f"{what}_{name}_{time.strftime('%Y-%m-%d', time.gmtime())}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [
        f"# {what.replace('-', ' ').capitalize()} on {name}",
        "",
        f"Command: `{command}`",
        f"Machine: {words}",
        "",
        *lines,
        "",
        "What each row is: ../README.md. The JSON:",
        "",
        "```json",
        msgspec.json.format(msgspec.json.encode(result), indent=1).decode(),
        "```",
    ]
    path.write_text("\n".join(text) + "\n")
    return path
