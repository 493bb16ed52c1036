"""Every column type of an Arrow table: a number, a category or refused by name, gaps or none, in
memory and streamed; what pandas adds to a file; features of TFRecord files that a record lacks.
"""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from shared.data import Table, fit_schema, load_examples, streaming
from shared.data.inspection import inspect_file
from shared.data.readers.arrow_columns import make_frame
from shared.data.readers.tfrecord_files import write_tfrecord
from shared.data.streaming import iterate_table
from shared.experiment import DataSection

UTC = datetime.UTC
NOON = datetime.datetime(1970, 1, 2, 12, tzinfo=UTC)
NAIVE = NOON.replace(tzinfo=None)
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64()]
INTEGERS += [pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
UNITS = ("s", "ms", "us", "ns")

# (type, values, the numbers that they become)
NUMBERS: list[tuple[pa.DataType, list[Any], list[float]]] = [
    *((kind, [1, 3], [1.0, 3.0]) for kind in INTEGERS),
    *((kind, [1.5, -2.0], [1.5, -2.0]) for kind in FLOATS),
    (pa.decimal128(5, 2), [Decimal("1.50"), Decimal("-2.25")], [1.5, -2.25]),
    (pa.decimal256(50, 2), [Decimal("1.50"), Decimal("-2.25")], [1.5, -2.25]),
    (pa.bool_(), [True, False], [1.0, 0.0]),
    (pa.date32(), [NOON.date(), datetime.date(1969, 12, 31)], [1.0, -1.0]),
    (pa.date64(), [NOON.date(), datetime.date(1969, 12, 31)], [1.0, -1.0]),
    *((pa.timestamp(unit), [NAIVE, datetime.datetime(1970, 1, 1)], [1.5, 0.0]) for unit in UNITS),
    (pa.timestamp("us", "Asia/Tokyo"), [NOON, NOON - datetime.timedelta(1)], [1.5, 0.5]),
    *((pa.time32(unit), [datetime.time(6), datetime.time(12)], [0.25, 0.5]) for unit in UNITS[:2]),
    *((pa.time64(unit), [datetime.time(6), datetime.time(12)], [0.25, 0.5]) for unit in UNITS[2:]),
    *((pa.duration(unit), [datetime.timedelta(2), NAIVE - NAIVE], [2.0, 0.0]) for unit in UNITS),
    (pa.dictionary(pa.int8(), pa.int64()), [7, 9], [7.0, 9.0]),
]
# (type, values, the categories that they become)
CATEGORIES: list[tuple[pa.DataType, list[Any], list[str]]] = [
    (pa.string(), ["a", "b"], ["a", "b"]),
    (pa.large_string(), ["a", "b"], ["a", "b"]),
    (pa.string_view(), ["a", "b"], ["a", "b"]),
    (pa.binary(), [b"a", "ö".encode()], ["a", "ö"]),
    (pa.large_binary(), [b"a", b"b"], ["a", "b"]),
    (pa.binary(2), [b"ab", b"cd"], ["ab", "cd"]),
    (pa.dictionary(pa.int32(), pa.string()), ["a", "b"], ["a", "b"]),
    (pa.dictionary(pa.int8(), pa.binary()), [b"a", b"b"], ["a", "b"]),
    (pa.bool_(), [True, False], ["True", "False"]),
    *((kind, [1, 3], ["1", "3"]) for kind in (*INTEGERS, *FLOATS)),
    (pa.int64(), [2**60 + 1, 2**60 + 2], [str(2**60 + 1), str(2**60 + 2)]),
    (pa.decimal128(5, 2), [Decimal("1.50"), Decimal("2.00")], ["1.5", "2"]),
]
UNUSABLE: list[tuple[pa.DataType, list[Any], str]] = [
    (pa.list_(pa.int64()), [[1], [2, 3]], "lists or records"),
    (pa.large_list(pa.string()), [["a"], []], "lists or records"),
    (pa.list_(pa.float32(), 2), [[1, 2], [3, 4]], "lists or records"),
    (pa.struct([("x", pa.int64())]), [{"x": 1}, {"x": 2}], "lists or records"),
    (pa.map_(pa.string(), pa.int64()), [[("x", 1)], []], "lists or records"),
    (pa.binary(), [b"\xff\xfe", b"a"], "bytes that are no UTF-8 text"),
    (pa.binary(16), [b"\xff" * 16, b"a" * 16], "bytes that are no UTF-8 text"),
]
WAYS = [(ending, is_streamed) for ending in (".parquet", ".arrow") for is_streamed in (False, True)]
NUM_ROWS = 40


def names_of(cases: list[Any]) -> list[str]:
    return [f"{str(kind).replace(' ', '')}-{i}" for i, (kind, *_) in enumerate(cases)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK_ROWS", 7)


def write(path: Path, table: pa.Table) -> Path:
    write_table = parquet.write_table if path.suffix == ".parquet" else feather.write_feather
    try:
        write_table(table, path)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        pytest.skip(f"no such file can be written: {error}")
    return path


def with_column(kind: pa.DataType, values: list[Any], gap: bool) -> pa.Table:
    """Both values in turn, with gaps in the second half; and a label."""
    column = [values[i % 2] for i in range(NUM_ROWS)]
    if gap:
        column[25:30] = [None] * 5
    labels = ["no" if i % 3 else "yes" for i in range(NUM_ROWS)]
    others = np.arange(NUM_ROWS) % 5
    return pa.table({"x": pa.array(column, kind), "other": others, "label": labels})


def load(path: Path, is_streamed: bool, **keys: Any) -> pd.DataFrame:
    """The features as training has them."""
    config = DataSection(name=str(path), stream=is_streamed, missing="fill", **keys)
    examples = load_examples(config)
    assert isinstance(examples, Table)
    fit_schema(examples, config)
    return pd.concat([part.frame for part in iterate_table(examples)])


@pytest.mark.parametrize(("ending", "is_streamed"), WAYS)
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize(("kind", "values", "expected"), NUMBERS, ids=names_of(NUMBERS))
def test_numbers(
    tmp_path: Path,
    kind: pa.DataType,
    values: list[Any],
    expected: list[float],
    gap: bool,
    ending: str,
    is_streamed: bool,
):
    path = write(tmp_path / f"t{ending}", with_column(kind, values, gap))
    numbers = load(path, is_streamed)["x"].to_numpy(np.float64, copy=True)
    assert np.isnan(numbers[25:30]).all() == gap
    numbers[25:30] = np.resize(expected, NUM_ROWS)[25:30]
    np.testing.assert_array_equal(numbers, np.resize(expected, NUM_ROWS))


@pytest.mark.parametrize(("ending", "is_streamed"), WAYS)
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize(("kind", "values", "expected"), CATEGORIES, ids=names_of(CATEGORIES))
def test_categories(
    tmp_path: Path,
    kind: pa.DataType,
    values: list[Any],
    expected: list[str],
    gap: bool,
    ending: str,
    is_streamed: bool,
):
    path = write(tmp_path / f"t{ending}", with_column(kind, values, gap))
    names = load(path, is_streamed, categorical="x")["x"].tolist()
    wanted = list(np.resize(expected, NUM_ROWS))
    assert [pd.isna(name) for name in names[25:30]] == [gap] * 5
    assert names[:25] + names[30:] == wanted[:25] + wanted[30:]


@pytest.mark.parametrize(("ending", "is_streamed"), WAYS)
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize(("kind", "values", "reason"), UNUSABLE, ids=names_of(UNUSABLE))
def test_what_is_no_value_is_refused_by_name_or_left_out(
    tmp_path: Path,
    kind: pa.DataType,
    values: list[Any],
    reason: str,
    gap: bool,
    ending: str,
    is_streamed: bool,
):
    path = write(tmp_path / f"t{ending}", with_column(kind, values, gap))
    with pytest.raises(ValueError, match=f"column 'x' holds {reason}; .* in data.features"):
        load(path, is_streamed)
    assert list(load(path, is_streamed, features="other").columns) == ["other", "label"]
    inspection = inspect_file(path)
    assert {c.name: c.role for c in inspection.columns}["x"] == f"left out: {reason}"
    assert inspection.keys["ignore"] == "x"


@pytest.mark.parametrize(("ending", "is_streamed"), WAYS)
def test_a_column_of_the_type_null_is_all_gaps(tmp_path: Path, ending: str, is_streamed: bool):
    path = write(tmp_path / f"t{ending}", with_column(pa.null(), [None, None], True))
    assert load(path, is_streamed)["x"].isna().all()
    assert load(path, is_streamed, categorical="x")["x"].isna().all()
    with pytest.raises(ValueError, match="'x' has no value in row 1"):
        load_examples(DataSection(name=str(path), stream=is_streamed))


def test_types_that_no_file_holds_are_refused_or_read_as_their_storage():
    month = pa.array([(1, 2, 3)], pa.month_day_nano_interval())
    union = pa.UnionArray.from_dense(
        pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]
    )
    for array in (month, union):
        with pytest.raises(ValueError, match=r"t: column 'x' holds (values of the type|lists)"):
            make_frame(pa.table({"x": array}), ["x"], "t")
    encoded = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array([5, 6]))
    assert make_frame(pa.table({"x": encoded}), ["x"], "t")["x"].tolist() == [5, 5, 6]
    extension = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"]))
    assert make_frame(pa.table({"x": extension}), ["x"], "t")["x"].tolist() == ["{}"]


