"""The report's page and tables, on run directories of real files (shared/run_record.py)."""

import ast
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from shared.report import terminal_table, write_report
from tests.unit.report_pages import (
    Page,
    central_run,
    federated_rows,
    federated_run,
    federation_with_silos,
    make_run,
    page_of,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a central run of 3 epochs and a federated one of 4 rounds."""
    directory = tmp_path_factory.mktemp("pair")
    return page_of(
        directory,
        central_run(directory / "a", accuracy=0.56),
        federated_run(directory / "b", rounds=4),
    )


def run_module(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shared.report", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )


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
    assert {reference.removeprefix("#") for reference in pair.references} - {"data:,"} <= set(
        pair.ids
    )


def test_the_same_runs_give_the_same_page(tmp_path: Path, pair: Page) -> None:
    again = page_of(
        tmp_path,
        central_run(tmp_path / "a", accuracy=0.56),
        federated_run(tmp_path / "b", rounds=4),
    )
    assert again.html == pair.html


def test_each_run_is_named_and_its_name_is_text(tmp_path: Path) -> None:
    page = page_of(
        tmp_path, central_run(tmp_path / "<b>x&$1$", name="first"), central_run(tmp_path / "_plain")
    )
    assert page.result("run") == ["<b>x&$1$first", "_plainexperiment"]
    assert "<b>x" not in page.html
    assert "</b> &lt;b&gt;x&amp;$1$</span>" in page.html  # legend
    assert "&lt;b&gt;x&amp;$1$</text>" in page.html  # bars: not a formula either


def test_runs_of_the_same_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    page = page_of(
        tmp_path, central_run(tmp_path / "x" / "run"), central_run(tmp_path / "y" / "run")
    )
    assert page.result("run") == ["x/runexperiment", "y/runexperiment"]


def test_columns_are_the_union_of_the_metrics(tmp_path: Path) -> None:
    regression = {
        "runtime": "horovod",
        "world_size": 2,
        "metrics": {"test": {"loss": 970.0, "mae": 0.000123}},
    }
    page = page_of(
        tmp_path,
        central_run(tmp_path / "a", accuracy=0.9),
        make_run(tmp_path / "b", [], regression, data__name="wine"),
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
    # The last two are equal as far as they are shown.
    assert page.result("test accuracy") == ["0.9000", "0.9500*", "0.9500*"]
    assert page.result("test loss") == ["nan", "0.2000*", "0.3000"]
    assert page.result("validation loss") == ["0.4000"] * 3
    assert page_of(tmp_path, runs[0]).result("test accuracy") == ["0.9000"]  # the best of one


def test_what_the_mark_means_is_said_where_there_is_one(tmp_path: Path) -> None:
    legend = '<span class="best key">green</span>the best of its column, on the same test examples'
    runs = [central_run(tmp_path / "a", accuracy=0.9), central_run(tmp_path / "b", accuracy=0.8)]
    assert page_of(tmp_path, *runs).html.count(legend) == 1
    assert legend not in page_of(tmp_path, runs[0]).html


def test_the_title_names_the_experiments_and_the_day_on_which_the_last_run_finished(
    tmp_path: Path,
) -> None:
    runs = [
        make_run(tmp_path / name, federated_rows(1), {"runtime": "x", **finished}, name=title)
        for name, title, finished in (
            ("a", "wine", {"finished": "2026-11-30T23:59:59+00:00"}),
            ("b", "digits", {"finished": "2026-12-01T06:26:55+00:00"}),
            ("c", "wine", {}),  # by an earlier version
        )
    ]
    page = page_of(tmp_path, *runs)
    assert "<title>wine, digits, 2026-12-01: runs side by side (Archipelago)</title>" in page.html
    assert "<h1>wine, digits, 2026-12-01</h1>" in page.html
    assert "<h1>wine</h1>" in page_of(tmp_path, runs[2]).html


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
    assert not [
        caption for caption in alone.tables_by_caption if caption.startswith("Settings that differ")
    ]


def test_each_silo_of_a_federation_has_a_row(tmp_path: Path) -> None:
    page = page_of(tmp_path, central_run(tmp_path / "a"), federation_with_silos(tmp_path / "b"))
    header = [
        "silo",
        "rounds",
        "training examples",
        "train loss, last",
        "seconds per round, median",
        "rounds failed",
    ]
    assert page.tables_by_caption["Silos of b"] == [
        header,
        ["north", "2", "1,500", "1.0000", "5.0000", "0"],
        ["south", "1", "20", "3.0000", "1.0000", "1: its disk is full & more"],
    ]
    assert "Silos of a" not in page.captions


def test_who_judged_whose_model_and_which_classes_were_taken_for_which(tmp_path: Path) -> None:
    page = page_of(tmp_path, federation_with_silos(tmp_path / "b"))
    judged = page.tables_by_caption[
        "b: accuracy of each silo's model (rows) on each silo's data (columns)"
    ]
    assert judged == [
        ["model of", "north", "south"],
        ["north", "0.9000", "0.6000"],
        ["south", "-", "-"],
    ]
    assert '--share:100%" class="share">0.9000' in page.html
    assert '--share:0%" class="share">0.6000' in page.html
    confused = page.tables_by_caption[
        "b: test examples by true class (rows) and predicted class (columns)"
    ]
    assert confused == [["true", "ill", "<well>"], ["ill", "7", "1"], ["<well>", "·", "1,200"]]
    assert '--share:88%" class="share">7<' in page.html  # of the 8 that are ill


def test_a_language_model_shows_how_it_goes_on(tmp_path: Path) -> None:
    sample = {"prompt": "The <import> ", "text": "statement & all"}
    run = make_run(
        tmp_path / "lm", federated_rows(1), {"runtime": "single", "metrics": {}, "sample": sample}
    )
    assert "<b>The &lt;import&gt; </b>statement &amp; all</pre>" in page_of(tmp_path, run).html


def test_versions_stand_at_the_foot(tmp_path: Path) -> None:
    page = page_of(
        tmp_path,
        central_run(tmp_path / "a"),
        central_run(tmp_path / "b"),
        make_run(tmp_path / "c", []),
    )
    assert (
        "<p>a, b: python 3.11.7, keras 3.15.1</p><p>c: known when the run is finished</p>"
        in page.html
    )


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
        ["run", "test loss", "test accuracy", "runtime", "participants", "seconds", "bytes sent"],
        ["a[red]", "0.3000", "0.9000", "single", "1 rank", "7.5", "0 B"],
        ["b", "0.2500", "0.8000", "flower", "3 silos", "7.5", "1 MB"],
        ["c (unfinished)", "-", "-", "-", "-", "4.0", "250 kB"],
    ]


def test_the_module_writes_the_page(tmp_path: Path) -> None:
    done = run_module(central_run(tmp_path / "a"), "-o", tmp_path / "page.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert Page(tmp_path / "page.html").result("run") == ["aexperiment"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a", "page.html"]  # nothing partial is left


@pytest.mark.parametrize(
    "case", ["none", "missing", "no run", "broken", "no directory", "a directory"]
)
def test_errors_are_one_line_with_the_value_received(tmp_path: Path, case: str) -> None:
    run, page = central_run(tmp_path / "run"), tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    broken = central_run(tmp_path / "broken")
    (broken / "result.json").write_text("{")
    runs, output, received = {
        "none": ([], page, "received none"),
        "missing": (
            [run, tmp_path / "nowhere"],
            page,
            f"holds an experiment.toml; received {tmp_path / 'nowhere'}.",
        ),
        "no run": (
            [tmp_path / "empty"],
            page,
            f"holds an experiment.toml; received {tmp_path / 'empty'}.",
        ),
        "broken": ([run, broken], page, str(broken)),
        "no directory": (
            [run],
            tmp_path / "nowhere" / "page.html",
            str(tmp_path / "nowhere" / "page.html"),
        ),
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
    code = (
        "import shared.report, sys; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert not {"tensorflow", "keras", "flwr", "horovod", "matplotlib"} & set(
        ast.literal_eval(done.stdout)
    )
