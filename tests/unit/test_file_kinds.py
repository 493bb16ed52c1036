"""Kinds of files by their endings, gzip, folders as Spark writes them, and Excel's sep= line."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from shared.data import Table, load_examples, streaming
from shared.data.inspection import inspect_file
from shared.data.readers.tfrecord_files import write_tfrecord
from shared.data.streaming import iterate_table
from shared.experiment import DataSection

FRAME = pd.DataFrame({"a": np.arange(40) / 2, "label": ["x", "y"] * 20})


def load(path: Path, **keys: Any) -> Table:
    examples = load_examples(DataSection(name=str(path), **keys))
    assert isinstance(examples, Table)
    return examples


def write(path: Path, frame: pd.DataFrame = FRAME) -> Path:
    """Writes the kind that the name says, in gzip if it ends so."""
    plain = path.with_name("plain")
    if ".csv" in path.name.lower():
        frame.to_csv(plain, index=False)
    elif ".tsv" in path.name:
        frame.to_csv(plain, index=False, sep="\t")
    elif ".tfrecord" in path.name:
        write_tfrecord(plain, frame)
    elif path.suffix in (".arrow", ".feather"):
        frame.to_feather(plain)
    else:
        frame.to_parquet(plain)
    content = plain.read_bytes()
    plain.unlink()
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("t.CSV", "t.csv.gz", "T.CSV.GZ", "t.tsv", "t.tsv.gz", "t.pq", "t.parq", "t.Parquet"),
        *("t.arrow", "t.feather", "t.tfrecords", "t.tfrecord.gz"),
    ],
)
def test_endings_in_capitals_and_gzip(tmp_path: Path, name: str):
    path = write(tmp_path / name)
    examples = load(path)
    assert examples.frame["a"].tolist() == FRAME["a"].tolist()
    assert examples.frame["label"].tolist() == FRAME["label"].tolist()
    inspection = inspect_file(path)
    assert inspection.classes == {"x": 20, "y": 20}
    keys: dict[str, Any] = inspection.keys
    assert len(load_examples(DataSection(**keys))) == 40


def test_gzip_is_told_by_its_content(tmp_path: Path):
    content = b"a,label\n1,x\n2,y\n"
    (tmp_path / "t.csv").write_bytes(gzip.compress(content))
    (tmp_path / "u.csv.gz").write_bytes(content)
    for name in ("t.csv", "u.csv.gz"):
        assert load(tmp_path / name).frame["a"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", ["t.csv.gz", "t.tfrecord.gz"])
@pytest.mark.parametrize("keep", [30, 0.6, 0.99])
def test_gzip_that_is_cut_off_is_refused(tmp_path: Path, name: str, keep: float):
    rng = np.random.default_rng(0)
    path = write(tmp_path / name, FRAME.assign(a=rng.normal(size=40)))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(ValueError, match=rf"{name}.* cannot be read as"):
        load(path)


@pytest.mark.parametrize("name", ["t.xls", "t.gz", "t.parquet.gz", "t"])
def test_other_endings_are_refused_with_the_kinds_that_there_are(tmp_path: Path, name: str):
    (tmp_path / name).write_text("a")
    with pytest.raises(ValueError, match=r"of the kinds \.npz, \.csv, \.tsv, .* received '.*t"):
        load(tmp_path / name)


def test_a_file_that_does_not_exist_has_nearest_names(tmp_path: Path):
    write(tmp_path / "visits.CSV")
    with pytest.raises(ValueError, match=r"Nearest in that folder: visits\.CSV\. Set data\.name"):
        load(tmp_path / "visit.csv")


# --- folders as Spark writes them


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("ending", [".snappy.parquet", ".arrow", ".tfrecord.gz"])
def test_a_folder_of_parts_is_one_table(
    tmp_path: Path, ending: str, is_streamed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streaming, "CHUNK_ROWS", 7)
    folder = tmp_path / "visits"
    folder.mkdir()
    for i in range(4):
        part = FRAME.iloc[10 * i : 10 * (i + 1)].reset_index(drop=True)
        write(folder / f"part-{i:05}{ending}", part)
        (folder / f".part-{i:05}{ending}.crc").write_bytes(b"1")
    (folder / "_SUCCESS").touch()
    examples = load(folder, stream=is_streamed)
    frame = pd.concat([part.frame for part in iterate_table(examples)])
    assert frame["a"].tolist() == FRAME["a"].tolist()
    assert frame.index.tolist() == list(range(1, 41))
    assert inspect_file(folder).num_examples == 40


def test_parts_of_other_columns_subfolders_and_parts_in_csv_are_refused(tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    write(tmp_path / "a" / "part-0.parquet")
    write(tmp_path / "a" / "part-1.parquet", FRAME.rename(columns={"a": "b"}))
    with pytest.raises(ValueError, match=r"part-1\.parquet .* only one of them has the column 'a'"):
        load(tmp_path / "a")
    (tmp_path / "b" / "year=2020").mkdir()
    with pytest.raises(ValueError, match=r"cut into subfolders .* without partitionBy"):
        load(tmp_path / "b")
    write(tmp_path / "c" / "part-0.csv")
    with pytest.raises(ValueError, match=r"a table in 1 parts in CSV; .* coalesce\(1\)"):
        load(tmp_path / "c")


# --- Excel's first line


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_first_line_sep_says_the_delimiter(tmp_path: Path, first: str, encoding: str):
    path = tmp_path / "t.csv"
    content = f"{first}\r\na;label\r\n1;x\r\n2,5;y\r\n"
    path.write_bytes(content.replace("2,5", "2.5").encode(encoding))
    keys = {"encoding": "utf-16"} if encoding == "utf-16" else {}
    assert load(path, **keys).frame["a"].tolist() == [1.0, 2.5]
    assert load(path, **keys).frame.index.tolist() == [3, 4]
    assert inspect_file(path).classes == {"x": 1, "y": 1}
    path.write_bytes(content.replace("2,5", "two").encode(encoding))
    with pytest.raises(ValueError, match="received 'two' in line 4"):
        load(path, **keys)
