"""The training report: one picture of loss and accuracy by epoch, beside the baselines.

Knows no release; whoever calls it says where the picture goes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from afterclick.training.baselines import BASELINES
from afterclick.training.fit import Epoch

if TYPE_CHECKING:
    from afterclick.training.prequential import Live


def write_report(
    path: Path, title: str, curve: Sequence[Epoch], metrics: Mapping[str, Mapping[str, float]]
) -> None:
    """Draw a PNG; its folder is made.

    Args:
        path: file to write.
        title: stands over the picture: the release.
        curve: what `fit` told.
        metrics: rates by method; those of `BASELINES` become horizontal lines.
    """
    # Figure without pyplot: no window system is looked for, and nothing global is changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss, hits, ranks = figure.subplots(1, 3)
    epochs = [epoch.epoch for epoch in curve]
    loss.plot(epochs, [epoch.loss for epoch in curve], marker="o", color="black")
    last = [epoch for epoch in curve if epoch.final]
    if last:
        loss.axvspan(last[0].epoch - 0.5, last[-1].epoch + 0.5, color="0.92")
        loss.text(last[-1].epoch, loss.get_ylim()[1], "all data", ha="center", va="bottom")
    loss.set_title("training loss, nats", loc="left")
    scored = [epoch for epoch in curve if epoch.mrr_20 is not None]
    panels = (
        (hits, "hit_rate_20", "HR@20, %", [epoch.hit_rate_20 for epoch in scored]),
        (ranks, "mrr_20", "MRR@20, %", [epoch.mrr_20 for epoch in scored]),
    )
    for axes, name, label, values in panels:
        shown = [100 * value for value in values if value is not None]
        axes.plot([e.epoch for e in scored], shown, marker="o", color="black", label="model")
        drawn = [method for method in BASELINES if method in metrics]
        for number, method in enumerate(drawn):
            axes.axhline(
                100 * metrics[method][name], color=f"C{number}", linestyle="--", label=method
            )
        axes.set_ylim(bottom=0)
        what = "held out" if scored else "no validation part"
        axes.set_title(f"{label}, {what}", loc="left")
        if drawn or scored:
            axes.legend(frameon=False, fontsize="small")
    for axes in (loss, hits, ranks):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def write_comparison(
    path: Path,
    title: str,
    methods: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]],
) -> None:
    """Draw HR@20 and MRR@20 of every method with its interval as a PNG; its folder is made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.4 * len(methods) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(methods)[::-1]
    for axes, (metric, label) in zip(
        figure.subplots(1, 2, sharey=True),
        (("hit_rate_20", "HR@20, %"), ("mrr_20", "MRR@20, %")),
        strict=True,
    ):
        for at, name in enumerate(names):
            low, high = (100 * end for end in intervals[name][metric])
            color = "black" if name == "model" else "0.55"
            axes.plot([low, high], [at, at], color=color)
            axes.plot([100 * methods[name][metric]], [at], marker="o", color=color)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(left=0)
        axes.set_title(label, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def write_curve(path: Path, title: str, live: "Live") -> None:
    """Draw a prequential evaluation's HR@20 over event time as a PNG; its folder is made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    days = [point.hours / 24 for point in live.curve]
    for label, name, color, style in (
        ("at the click", "hit_rate_20", "black", "-"),
        ("standing in Redis", "standing_hit_rate_20", "black", "--"),
        ("Markov, then popularity 24 h", "markov_popularity_hit_rate_20", "0.55", "-"),
    ):
        rates = [100 * getattr(point, name) for point in live.curve]
        axes.plot(days, rates, label=label, color=color, linestyle=style, marker="o")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("days since live began")
    axes.set_title("HR@20, %, of the clicks since the point before", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