# --- files as pandas writes them

FRAMES: dict[str, pd.DataFrame] = {
    "a named index": pd.DataFrame(
        {"a": range(0, 80, 2)}, pd.RangeIndex(0, 80, 2).astype(float).rename("b")
    ),
    "an index without a name": pd.DataFrame(
        {"a": range(0, 80, 2), "b": range(0, 80, 2)}, range(5, 45)[::-1]
    ),
    "two indices": pd.DataFrame(
        {"a": range(0, 80, 2)},
        pd.MultiIndex.from_arrays([np.arange(0, 80.0, 2)] * 2, names=["b", None]),
    ),
    "dates": pd.DataFrame(
        {"a": range(0, 80, 2)}, pd.date_range("1970", periods=40, freq="2D", name="b")
    ),
    "nullable": pd.DataFrame({"a": range(0, 80, 2), "b": pd.array(range(0, 80, 2), "Int64")}),
}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("name", FRAMES)
def test_an_index_with_a_name_is_a_column(tmp_path: Path, name: str, is_streamed: bool):
    frame = FRAMES[name].assign(label=["x", "y"] * 20)
    frame.to_parquet(tmp_path / "t.parquet")
    features = load(tmp_path / "t.parquet", is_streamed)
    assert set(features.columns) == {"a", "b", "label"}
    assert features["b"].tolist() == features["a"].tolist() == list(range(0, 80, 2))
    assert features.index.tolist() == list(range(1, 41))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_names_that_are_numbers_and_names_with_dots(tmp_path: Path, is_streamed: bool):
    frame = pd.DataFrame({0: range(0, 80, 2), 1: range(0, 80, 2), 2: ["x", "y"] * 20})
    frame.to_parquet(tmp_path / "t.parquet")
    assert set(load(tmp_path / "t.parquet", is_streamed, label="2").columns) == {"0", "1", "2"}
    frame.columns = ["a", "a.b", "label"]
    frame.to_parquet(tmp_path / "t.parquet")
    assert set(load(tmp_path / "t.parquet", is_streamed, features="a.b")) == {"a.b", "label"}
    assert set(load(tmp_path / "t.parquet", is_streamed, features="a")) == {"a", "label"}


