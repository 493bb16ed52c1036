"""The drawings of the report: SVG whose colours are the page's own, so that they are light or dark as it is."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from shared.report.runs import HELD_OUT, Run, human_bytes, human_number, loss_first
from shared.report.tables import Cell, html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# After Okabe and Ito, whose colours the colour-blind tell apart too; and five markers: as drawn and as written.
LIGHT = ("#0072b2", "#c24e00", "#00805c", "#b3558c", "#996800", "#1b7fb8", "#333333")
DARK = ("#5cb3ea", "#ff8f4d", "#2fcf9f", "#e9a0cb", "#f0b83d", "#9bd5f7", "#d5dbe2")
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))
TEXT, LINE, PAGE = "#010203", "#040506", "#070809"  # drawn, and then replaced by what the page says
PAGES_OWN = {TEXT: "currentColor", LINE: "var(--line)", PAGE: "var(--page)"}
PAGES_OWN |= {colour: f"var(--run{i})" for i, colour in enumerate(LIGHT)}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # $ is no formula
    "font.size": 11,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": LINE,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
MOST_ROWS = 60  # of the table beside a curve; longer ones are thinned out
UNITS = ((7200.0, 3600.0, "h"), (600.0, 60.0, "min"), (0.0, 1.0, "s"))  # from so many seconds on: what to count in


@contextlib.contextmanager
def _figure(figures: list[str], title: str, x_label: str, height: float, values: str = "") -> Iterator[Axes]:
    """Axes to paint on; afterwards `figures` has one more. No pyplot, no matplotlibrc of the user's."""
    from matplotlib import style  # here: most of a second to import, and the terminal table draws nothing
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = StringIO()
    look = ["default", "seaborn-v0_8-whitegrid", {**STYLE, "svg.hashsalt": title}]  # salt: no id twice
    with style.context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text is only measured here: the browser has more fonts
        figure = Figure(figsize=(4.8, height), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])  # figure_1, axes_1: the same in every figure
    svg = re.sub("|".join(PAGES_OWN), lambda found: PAGES_OWN[found[0]], svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    figures.append(f"<figure>{svg}{values}</figure>")


def _plot_curves(figures: list[str], runs: Sequence[Run], metric: str, x: str, label: str, *splits: str) -> None:
    """One metric against x; no figure if no run has such values."""
    curves = {(i, split): run.curve(x, split, metric) for split in splits for i, run in enumerate(runs)}
    values = [value for points in curves.values() for _, value in points if math.isfinite(value)]
    if not values:
        return
    title, unit = f"{metric} by {label}", 1.0
    if x == "seconds":
        longest = max(at for points in curves.values() for at, _ in points)
        unit, name = next((each, name) for least, each, name in UNITS if longest >= least)
        label = f"{label} ({name})"
    log = metric != "accuracy" and 0 < 50 * min(values) < max(values)
    table = _values(title, label, runs, curves) if x == "step" else ""
    with _figure(figures, title, label, 3.3, table) as axes:
        for (i, split), points in curves.items():
            look = _look(i, split, len(runs), len(points))
            at, value = [at / unit for at, _ in points], [value for _, value in points]
            axes.plot(at, value, gid=f"{x}-{metric}-{split}-run{i}", **look)
        axes.set(ylabel=metric + " (log scale)" * log, yscale="log" if log else "linear")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.locator_params(axis="x", integer=x == "step", nbins=5 if x == "bytes_sent" else 7)
        axes.set_xlim(left=0)
        if x == "bytes_sent":
            axes.xaxis.set_major_formatter(lambda at, _: human_bytes(at))


def _look(i: int, split: str, num_runs: int, num_points: int) -> dict[str, Any]:
    """The run tells colour and marker, the split tells dashes and fill."""
    colour, width = LIGHT[i % len(LIGHT)], 1.5 + 0.9 * min(3, num_runs - 1 - i)  # curves that coincide all show
    if split == "train":
        return {"color": colour, "linewidth": 0.7 * width, "linestyle": (0, (4, 2)), "alpha": 0.6}
    marker = {"marker": MARKERS[i % len(MARKERS)][0], "markersize": 4 + width, "markevery": num_points // 10 + 1}
    return {"color": colour, "linewidth": width, "markerfacecolor": colour if split == "test" else PAGE, **marker}


def _values(
    title: str, label: str, runs: Sequence[Run], curves: Mapping[tuple[int, str], Sequence[tuple[float, float]]]
) -> str:
    """What the curves show, for those who read tables instead."""
    drawn = {key: dict(points) for key, points in sorted(curves.items()) if points}
    steps = sorted({at for points in drawn.values() for at in points})
    every = -(-len(steps) // MOST_ROWS)
    shown = [step for i, step in enumerate(steps) if i % every == 0 or step == steps[-1]]
    rows = {f"{step:g}": [Cell(human_number(points.get(step))) for points in drawn.values()] for step in shown}
    header = [label, *(f"{runs[i].label} {split}" for i, split in drawn)]
    return f"<details><summary>Values</summary>{html_table(title, header, rows)}</details>"


def _plot_bars(figures: list[str], runs: Sequence[Run], key: str, label: str, human: Callable[[float], str]) -> None:
    """A bar per run, pale as long as the run is unfinished; no figure if all are 0 or unknown."""
    values = [run.cost(key) or 0.0 for run in runs]
    if not any(values):
        return
    with _figure(figures, f"{label} by run", label, height=1.15 + 0.42 * len(runs)) as axes:
        for i, (run, value) in enumerate(zip(runs, values, strict=True)):
            alpha, note = (1.0, "") if run.result else (0.4, " so far")
            axes.barh(i, value, 0.62, color=LIGHT[i % len(LIGHT)], alpha=alpha, gid=f"{key}-run{i}")
            axes.annotate(human(value) + note, (value, i), (5, 0), textcoords="offset points", va="center")
        names = [r.label if len(r.label) <= 24 else f"{r.label[:8]}…{r.label[-15:]}" for r in runs]
        axes.set_yticks(range(len(runs)), names)
        axes.set_xlim(0, 1.35 * max(values))
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda at, _: human(at))
        axes.invert_yaxis()
        axes.grid(False, axis="y")


def plots(runs: Sequence[Run]) -> str:
    """Each metric by step; the main one by time and by bytes sent too; what each run cost."""
    figures: list[str] = []
    splits = ("train", *reversed(HELD_OUT))  # the last is drawn on top
    metrics = loss_first(metric for run in runs for row in run.rows for s in splits for metric in row.get(s, {}))
    steps = " or ".join(sorted({"round" if "round" in row else "epoch" for run in runs for row in run.rows}))
    for metric in metrics:
        _plot_curves(figures, runs, metric, "step", steps, *splits)
    if metrics:  # the main one: what most runs report, and of these rather not the loss
        main = max(metrics[::-1], key=lambda m: sum(any(run.curve("step", s, m) for s in HELD_OUT) for run in runs))
        _plot_curves(figures, runs, main, "seconds", "time", *splits[1:])
        _plot_curves(figures, runs, main, "bytes_sent", "bytes sent", *splits[1:])
    _plot_bars(figures, runs, "seconds", "time", "{:,.4g} s".format)
    _plot_bars(figures, runs, "bytes_sent", "bytes sent", human_bytes)
    looks = ((i % len(LIGHT), MARKERS[i % len(MARKERS)][1], run.label) for i, run in enumerate(runs))
    names = "".join(
        f'<span><b aria-hidden="true" style="color:var(--run{i})">{mark}</b> {escape(label)}</span> '
        for i, mark, label in looks
    )
    legend = f'<p class="legend">{names}<i>filled marker: test; hollow: validation; dashed: train</i></p>'
    return f'{legend}\n<div class="plots">{"".join(figures)}</div>'
