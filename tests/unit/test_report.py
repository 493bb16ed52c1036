"""The report, on run directories made of real files in the format of shared/run_record.py."""

import ast
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shared.experiment import experiment_from_flat
from shared.report import terminal_table, write_report

VOID = {"meta", "link", "path", "use", "rect"}
VERSIONS = {"python": "3.11.7", "keras": "3.15.1"}


def make_run(directory: Path, rows: list[dict], result: dict | None = None, **settings: Any) -> Path:
    directory.mkdir(parents=True)
    flat = {key.replace("__", "."): value for key, value in settings.items()}
    (directory / "experiment.toml").write_text(experiment_from_flat(flat).to_toml())
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if result is not None:
        common = {"num_parameters": 13706, "seconds": 7.5, "weights_sha256": "f31e5e6f" * 8, "versions": VERSIONS}
        (directory / "result.json").write_text(json.dumps({**common, **result}))
    return directory


def central_run(directory: Path, accuracy: float = 0.9, loss: float = 0.3, epochs: int = 3, **settings: Any) -> Path:
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
    metrics = {"validation": {"loss": 0.4, "accuracy": 0.8}, "test": {"loss": loss, "accuracy": accuracy}}
    return make_run(directory, rows, {"runtime": "single", "world_size": 1, "metrics": metrics}, **settings)


def federated_rows(rounds: int) -> list[dict]:
    return [
        {"round": r, "test": {"loss": 1.0 / r, "accuracy": 0.2 * r}, "bytes_sent": 250_000 * r, "seconds": 4.0 * r}
        for r in range(1, rounds + 1)
    ]


def federated_run(directory: Path, accuracy: float = 0.8, rounds: int = 4, **settings: Any) -> Path:
    result = {"runtime": "flower", "num_silos": 3, "bytes_sent": 1_000_000}
    metrics = {"test": {"loss": 0.25, "accuracy": accuracy}}
    return make_run(directory, federated_rows(rounds), {**result, "metrics": metrics}, **settings)