# --- TFRecord


@pytest.mark.parametrize("is_streamed", [False, True])
def test_features_that_a_record_lacks_are_gaps(tmp_path: Path, is_streamed: bool):
    import tensorflow as tf

    path = tmp_path / "t.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for i in range(40):
            row: dict[str, Any] = {"label": tf.train.Int64List(value=[i % 2])}
            if i >= 20:
                row["late"] = tf.train.Int64List(value=[2**60 + i % 2])
            if i < 20:
                row["early"] = tf.train.FloatList(value=[i])
            row["several"] = tf.train.FloatList(value=[1.0] * (1 + i % 2))
            features = {
                name: tf.train.Feature(**{kind_name(value): value}) for name, value in row.items()
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())

    frame = load(path, is_streamed, features="late, early", categorical="late")
    assert frame["late"].isna().tolist() == [True] * 20 + [False] * 20
    assert set(frame["late"].dropna()) == {str(2**60), str(2**60 + 1)}
    assert frame["early"].isna().tolist() == [False] * 20 + [True] * 20
    with pytest.raises(ValueError, match="column 'several' holds lists or records"):
        load(path, is_streamed)


def kind_name(value: Any) -> str:
    return "int64_list" if "Int64" in type(value).__name__ else "float_list"


def test_gaps_of_numbers_and_text_are_written_and_read_back(tmp_path: Path):
    frame = pd.DataFrame({"a": [1.5, np.nan], "s": ["x", None], "label": [0, 1]})
    write_tfrecord(tmp_path / "t.tfrecord", frame)
    again = load(tmp_path / "t.tfrecord", False, categorical="s")
    assert again["a"].isna().tolist() == again["s"].isna().tolist() == [False, True]
