"""Tables: roles, what is fitted to training examples, what becomes of columns, and files of other
kinds than CSV.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.class_weight import compute_class_weight

from dist_train.collectives import LocalCommunicator
from dist_train.trainer import train
from shared.data import (
    Schema,
    Table,
    encode,
    fit_schema,
    load_examples,
    split,
    split_pool,
    weigh_classes,
)
from shared.data.partition import partition
from shared.data.readers.tfrecord_files import write_tfrecord
from shared.data.roles import parse_names
from shared.data.schema import Category, Columns, Number, merge_schemas, schema_from_json
from shared.data.sources import save_examples
from shared.data.tables import make_table
from shared.experiment import DataSection, PartitionSection, experiment_from_flat

ROLES = {
    "label": "outcome",
    "categorical": "colour, site",
    "id": "name",
    "group": "patient",
    "weight": "trust",
}


def patients(num_examples: int = 200, seed: int = 0) -> pd.DataFrame:
    """Columns of every role; rows of one patient follow each other."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "name": [f"visit {i}" for i in range(num_examples)],
            "patient": np.arange(num_examples) // 7,
            "age": rng.normal(50.0, 12.0, num_examples),
            "colour": rng.choice(["red", "green", "blue"], num_examples),
            "pressure": 1e6 + rng.exponential(3.0, num_examples),
            "site": rng.integers(1, 4, num_examples),
            "trust": rng.uniform(0.5, 2.0, num_examples),
            "outcome": rng.choice(["well", "ill", "worse"], num_examples, p=[0.6, 0.3, 0.1]),
        }
    )
    frame.index.name = "row"
    return frame


def table(frame: pd.DataFrame | None = None, **keys: Any) -> Table:
    return make_table(patients() if frame is None else frame, config(**keys), "visits")


def config(**keys: Any) -> DataSection:
    return DataSection(**{**ROLES, **keys})


# --- what becomes of columns


def test_inputs_are_what_scikit_learn_makes_of_them():
    frame, examples = patients(), table()
    x = encode(examples, fit_schema(examples, examples.config)).x
    numbers = StandardScaler().fit_transform(frame[["age", "pressure"]])
    ones = OneHotEncoder(sparse_output=False).fit_transform(frame[["colour", "site"]].astype(str))
    assert x.shape == (200, 2 + 3 + 3)
    np.testing.assert_allclose(x, np.concatenate([numbers, ones], axis=1), atol=1e-6)


def test_the_inputs_have_names():
    schema = fit_schema(table(), config())
    assert schema.columns is not None
    names = [
        "age",
        "pressure",
        "colour=blue",
        "colour=green",
        "colour=red",
        "site=1",
        "site=2",
        "site=3",
    ]
    assert schema.columns.inputs == names
    assert (schema.classes, schema.num_classes) == (("ill", "well", "worse"), 3)


def test_names_of_classes_become_their_place_in_the_sorted_list():
    examples = table()
    y = encode(examples, fit_schema(examples, examples.config)).y
    assert [("ill", "well", "worse")[i] for i in y] == patients()["outcome"].tolist()


@pytest.mark.parametrize(
    ("features", "expected"), [("age", ["age"]), ("site, age", ["age", "site=1"])]
)
def test_only_the_features_that_are_named_are_learnt_from(features: str, expected: list[str]):
    categorical = "site" if "site" in features else ""
    columns = fit_schema(table(features=features, categorical=categorical), config()).columns
    assert columns is not None
    assert columns.inputs[:2] == expected


def test_numbers_stay_as_they_are_without_scaling():
    examples = table(scaling="none")
    x = encode(examples, fit_schema(examples, examples.config)).x
    np.testing.assert_array_equal(x[:, 0], patients()["age"].to_numpy(np.float32))


def test_a_regressions_targets_are_scaled_as_its_inputs_are():
    frame = patients()
    examples = table(label="pressure", categorical="colour, site, outcome")
    y = encode(examples, fit_schema(examples, examples.config)).y
    np.testing.assert_allclose(
        y, StandardScaler().fit_transform(frame[["pressure"]])[:, 0], atol=1e-5
    )