class Page(HTMLParser):
    """The page as parsed: refuses tags that do not nest; `tables` holds the tables' cells as (text, class)."""

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
        self.references += [attributes[name] for name in ("src", "href", "xlink:href", "data") if name in attributes]
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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a central run of 3 epochs and a federated one of 4 rounds, for the tests that only look."""
    directory = tmp_path_factory.mktemp("pair")
    return page_of(directory, central_run(directory / "a", accuracy=0.56), federated_run(directory / "b", rounds=4))


def run_module(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shared.report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)


def test_the_page_is_one_file_without_scripts_or_anything_to_fetch(pair: Page) -> None:
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", pair.html)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)|<script|<iframe", without_namespaces)
    assert pair.references  # the SVG's own, those of the sections, and no icon to look for
    assert all(reference.startswith("#") or reference == "data:," for reference in pair.references)
    assert "<?xml" not in pair.html
    assert "<!DOCTYPE svg" not in pair.html


def test_no_two_elements_of_the_page_share_an_id(pair: Page) -> None:
    assert len(pair.ids) > 10
    assert sorted(pair.ids) == sorted(set(pair.ids))
    assert {reference.removeprefix("#") for reference in pair.references} - {"data:,"} <= set(pair.ids)


def test_the_same_runs_give_the_same_page(tmp_path: Path, pair: Page) -> None:
    again = page_of(tmp_path, central_run(tmp_path / "a", accuracy=0.56), federated_run(tmp_path / "b", rounds=4))
    assert again.html == pair.html


def test_each_run_is_named_and_its_name_is_text(tmp_path: Path) -> None:
    page = page_of(tmp_path, central_run(tmp_path / "<b>x&$1$", name="first"), central_run(tmp_path / "_plain"))
    assert page.result("run") == ["<b>x&$1$first", "_plainexperiment"]
    assert "<b>x" not in page.html
    assert "</b> &lt;b&gt;x&amp;$1$</span>" in page.html  # legend
    assert "&lt;b&gt;x&amp;$1$</text>" in page.html  # bars: not a formula either


@pytest.mark.filterwarnings("error")
def test_bars_have_long_and_foreign_names(tmp_path: Path) -> None:
    long = "federation_of_very_many_hospitals_run_"
    page = page_of(tmp_path, *(central_run(tmp_path / name) for name in (f"{long}1", f"{long}2", "病院")))
    for shown in ("federati…hospitals_run_1", "federati…hospitals_run_2", "病院"):
        assert f">{shown}</text>" in page.html


def test_runs_of_the_same_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    page = page_of(tmp_path, central_run(tmp_path / "x" / "run"), central_run(tmp_path / "y" / "run"))
    assert page.result("run") == ["x/runexperiment", "y/runexperiment"]


def test_curves_follow_the_rows(pair: Page) -> None:
    (x1, y1), (x2, y2), (x3, y3) = pair.curve("step-accuracy-train-run0")
    assert 0 < x2 - x1 == pytest.approx(x3 - x2, abs=1e-3)  # epochs 1, 2, 3
    assert 0 > y2 - y1 == pytest.approx(y3 - y2, abs=1e-3)  # accuracy 0.3, 0.6, 0.9; SVG counts downwards
    assert len(pair.curve("step-loss-validation-run0")) == 3
    assert len(pair.curve("step-loss-test-run1")) == 4
    assert pair.curve("step-loss-train-run1") == []  # this federation reports none


def test_a_test_value_from_the_end_only_is_one_point_at_the_last_step(pair: Page) -> None:
    (_, _), (_, y_of_056), (last_x, _) = pair.curve("step-accuracy-validation-run0")  # accuracy 0.28, 0.56, 0.84
    drawn = pair.html.split('<g id="step-accuracy-test-run0">')[1].split("</g>")[0]
    markers = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', drawn)
    assert [tuple(map(float, marker)) for marker in markers] == [pytest.approx((last_x, y_of_056), abs=1e-3)]


def test_only_runs_that_sent_bytes_are_drawn_against_bytes(tmp_path: Path, pair: Page) -> None:
    assert len(pair.curve("bytes_sent-accuracy-test-run1")) == 4
    assert pair.curve("bytes_sent-accuracy-validation-run0") == []
    assert "accuracy by bytes sent" in pair.html
    assert pair.html.count(">500 kB</text>") == 2  # on the axes of the curves and of the bars
    alone = page_of(tmp_path, central_run(tmp_path / "a"))
    assert "by bytes sent" not in alone.html
    assert "accuracy by time" in alone.html


def test_bars_are_as_long_as_the_values(tmp_path: Path) -> None:
    runs = [central_run(tmp_path / "a"), federated_run(tmp_path / "b")]
    result = json.loads((runs[0] / "result.json").read_text())
    (runs[0] / "result.json").write_text(json.dumps({**result, "seconds": 15.0}))  # the other: 7.5
    page = page_of(tmp_path, *runs)
    lengths = [
        max(x for x, _ in bar) - min(x for x, _ in bar) for bar in map(page.curve, ("seconds-run0", "seconds-run1"))
    ]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=1e-4)


def test_columns_are_the_union_of_the_metrics(tmp_path: Path) -> None:
    regression = {"runtime": "horovod", "world_size": 2, "metrics": {"test": {"loss": 970.0, "mae": 0.000123}}}
    page = page_of(
        tmp_path, central_run(tmp_path / "a", accuracy=0.9), make_run(tmp_path / "b", [], regression, data__name="wine")
    )
    assert page.result("test accuracy") == ["0.9000", "-"]
    assert page.result("test mae") == ["-", "0.000123"]
    assert page.result("test loss") == ["0.3000", "970.00"]  # of different data: none is better
    assert page.result("validation loss") == ["0.4000", "-"]
    assert page.result("participants") == ["1 rank", "2 ranks"]
    assert page.result("runtime") == ["single", "horovod"]


def test_the_best_test_values_are_marked(tmp_path: Path) -> None:
    runs = [
        central_run(tmp_path / "a", accuracy=0.90, loss=float("nan")),
        central_run(tmp_path / "b", accuracy=0.95, loss=0.2),
        central_run(tmp_path / "c", accuracy=0.95000001, loss=0.3),
    ]
    page = page_of(tmp_path, *runs)
    assert page.result("test accuracy") == ["0.9000", "0.9500*", "0.9500*"]  # equal as far as they are shown
    assert page.result("test loss") == ["nan", "0.2000*", "0.3000"]
    assert page.result("validation loss") == ["0.4000"] * 3
    assert page_of(tmp_path, runs[0]).result("test accuracy") == ["0.9000"]  # the best of one


def test_an_unfinished_run_is_marked_and_drawn(tmp_path: Path) -> None:
    unfinished = make_run(tmp_path / "b", federated_rows(2))
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "te')  # cut off by a crash
    page = page_of(tmp_path, central_run(tmp_path / "a"), unfinished, make_run(tmp_path / "c", []))
    assert page.result("run") == ["aexperiment", "bexperiment unfinished", "cexperiment unfinished"]
    assert page.result("test accuracy") == ["0.9000", "-", "-"]
    assert page.result("seconds") == ["7.5", "8.0", "-"]
    assert page.result("bytes sent") == ["0 B", "500 kB", "-"]
    assert len(page.curve("step-loss-test-run1")) == 2
    assert ">8 s so far</text>" in page.html


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    runs = [
        central_run(tmp_path / "a", optimizer__learning_rate=0.1, run__directory="here"),
        central_run(tmp_path / "b", optimizer__learning_rate=0.01, run__directory="there"),
    ]
    page = page_of(tmp_path, *runs)
    table = page.tables_by_caption["Settings that differ; marked: from those of the first run"]
    assert table == [["setting", "a", "b"], ["optimizer.learning_rate", "0.1", "0.01 (differs)"]]
    assert ["seed", "0", "0"] in page.tables_by_caption["All settings"]
    alone = page_of(tmp_path, runs[0])
    assert not [caption for caption in alone.tables_by_caption if caption.startswith("Settings that differ")]


def federation_with_silos(directory: Path) -> Path:
    """Two silos, of which one fails in round 2, and their judgements of each other's models."""
    matrix = {"north": {"north": {"loss": 0.1, "accuracy": 0.9}, "south": {"loss": 0.5, "accuracy": 0.6}}, "south": {}}
    confusion = {"classes": ["ill", "<well>"], "counts": [[7, 1], [0, 1200]]}
    result = {"runtime": "flower", "num_silos": 2, "cross_site": matrix, "confusion": confusion}
    rows = federated_rows(2)
    rows[1]["failures"] = {"south": "its disk is full & more"}
    run = make_run(directory, rows, {**result, "metrics": {"test": {"loss": 0.2}}})
    silos = [
        {"round": 1, "silo": "north", "num_examples": 1500, "train": {"loss": 2.0}, "validation": {}, "seconds": 4.0},
        {"round": 1, "silo": "south", "num_examples": 20, "train": {"loss": 3.0}, "validation": {}, "seconds": 1.0},
        {"round": 2, "silo": "north", "num_examples": 1500, "train": {"loss": 1.0}, "validation": {}, "seconds": 6.0},
    ]
    (run / "silos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in silos))
    return run


def test_each_silo_of_a_federation_has_a_row(tmp_path: Path) -> None:
    page = page_of(tmp_path, central_run(tmp_path / "a"), federation_with_silos(tmp_path / "b"))
    header = ["silo", "rounds", "training examples", "train loss, last", "seconds per round, median", "rounds failed"]
    assert page.tables_by_caption["Silos of b"] == [
        header,
        ["north", "2", "1,500", "1.0000", "5.0000", "0"],
        ["south", "1", "20", "3.0000", "1.0000", "1: its disk is full & more"],
    ]
    assert "Silos of a" not in page.captions


def test_who_judged_whose_model_and_which_classes_were_taken_for_which(tmp_path: Path) -> None:
    page = page_of(tmp_path, federation_with_silos(tmp_path / "b"))
    judged = page.tables_by_caption["b: accuracy of each silo's model (rows) on each silo's data (columns)"]
    assert judged == [["model of", "north", "south"], ["north", "0.9000", "0.6000"], ["south", "-", "-"]]
    assert '--share:100%" class="share">0.9000' in page.html
    assert '--share:0%" class="share">0.6000' in page.html
    confused = page.tables_by_caption["b: test examples by true class (rows) and predicted class (columns)"]
    assert confused == [["true", "ill", "<well>"], ["ill", "7", "1"], ["<well>", "·", "1,200"]]
    assert '--share:88%" class="share">7<' in page.html  # of the 8 that are ill


def test_a_language_model_shows_how_it_goes_on(tmp_path: Path) -> None:
    sample = {"prompt": "The <import> ", "text": "statement & all"}
    run = make_run(tmp_path / "lm", federated_rows(1), {"runtime": "single", "metrics": {}, "sample": sample})
    assert "<b>The &lt;import&gt; </b>statement &amp; all</pre>" in page_of(tmp_path, run).html


def test_the_values_of_the_curves_stand_beside_them(pair: Page) -> None:
    values = pair.tables_by_caption["accuracy by epoch or round"]
    assert values[0] == ["epoch or round", "a test", "a train", "a validation", "b test"]
    assert values[1] == ["1", "-", "0.3000", "0.2800", "0.2000"]
    assert values[4] == ["4", "-", "-", "-", "0.8000"]


def test_a_long_curve_has_a_short_table_which_ends_with_the_last_step(tmp_path: Path) -> None:
    page = page_of(tmp_path, central_run(tmp_path / "a", epochs=500))
    steps = [row[0] for row in page.tables_by_caption["loss by epoch"][1:]]
    assert 50 < len(steps) <= 61
    assert (steps[0], steps[-1]) == ("1", "500")


def test_losses_of_many_magnitudes_are_drawn_by_their_logarithm_and_accuracies_never(tmp_path: Path) -> None:
    rows = [{"epoch": e, "validation": {"loss": 10.0**-e, "accuracy": 0.001 * 9**e}, "seconds": e} for e in (1, 2, 3)]
    page = page_of(tmp_path, make_run(tmp_path / "a", rows))
    assert "loss (log scale)" in page.html
    assert "accuracy (log scale)" not in page.html


def test_long_runs_are_drawn_in_minutes_or_hours(tmp_path: Path) -> None:
    page = page_of(tmp_path, central_run(tmp_path / "a", epochs=500))  # 750 s
    assert "time (min)" in page.html
    assert "time (s)" not in page.html


def test_versions_stand_at_the_foot(tmp_path: Path) -> None:
    page = page_of(tmp_path, central_run(tmp_path / "a"), central_run(tmp_path / "b"), make_run(tmp_path / "c", []))
    assert "<p>a, b: python 3.11.7, keras 3.15.1</p><p>c: known when the run is finished</p>" in page.html


def test_the_terminal_table_has_the_same_values(tmp_path: Path) -> None:
    runs = [
        central_run(tmp_path / "a[red]"),
        federated_run(tmp_path / "b"),
        make_run(tmp_path / "c", federated_rows(1)),
    ]
    console = Console(width=140, file=StringIO(), record=True)
    console.print(terminal_table(runs))
    lines = [re.findall(r"[^│┃|]+", line) for line in console.export_text().splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) > 1]
    assert cells == [
        ["run", "runtime", "participants", "test loss", "test accuracy", "seconds", "bytes sent"],
        ["a[red]", "single", "1 rank", "0.3000", "0.9000", "7.5", "0 B"],
        ["b", "flower", "3 silos", "0.2500", "0.8000", "7.5", "1 MB"],
        ["c (unfinished)", "-", "-", "-", "-", "4.0", "250 kB"],
    ]


