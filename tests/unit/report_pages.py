"""Run directories for the tests of the report, and its page as parsed."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from shared.experiment import experiment_from_flat
from shared.report import write_report

VOID = {"meta", "link", "path", "use", "rect"}
VERSIONS = {"python": "3.11.7", "keras": "3.15.1"}


def make_run(
    directory: Path, rows: list[dict], result: dict | None = None, **settings: Any
) -> Path:
    directory.mkdir(parents=True)
    flat = {key.replace("__", "."): value for key, value in settings.items()}
    (directory / "experiment.toml").write_text(experiment_from_flat(flat).to_toml())
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if result is not None:
        common = {
            "num_parameters": 13706,
            "seconds": 7.5,
            "weights_sha256": "f31e5e6f" * 8,
            "versions": VERSIONS,
        }
        (directory / "result.json").write_text(json.dumps({**common, **result}))
    return directory


def central_run(
    directory: Path, accuracy: float = 0.9, loss: float = 0.3, epochs: int = 3, **settings: Any
) -> Path:
    rows = [
        {
            "epoch": epoch,
            "train": {"loss": 2.0 / epoch, "accuracy": 0.3 * epoch},
            "validation": {"loss": 2.2 / epoch, "accuracy": 0.28 * epoch},
            "bytes_sent": 0,
            "seconds": 1.5 * epoch,
        }
        for epoch in range(1, epochs + 1)
    ]
    metrics = {
        "validation": {"loss": 0.4, "accuracy": 0.8},
        "test": {"loss": loss, "accuracy": accuracy},
    }
    return make_run(
        directory, rows, {"runtime": "single", "world_size": 1, "metrics": metrics}, **settings
    )


def federated_rows(rounds: int) -> list[dict]:
    return [
        {
            "round": r,
            "test": {"loss": 1.0 / r, "accuracy": 0.2 * r},
            "bytes_sent": 250_000 * r,
            "seconds": 4.0 * r,
        }
        for r in range(1, rounds + 1)
    ]


def federated_run(directory: Path, accuracy: float = 0.8, rounds: int = 4, **settings: Any) -> Path:
    result = {"runtime": "flower", "num_silos": 3, "bytes_sent": 1_000_000}
    metrics = {"test": {"loss": 0.25, "accuracy": accuracy}}
    return make_run(directory, federated_rows(rounds), {**result, "metrics": metrics}, **settings)


class Page(HTMLParser):
    """The page as parsed; refuses tags that do not nest.

    `tables` holds the tables' cells as (text, class).
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open_tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tables: list[list[list[tuple[str, str]]]] = []
        self.captions: list[str] = []
        self.feed(self.html)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [
            attributes[name] for name in ("src", "href", "xlink:href", "data") if name in attributes
        ]
        if tag == "table":
            self.tables.append([])
        elif tag == "caption":
            self.captions.append("")
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", attributes.get("class", "")))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if "caption" in self.open_tags:
            self.captions[-1] += data
        if {"td", "th"} & set(self.open_tags):
            row = self.tables[-1][-1]
            row[-1] = (row[-1][0] + data, row[-1][1])

    @property
    def tables_by_caption(self) -> dict[str, list[list[str]]]:
        texts = [[[text for text, _ in row] for row in table] for table in self.tables]
        return dict(zip(self.captions, texts, strict=True))

    def result(self, column: str) -> list[str]:
        """One column of the table of results, a best value with an asterisk."""
        header, *rows = self.tables[0]
        at = [text for text, _ in header].index(column)
        return [text.replace(" (best)", "*") for text, _ in (row[at] for row in rows)]

    def curve(self, gid: str) -> list[tuple[float, float]]:
        """The points of one curve, in the units of its SVG."""
        if f'<g id="{gid}">' not in self.html:
            return []
        path = re.search(r' d="([^"]*)"', self.html.split(f'<g id="{gid}">')[1])
        assert path
        numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", path[1])]
        return list(zip(numbers[::2], numbers[1::2], strict=True))


def page_of(tmp_path: Path, *runs: Path) -> Page:
    write_report(runs, tmp_path / "page.html")
    return Page(tmp_path / "page.html")


def federation_with_silos(directory: Path) -> Path:
    """Two silos, of which one fails in round 2, and their judgements of each other's models."""
    matrix = {
        "north": {"north": {"loss": 0.1, "accuracy": 0.9}, "south": {"loss": 0.5, "accuracy": 0.6}},
        "south": {},
    }
    confusion = {"classes": ["ill", "<well>"], "counts": [[7, 1], [0, 1200]]}
    result = {"runtime": "flower", "num_silos": 2, "cross_site": matrix, "confusion": confusion}
    rows = federated_rows(2)
    rows[1]["failures"] = {"south": "its disk is full & more"}
    run = make_run(directory, rows, {**result, "metrics": {"test": {"loss": 0.2}}})
    silos = [
        {
            "round": 1,
            "silo": "north",
            "num_examples": 1500,
            "train": {"loss": 2.0},
            "validation": {},
            "seconds": 4.0,
        },
        {
            "round": 1,
            "silo": "south",
            "num_examples": 20,
            "train": {"loss": 3.0},
            "validation": {},
            "seconds": 1.0,
        },
        {
            "round": 2,
            "silo": "north",
            "num_examples": 1500,
            "train": {"loss": 1.0},
            "validation": {},
            "seconds": 6.0,
        },
    ]
    (run / "silos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in silos))
    return run
