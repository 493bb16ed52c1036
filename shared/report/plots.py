"""The drawings of the report, as SVG.

Their colours are the page's own, so that they are light or dark as it is.
"""

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

# After Okabe and Ito, whose colours the colour-blind tell apart too.
LIGHT = ("#0072b2", "#c24e00", "#00805c", "#b3558c", "#996800", "#1b7fb8", "#333333")
DARK = ("#5cb3ea", "#ff8f4d", "#2fcf9f", "#e9a0cb", "#f0b83d", "#9bd5f7", "#d5dbe2")
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))  # as drawn, as written

# Drawn in these colours, which then become variables of the page.
TEXT = "#010203"
LINE = "#040506"
PAGE = "#070809"
PAGE_COLOURS = {
    TEXT: "currentColor",
    LINE: "var(--line)",
    PAGE: "var(--page)",
    **{colour: f"var(--run{i})" for i, colour in enumerate(LIGHT)},
}
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
MAX_ROWS = 60  # of the table beside a curve; longer ones are thinned out
MAX_NAME = 24  # characters of a run's name beside its bar
TIME_UNITS = ((7200.0, 3600.0, "h"), (600.0, 60.0, "min"), (0.0, 1.0, "s"))  # from so many seconds

Curve = Sequence[tuple[float, float]]  # (x, value) ...
Curves = Mapping[tuple[int, str], Curve]  # by run and split


@contextlib.contextmanager
def _figure(
    figures: list[str], title: str, x_label: str, height: float, details: str = ""
) -> Iterator[Axes]:
    """Axes to draw on; afterwards `figures` has one more, with `details` below it.

    Needs no pyplot, and heeds no matplotlibrc of the user's.
    """
    # Most of a second to import, and the terminal table draws nothing.
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    salted = {**STYLE, "svg.hashsalt": title}  # no id twice on a page
    buffer = StringIO()
    with style.context(["default", "seaborn-v0_8-whitegrid", salted]), warnings.catch_warnings():
        # Text is only measured here; the browser has more fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(4.8, height), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    figures.append(f"<figure>{_page_svg(buffer.getvalue(), title)}{details}</figure>")


def _page_svg(svg: str, title: str) -> str:
    """The SVG element alone, in the page's colours, with a name for those who do not see it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)  # figure_1, axes_1: the same in every figure
    svg = re.sub("|".join(PAGE_COLOURS), lambda match: PAGE_COLOURS[match[0]], svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _plot_curves(
    figures: list[str], runs: Sequence[Run], metric: str, x: str, label: str, splits: Sequence[str]
) -> None:
    """Draws one metric against x; no figure if no run has such values."""
    curves = {
        (i, split): run.curve(x, split, metric) for split in splits for i, run in enumerate(runs)
    }
    points = [point for curve in curves.values() for point in curve]
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return

    # The unit of time that suits the longest run.
    title = f"{metric} by {label}"
    unit = 1.0
    if x == "seconds":
        longest = max(at for at, _ in points)
        unit, unit_name = next((size, name) for least, size, name in TIME_UNITS if longest >= least)
        label = f"{label} ({unit_name})"
    table = _value_table(title, label, runs, curves) if x == "step" else ""
    groups = _equal_curves(curves, 0.004 * (max(values) - min(values)))
    notes = _equality_note(runs, groups) + (_startup_note(runs) if x == "seconds" else "")

    with _figure(figures, title, label, 3.3, notes + table) as axes:
        for group in groups:
            for place, (i, split) in enumerate(group):
                curve = curves[i, split]
                xs = [at / unit for at, _ in curve]
                ys = [value for _, value in curve]
                look = _look(i, split, len(runs), len(curve), place, len(group))
                axes.plot(xs, ys, gid=f"{x}-{metric}-{split}-run{i}", **look)
        _label_axes(axes, x, metric, values)


def _equal_curves(curves: Curves, tolerance: float) -> list[list[tuple[int, str]]]:
    """The curves in groups of those of one split that would hide each other, in their order."""
    groups: list[list[tuple[int, str]]] = []
    for key, curve in curves.items():
        _, split = key
        for group in groups:
            first = group[0]
            if first[1] == split and _look_equal(curves[first], curve, tolerance):
                group.append(key)
                break
        else:
            groups.append([key])
    return groups


def _look_equal(a: Curve, b: Curve, tolerance: float) -> bool:
    """True if the curves have the same xs, and values that differ by less than a line's width."""
    return len(a) == len(b) > 0 and all(
        xa == xb and (ya == yb or abs(ya - yb) <= tolerance)
        for (xa, ya), (xb, yb) in zip(a, b, strict=True)
    )


