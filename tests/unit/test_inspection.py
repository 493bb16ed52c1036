"""python -m shared.data inspect: what it says of a file, and that what it suggests can be trained
on.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shared.data import fit_schema, load_examples
from shared.data.__main__ import main
from shared.data.inspection import inspect_file
from shared.data.readers.tfrecord_files import write_tfrecord
from shared.data.roles import format_names, parse_names
from shared.experiment import DataSection, load_experiment
from tests.unit.test_tables import patients

ROOT = Path(__file__).parents[2]


@pytest.fixture
def visits(tmp_path: Path) -> Path:
    """A file with a gap, a name for each row, text of many kinds, and classes of uneven size."""
    frame = patients().assign(note=[f"note {i // 2}" for i in range(200)], ward="A")
    frame.loc[3:9, "age"] = float("nan")
    path = tmp_path / "visits.csv"
    frame.to_csv(path, index=False)
    return path


def test_each_column_is_described(visits: Path):
    found = inspect_file(visits, "outcome")
    roles = {
        column.name: (column.kind, column.missing, column.role.partition(":")[0])
        for column in found.columns
    }
    assert found.num_examples == 200
    assert roles == {
        "name": ("text", 0, "id"),
        "patient": ("whole numbers", 0, "number"),
        "age": ("numbers", 7, "number"),
        "colour": ("text", 0, "categorical"),
        "pressure": ("numbers", 0, "number"),
        "site": ("whole numbers", 0, "number"),
        "trust": ("numbers", 0, "number"),
        "outcome": ("text", 0, "label"),
        "note": ("text", 0, "left out"),
        "ward": ("text", 0, "categorical"),
    }
    assert sum(found.classes.values()) == 200
    assert list(found.classes) == ["well", "ill", "worse"]  # the largest first


def test_the_section_it_suggests_loads_the_file(visits: Path):
    section = tomllib.loads(inspect_file(visits, "outcome").section)["data"]
    assert section["categorical"] == "colour, ward"
    assert section["missing"] == "fill"
    assert section["class_weights"] == "balanced"
    config = DataSection(**section)
    schema = fit_schema(load_examples(config), config)
    assert schema.classes == ("ill", "well", "worse")
    assert schema.columns is not None
    assert [number.name for number in schema.columns.numbers] == [
        "patient",
        "age",
        "pressure",
        "site",
        "trust",
    ]


@pytest.mark.parametrize(
    ("label", "task"), [("age", "regression"), ("patient", "regression"), ("site", None)]
)
def test_the_target_tells_the_task(tmp_path: Path, label: str, task: str | None):
    patients().drop(columns="name").to_csv(tmp_path / "t.csv", index=False)
    assert inspect_file(tmp_path / "t.csv", label).keys.get("task") == task


def test_the_target_is_found_by_its_name_or_is_the_last_column(tmp_path: Path):
    (tmp_path / "a.csv").write_text("x,Target,z\n1,0,2\n2,1,3\n3,0,1\n")
    assert inspect_file(tmp_path / "a.csv").keys["label"] == "Target"
    (tmp_path / "b.csv").write_text("x,w,z\n1,0,2\n2,1,3\n3,0,1\n")
    assert inspect_file(tmp_path / "b.csv").keys["label"] == "z"


@pytest.mark.parametrize(
    ("text", "encoding", "keys"),
    [
        ("x;label\n1,5;0\n2;1\n", "utf-8", {"delimiter": ";"}),
        ("größe\tlabel\n1\t0\n2\t1\n", "latin-1", {"delimiter": "\t", "encoding": "latin-1"}),
        ("größe,label\n1,0\n2,1\n", "utf-16", {"encoding": "utf-16"}),
    ],
)
def test_delimiter_and_encoding_are_found(
    tmp_path: Path, text: str, encoding: str, keys: dict[str, str]
):
    (tmp_path / "t.csv").write_text(text.replace("1,5", "1.5"), encoding=encoding)
    section = inspect_file(tmp_path / "t.csv").keys
    assert {key: section[key] for key in ("delimiter", "encoding") if key in section} == keys
    assert len(load_examples(DataSection(**section))) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["parquet", "tfrecord"])
def test_other_kinds_of_files_are_described_too(tmp_path: Path, kind: str):
    path = tmp_path / f"visits.{kind}"
    patients().to_parquet(path) if kind == "parquet" else write_tfrecord(path, patients())
    found = inspect_file(path, "outcome")
    assert (found.num_examples, found.keys["id"], found.keys["categorical"]) == (
        200,
        "name",
        "colour",
    )


def test_a_column_without_values_is_left_out(tmp_path: Path):
    frame = pd.DataFrame({"x": [1.5, 2.0, 3.0], "nothing": [float("nan")] * 3, "label": [0, 1, 0]})
    frame.to_parquet(tmp_path / "t.parquet")
    inspection = inspect_file(tmp_path / "t.parquet")
    assert inspection.columns[1].role == "left out: empty"
    assert inspection.keys["ignore"] == "nothing"


def test_names_with_quotes_are_read_back():
    names = ["age", "sex, at birth", 'so-called "size"']
    assert parse_names(format_names(names)) == names


def test_names_with_commas_are_quoted(tmp_path: Path):
    (tmp_path / "t.csv").write_text('"sex, at birth",x,label\nf,1,0\nm,2,1\nf,3,0\nm,4,1\n')
    keys = inspect_file(tmp_path / "t.csv").keys
    assert keys["categorical"] == '"sex, at birth"'
    assert len(load_examples(DataSection(**keys))) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x,label\n1,0\n2\n", "line 3 has 1 fields"),
        ("x,x,label\n1,0,1\n", "two columns of the name 'x'"),
        ("name,label\na,0\nb,1\n", "only the label column|no column is left"),
        ("x,label\n1,\n2,0\n", "'label' has no value in line 2"),
        ("", "is empty"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
):
    (tmp_path / "t.csv").write_text(content)
    assert main(["inspect", str(tmp_path / "t.csv")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(words, error)


def test_an_unknown_label_and_an_existing_output_are_told(
    visits: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["inspect", str(visits), "--label", "outcom"]) == 2
    assert "Nearest: outcome." in capsys.readouterr().err
    assert main(["inspect", str(visits), "-o", str(visits)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_readmes_three_commands_train_a_model_on_a_file_of_ones_own(tmp_path: Path):
    """The first, `make setup`, has made the environment that this test runs in."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(
        r"## Your own table in three commands\n.*?\n((?:    [^\n]*\n)+)", readme, re.DOTALL
    )
    assert block is not None
    setup, inspect, train = (shlex.split(line, comments=True) for line in block[1].splitlines())
    assert setup == ["make", "setup"]
    frame = pd.DataFrame({"x": np.arange(120) / 2, "colour": ["red", "blue"] * 60})
    frame["outcome"] = ["late" if x > 30 else "early" for x in frame["x"]]
    frame.to_csv(tmp_path / "mine.csv", index=False)
    for command in (inspect, train):
        assert command[0] == ".venv/bin/archipelago"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command[:1] = [sys.executable, "-m", "archipelago"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert float(re.search(r"test accuracy ([\d.]+)", done.stdout)[1]) > 0.9  # type: ignore[index]
    (run,) = (tmp_path / "runs").iterdir()
    assert {"model.keras", "schema.json", "result.json"} <= {path.name for path in run.iterdir()}
    assert load_experiment(run / "experiment.toml").data.categorical == "colour"