def test_the_module_writes_the_page(tmp_path: Path) -> None:
    done = run_module(central_run(tmp_path / "a"), "-o", tmp_path / "page.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert Page(tmp_path / "page.html").result("run") == ["aexperiment"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "page.html"]  # nothing partial is left


@pytest.mark.parametrize("case", ["none", "missing", "no run", "broken", "no directory", "a directory"])
def test_errors_are_one_line_with_the_value_received(tmp_path: Path, case: str) -> None:
    run, page = central_run(tmp_path / "run"), tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    broken = central_run(tmp_path / "broken")
    (broken / "result.json").write_text("{")
    runs, output, received = {
        "none": ([], page, "received none"),
        "missing": ([run, tmp_path / "nowhere"], page, f"holds an experiment.toml; received {tmp_path / 'nowhere'}."),
        "no run": ([tmp_path / "empty"], page, f"holds an experiment.toml; received {tmp_path / 'empty'}."),
        "broken": ([run, broken], page, str(broken)),
        "no directory": ([run], tmp_path / "nowhere" / "page.html", str(tmp_path / "nowhere" / "page.html")),
        "a directory": ([run], tmp_path / "empty", str(tmp_path / "empty")),
    }[case]
    before = sorted(tmp_path.rglob("*"))
    done = run_module(*runs, "-o", output)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: .+; received .+\n", done.stderr)  # . matches no newline: one line
    assert received in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    run, page = central_run(tmp_path / "run"), tmp_path / "page.html"
    page.write_text("the old page")
    (tmp_path / "page.html.partial").mkdir()  # in the way of the new one
    with pytest.raises(ValueError, match=r"Choose another one with -o"):
        write_report([run], page)
    assert page.read_text() == "the old page"


def test_importing_the_report_loads_no_framework_and_draws_nothing() -> None:
    code = "import shared.report, sys; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert not {"tensorflow", "keras", "flwr", "horovod", "matplotlib"} & set(ast.literal_eval(done.stdout))
