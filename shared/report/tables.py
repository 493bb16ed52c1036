"""The tables of the report: cells with marks, for the page and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from shared.report.runs import HELD_OUT, Run, SiloSummary, human_bytes, human_number, loss_first, read_runs

BEST = {"accuracy": max, "loss": min, "mae": min}  # of other metrics the reader is the judge

LONG = 32  # letters from which on a cell has several lines


class Cell(NamedTuple):
    """`mark`: "best" of its column, or "differs" from the first run. `share`, 0 to 1: how deep its ground is."""

    text: str
    mark: str = ""
    share: float | None = None


def terminal_table(run_dirs: Sequence[Path]) -> Table:
    """The results in short, the best test values in bold. Raises ValueError as `write_report` does."""
    runs = read_runs(run_dirs)
    columns = result_columns(runs, ["test"])
    table = Table("run")
    for header in columns:
        table.add_column(header, justify="left" if header == "runtime" else "right")
    for i, run in enumerate(runs):
        name = Text(run.label).append("" if run.result else " (unfinished)", style="italic")
        row = (cells[i] for cells in columns.values())
        table.add_row(name, *(Text(cell.text, style="bold green" if cell.mark else "") for cell in row))
    return table


def result_columns(runs: Sequence[Run], splits: Sequence[str]) -> dict[str, list[Cell]]:
    """The results: header -> one cell per run."""
    columns = {"runtime": [Cell(run.result.get("runtime", "-")) for run in runs]}
    columns["participants"] = [Cell(run.participants) for run in runs]
    for split in splits:
        for metric in loss_first(metric for run in runs for metric in run.finals(split)):
            columns[f"{split} {metric}"] = _final_values(runs, split, metric)
    columns["seconds"] = [Cell("-" if (s := run.cost("seconds")) is None else f"{s:,.1f}") for run in runs]
    columns["bytes sent"] = [Cell(human_bytes(run.cost("bytes_sent"))) for run in runs]
    return columns


def _final_values(runs: Sequence[Run], split: str, metric: str) -> list[Cell]:
    """Values that read the same are equally good; nothing is the best of one, or over different data."""
    values = [run.finals(split).get(metric) for run in runs]
    known = [value for value in values if value is not None and math.isfinite(value)]
    tested = [run.settings for run in runs if metric in run.finals(split)]
    one_data_set = len({tuple(v for k, v in s.items() if k == "seed" or k.startswith("data.")) for s in tested}) == 1
    compared = split == "test" and metric in BEST and len(known) > 1 and one_data_set
    best = human_number(BEST[metric](known)) if compared else ""
    return [Cell(text, "best" if text == best else "") for text in map(human_number, values)]


def results(runs: Sequence[Run]) -> str:
    columns = result_columns(runs, HELD_OUT)
    sizes = [run.result.get("num_parameters") for run in runs]
    columns["parameters"] = [Cell("-" if size is None else f"{size:,}") for size in sizes]
    columns["weights sha256"] = [Cell(run.result.get("weights_sha256", "-")[:8]) for run in runs]
    rows = {}
    for i, run in enumerate(runs):
        mark = "" if run.result else ' <span class="unfinished">unfinished</span>'
        name = f"{escape(run.label)}<small>{escape(str(run.settings['name']))}{mark}</small>"
        rows[name] = [cells[i] for cells in columns.values()]
    return html_table("Results at the end of each run", ["run", *columns], rows)


def silos(runs: Sequence[Run]) -> str:
    """Of each federation: its silos and, where they were made, their judgements of each other's models."""
    parts = []
    for run in runs:
        if summaries := run.silos():
            parts.append(_silo_table(run, summaries))
        if cross_site := run.result.get("cross_site"):
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
        values = [Cell(human_number(silo.metrics[split].get(metric))) for split, metric in kinds]
        failures = f"{len(silo.reasons)}: {silo.reasons[-1]}" if silo.reasons else "0"
        rows[escape(silo.name)] = [
            Cell(str(silo.num_rounds)),
            Cell("-" if silo.num_examples is None else f"{silo.num_examples:,}"),
            *values,
            Cell(human_number(silo.median_seconds)),
            Cell(failures),
        ]
    metrics = (f"{split} {metric}, last" for split, metric in kinds)
    header = ["silo", "rounds", "training examples", *metrics, "seconds per round, median", "rounds failed"]
    return html_table(f"Silos of {run.label}", header, rows)


