"""Exports: every model in every format predicts the same, in the data's own units."""

import json
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from shared.data import Schema, fit_schema
from shared.data.tables import make_table
from shared.experiment import DataSection, experiment_from_flat
from shared.export import FORMATS, export
from shared.export.__main__ import main
from shared.run_record import RunRecord
from shared.zoo import MODELS, build_model, saved_model
from tests.unit.test_zoo import SETS, TINY, eight_examples


def finished_run(
    directory: Path, schema: Schema, weights: list[np.ndarray] | None = None, **keys: str
) -> Path:
    """A run directory as a trainer leaves it, of a model with fresh weights or these."""
    flat = {key.replace("__", "."): value for key, value in keys.items()} | {
        "run.directory": str(directory)
    }
    experiment = experiment_from_flat(flat)
    model = build_model(experiment.model, schema, seed=5)
    if weights:
        model.set_weights(weights)
    record = RunRecord(experiment, "single", "epoch")
    record.open()
    record.finish(model, schema, {})
    return directory


def patients(**keys: object) -> tuple[pd.DataFrame, Schema]:
    """A table of numbers with gaps and of categories, and its schema."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"age in years": rng.normal(50, 10, 40), "pressure": rng.normal(1e5, 1e3, 40)}
    )
    frame["sex"] = rng.choice(["f", "m"], 40)
    frame["ward: north"] = rng.choice(["1", "2", "3"], 40)
    frame["outcome"] = np.where(frame["pressure"] > 1e5, "ill", "well")
    frame["days"] = 30 + 0.5 * frame["age in years"] + rng.normal(0, 1, 40)
    frame.loc[3, "pressure"] = np.nan
    common = {
        "label": "outcome",
        "features": "age in years, pressure, sex, ward: north",
        "missing": "fill",
    }
    config = DataSection(**{**common, "categorical": "sex, ward: north", **keys})
    return frame, fit_schema(make_table(frame.rename_axis(index="row"), config, "patients"), config)


# make test has each model in one format, by turns; make test-slow has the others
PAIRS = [
    pytest.param(name, format_name, marks=() if j == i % len(FORMATS) else pytest.mark.slow)
    for i, name in enumerate(MODELS)
    for j, format_name in enumerate(FORMATS)
]


@pytest.mark.parametrize(("name", "format_name"), PAIRS)
def test_every_model_is_exported_in_every_format(tmp_path: Path, name: str, format_name: str):
    examples = eight_examples(SETS.get(name, ["wine"])[0])
    run = finished_run(
        tmp_path / "run", examples.schema, model__name=name, model__options=TINY.get(name, "")
    )
    path = export(run, format_name)  # which checks what it wrote against the model
    model = keras.models.load_model(run / "model.keras", compile=False)
    form = FORMATS[format_name]
    # Another number of examples than it was checked with.
    x = examples.x[:1].astype(examples.schema.input_dtype)
    if examples.schema.columns is None:
        logits = np.asarray(model(x), np.float64)
        shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        expected = shares if examples.schema.num_classes else logits
        np.testing.assert_allclose(form.predict(path, {"x": x}), expected, atol=form.tolerance)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_table_goes_in_as_it_is_and_comes_out_in_the_units_of_its_label(
    tmp_path: Path, format_name: str
):
    """A linear model by hand: mean + std (w . ((x - mean) / std) + b).

    Gaps are the mean, unknown categories 0.
    """
    frame, schema = patients(label="days", task="regression")
    kernel = np.arange(7, dtype=np.float32)[:, None] - 3.0
    run = finished_run(
        tmp_path / "run", schema, [kernel, np.array([0.5], np.float32)], model__name="linear"
    )
    path, form = export(run, format_name), FORMATS[format_name]
    numbers = np.array([[61.0, 1.01e5], [40.0, np.nan]])
    names, places = np.array([["m", "2"], ["f", "9"]]), np.array([[1, 1], [0, -1]])
    by_name = form.category_dtype == "string"
    categories = names if by_name else places.astype(form.category_dtype)
    received = form.predict(
        path, {"numbers": numbers.astype(form.number_dtype), "categories": categories}
    )
    mean, std = (
        frame[["age in years", "pressure"]].mean(),
        frame[["age in years", "pressure"]].std(ddof=0),
    )
    scaled = np.nan_to_num((numbers - mean.to_numpy()) / std.to_numpy())
    one_hot = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])
    outputs = np.concatenate([scaled, one_hot], axis=1) @ kernel + 0.5
    days = frame["days"]
    np.testing.assert_allclose(received, days.mean() + days.std(ddof=0) * outputs, rtol=1e-5)
    notes = json.loads(Path(f"{path}.inputs.json").read_text())
    assert notes["inputs"]["numbers"]["columns"] == ["age in years", "pressure"]
    assert notes["inputs"]["categories"]["columns"]["ward: north"] == ["1", "2", "3"]


def test_classes_come_out_as_probabilities_with_their_names(tmp_path: Path):
    _, schema = patients()
    run = finished_run(tmp_path / "run", schema, model__name="wide_deep")
    path = export(run, "onnx", tmp_path / "my.onnx")
    inputs = {"numbers": np.array([[50.0, 1e5]]), "categories": np.array([[0, 1]], np.int32)}
    assert FORMATS["onnx"].predict(path, inputs).sum() == pytest.approx(1.0, abs=1e-6)
    assert json.loads((tmp_path / "my.onnx.inputs.json").read_text())["output"]["classes"] == [
        "ill",
        "well",
    ]


def test_a_model_trained_in_bfloat16_is_exported_in_float32(tmp_path: Path):
    schema = eight_examples("digits").schema
    run = finished_run(
        tmp_path / "run", schema, model__name="cnn", model__precision="mixed_bfloat16"
    )
    for format_name in FORMATS:
        export(run, format_name)


def test_an_export_that_predicts_something_else_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = finished_run(tmp_path / "run", eight_examples("digits").schema, model__name="cnn")

    def save_another(model: keras.Model, path: Path) -> None:
        FORMATS["keras"].save(keras.models.clone_model(model), path)

    monkeypatch.setitem(
        FORMATS,
        "onnx",
        replace(FORMATS["onnx"], save=save_another, predict=FORMATS["keras"].predict),
    )
    with pytest.raises(
        ValueError, match="must predict what the model predicts, to 1e-05; received"
    ):
        export(run, "onnx", tmp_path / "wrong.keras")
    assert not list(tmp_path.glob("wrong*"))


def test_an_export_that_is_interrupted_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = finished_run(tmp_path / "run", eight_examples("digits").schema, model__name="cnn")

    def interrupted(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
        assert path.exists()
        raise KeyboardInterrupt

    monkeypatch.setitem(FORMATS, "keras", replace(FORMATS["keras"], predict=interrupted))
    with pytest.raises(KeyboardInterrupt):
        export(run, "keras")
    assert not list(run.glob("export*"))


# --- TFLite


@pytest.mark.parametrize(
    ("layer", "schema"),
    [
        ("LSTM", Schema((6,), 2, vocabulary_size=9)),
        *(
            pytest.param(layer, schema, marks=pytest.mark.slow)
            for layer in ("LSTM", "GRU", "SimpleRNN")
            for schema in (Schema((20, 3), 2), Schema((12,), 2, vocabulary_size=9))
        ),
    ],
)
def test_recurrent_layers_are_exported_and_the_command_stays_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], layer: str, schema: Schema
):
    """In both directions and one after the other; ids with a mask, which Keras's own unrolling
    takes the wrong way round in the layer that goes backwards. TFLite takes no loop.
    """
    run = finished_run(
        tmp_path / "run",
        schema,
        model__name="tests.own_models:build_recurrent",
        model__options=f"layer = '{layer}'",
    )
    capfd.readouterr()
    assert main([str(run), "--format", "tflite"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert output.out.count("\n") == 1

    # Equal outputs, for another number of examples than it was checked with.
    rng = np.random.default_rng(1)
    shape = (3, *schema.input_shape)
    x = rng.integers(schema.vocabulary_size or 9, size=shape).astype(schema.input_dtype)
    config = experiment_from_flat(
        {"model.name": "tests.own_models:build_recurrent", "model.options": f"layer = '{layer}'"}
    ).model
    outputs = np.asarray(saved_model(config, schema, run / "model.keras")(x), np.float64)
    expected = np.exp(outputs) / np.exp(outputs).sum(axis=-1, keepdims=True)
    received = FORMATS["tflite"].predict(run / "export.tflite", {"x": x})
    np.testing.assert_allclose(received, expected, atol=1e-6)


def test_what_tflite_has_no_operation_for_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run = finished_run(
        tmp_path / "run", Schema((4,), 2), model__name="tests.own_models:build_unconvertible"
    )
    capfd.readouterr()
    assert main([str(run), "--format", "tflite"]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: The model of {run} cannot be exported as tflite: ")
    assert "no TFLite operation for TensorFlow's Digamma. Choose another --format" in output.err
    assert output.err.count("\n") == 1
    assert not list(run.glob("export*"))


def test_mistakes_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), "--format", "onnx"]) == 2
    assert "takes the directory of a finished run" in capsys.readouterr().err
    run = finished_run(tmp_path / "run", eight_examples("digits").schema, model__name="cnn")
    assert main([str(run), "--format", "keras"]) == 0
    assert "export.keras" in capsys.readouterr().out
    assert main([str(run), "--format", "keras"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([str(run), "--format", "keras", "-o", str(tmp_path / "no" / "where.keras")]) == 2
    assert "a directory that exists" in capsys.readouterr().err
    (run / "schema.json").write_text("{}")
    assert main([str(run), "--format", "onnx"]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: The record in")
    assert captured.count("\n") == 1