def test_a_constant_column_becomes_zeros():
    examples = table(patients().assign(age=3.0))
    assert (encode(examples, fit_schema(examples, examples.config)).x[:, 0] == 0.0).all()


def test_a_missing_value_becomes_the_mean_and_a_missing_category_none():
    frame = patients()
    frame["colour"] = frame["colour"].astype(object)
    frame.loc[3, "age"], frame.loc[4, "colour"] = np.nan, None
    with pytest.raises(
        ValueError, match=r"column '(age|colour)' has no value in row [34] .*data\.missing = 'fill'"
    ):
        table(frame)
    examples = table(frame, missing="fill")
    schema = fit_schema(examples, examples.config)
    x = encode(examples, schema).x
    assert x[3, 0] == 0.0
    assert x[4, 2:5].tolist() == [0.0, 0.0, 0.0]
    assert schema.columns is not None
    assert schema.columns.numbers[0].mean == pytest.approx(frame["age"].mean(), rel=1e-12)
    unscaled = table(frame, missing="fill", scaling="none")
    assert encode(unscaled, fit_schema(unscaled, unscaled.config)).x[3, 0] == pytest.approx(
        frame["age"].mean()
    )


def test_a_category_that_training_does_not_know_becomes_zeros_and_a_class_is_refused():
    known, frame = table(), patients()
    schema = fit_schema(known, known.config)
    frame["colour"] = "violet"
    assert (encode(table(frame), schema).x[:, 2:5] == 0.0).all()
    frame.loc[5, "outcome"] = "cured"
    with pytest.raises(
        ValueError, match=r"visits: the class 'cured' \(in row 5\) has no training example"
    ):
        encode(table(frame), schema)


def test_names_may_hold_commas():
    assert parse_names('age, "sex, at birth" ,  site') == ["age", "sex, at birth", "site"]
    assert parse_names("") == []


# --- fitted to training examples alone


def test_what_is_held_out_changes_nothing_of_the_schema():
    frame, settings = patients(), config(group="")
    examples = make_table(frame, settings, "visits")
    parts = split(examples, settings, seed=0)
    held_out = np.setdiff1d(np.arange(200), train_rows(examples, settings))
    assert len(held_out) == 40 + 16
    frame.loc[held_out, "age"] += 1000.0
    again = split(make_table(frame, settings, "visits"), settings, seed=0)
    assert again.schema == parts.schema
    np.testing.assert_array_equal(again.train.x, parts.train.x)
    assert again.test.x[:, 1].min() > 50.0  # the patient comes first
    frame.loc[train_rows(examples, settings), "age"] += 1.0
    assert split(make_table(frame, settings, "visits"), settings, seed=0).schema != parts.schema


def train_rows(examples: Table, settings: DataSection) -> np.ndarray:
    """Found by the examples' weights, which are all different."""
    train = split(examples, settings, seed=0).train.sample_weight
    assert train is not None
    return np.flatnonzero(np.isin(examples.frame["trust"].to_numpy(np.float32), train))


@pytest.mark.parametrize("num_silos", [1, 2, 5])
def test_the_schemas_of_all_silos_together_are_that_of_the_union(num_silos: int):
    whole = table(class_weights="balanced")
    parts = partition(PartitionSection(kind="dirichlet"), whole, num_silos, seed=3)
    merged = merge_schemas({str(i): fit_schema(part, whole.config) for i, part in enumerate(parts)})
    central = fit_schema(whole, whole.config)
    assert merged.columns is not None
    assert central.columns is not None
    for mine, theirs in zip(merged.columns.numbers, central.columns.numbers, strict=True):
        assert (mine.name, mine.count) == (theirs.name, theirs.count)
        assert mine.mean == pytest.approx(theirs.mean, rel=1e-12)
        assert mine.variance == pytest.approx(
            theirs.variance, rel=1e-9
        )  # of 3e6 + [0, 9]: the hard case
    assert merged.columns.categories == central.columns.categories
    assert (merged.classes, merged.class_counts) == (central.classes, central.class_counts)
    assert merged.input_shape == central.input_shape


