"""The tables of the report: cells with marks, for the page and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from shared.report.runs import (
    HELD_OUT,
    Run,
    SiloSummary,
    human_bytes,
    human_number,
    loss_first,
    read_runs,
)

BEST = {"accuracy": max, "loss": min, "mae": min}  # of other metrics the reader decides

LONG = 32  # characters from which on a cell has several lines

BEST_LEGEND = (
    '<p><span class="best key">green</span>the best of its column, on the same test examples</p>\n'
)

CrossSite = Mapping[str, Mapping[str, Mapping[str, float]]]  # model of, data of, metric


class Cell(NamedTuple):
    """A cell of a table.

    mark: "best" of its column, or "differs" from the first run. share: the depth of its
    background, 0 to 1.
    """

    text: str
    mark: str = ""
    share: float | None = None


def terminal_table(run_dirs: Sequence[Path]) -> Table:
    """The results in short, the best test values in bold.

    Raises ValueError as `write_report` does.
    """
    runs = read_runs(run_dirs)
    columns = result_columns(runs, ["test"])
    table = Table("run")
    for header in columns:
        table.add_column(header, justify="left" if header == "runtime" else "right")

    for i, run in enumerate(runs):
        name = Text(run.label).append("" if run.result else " (unfinished)", style="italic")
        row = [cells[i] for cells in columns.values()]
        texts = [Text(cell.text, style="bold green" if cell.mark else "") for cell in row]
        table.add_row(name, *texts)
    return table


def result_columns(runs: Sequence[Run], splits: Sequence[str]) -> dict[str, list[Cell]]:
    """The results: header -> one cell per run."""
    # Metrics first: a phone shows little more than them.
    columns: dict[str, list[Cell]] = {}
    for split in splits:
        metrics = loss_first(metric for run in runs for metric in run.finals(split))
        for metric in metrics:
            columns[f"{split} {metric}"] = _final_values(runs, split, metric)

    columns["runtime"] = [Cell(run.result.get("runtime", "-")) for run in runs]
    columns["participants"] = [Cell(run.participants) for run in runs]
    seconds = [run.cost("seconds") for run in runs]
    columns["seconds"] = [Cell("-" if value is None else f"{value:,.1f}") for value in seconds]
    columns["bytes sent"] = [Cell(human_bytes(run.cost("bytes_sent"))) for run in runs]
    return columns


def _final_values(runs: Sequence[Run], split: str, metric: str) -> list[Cell]:
    """The cells of a metric, the best of the test values marked.

    Values that read the same are equally good. Nothing is the best of one, or over different data.
    """
    values = [run.finals(split).get(metric) for run in runs]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    data_sets = {_data_settings(run) for run in runs if metric in run.finals(split)}

    best = ""
    if split == "test" and metric in BEST and len(finite) > 1 and len(data_sets) == 1:
        best = human_number(BEST[metric](finite))
    texts = [human_number(value) for value in values]
    return [Cell(text, "best" if text == best else "") for text in texts]


def _data_settings(run: Run) -> tuple[object, ...]:
    """The settings that decide the examples of a run and their splits."""
    return tuple(
        value for key, value in run.settings.items() if key == "seed" or key.startswith("data.")
    )


def results(runs: Sequence[Run]) -> str:
    """The table of results: metrics, costs and identities at the end of each run."""
    columns = result_columns(runs, HELD_OUT)
    sizes = [run.result.get("num_parameters") for run in runs]
    columns["parameters"] = [Cell("-" if size is None else f"{size:,}") for size in sizes]
    hashes = [run.result.get("weights_sha256", "-") for run in runs]
    columns["weights sha256"] = [Cell(text[:8]) for text in hashes]

    rows = {}
    for i, run in enumerate(runs):
        mark = "" if run.result else ' <span class="unfinished">unfinished</span>'
        name = f"{escape(run.label)}<small>{escape(str(run.settings['name']))}{mark}</small>"
        rows[name] = [cells[i] for cells in columns.values()]
    table = html_table("Results at the end of each run", ["run", *columns], rows)
    has_best = any(cell.mark == "best" for cells in columns.values() for cell in cells)
    return table + (BEST_LEGEND if has_best else "")


def silos(runs: Sequence[Run]) -> str:
    """The silos of each federation, and their evaluations of each other's models if it has any."""
    parts = []
    for run in runs:
        summaries = run.silos()
        if summaries:
            parts.append(_silo_table(run, summaries))
        cross_site = run.result.get("cross_site")
        if cross_site:
            parts.append(_cross_site(run, cross_site))
    return "".join(parts)


def _silo_table(run: Run, summaries: Sequence[SiloSummary]) -> str:
    kinds = [
        (split, metric)
        for split in ("train", "validation")
        for metric in loss_first(metric for silo in summaries for metric in silo.metrics[split])
    ]
    rows = {}
    for silo in summaries:
        values = [silo.metrics[split].get(metric) for split, metric in kinds]
        failures = f"{len(silo.reasons)}: {silo.reasons[-1]}" if silo.reasons else "0"
        rows[escape(silo.name)] = [
            Cell(str(silo.num_rounds)),
            Cell("-" if silo.num_examples is None else f"{silo.num_examples:,}"),
            *(Cell(human_number(value)) for value in values),
            Cell(human_number(silo.median_seconds)),
            Cell(failures),
        ]

    header = [
        "silo",
        "rounds",
        "training examples",
        *(f"{split} {metric}, last" for split, metric in kinds),
        "seconds per round, median",
        "rounds failed",
    ]
    return html_table(f"Silos of {run.label}", header, rows)


