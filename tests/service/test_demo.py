"""The whole demo, as a newcomer runs it."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from afterclick.streams.local import afterclick_argv
from tests.realdata import DATA, needs_data

pytestmark = [pytest.mark.service, pytest.mark.demo, pytest.mark.timeout(420)]

SMALL = ["--past", "12000", "--users", "400", "--num-items", "400", "--every", "5"]
"""A world that trains in seconds; two cores may be shared."""


def start(*arguments: str, folder: Path) -> "subprocess.Popen[str]":
    env = {k: v for k, v in os.environ.items() if not k.startswith("AFTERCLICK_")}
    return subprocess.Popen(
        afterclick_argv("demo", "--folder", str(folder), *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines and environments of this machine's processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in text:
                found.append(f"{entry.name}: {text[:200]!r}")
    return found


def test_from_nothing_to_a_swap_under_live_clicks(tmp_path: Path) -> None:
    """Lists answer every click, latency is measured, a re-exported release is swapped in, and
    nothing is left running.
    """
    demo = start("--seconds", "10", *SMALL, folder=tmp_path)
    out, err = demo.communicate(timeout=400)

    assert demo.returncode == 0, out + err
    *lines, last = out.splitlines()
    summary = json.loads(last)
    assert summary["clicks"] > 50
    assert summary["clicks_per_s"] > 0
    assert 0 < summary["latency_ms"]["p50"] <= summary["latency_ms"]["p99"]
    assert summary["swaps"] >= 1
    assert (summary["lists"], summary["lists_unseen"]) == (summary["clicks"], 0)
    assert summary["failed"] == 0
    # 400 items in 40 topics: a model that learnt anything is far above popularity's 20 items.
    assert summary["hit_rate_20"] > summary["popularity_hit_rate_20"] + 0.1
    assert summary["markov_hit_rate_20"] > summary["popularity_hit_rate_20"]
    assert 0 < summary["mrr_20"] <= summary["hit_rate_20"]
    assert 0 < summary["first_list_s"] < 60
    text = "\n".join(lines)
    assert "HR@20" in text
    assert "swapped in while clicks go on" in text
    assert re.search(r"redis-cli -p \d+ --raw GET afterclick:top:u\d+", text)
    assert "click you i" in text
    assert not processes_of(tmp_path)


def test_ctrl_c_stops_everything_and_another_terminal_can_click(tmp_path: Path) -> None:
    """The env file leads `afterclick click` and `top` to the demo; SIGINT ends all it started."""
    demo = start(*SMALL, folder=tmp_path)
    try:
        assert demo.stdout is not None
        seen = []
        for line in demo.stdout:
            seen.append(line)
            if re.search(r"live: [1-9]", line):
                break
        assert demo.poll() is None, "".join(seen)
        (env_file,) = tmp_path.glob("demo-*/demo.env")
        text = env_file.read_text()
        settings = dict(re.findall(r"^export (\w+)=(.*)$", text, flags=re.MULTILINE))
        env = {k: v for k, v in os.environ.items() if not k.startswith("AFTERCLICK_")}
        clicked = subprocess.run(
            afterclick_argv("click", "you", "i00003"),
            env={**env, **settings},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert clicked.returncode == 0, clicked.stderr
        assert "new list" in clicked.stdout
        assert len(processes_of(tmp_path)) > 3  # broker or Redis, worker, trainer, the demo itself
        demo.send_signal(signal.SIGINT)
        out, err = demo.communicate(timeout=60)
        assert demo.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["clicks"] > 0
        assert not processes_of(tmp_path)
    finally:
        demo.kill()
        demo.wait()


@needs_data
def test_a_real_log_with_its_catalogue(tmp_path: Path) -> None:
    """A slice of caixin: its first part trains, the rest is replayed, new items come with it."""
    folder = DATA / "caixin-news-2014"
    import pyarrow.csv as pacsv

    clicks = pacsv.read_csv(folder / "clicks.csv.gz").slice(0, 8000)
    pacsv.write_csv(clicks, tmp_path / "clicks.csv")
    files = ["--clicks", str(tmp_path / "clicks.csv"), "--items", str(folder / "items.csv.gz")]

    demo = start(*files, "--rate", "100", "--train-share", "0.95", folder=tmp_path)
    out, err = demo.communicate(timeout=400)

    assert demo.returncode == 0, out + err
    summary = json.loads(out.splitlines()[-1])
    assert (summary["clicks"], summary["lists"]) == (400, 400)
    assert summary["new_items"] > 0
    assert summary["hit_rate_20"] > 0