@pytest.mark.parametrize("label", ["outcome", "pressure"])
def test_neither_the_order_nor_the_grouping_of_the_silos_matters(label: str):
    categorical = "colour, site" if label == "outcome" else "colour, site, outcome"
    whole = table(label=label, categorical=categorical)
    parts = partition(PartitionSection(), whole, 4, seed=1)
    a, b, c, d = (fit_schema(part, whole.config) for part in parts)
    ab, cd = merge_schemas({"a": a, "b": b}), merge_schemas({"c": c, "d": d})
    one, other = (
        merge_schemas({"ab": ab, "cd": cd}),
        merge_schemas({"d": d, "b": b, "c": c, "a": a}),
    )
    assert one.columns is not None
    assert other.columns is not None
    assert (one.classes, one.input_shape) == (other.classes, other.input_shape)
    assert one.columns.categories == other.columns.categories
    targets = [(one.target_scale, other.target_scale)] if label == "pressure" else []
    for mine, theirs in [*zip(one.columns.numbers, other.columns.numbers, strict=True), *targets]:
        assert mine is not None
        assert theirs is not None
        assert mine.count == theirs.count == 200
        assert mine.mean == pytest.approx(theirs.mean, rel=1e-12)
        assert mine.variance == pytest.approx(theirs.variance, rel=1e-9)


def test_a_column_without_values_changes_nothing():
    number, empty = Number("x", 3, 2.0, 5.0), Number("x", 0, 0.0, 0.0)
    assert number + empty == empty + number == number


def test_silos_that_know_other_classes_and_categories_learn_from_each_other():
    frame = patients()
    a = table(frame[(frame["outcome"] != "worse") & (frame["colour"] != "red")])
    b = table(frame[frame["outcome"] == "worse"])
    schema = merge_schemas({"a": fit_schema(a, a.config), "b": fit_schema(b, b.config)})
    assert schema.classes == ("ill", "well", "worse")
    assert set(encode(b, schema).y) == {2}
    assert encode(a, schema).x.shape[1] == encode(b, schema).x.shape[1] == 8


def test_silos_with_other_columns_are_named():
    a, b = table(), table(patients().rename(columns={"age": "Age"}))
    with pytest.raises(
        ValueError, match=r"silo 'a': .*columns age, pressure.*; silo 'b': .*columns Age, pressure"
    ):
        merge_schemas({"silo 'a'": fit_schema(a, a.config), "silo 'b'": fit_schema(b, b.config)})


def test_a_schema_comes_back_from_json():
    schema = fit_schema(table(class_weights="balanced"), config(class_weights="balanced"))
    assert schema_from_json(schema.to_json()) == schema
    assert hash(schema_from_json(schema.to_json())) == hash(schema)


@pytest.mark.parametrize(
    "broken", [None, [], {}, {"input_shape": ["x"], "num_classes": 1}, {"colour": 1}]
)
def test_what_is_no_schema_is_refused(broken: Any):
    with pytest.raises(ValueError, match="schema"):
        schema_from_json(broken)


def test_numbers_that_are_not_finite_do_not_get_into_a_schema():
    json = fit_schema(table(), config()).to_json()
    json["columns"]["numbers"][0]["mean"] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        schema_from_json(json)


def test_adding_columns_adds_their_statistics():
    a = Columns((Number("x", 2, 1.0, 1.0),), (Category("s", ("a", "b")),), None, True)
    b = Columns((Number("x", 2, 5.0, 1.0),), (Category("s", ("c",)),), None, True)
    assert a + b == Columns(
        (Number("x", 4, 3.0, 5.0),), (Category("s", ("a", "b", "c")),), None, True
    )
    assert Number("x", 0, 0.0, 0.0) + Number("x", 0, 0.0, 0.0) == Number("x", 0, 0.0, 0.0)


# --- weights and groups


def test_balanced_classes_weigh_what_scikit_learn_gives_them():
    examples = table(class_weights="balanced", weight="")
    schema = fit_schema(examples, examples.config)
    data = encode(examples, schema)
    weighed = weigh_classes(data, schema).sample_weight
    of_class = compute_class_weight("balanced", classes=np.arange(3), y=data.y)
    np.testing.assert_allclose(weighed, of_class[data.y], rtol=1e-6)
    own = encode(table(), fit_schema(table(), config()))
    weighed_twice = weigh_classes(own, schema).sample_weight
    np.testing.assert_allclose(weighed_twice, patients()["trust"] * of_class[own.y], rtol=1e-6)