def _cross_site(run: Run, table: CrossSite) -> str:
    """A row for each silo's model, a column for each silo's data.

    The deeper the background, the better the value.
    """
    metrics = {name for row in table.values() for values in row.values() for name in values}
    metric = next((name for name in ("accuracy", "mae") if name in metrics), "loss")
    sites = sorted({site for row in table.values() for site in row})

    # The range of the values is that of the backgrounds.
    values = {
        model: [row.get(site, {}).get(metric) for site in sites] for model, row in table.items()
    }
    finite = [
        value
        for row in values.values()
        for value in row
        if value is not None and math.isfinite(value)
    ]
    low = min(finite, default=0.0)
    high = max(finite, default=0.0)

    def cell(value: float | None) -> Cell:
        if value is None or not math.isfinite(value) or high == low:
            return Cell(human_number(value))
        share = (value - low) / (high - low)
        return Cell(human_number(value), share=share if BEST[metric] is max else 1 - share)

    rows = {escape(model): [cell(value) for value in row] for model, row in values.items()}
    caption = f"{run.label}: {metric} of each silo's model (rows) on each silo's data (columns)"
    return html_table(caption, ["model of", *sites], rows)


def confusions(runs: Sequence[Run]) -> str:
    """Counts of test examples, true classes in rows, predicted ones in columns.

    One table for each run that classifies.
    """
    parts = []
    for run in runs:
        confusion = run.result.get("confusion")
        if not confusion:
            continue
        names = confusion["classes"]
        rows = {
            escape(name): _counts(counts)
            for name, counts in zip(names, confusion["counts"], strict=True)
        }
        caption = f"{run.label}: test examples by true class (rows) and predicted class (columns)"
        parts.append(html_table(caption, ["true", *names], rows))
    return f'<div class="side-by-side">{"".join(parts)}</div>' if parts else ""


def _counts(counts: Sequence[int]) -> list[Cell]:
    """The cells of one true class, each as deep as its share of the class's examples."""
    total = max(1, sum(counts))
    return [Cell(f"{count:,}" if count else "·", share=count / total) for count in counts]


def samples(runs: Sequence[Run]) -> str:
    """The continuation of a prompt by each language model."""
    figures = []
    for run in runs:
        sample = run.result.get("sample")
        if sample is None:
            continue
        figures.append(
            f"<figure><figcaption>{escape(run.label)}, from the prompt in bold</figcaption>"
            f'<pre tabindex="0"><b>{escape(sample["prompt"])}</b>{escape(sample["text"])}</pre>'
            "</figure>"
        )
    return "".join(figures)


def settings(runs: Sequence[Run]) -> str:
    """The settings that make the runs different experiments, then all of them.

    The keys of [run], where records lie, are no part of an experiment.
    """
    rows = {}
    for key in runs[0].settings:
        if not key.startswith("run."):
            texts = [str(run.settings[key]) for run in runs]
            marks = ["differs" if text != texts[0] else "" for text in texts]
            rows[escape(key)] = [Cell(*pair) for pair in zip(texts, marks, strict=True)]
    different = {key: row for key, row in rows.items() if any(cell.mark for cell in row)}

    header = ["setting", *(run.label for run in runs)]
    caption = "Settings that differ; marked: from those of the first run"
    shown = html_table(caption, header, different) if different else "<p>None.</p>"
    whole = html_table("All settings", header, rows)
    return f"{shown}<details><summary>All settings</summary>{whole}</details>"


def versions(runs: Sequence[Run]) -> str:
    """The versions of packages, and the runs that were made with them."""
    labels: dict[str, list[str]] = {}  # by each set of versions
    for run in runs:
        packages = run.result.get("versions", {})
        text = ", ".join(f"{name} {version}" for name, version in packages.items())
        labels.setdefault(text or "known when the run is finished", []).append(run.label)
    return "".join(
        f"<p>{escape(', '.join(names))}: {escape(text)}</p>" for text, names in labels.items()
    )


def html_table(caption: str, header: Iterable[str], rows: Mapping[str, Iterable[Cell]]) -> str:
    """A table that scrolls by itself where it is too wide.

    `rows` maps the HTML of a row's head to its cells.
    """
    caption = escape(caption)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = ""
    for name, cells in rows.items():
        data = "".join(_html_cell(cell) for cell in cells)
        body += f'<tr><th scope="row">{name}</th>{data}</tr>\n'
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{caption}"><table>'
        f"<caption><span>{caption}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _html_cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.share is not None:
        return f'<td style="--share:{round(100 * cell.share)}%" class="share">{text}</td>'

    classes = [cell.mark] if cell.mark else []
    if len(cell.text) > LONG:
        classes.append("long")
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    spoken_mark = f'<span class="unseen"> ({cell.mark})</span>' if cell.mark else ""
    return f"<td{attribute}>{text}{spoken_mark}</td>"
