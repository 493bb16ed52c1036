"""The report's curves and bars, read back from the SVG in the page."""

import json
import re
from pathlib import Path

import pytest

from tests.unit.report_pages import Page, central_run, federated_run, make_run, page_of


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a central run of 3 epochs and a federated one of 4 rounds."""
    directory = tmp_path_factory.mktemp("pair")
    return page_of(
        directory,
        central_run(directory / "a", accuracy=0.56),
        federated_run(directory / "b", rounds=4),
    )


@pytest.mark.filterwarnings("error")
def test_bars_have_long_and_foreign_names(tmp_path: Path) -> None:
    long = "federation_of_very_many_hospitals_run_"
    page = page_of(
        tmp_path, *(central_run(tmp_path / name) for name in (f"{long}1", f"{long}2", "病院"))
    )
    for shown in ("federati…hospitals_run_1", "federati…hospitals_run_2", "病院"):
        assert f">{shown}</text>" in page.html


def test_curves_follow_the_rows(pair: Page) -> None:
    # Epochs 1, 2, 3; accuracy 0.3, 0.6, 0.9, and SVG counts downwards.
    (x1, y1), (x2, y2), (x3, y3) = pair.curve("step-accuracy-train-run0")
    assert 0 < x2 - x1 == pytest.approx(x3 - x2, abs=1e-3)
    assert 0 > y2 - y1 == pytest.approx(y3 - y2, abs=1e-3)
    assert len(pair.curve("step-loss-validation-run0")) == 3
    assert len(pair.curve("step-loss-test-run1")) == 4
    assert pair.curve("step-loss-train-run1") == []  # this federation reports none


def test_a_test_value_from_the_end_only_is_one_point_at_the_last_step(pair: Page) -> None:
    # The validation accuracy is 0.28, 0.56, 0.84; the test accuracy 0.56.
    (_, _), (_, y_of_056), (last_x, _) = pair.curve("step-accuracy-validation-run0")
    drawn = pair.html.split('<g id="step-accuracy-test-run0">')[1].split("</g>")[0]
    markers = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', drawn)
    assert [tuple(map(float, marker)) for marker in markers] == [
        pytest.approx((last_x, y_of_056), abs=1e-3)
    ]


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
        max(x for x, _ in bar) - min(x for x, _ in bar)
        for bar in map(page.curve, ("seconds-run0", "seconds-run1"))
    ]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=1e-4)


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


def test_losses_of_many_magnitudes_are_drawn_by_their_logarithm_and_accuracies_never(
    tmp_path: Path,
) -> None:
    rows = [
        {"epoch": e, "validation": {"loss": 10.0**-e, "accuracy": 0.001 * 9**e}, "seconds": e}
        for e in (1, 2, 3)
    ]
    page = page_of(tmp_path, make_run(tmp_path / "a", rows))
    assert "loss (log scale)" in page.html
    assert "accuracy (log scale)" not in page.html


def test_long_runs_are_drawn_in_minutes_or_hours(tmp_path: Path) -> None:
    page = page_of(tmp_path, central_run(tmp_path / "a", epochs=500))  # 750 s
    assert "time (min)" in page.html
    assert "time (s)" not in page.html


# --- curves that are equal


def dashes(page: Page, gid: str) -> tuple[list[float], float]:
    """The lengths and the offset of a curve's dashes, in multiples of the first length."""
    style = page.html.split(f'<g id="{gid}">')[1].split("</g>")[0]
    lengths = re.search(r"stroke-dasharray: ([\d., ]+)", style)
    offset = re.search(r"stroke-dashoffset: ([\d.]+)", style)
    assert lengths, style
    assert offset, style
    on, off = (float(length) for length in lengths[1].split(","))
    return [1.0, off / on], float(offset[1]) / on


def markers(page: Page, gid: str) -> int:
    return page.html.split(f'<g id="{gid}">')[1].split("</g>")[0].count("<use ")


def test_equal_curves_alternate_so_that_none_hides_another(tmp_path: Path) -> None:
    page = page_of(tmp_path, *(central_run(tmp_path / name, epochs=9) for name in "abc"))
    found = [dashes(page, f"step-loss-validation-run{i}") for i in range(3)]
    assert [lengths for lengths, _ in found] == [[1.0, pytest.approx(2.0)]] * 3
    assert sorted(offset for _, offset in found) == pytest.approx([0.0, 1.0, 2.0])
    assert [markers(page, f"step-loss-validation-run{i}") for i in range(3)] == [3, 3, 3]
    assert page.html.count("Equal, in alternating colours: a = b = c (train, validation, test)") > 1


def test_curves_that_differ_are_solid_and_nothing_is_said_of_them(tmp_path: Path) -> None:
    page = page_of(tmp_path, central_run(tmp_path / "a"), federated_run(tmp_path / "b"))
    assert "Equal, in" not in page.html
    assert "dasharray" not in page.html.split('<g id="step-loss-test-run1">')[1].split("</g>")[0]


def test_values_that_differ_by_less_than_a_line_are_equal_to_the_eye(tmp_path: Path) -> None:
    runs = [central_run(tmp_path / name, epochs=5) for name in "ab"]
    rows = (runs[1] / "metrics.jsonl").read_text().replace('"loss": 2.0', '"loss": 2.000001')
    (runs[1] / "metrics.jsonl").write_text(rows)
    assert (
        "Equal, in alternating colours: a = b (train, validation, test)"
        in page_of(tmp_path, *runs).html
    )


# --- start-up


def test_start_up_is_shown_apart_from_training(tmp_path: Path) -> None:
    rows = [
        {"epoch": e, "train": {"loss": 1.0 / e}, "seconds": 8.0 + 2.0 * e} for e in (1, 2, 3, 4)
    ]
    rows = [{**row, "validation": {"loss": 1.0}} for row in rows]
    result = {"runtime": "single", "world_size": 1, "metrics": {}, "seconds": 17.0}
    page = page_of(tmp_path, make_run(tmp_path / "slow", rows, result), central_run(tmp_path / "b"))
    assert "Start-up, which is part of the time: slow 8 s</figcaption>" in page.html
    assert "Framed: start-up" in page.html

    def length(gid: str) -> float:
        xs = [x for x, _ in page.curve(gid)]
        return max(xs) - min(xs)

    assert length("startup-run0") == pytest.approx(length("seconds-run0") * 8 / 17, rel=1e-3)
    assert page.curve("startup-run1") == []  # its first epoch took as long as the others


@pytest.mark.parametrize("epochs", [1, 2])
def test_of_a_few_epochs_start_up_is_not_told(tmp_path: Path, epochs: int) -> None:
    page = page_of(tmp_path, central_run(tmp_path / "a", epochs=epochs))
    assert "tart-up" not in page.html