def test_only_training_examples_are_weighed_by_class():
    settings = config(class_weights="balanced", weight="", group="")
    parts = split(table(class_weights="balanced", weight="", group=""), settings, seed=0)
    assert parts.train.sample_weight is not None
    assert parts.test.sample_weight is None


def test_a_regression_has_no_classes_to_balance():
    examples = table(label="age", categorical="colour, site, outcome", class_weights="balanced")
    with pytest.raises(
        ValueError, match=r"data\.class_weights = 'balanced' needs one class per example"
    ):
        fit_schema(examples, examples.config)


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_never_in_two_splits(seed: int):
    examples = table()
    pool, test = split_pool(examples, seed, 0.2)
    assert pool.groups is not None
    assert test.groups is not None
    assert set(pool.frame["patient"]).isdisjoint(test.frame["patient"])
    assert len(pool) + len(test) == 200
    assert abs(len(test) - 40) <= 4  # half a group


def test_one_group_cannot_be_held_out():
    examples = table(patients().assign(patient=1))
    with pytest.raises(
        ValueError, match=r"Groups stay whole .* hold out 0\.2 of 200 examples in 1 groups"
    ):
        split_pool(examples, 0, 0.2)


def test_a_class_without_training_examples_is_told(numbered: Callable[..., Any]):
    frame = patients(30).assign(outcome=["rare"] + 29 * ["common"])
    seeds = [
        seed
        for seed in range(50)
        if 0 in split_pool(table(frame, group=""), seed, 0.5)[1].frame.index
    ]
    with pytest.raises(ValueError, match=r"the class 'rare' .* has no training example"):
        split(table(frame, group=""), config(test_fraction=0.5, group=""), seeds[0])


# --- files


@pytest.mark.parametrize("kind", ["csv", "parquet", "tfrecord"])
def test_the_same_table_is_read_from_every_kind_of_file(tmp_path: Path, kind: str):
    path, frame = tmp_path / f"visits.{kind}", patients()
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        write_tfrecord(path, frame)
    examples = load_examples(config(name=str(path)))
    data, expected = (
        encode(examples, fit_schema(examples, config())),
        encode(table(), fit_schema(table(), config())),
    )
    np.testing.assert_allclose(
        data.x, expected.x, atol=1e-6 if kind != "tfrecord" else 5e-2
    )  # float32 near 1e6
    np.testing.assert_array_equal(data.y, expected.y)
    np.testing.assert_allclose(data.sample_weight, expected.sample_weight, rtol=1e-6)


def test_what_is_saved_comes_back_as_the_same_examples(tmp_path: Path):
    whole = table()
    again = load_examples(config(name=str(save_examples(tmp_path / "part", whole))))
    assert isinstance(again, Table)
    assert again.sha256() == whole.sha256()
    assert fit_schema(again, config()) == fit_schema(whole, config())


def test_a_part_of_a_regression_comes_back_as_one(tmp_path: Path):
    diabetes = load_examples(DataSection(name="diabetes"))
    again = load_examples(DataSection(name=str(save_examples(tmp_path / "part", diabetes))))
    assert isinstance(again, Table)
    assert again.is_regression


