"""python -m shared.report RUN_DIR [RUN_DIR ...] -o page.html: runs side by side, on one page or in the terminal.

The page is one file: inline CSS, inline SVG, no script, nothing fetched. The same runs give the same page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from shared.experiment import Scalar, load_experiment
from shared.run_record import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cell = tuple[str, bool]  # a text, and whether it is the best of its column
BEST = {"accuracy": max, "loss": min, "mae": min}  # of other metrics the reader is the judge
HELD_OUT = ("test", "validation")
# Okabe and Ito's colours, which the colour-blind tell apart too, and five markers: as drawn and as written.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))
STYLE = ("default", "seaborn-v0_8-whitegrid", {"svg.fonttype": "none", "text.parse_math": False})  # $ is no formula
CSS = """
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem); max-width: 88rem; color: #1d2733; background: #fff;
       font: 14px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .6rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p, small { color: #4a5562; margin: .3rem 0; } small { display: block; font-weight: 400; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e1e5ea; }
th:first-child { text-align: left; } tbody tr:hover { background: #f5f8fb; }
thead th { vertical-align: bottom; white-space: normal; font-size: .85rem; border-bottom: 2px solid #8a94a0; }
.best { font-weight: 700; background: #e3f4ec; color: #005a41; }
.unfinished { font-size: .75rem; padding: .05rem .5rem; border-radius: 1rem; background: #fdecc8; color: #6b4500; }
.legend { position: sticky; top: 0; padding: .4rem 0; background: #fff; } .legend span { white-space: nowrap; }
.plots { display: grid; gap: 1.6rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
svg { width: 100%; height: auto; } svg text { font-family: inherit !important; } :root { color-scheme: light; }
"""


@dataclass(frozen=True)
class Run:
    """One run directory, read. `result` is empty as long as the run is unfinished."""

    label: str  # the end of its path that tells it from the others
    settings: dict[str, Scalar]
    rows: list[dict[str, Any]]  # of metrics.jsonl, each with its epoch or round as "step" too
    result: dict[str, Any]

    @property
    def participants(self) -> str:
        noun = "silo" if "num_silos" in self.result else "rank"
        count = self.result.get("num_silos", self.result.get("world_size"))
        return "-" if count is None else f"{count} {noun}{'' if count == 1 else 's'}"

    def cost(self, key: str) -> float | None:
        """`seconds` or `bytes_sent` of the whole run, or up to the last row of an unfinished one."""
        return self.result.get(key, self.rows[-1].get(key) if self.rows else None)

    def finals(self, split: str) -> dict[str, float]:
        return self.result.get("metrics", {}).get(split, {})

    def curve(self, x: str, split: str, metric: str) -> list[tuple[float, float]]:
        """(x, value) per row that has both; x is "step", "seconds" or "bytes_sent".

        Edge cases: a test value measured only at the end -> one point at the last row; nothing sent -> no points.
        """
        pairs = [(row.get(x), row.get(split, {}).get(metric)) for row in self.rows]
        if split == "test" and pairs and all(value is None for _, value in pairs):
            pairs = [(pairs[-1][0], self.finals(split).get(metric))]
        known = [(at, value) for at, value in pairs if at is not None and value is not None]
        return known if any(at > 0 for at, _ in known) else []


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Reads each directory once, in the order given. Raises ValueError for what is no run directory."""
    paths = list(dict.fromkeys(Path(directory).resolve() for directory in run_dirs))
    if not paths:
        raise ValueError("A report needs at least one run directory; received none. Name some, for example runs/*/")
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _read_run(path: Path, label: str) -> Run:
    if not os.access(path / "experiment.toml", os.R_OK):  # unlike Path.is_file it never raises
        raise ValueError(f"A run directory holds an experiment.toml; received {path}. Name one, for example runs/NAME.")
    file = path / "result.json"
    try:
        settings = load_experiment(path / "experiment.toml").to_flat()
        rows = [{"step": row.get("round", row.get("epoch")), **row} for row in read_metrics(path)]
        return Run(label, settings, rows, json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})
    except (ValueError, OSError) as error:
        raise ValueError(
            f"The experiment.toml, metrics.jsonl and result.json of a run must be readable; received {path} ({error}). "
            f"Mend them or leave the run out."
        ) from None


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ: their names, or parent/name, ..."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(paths):
            break
    return labels


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Writes the page, whole or not at all. Raises ValueError: the rule, what was received, the remedy."""
    page = _page(read_runs(run_dirs))
    temporary = Path(f"{output}.partial")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ValueError(
            f"The page must be a file in a directory that exists and may be written to; received {output} "
            f"({error.strerror}). Choose another one with -o."
        ) from None


def terminal_table(run_dirs: Sequence[Path]) -> Table:
    """The results in short, the best test values in bold. Raises ValueError as `write_report` does."""
    runs = read_runs(run_dirs)
    columns = _columns(runs, ["test"])
    table = Table("run")
    for header in columns:
        table.add_column(header, justify="left" if header == "runtime" else "right")
    for i, run in enumerate(runs):
        name = Text(run.label).append("" if run.result else " (unfinished)", style="italic")
        row = (cells[i] for cells in columns.values())
        table.add_row(name, *(Text(text, style="bold green" if best else "") for text, best in row))
    return table


def human_bytes(count: float | None) -> str:
    """Decimal units, as networks count.

    >>> human_bytes(33_716_760), human_bytes(0), human_bytes(None)
    ('33.7 MB', '0 B', '-')
    """
    if count is None:
        return "-"
    power = sum(count >= 999.5 * 1000**p for p in range(4))  # 999.5 kB would read 1e+03 kB
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.4g}"


def _columns(runs: Sequence[Run], splits: Sequence[str]) -> dict[str, list[Cell]]:
    """The results: header -> one cell per run."""
    columns = {"runtime": [(run.result.get("runtime", "-"), False) for run in runs]}
    columns["participants"] = [(run.participants, False) for run in runs]
    for split in splits:
        for metric in _loss_first(metric for run in runs for metric in run.finals(split)):
            columns[f"{split} {metric}"] = _final_values(runs, split, metric)
    columns["seconds"] = [("-" if (s := run.cost("seconds")) is None else f"{s:,.1f}", False) for run in runs]
    columns["bytes sent"] = [(human_bytes(run.cost("bytes_sent")), False) for run in runs]
    return columns


def _final_values(runs: Sequence[Run], split: str, metric: str) -> list[Cell]:
    """Values that read the same are equally good; nothing is the best of one, or over different data."""
    values = [run.finals(split).get(metric) for run in runs]
    known = [value for value in values if value is not None and math.isfinite(value)]
    tested = [run.settings for run in runs if metric in run.finals(split)]
    one_data_set = len({tuple(v for k, v in s.items() if k == "seed" or k.startswith("data.")) for s in tested}) == 1
    compared = split == "test" and metric in BEST and len(known) > 1 and one_data_set
    best = _number(BEST[metric](known)) if compared else ""
    return [(text, text == best) for text in map(_number, values)]


def _loss_first(metrics: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(metrics), key=lambda metric: metric != "loss")


@contextlib.contextmanager
def _figure(svgs: list[str], title: str, x_label: str, height: float) -> Iterator[Axes]:
    """Axes to paint on; afterwards `svgs` has one more. No pyplot, no matplotlibrc of the user's."""
    from matplotlib import style  # here: most of a second to import, and the terminal table draws nothing
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = StringIO()
    with style.context([*STYLE, {"svg.hashsalt": title}]), warnings.catch_warnings():  # salt: no id twice
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text is only measured here: the browser has more fonts
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])  # figure_1, axes_1: the same in every figure
    svgs.append(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def _plot_curves(svgs: list[str], runs: Sequence[Run], metric: str, x: str, label: str, *splits: str) -> None:
    """One metric against x; no figure if no run has such values."""
    curves = {(i, split): run.curve(x, split, metric) for split in splits for i, run in enumerate(runs)}
    values = [value for points in curves.values() for _, value in points if math.isfinite(value)]
    if not values:
        return
    log = 0 < 50 * min(values) < max(values)
    with _figure(svgs, f"{metric} by {label}", label, height=3.7) as axes:
        for (i, split), points in curves.items():
            look = _look(i, split, len(runs), len(points))
            axes.plot([at for at, _ in points], [y for _, y in points], gid=f"{x}-{metric}-{split}-run{i}", **look)
        axes.set(ylabel=metric + " (log scale)" * log, yscale="log" if log else "linear")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.locator_params(axis="x", integer=x == "step")
        axes.set_xlim(left=0)
        if x == "bytes_sent":
            axes.xaxis.set_major_formatter(lambda at, _: human_bytes(at))


def _look(i: int, split: str, num_runs: int, num_points: int) -> dict[str, Any]:
    """The run tells colour and marker, the split tells dashes and fill."""
    colour, width = COLOURS[i % len(COLOURS)], 1.5 + 0.9 * min(3, num_runs - 1 - i)  # curves that coincide all show
    if split == "train":
        return {"color": colour, "linewidth": 0.7 * width, "linestyle": (0, (4, 2)), "alpha": 0.55}
    marker = {"marker": MARKERS[i % len(MARKERS)][0], "markersize": 4 + width, "markevery": num_points // 10 + 1}
    return {"color": colour, "linewidth": width, "markerfacecolor": colour if split == "test" else "white", **marker}


def _plot_bars(svgs: list[str], runs: Sequence[Run], key: str, label: str, human: Callable[[float], str]) -> None:
    """A bar per run, pale as long as the run is unfinished; no figure if all are 0 or unknown."""
    values = [run.cost(key) or 0.0 for run in runs]
    if not any(values):
        return
    with _figure(svgs, f"{label} by run", label, height=1.15 + 0.42 * len(runs)) as axes:
        for i, (run, value) in enumerate(zip(runs, values, strict=True)):
            alpha, note = (1.0, "") if run.result else (0.4, " so far")
            axes.barh(i, value, 0.62, color=COLOURS[i % len(COLOURS)], alpha=alpha, gid=f"{key}-run{i}")
            axes.annotate(human(value) + note, (value, i), (5, 0), textcoords="offset points", va="center")
        names = [r.label if len(r.label) <= 32 else f"{r.label[:12]}…{r.label[-19:]}" for r in runs]
        axes.set_yticks(range(len(runs)), names)
        axes.set_xlim(0, 1.3 * max(values))
        axes.xaxis.set_major_formatter(lambda at, _: human(at))
        axes.invert_yaxis()
        axes.grid(False, axis="y")


def _plots(runs: Sequence[Run]) -> str:
    svgs: list[str] = []
    splits = ("train", *reversed(HELD_OUT))  # the last is drawn on top
    metrics = _loss_first(metric for run in runs for row in run.rows for s in splits for metric in row.get(s, {}))
    steps = " or ".join(sorted({"round" if "round" in row else "epoch" for run in runs for row in run.rows}))
    for metric in metrics:
        _plot_curves(svgs, runs, metric, "step", steps, *splits)
    if metrics:  # the main one: what most runs report, and of these rather not the loss
        main = max(metrics[::-1], key=lambda m: sum(any(run.curve("step", s, m) for s in HELD_OUT) for run in runs))
        _plot_curves(svgs, runs, main, "seconds", "time (s)", *splits[1:])
        _plot_curves(svgs, runs, main, "bytes_sent", "bytes sent", *splits[1:])
    _plot_bars(svgs, runs, "seconds", "time", "{:,.6g} s".format)
    _plot_bars(svgs, runs, "bytes_sent", "bytes sent", human_bytes)
    looks = ((COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)][1], run.label) for i, run in enumerate(runs))
    names = (
        f'<span><b style="color:{colour}">{mark}</b> {escape(label)}</span>&emsp; ' for colour, mark, label in looks
    )
    legend = f'<p class="legend">{"".join(names)}<i>filled marker: test; hollow: validation; dashed: train</i></p>'
    return f'{legend}\n<div class="plots">{"".join(svgs)}</div>'


def _results(runs: Sequence[Run]) -> str:
    columns = _columns(runs, HELD_OUT)
    sizes = [run.result.get("num_parameters") for run in runs]
    columns["parameters"] = [("-" if size is None else f"{size:,}", False) for size in sizes]
    columns["weights sha256"] = [(run.result.get("weights_sha256", "-")[:8], False) for run in runs]
    rows = {}
    for i, run in enumerate(runs):
        mark = "" if run.result else ' <span class="unfinished">unfinished</span>'
        name = f"{escape(run.label)}<small>{escape(str(run.settings['name']))}{mark}</small>"
        rows[name] = [cells[i] for cells in columns.values()]
    return _html_table(["run", *columns], rows)


def _settings(runs: Sequence[Run]) -> str:
    """The keys that make the runs different experiments: not where their records lie."""
    texts = {key: [str(run.settings[key]) for run in runs] for key in runs[0].settings if not key.startswith("run.")}
    rows = {escape(key): [(text, False) for text in row] for key, row in texts.items() if len(set(row)) > 1}
    return _html_table(["setting", *(run.label for run in runs)], rows) if rows else "<p>None.</p>"


def _versions(runs: Sequence[Run]) -> str:
    made: dict[str, list[str]] = {}  # by each set of versions: its runs
    for run in runs:
        versions = (f"{name} {version}" for name, version in run.result.get("versions", {}).items())
        made.setdefault(", ".join(versions) or "known when the run is finished", []).append(run.label)
    return "".join(f"<p>{escape(', '.join(labels))}: {escape(versions)}</p>" for versions, labels in made.items())


def _html_table(header: Iterable[str], rows: Mapping[str, Iterable[Cell]]) -> str:
    """`rows` maps the HTML of a row's head to its cells."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ""
    for name, cells in rows.items():
        row = (f"<td{best * ' class=best'}>{escape(text)}</td>" for text, best in cells)
        body += f"<tr><th>{name}</th>{''.join(row)}</tr>\n"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _page(runs: Sequence[Run]) -> str:
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Archipelago: runs side by side</title><style>{CSS}</style></head><body>
<h1>Runs side by side</h1>
{_results(runs)}
<h2>Curves and costs</h2>{_plots(runs)}
<h2>Settings that differ</h2>{_settings(runs)}
<h2>Versions</h2>{_versions(runs)}
</body></html>
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.report", description="Set runs side by side on one page.")
    parser.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR", help="what a run left behind: runs/NAME")
    parser.add_argument("-o", dest="output", type=Path, default="report.html", help="the page (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        write_report(options.run_dirs, options.output)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"report: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