def _equality_note(runs: Sequence[Run], groups: Sequence[Sequence[tuple[int, str]]]) -> str:
    """The runs whose curves lie on each other, by split, as HTML; empty if there are none."""
    splits: dict[str, list[str]] = {}  # by the names of the runs
    for group in groups:
        if len(group) > 1:
            names = " = ".join(runs[i].label for i, _ in group)
            splits.setdefault(names, []).append(group[0][1])
    equal = "; ".join(f"{names} ({', '.join(found)})" for names, found in splits.items())
    return _caption(f"Equal, in alternating colours: {equal}") if equal else ""


def _startup_note(runs: Sequence[Run]) -> str:
    """The start-up of each run, as HTML; empty if none is known."""
    parts = [f"{run.label} {run.startup_s:.3g} s" for run in runs if run.startup_s]
    return _caption(f"Start-up, which is part of the time: {', '.join(parts)}") if parts else ""


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>"


def _label_axes(axes: Axes, x: str, metric: str, values: Sequence[float]) -> None:
    """Scales and labels; values over more than a factor of 50 are drawn on a log scale."""
    is_log = metric != "accuracy" and 0 < 50 * min(values) < max(values)
    axes.set_ylabel(f"{metric} (log scale)" if is_log else metric)
    axes.set_yscale("log" if is_log else "linear")
    axes.yaxis.set_major_formatter("{x:g}")

    axes.locator_params(axis="x", integer=x == "step", nbins=5 if x == "bytes_sent" else 7)
    axes.set_xlim(left=0)
    if x == "bytes_sent":
        axes.xaxis.set_major_formatter(lambda at, _: human_bytes(at))


def _look(
    i: int, split: str, num_runs: int, num_points: int, place: int, num_equal: int
) -> dict[str, Any]:
    """The look of a curve: colour and marker show the run, dashes and fill the split.

    `place`: among the `num_equal` curves that are equal to it. Their colours alternate along the
    line, and their markers from point to point.
    """
    colour = LIGHT[i % len(LIGHT)]
    width = 1.5 + 0.9 * min(3, num_runs - 1 - i)  # curves that coincide in part all show
    if num_equal > 1:
        width = 2.4
    if split == "train":
        dashes = _alternating(4, 2, place, num_equal)
        return {"color": colour, "linewidth": 0.7 * width, "linestyle": dashes, "alpha": 0.6}

    drawn_marker, _ = MARKERS[i % len(MARKERS)]
    takes_turns = num_equal <= num_points
    size = width if takes_turns else width + 3.0 * (num_equal - 1 - place)
    stride = num_points // 10 + 1
    return {
        "color": colour,
        "linewidth": width,
        "linestyle": _alternating(5, 0, place, num_equal) if num_equal > 1 else "solid",
        "marker": drawn_marker,
        "markersize": 4 + size,
        "markevery": (place * stride, num_equal * stride) if takes_turns else stride,
        "markerfacecolor": colour if split == "test" else PAGE,
    }


def _alternating(
    length: float, gap: float, place: int, num_equal: int
) -> tuple[float, tuple[float, float]]:
    """Dashes of a curve that leave room for those of the curves that are equal to it."""
    period = num_equal * (length + gap)
    return (period - place * (length + gap), (length, period - length))


def _value_table(title: str, label: str, runs: Sequence[Run], curves: Curves) -> str:
    """The values of the curves, for those who read tables instead."""
    drawn = {key: dict(points) for key, points in sorted(curves.items()) if points}
    steps = sorted({at for points in drawn.values() for at in points})
    stride = math.ceil(len(steps) / MAX_ROWS)
    shown = [step for i, step in enumerate(steps) if i % stride == 0 or step == steps[-1]]

    rows = {}
    for step in shown:
        values = [points.get(step) for points in drawn.values()]
        rows[f"{step:g}"] = [Cell(human_number(value)) for value in values]
    header = [label, *(f"{runs[i].label} {split}" for i, split in drawn)]
    return f"<details><summary>Values</summary>{html_table(title, header, rows)}</details>"


