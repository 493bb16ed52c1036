"""Text as values: notations of numbers, codes of gaps, forms of names; what they break on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from shared.data import fit_schema, load_examples
from shared.data.preparation import encode, split
from shared.data.schema import merge_schemas
from shared.data.tables import Table
from shared.data.values import GAPS, NUMBER_GAPS, Notation, as_names, parse_numbers, text_of
from shared.experiment import DataSection, load_experiment

NFC, NFD = "gr\u00f6\u00dfe", "gro\u0308\u00dfe"
DEFAULTS = {"test_fraction": 0.0, "validation_fraction": 0.0}


def numbers(texts: list[str | None], **signs: Any) -> tuple[list[float], list[bool]]:
    text = text_of(pd.Series(texts, dtype="str"))
    assert text is not None
    values, is_text = parse_numbers(text, Notation(**signs))
    return values.tolist(), is_text.tolist()


def load(path: Path, content: str | bytes, **keys: Any) -> Table:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    table = load_examples(DataSection(name=str(path), **keys))
    assert isinstance(table, Table)
    return table


# --- numbers


@pytest.mark.parametrize(
    ("text", "signs", "expected"),
    [
        ("1.5", {}, 1.5),
        (" 1.5 ", {}, 1.5),
        ("+1.5", {}, 1.5),
        ("\u22121.5", {}, -1.5),
        (".5", {}, 0.5),
        ("5.", {}, 5.0),
        ("1e-3", {}, 0.001),
        ("1,5", {"decimal": ","}, 1.5),
        ("-1.234,5", {"decimal": ",", "thousands": "."}, -1234.5),
        ("1234,5", {"decimal": ",", "thousands": "."}, 1234.5),
        ("1.234.567", {"decimal": ",", "thousands": "."}, 1234567.0),
        ("1,234.5", {"thousands": ","}, 1234.5),
        ("1 234,5", {"decimal": ",", "thousands": " "}, 1234.5),
        ("1\u00a0234\u202f567", {"thousands": " "}, 1234567.0),
        ("1'234.5", {"thousands": "'"}, 1234.5),
        ("1\u2019234", {"thousands": "'"}, 1234.0),
    ],
)
def test_numbers_are_read_in_the_notation_that_is_declared(
    text: str, signs: dict[str, str], expected: float
):
    assert numbers([text, "x"], **signs)[0][0] == expected
    assert numbers([text], **signs) == ([expected], [False])


@pytest.mark.parametrize(
    ("text", "signs"),
    [
        ("1,5", {}),
        ("1.5", {"decimal": ","}),
        ("1.5", {"decimal": ",", "thousands": "."}),
        ("12.34,5", {"decimal": ",", "thousands": "."}),
        ("1,234,5", {"thousands": ","}),
        ("1.2.3", {}),
        ("5 mg", {}),
        ("e5", {}),
        (".", {"decimal": ",", "missing_codes": ()}),
        ("0x10", {}),
        ("1_000", {}),
    ],
)
def test_what_is_written_otherwise_is_never_read_as_another_number(
    text: str, signs: dict[str, Any]
):
    (value, _), (is_text, _) = numbers([text, "2"], **signs)
    assert np.isnan(value)
    assert is_text is (text not in NUMBER_GAPS)


@pytest.mark.parametrize("code", [*GAPS, *NUMBER_GAPS])
def test_the_usual_codes_are_gaps_among_numbers(code: str):
    values, is_text = numbers([code, f" {code} ", "1"])
    assert (np.isnan(values).tolist(), any(is_text)) == ([True, True, False], False)


@pytest.mark.parametrize("code", ["None", "none", "-", "--", "."])
def test_some_codes_are_categories_where_no_numbers_are(code: str):
    names = as_names(pd.Series(["+", code, "?", "NA"]), Notation())
    assert names.isna().tolist() == [False, False, True, True]
    assert names[1] == code


def test_codes_of_ones_own_are_gaps_in_text_and_in_numbers_of_any_type():
    notation = Notation(missing_codes=("999", "unknown"))
    assert as_names(pd.Series(["a", "unknown", "999"]), notation).isna().tolist() == [0, 1, 1]
    assert as_names(pd.Series([1.0, 999.0]), notation).isna().tolist() == [False, True]
    text = text_of(pd.Series(["1", "999", "999.0", " 999"]))
    assert text is not None
    assert np.isnan(parse_numbers(text, notation)[0]).tolist() == [False, True, True, True]


def test_codes_are_gaps_in_typed_columns_too(tmp_path: Path):
    frame = pd.DataFrame({"a": [1, 999, 3, 4], "b": [0.5, 1.5, 999.0, 2.0], "label": list("xyxy")})
    frame.to_parquet(tmp_path / "t.parquet")
    config = DataSection(name=str(tmp_path / "t.parquet"), missing="fill", missing_codes="999")
    table = load_examples(config)
    assert isinstance(table, Table)
    assert table.frame[["a", "b"]].isna().to_numpy().sum(axis=0).tolist() == [1, 1]
    with pytest.raises(ValueError, match="no value in row 2"):
        load_examples(config.model_copy(update={"missing": "refuse"}))


# --- whole files


@pytest.mark.parametrize(
    ("received", "remedy"),
    [
        ("21,5", r"decimal comma: set data.decimal = ','"),
        ("1.234.567", r"set data.thousands = '.' and data.decimal = ','"),
        ("1,234,567", r"set data.thousands = ','"),
        ("1,234", r"a decimal sign or one of thousands"),
        ("5 %", "has a unit"),
        ("12 EUR", "has a unit"),
        ("31.12.2024", "a date"),
        ("2024-12-31", "a date"),
        ("unknown", "data.missing_codes"),
    ],
)
def test_text_among_numbers_is_refused_with_the_remedy_that_fits(
    tmp_path: Path, received: str, remedy: str
):
    with pytest.raises(
        ValueError, match=rf"must be numeric; received '{received}' in line 3 .*{remedy}"
    ):
        load(tmp_path / "t.csv", f'x,label\n1,a\n"{received}",b\n2,a\n')


def test_a_german_export_is_read(tmp_path: Path):
    content = "temperatur;druck;label\n21,5;1.013,25;gut\n-3,0;998,5;schlecht\n"
    keys = {"delimiter": ";", "decimal": ",", "thousands": "."}
    table = load(tmp_path / "t.csv", content, **keys)
    assert table.frame["temperatur"].tolist() == [21.5, -3.0]
    assert table.frame["druck"].tolist() == [1013.25, 998.5]


def test_everything_quoted_with_empty_gaps_is_read(tmp_path: Path):
    content = '"a","colour","label"\n"1.5","red","x"\n"","","y"\n"2.5","blue","x"\n'
    keys = {"categorical": "colour", "missing": "fill"}
    table = load(tmp_path / "t.csv", content, **keys)
    assert np.isnan(table.frame["a"]).tolist() == [False, True, False]
    schema = fit_schema(table, table.config)
    assert schema.columns is not None
    assert schema.columns.inputs == ["a", "colour=blue", "colour=red"]


def test_blanks_around_names_and_texts_are_no_part_of_them(tmp_path: Path):
    content = "age, colour , label\n39, red, yes \n50,blue , no\n"
    table = load(tmp_path / "t.csv", content, categorical="colour")
    assert table.frame["colour"].tolist() == ["red", "blue"]
    assert table.frame["label"].tolist() == ["yes", "no"]


def test_utf_16_is_told_by_its_mark(tmp_path: Path):
    table = load(tmp_path / "t.csv", "größe,label\n1,ä\n2,b\n".encode("utf-16"))
    assert table.frame["größe"].tolist() == [1.0, 2.0]


def test_a_gap_is_refused_with_the_code_that_stands_for_it(tmp_path: Path):
    with pytest.raises(ValueError, match=r"line 3 \('\?' stands for none; 1 such\)"):
        load(tmp_path / "t.csv", "x,label\n1,a\n?,b\n")
    with pytest.raises(ValueError, match=r"'label' has no value in line 2 \('-' stands for none"):
        load(tmp_path / "u.csv", "x,label\n1,-\n2,1.5\n")


# --- forms of Unicode, and the order of columns


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".arrow"])
@pytest.mark.parametrize(("in_file", "in_key"), [(NFC, NFD), (NFD, NFC), (f" {NFD} ", NFC)])
def test_a_name_is_found_in_either_form(tmp_path: Path, ending: str, in_file: str, in_key: str):
    path = tmp_path / f"t{ending}"
    frame = pd.DataFrame({in_file: [1.5, 2.5, 4.0, 7.0], "label": ["a", "b", "a", "b"]})
    if ending == ".csv":
        frame.to_csv(path, index=False)
    elif ending == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_feather(path)
    for stream in (False, True) if ending != ".csv" else (False,):
        config = DataSection(name=str(path), features=in_key, stream=stream, cache=str(tmp_path))
        table = load_examples(config)
        assert isinstance(table, Table)
        assert table.roles.numbers == (NFC,)
        x = encode(table, fit_schema(table, config)).x
        assert x[:4].shape == (4, 1)


def test_classes_that_differ_in_form_only_are_one(tmp_path: Path):
    content = f"x,label\n1,{NFC}\n2.5,{NFD}\n3,klein\n"
    table = load(tmp_path / "t.csv", content)
    assert fit_schema(table, table.config).classes == (NFC, "klein")


def test_silos_may_have_their_columns_in_another_order(tmp_path: Path):
    a = load(tmp_path / "a.csv", "x,y,c,d,label\n1,5,u,k,no\n2,7,v,k,yes\n", categorical="c,d")
    b = load(tmp_path / "b.csv", "d,c,y,x,label\nk,u,9,3,no\nm,w,5,4,yes\n", categorical="d,c")
    schemas = {"a": fit_schema(a, a.config), "b": fit_schema(b, b.config)}
    merged = merge_schemas(schemas)
    assert merged == merge_schemas(dict(reversed(schemas.items())))
    assert merged.columns is not None
    assert merged.columns.inputs == ["x", "y", "c=u", "c=v", "c=w", "d=k", "d=m"]
    together = np.concatenate([encode(silo, merged).x for silo in (a, b)])
    assert together[:, 2:].tolist() == [
        [1, 0, 0, 1, 0],
        [0, 1, 0, 1, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 1, 0, 1],
    ]
    np.testing.assert_allclose(together[:, :2].mean(axis=0), 0, atol=1e-6)
    # Where all have one order it stays.
    twice = merge_schemas({"b": schemas["b"], "b too": schemas["b"]})
    assert twice.columns is not None
    assert twice.columns.names == ["y", "x", "d", "c"]


# --- classes


@pytest.mark.parametrize(
    ("labels", "received"),
    [("1 2 1 2 1 2", "1, 2"), ("1990 2005 2020 1990 2005 2020", "1990, 2005, 2020")],
)
def test_classes_by_number_that_would_make_useless_outputs_are_told(
    tmp_path: Path, labels: str, received: str
):
    rows = [f"{i * 0.5},{label}" for i, label in enumerate(labels.split())]
    content = "\n".join(["x,label", *rows])
    table = load(tmp_path / "t.csv", content, **DEFAULTS)
    with pytest.raises(ValueError, match=f"received {received} .*data.classes = '{received}'"):
        split(table, table.config, seed=0)

    declared = load(tmp_path / "t.csv", content, classes=received, **DEFAULTS)
    splits = split(declared, declared.config, seed=0)
    names = received.split(", ")
    assert splits.schema.classes == tuple(names)
    assert sorted(splits.train.y) == sorted(names.index(label) for label in labels.split())


def test_declared_classes_keep_their_order_and_need_not_occur(tmp_path: Path):
    content = "x,label\n1,high\n2.5,low\n3,high\n"
    table = load(tmp_path / "t.csv", content, classes="low, medium, high", class_weights="balanced")
    schema = fit_schema(table, table.config)
    assert (schema.classes, schema.class_counts) == (("low", "medium", "high"), (1, 0, 2))
    assert merge_schemas({"a": schema, "b": schema}).class_counts == (2, 0, 4)
    assert encode(table, schema).y.tolist() == [2, 0, 2]
    with pytest.raises(ValueError, match=r"received 'low' in line 3 .*Add it to data.classes"):
        load(tmp_path / "t.csv", content, classes="high, medium")


def test_minus_one_and_one_may_be_classes(tmp_path: Path):
    for label in ("-1", "-1.0"):
        content = f"x,label\n1,{label}\n2.5,1\n3,{label}\n"
        table = load(tmp_path / "t.csv", content, classes="-1, 1")
        assert encode(table, fit_schema(table, table.config)).y.tolist() == [0, 1, 0]


def test_a_single_class_is_refused(tmp_path: Path):
    content = "x,label\n" + "".join(f"{i / 2},only\n" for i in range(12))
    table = load(tmp_path / "t.csv", content, **DEFAULTS)
    with pytest.raises(ValueError, match=r"All 12 training examples .* are of one class"):
        split(table, table.config, seed=0)


# --- roles and scaling


def test_a_feature_that_is_named_twice_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.features names the column 'a' twice"):
        load(tmp_path / "t.csv", "a,label\n1,x\n2,y\n", features="a, a")


def test_timestamps_of_one_hour_are_scaled_as_what_they_are(tmp_path: Path):
    start = 1_700_000_000_000_000_000  # nanoseconds since 1970
    times = [start + i**2 * 1_000_000_000 for i in range(40)]
    content = "time,label\n" + "".join(f"{time},{i % 2}\n" for i, time in enumerate(times))
    table = load(tmp_path / "t.csv", content)
    x = encode(table, fit_schema(table, table.config)).x[:, 0]
    expected = np.arange(40) ** 2.0
    np.testing.assert_allclose(x, (expected - expected.mean()) / expected.std(), atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e300, 1.7e18, -7e-30])
@pytest.mark.parametrize("num_rows", [10, 9999])
def test_a_constant_stays_one_whatever_its_size(tmp_path: Path, value: float, num_rows: int):
    frame = pd.DataFrame({"x": np.full(num_rows, min(value, 1e38))})
    frame["label"] = ["a", "b"] * (num_rows // 2) + ["a"] * (num_rows % 2)
    parts = [frame, frame.head(7)]
    tables = []
    for i, part in enumerate(parts):
        part.to_parquet(tmp_path / f"{i}.parquet")
        tables.append(load_examples(DataSection(name=str(tmp_path / f"{i}.parquet"))))
    schemas = {str(i): fit_schema(table, DataSection()) for i, table in enumerate(tables)}
    merged = merge_schemas(schemas)
    assert merged.columns is not None
    assert merged.columns.numbers[0].std == 1.0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('decimal = ","\nthousands = ","', "data.decimal and data.thousands must be different"),
        ('classes = "a, b"\ntask = "regression"', "data.classes is for a classification"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(tmp_path: Path, line: str, told: str):
    path = tmp_path / "e.toml"
    path.write_text(f'[data]\nname = "t.csv"\n{line}\n')
    with pytest.raises(ValueError, match=told):
        load_experiment(path)