def _cross_site(run: Run, table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row for each silo's model, a column for each silo's data; the deeper the ground, the better the value."""
    metrics = [metric for judged in table.values() for found in judged.values() for metric in found]
    metric = next((m for m in ("accuracy", "mae") if m in metrics), "loss")
    columns = sorted({silo for judged in table.values() for silo in judged})
    values = {(model, at): table[model].get(at, {}).get(metric) for model in table for at in columns}
    known = sorted(value for value in values.values() if value is not None and math.isfinite(value))
    low, high = (known[0], known[-1]) if known else (0.0, 0.0)

    def cell(value: float | None) -> Cell:
        if value is None or not math.isfinite(value) or high == low:
            return Cell(human_number(value))
        share = (value - low) / (high - low)
        return Cell(human_number(value), share=share if BEST[metric] is max else 1 - share)

    rows = {escape(model): [cell(values[model, at]) for at in columns] for model in table}
    caption = f"{run.label}: {metric} of each silo's model (rows) on each silo's data (columns)"
    return html_table(caption, ["model of", *columns], rows)


def confusions(runs: Sequence[Run]) -> str:
    """Of each run that classifies: counts of test examples, true classes in rows, predicted ones in columns."""
    parts = []
    for run in runs:
        if not (found := run.result.get("confusion")):
            continue
        names, counts = found["classes"], found["counts"]
        rows = {
            escape(name): [Cell(f"{count:,}" if count else "·", share=count / max(1, sum(row))) for count in row]
            for name, row in zip(names, counts, strict=True)
        }
        caption = f"{run.label}: test examples by true class (rows) and predicted class (columns)"
        parts.append(html_table(caption, ["true", *names], rows))
    return f'<div class="side-by-side">{"".join(parts)}</div>' if parts else ""


def samples(runs: Sequence[Run]) -> str:
    """Of each language model: how it goes on from a prompt."""
    found = ((run.label, run.result["sample"]) for run in runs if "sample" in run.result)
    return "".join(
        f"<figure><figcaption>{escape(label)}, from the prompt in bold</figcaption>"
        f'<pre tabindex="0"><b>{escape(sample["prompt"])}</b>{escape(sample["text"])}</pre></figure>'
        for label, sample in found
    )


def settings(runs: Sequence[Run]) -> str:
    """The keys that make the runs different experiments: not where their records lie. Then all keys."""
    texts = {key: [str(run.settings[key]) for run in runs] for key in runs[0].settings if not key.startswith("run.")}
    rows = {
        escape(key): [Cell(text, "differs" if text != row[0] else "") for text in row] for key, row in texts.items()
    }
    different = {key: row for key, row in rows.items() if any(cell.mark for cell in row)}
    header = ["setting", *(run.label for run in runs)]
    caption = "Settings that differ; marked: from those of the first run"
    shown = html_table(caption, header, different) if different else "<p>None.</p>"
    whole = html_table("All settings", header, rows)
    return f"{shown}<details><summary>All settings</summary>{whole}</details>"


def versions(runs: Sequence[Run]) -> str:
    made: dict[str, list[str]] = {}  # by each set of versions: its runs
    for run in runs:
        found = (f"{name} {version}" for name, version in run.result.get("versions", {}).items())
        made.setdefault(", ".join(found) or "known when the run is finished", []).append(run.label)
    return "".join(f"<p>{escape(', '.join(labels))}: {escape(text)}</p>" for text, labels in made.items())


def html_table(caption: str, header: Iterable[str], rows: Mapping[str, Iterable[Cell]]) -> str:
    """A table that scrolls by itself where it is too wide. `rows` maps the HTML of a row's head to its cells."""
    caption = escape(caption)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = ""
    for name, cells in rows.items():
        body += f'<tr><th scope="row">{name}</th>{"".join(map(_html_cell, cells))}</tr>\n'
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{caption}"><table>'
        f"<caption><span>{caption}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _html_cell(cell: Cell) -> str:
    if cell.share is not None:
        return f'<td style="--share:{round(100 * cell.share)}%" class="share">{escape(cell.text)}</td>'
    classes = " ".join(filter(None, (cell.mark, "long" if len(cell.text) > LONG else "")))
    attribute = f' class="{classes}"' if classes else ""
    said = f'<span class="unseen"> ({cell.mark})</span>' if cell.mark else ""
    return f"<td{attribute}>{escape(cell.text)}{said}</td>"
