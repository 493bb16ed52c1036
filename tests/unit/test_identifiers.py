"""Columns that tell rows apart, from which a model would learn the order of a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shared.data import load_examples
from shared.data.identifiers import row_number_reason
from shared.data.inspection import inspect_file
from shared.data.sources import save_examples
from shared.data.tables import Table
from shared.experiment import DataSection

NUM_ROWS = 60


def noise(**columns: object) -> pd.DataFrame:
    """Pure noise, sorted by class: only the order of the rows tells the class."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(columns)
    frame["x"] = rng.normal(size=NUM_ROWS)
    frame["label"] = ["a"] * (NUM_ROWS // 2) + ["b"] * (NUM_ROWS // 2)
    return frame


SHUFFLED = np.random.default_rng(1).permutation(NUM_ROWS) * 3 + 1000
ROW_NUMBERS = {
    "counter from 0": {"whatever": range(NUM_ROWS)},
    "counter from 1": {"nr.": range(1, NUM_ROWS + 1)},
    "unnamed, with rows taken out": {"Unnamed: 0": np.arange(NUM_ROWS) * 2},
}
IDENTIFIERS = {name: {name: SHUFFLED} for name in ("PassengerId", "patientID", "idx", "Lfd. Nr.")}


@pytest.mark.parametrize("columns", [*ROW_NUMBERS.values(), *IDENTIFIERS.values()])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_tells_rows_apart_is_refused_unless_someone_has_named_it(
    tmp_path: Path, columns: dict[str, object], ending: str, stream: bool
):
    if stream and ending == ".csv":
        return
    (name,) = columns
    frame, path = noise(**columns), tmp_path / f"t{ending}"
    frame.to_csv(path, index=False) if ending == ".csv" else frame.to_parquet(path)
    config = DataSection(name=str(path), stream=stream, cache=str(tmp_path))
    with pytest.raises(ValueError, match=rf"column '{name}' holds .*Set data.ignore = '{name}'"):
        load_examples(config)

    for keys in ({"ignore": name}, {"id": name}, {"features": f"{name}, x"}):
        table = load_examples(config.model_copy(update=keys))
        assert isinstance(table, Table)
        assert (name in table.roles.features) == ("features" in keys)


def test_an_index_that_pandas_has_written_is_left_out_by_inspect(tmp_path: Path):
    path = tmp_path / "t.csv"
    noise().to_csv(path)  # its first column has no name
    inspection = inspect_file(path)
    assert inspection.columns[0].name == "Unnamed: 0"
    assert inspection.columns[0].role == "left out: row numbers"
    assert inspection.keys["ignore"] == "Unnamed: 0"
    table = load_examples(DataSection(**inspection.keys))  # type: ignore[arg-type]
    assert isinstance(table, Table)
    assert table.roles.features == ["x"]


def test_parts_of_a_table_lack_what_it_ignores(tmp_path: Path):
    """As the silos get them that one table is dealt to."""
    noise(PassengerId=SHUFFLED).to_csv(tmp_path / "t.csv", index=False)
    config = DataSection(name=str(tmp_path / "t.csv"), ignore="PassengerId")
    part = save_examples(tmp_path / "part", load_examples(config))
    again = load_examples(config.model_copy(update={"name": str(part)}))
    assert isinstance(again, Table)
    assert again.roles.features == ["x"]


@pytest.mark.parametrize(
    ("values", "role"),
    [
        (SHUFFLED, "id"),
        ([f"P{i:04}" for i in range(NUM_ROWS)], "id"),
        ([f"the patient says that it hurts {i} times" for i in range(NUM_ROWS)], "left out: text"),
    ],
)
def test_inspect_tells_identifiers_from_free_text(tmp_path: Path, values: object, role: str):
    path = tmp_path / "t.csv"
    noise(CaseNo=values).to_csv(path, index=False)
    inspection = inspect_file(path)
    assert inspection.columns[0].role.startswith(role)
    key = "id" if role == "id" else "ignore"
    assert inspection.keys[key] == "CaseNo"


@pytest.mark.parametrize(
    "values",
    [
        np.arange(NUM_ROWS) + 17.0,
        np.arange(NUM_ROWS) * 2.0,
        np.where(np.arange(NUM_ROWS) == 5, np.nan, np.arange(NUM_ROWS)),
        np.arange(NUM_ROWS) / 2,
        np.arange(29.0),
    ],
)
def test_other_numbers_are_measurements(values: np.ndarray):
    assert row_number_reason(values, "age") == ""