def _plot_bars(
    figures: list[str], runs: Sequence[Run], key: str, label: str, human: Callable[[float], str]
) -> None:
    """Draws a bar per run, pale as long as the run is unfinished; its start-up as a frame.

    No figure if all are 0 or unknown.
    """
    values = [run.cost(key) or 0.0 for run in runs]
    if not any(values):
        return

    startups = [run.startup_s or 0.0 if key == "seconds" else 0.0 for run in runs]
    note = _caption("Framed: start-up, as far as it is known") if any(startups) else ""
    height = 1.15 + 0.42 * len(runs)
    with _figure(figures, f"{label} by run", label, height, note) as axes:
        # The bars, each with its value behind it.
        for i, (run, value) in enumerate(zip(runs, values, strict=True)):
            alpha = 1.0 if run.result else 0.4
            text = human(value) if run.result else f"{human(value)} so far"
            axes.barh(i, value, 0.62, color=LIGHT[i % len(LIGHT)], alpha=alpha, gid=f"{key}-run{i}")
            if startups[i]:
                colour = LIGHT[i % len(LIGHT)]
                gid = f"startup-run{i}"
                axes.barh(i, startups[i], 0.62, facecolor=PAGE, edgecolor=colour, gid=gid)
            axes.annotate(text, (value, i), (5, 0), textcoords="offset points", va="center")

        axes.set_yticks(range(len(runs)), [_short(run.label) for run in runs])
        axes.set_xlim(0, 1.35 * max(values))
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda at, _: human(at))
        axes.invert_yaxis()
        axes.grid(False, axis="y")


def _short(name: str) -> str:
    """Shortens a name in the middle, as runs of one series differ at the end.

    >>> _short("federation_of_very_many_hospitals_run_1")
    'federati…hospitals_run_1'
    """
    return name if len(name) <= MAX_NAME else f"{name[:8]}…{name[-15:]}"


def plots(runs: Sequence[Run]) -> str:
    """Each metric by step; the main one by time and by bytes sent too; the cost of each run."""
    figures: list[str] = []
    held_out = list(reversed(HELD_OUT))  # the last is drawn on top
    splits = ["train", *held_out]
    rows = [row for run in runs for row in run.rows]

    # Every metric that a row has, by epochs or rounds.
    metrics = loss_first(
        metric for row in rows for split in splits for metric in row.get(split, {})
    )
    steps = " or ".join(sorted({"round" if "round" in row else "epoch" for row in rows}))
    for metric in metrics:
        _plot_curves(figures, runs, metric, "step", steps, splits)
    if metrics:
        main = _main_metric(runs, metrics)
        _plot_curves(figures, runs, main, "seconds", "time", held_out)
        _plot_curves(figures, runs, main, "bytes_sent", "bytes sent", held_out)

    _plot_bars(figures, runs, "seconds", "time", "{:,.4g} s".format)
    _plot_bars(figures, runs, "bytes_sent", "bytes sent", human_bytes)
    return f'{_legend(runs)}\n<div class="plots">{"".join(figures)}</div>'


def _main_metric(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """The metric that most runs report on held-out examples; of equal ones rather not the loss."""

    def num_runs(metric: str) -> int:
        return sum(any(run.curve("step", split, metric) for split in HELD_OUT) for run in runs)

    return max(reversed(metrics), key=num_runs)


def _legend(runs: Sequence[Run]) -> str:
    names = ""
    for i, run in enumerate(runs):
        colour = f"var(--run{i % len(LIGHT)})"
        _, written_marker = MARKERS[i % len(MARKERS)]
        names += (
            f'<span><b aria-hidden="true" style="color:{colour}">{written_marker}</b>'
            f" {escape(run.label)}</span> "
        )
    return (
        f'<p class="legend">{names}<i>filled marker: test; hollow: validation; dashed:'
        " train</i></p>"
    )