@pytest.mark.parametrize("kind", ["parquet", "tfrecord"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_told(tmp_path: Path, kind: str, keep: float):
    path = tmp_path / f"visits.{kind}"
    patients().to_parquet(path) if kind == "parquet" else write_tfrecord(path, patients())
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(
        ValueError, match=rf"visits\.{kind}.*(cannot be read as a (Parquet|TFRecord) file|holds no)"
    ):
        load_examples(config(name=str(path)))


def test_a_parquet_file_with_lists_is_told(tmp_path: Path):
    path = tmp_path / "lists.parquet"
    pd.DataFrame({"a": [[1], [2, 3]], "label": [0, 1]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"lists\.parquet: column 'a' holds lists or records"):
        load_examples(DataSection(name=str(path)))


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (b"\xef\xbb\xbfa,s,label\r\n1.5,x,0\r\n-2,y,1\r\n", {}),
        (b"a;s;label\n 1.5 ; x;0\n\n-2;y ;1\n\n", {"delimiter": ";"}),
        ("a,s,label\n1.5,x,0\n-2,y,1\n".encode("utf-16"), {"encoding": "utf-16"}),
        (b'"a","s","label"\n1.5,"x",0\n"-2","y",1', {}),
    ],
    ids=[
        "byte order mark and Windows lines",
        "semicolons, blanks and empty lines",
        "UTF-16",
        "quotes",
    ],
)
def test_csv_files_of_many_makers_are_read(tmp_path: Path, content: bytes, keys: dict[str, str]):
    (tmp_path / "t.csv").write_bytes(content)
    settings = DataSection(name=str(tmp_path / "t.csv"), categorical="s", scaling="none", **keys)
    examples = load_examples(settings)
    schema = fit_schema(examples, settings)
    assert schema.columns is not None
    assert schema.columns.inputs == ["a", "s=x", "s=y"]
    assert encode(examples, schema).x.tolist() == [[1.5, 1.0, 0.0], [-2.0, 0.0, 1.0]]


def test_lines_are_counted_past_empty_ones(tmp_path: Path):
    (tmp_path / "t.csv").write_text("a,label\n1,0\n\n\n,1\n")
    with pytest.raises(ValueError, match="'a' has no value in line 5"):
        load_examples(DataSection(name=str(tmp_path / "t.csv")))


def test_the_schema_of_a_table_says_what_it_is():
    assert (
        str(fit_schema(table(), config()))
        == "classification (named classes) on a table of the columns age, pressure, colour, site"
    )
    assert str(Schema((4,), 0)) == "regression on examples of (4,)"


def reconstructed(folder: Path, name: str, wards: list[str]) -> Path:
    path = folder / f"{name}.csv"
    rng = np.random.default_rng(len(wards))
    rows = [
        f"{rng.normal():.3f},{rng.normal():.3f},{ward},{i % 2}" for i, ward in enumerate(wards * 10)
    ]
    path.write_text("\n".join(["a,b,ward,label", *rows]) + "\n")
    return path


def test_the_inputs_of_a_table_can_be_its_targets_and_its_label_is_left_out(tmp_path: Path):
    path = reconstructed(tmp_path, "all", ["n", "s"])
    settings = DataSection(name=str(path), task="reconstruction", categorical="ward")
    splits = split(load_examples(settings), settings, seed=0)
    assert splits.schema.input_shape == splits.schema.target_shape == (4,)  # a, b, ward=n, ward=s
    assert splits.schema.num_classes == 0
    for part in (splits.train, splits.validation, splits.test):
        np.testing.assert_array_equal(part.x, part.y)
    path.write_text(path.read_text().replace(",label", ",other"))
    without_label = load_examples(settings.model_copy(update={"categorical": "ward, other"}))
    assert fit_schema(without_label, settings).input_shape == (6,)
    with pytest.raises(
        ValueError, match=r"data\.stream holds targets in memory; received data\.task"
    ):
        load_examples(settings.model_copy(update={"stream": True}))


def test_silos_reconstruct_together_what_only_some_of_them_know(tmp_path: Path):
    schemas = {}
    for name, wards in (("a", ["n", "s"]), ("b", ["s", "w", "e"])):
        settings = DataSection(
            name=str(reconstructed(tmp_path, name, wards)),
            task="reconstruction",
            categorical="ward",
        )
        schemas[name] = fit_schema(load_examples(settings), settings)
    merged = merge_schemas(schemas)
    assert merged.input_shape == merged.target_shape == (6,)
    examples = encode(load_examples(settings), merged)
    assert examples.y.shape == (30, 6)
    np.testing.assert_array_equal(examples.x, examples.y)


def test_an_autoencoder_learns_a_table(tmp_path: Path):
    flat = {
        "data.name": "wine",
        "data.task": "reconstruction",
        "data.label": "class",
        "model.name": "autoencoder",
    }
    flat |= {"model.options": "units = [8]", "training.epochs": 60, "optimizer.learning_rate": 0.01}
    result = train(
        experiment_from_flat({**flat, "run.directory": str(tmp_path / "run")}), LocalCommunicator()
    )
    assert result["metrics"]["test"]["loss"] < 0.4  # of variances 1
    assert "confusion" not in result
