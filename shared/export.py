"""python -m shared.export RUN --format onnx: a trained model for other programs, checked to predict the same.

What is exported takes the data as it is and answers in its units: a table's columns in, unscaled, with gaps (NaN);
probabilities of classes, or numbers in the label's unit, out. `PATH.inputs.json` says what goes where.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data import Schema
from shared.data.schema import Columns, schema_from_json
from shared.data.tables import encode_inputs
from shared.experiment import load_experiment
from shared.run_record import SCHEMA
from shared.seeding import rng_for

if TYPE_CHECKING:
    import keras

Inputs = dict[str, np.ndarray]
UNKNOWN = "\0unknown"  # no category of anyone's
NUM_CHECKED = 32


@dataclass(frozen=True)
class Format:
    """How a format takes numbers and categories ("string": by name; otherwise by place in their list, -1: unknown)."""

    suffix: str
    number_dtype: str
    category_dtype: str
    tolerance: float  # of a probability, or of a number in standard deviations of the label
    save: Callable[[keras.Model, Path], None]
    predict: Callable[[Path, Inputs], np.ndarray]


def export(run: Path, format_name: str, output: Path | None = None) -> Path:
    """Writes the model of a finished run in a format of `FORMATS`, and how to feed it; returns the path.

    Guarantee: read back by the format's own runtime, the file predicts what the run's model predicts, within the
    format's tolerance, on drawn examples with gaps and unknown categories; else nothing is left behind. Raises
    ValueError for a run that has no model, a path that exists, or a model that the format cannot hold.
    """
    form = FORMATS[format_name]
    schema, model = _read(run)
    path = output or run / f"export{form.suffix}"
    notes = Path(f"{path}.inputs.json")
    if path.exists():
        raise ValueError(f"The export {path} exists already. Delete it, or choose another path with -o.")
    if not path.parent.is_dir():
        raise ValueError(f"The export must lie in a directory that exists; received {path}. Choose another with -o.")
    served = serving_model(model, schema, form)
    is_good = False
    try:
        apart = _difference(form, served, path, model, schema)
        is_good = apart <= form.tolerance
    except Exception as error:  # converters raise whatever they like
        raise ValueError(
            f"The model of {run} cannot be exported as {format_name}: {type(error).__name__}: {error}. Try another "
            f"--format: {', '.join(FORMATS)}."
        ) from error
    finally:
        if not is_good:  # after Ctrl-C too
            _remove(path)
    if not is_good:
        raise ValueError(
            f"An export must predict what the model predicts, to {form.tolerance:g}; received {path} whose predictions "
            f"differ by {apart:g}. It was removed; choose another --format: {', '.join(FORMATS)}."
        )
    notes.write_text(json.dumps(describe(schema, form), indent=2) + "\n", encoding="utf-8")
    return path


def _read(run: Path) -> tuple[Schema, keras.Model]:
    import keras

    from shared.zoo import build_model

    for name in ("experiment.toml", SCHEMA, "model.keras"):
        if not (run / name).is_file():
            raise ValueError(
                f"An export takes the directory of a finished run, with experiment.toml, schema.json and model.keras; "
                f"received {run}, which lacks {name}. Name one, for example runs/NAME."
            )
    try:
        schema = schema_from_json(json.loads((run / SCHEMA).read_text(encoding="utf-8")))
        model = keras.models.load_model(run / "model.keras", compile=False)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"The record in {run} cannot be read: {str(error).splitlines()[0]}") from None
    config = load_experiment(run / "experiment.toml").model
    if config.precision == "float32":
        return schema, model
    plain = config.model_copy(update={"precision": "float32", "adapter": "none", "initial": ""})
    exact = build_model(plain, schema, seed=0)  # other engines round bfloat16 in other places
    exact.set_weights(model.get_weights())
    return schema, exact


def serving_model(model: keras.Model, schema: Schema, form: Format) -> keras.Model:
    """The model between the data as it is and answers in its units, of Keras's own layers."""
    import keras

    columns = schema.columns
    if columns is None:
        inputs = {"x": keras.Input(schema.input_shape, dtype=schema.input_dtype, name="x")}
        outputs = model(inputs["x"])
    else:
        inputs = _column_inputs(columns, form)
        outputs = model(_encoded(columns, inputs))
    if schema.num_classes:
        outputs = keras.layers.Softmax(dtype="float32", name="probabilities")(outputs)
    elif columns and columns.scaled and columns.target:
        outputs = outputs * columns.target.std + columns.target.mean
    return keras.Model(inputs, outputs, name="served")


def _column_inputs(columns: Columns, form: Format) -> dict[str, Any]:
    import keras

    inputs = {}
    if columns.numbers:
        inputs["numbers"] = keras.Input((len(columns.numbers),), dtype=form.number_dtype, name="numbers")
    if columns.categories:
        inputs["categories"] = keras.Input((len(columns.categories),), dtype=form.category_dtype, name="categories")
    return inputs


def _encoded(columns: Columns, inputs: dict[str, Any]) -> Any:
    """As `shared.data.tables.encode_inputs`, in Keras."""
    from keras import layers, ops

    parts = []
    if columns.numbers:
        numbers = inputs["numbers"]
        means = np.array([[column.mean for column in columns.numbers]], numbers.dtype)
        numbers = ops.where(ops.isnan(numbers), means, numbers)
        if columns.scaled:
            numbers = (numbers - means) / np.array([[column.std for column in columns.numbers]], numbers.dtype)
        parts.append(ops.cast(numbers, "float32"))
    for i, column in enumerate(columns.categories):
        places = inputs["categories"][:, i : i + 1]
        if inputs["categories"].dtype == "string":
            names = layers.StringLookup(vocabulary=list(column.values), num_oov_indices=1, name=f"category{i}")
            places = ops.cast(names(places), "int32") - 1
        ones = ops.equal(places, np.arange(len(column.values), dtype=np.int32)[None])
        parts.append(ops.cast(ones, "float32"))
    return ops.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def describe(schema: Schema, form: Format) -> dict[str, Any]:
    """What goes into the exported model and what comes out."""
    columns = schema.columns
    inputs: dict[str, Any] = {}
    if columns is None:
        inputs["x"] = {"dtype": schema.input_dtype, "shape": [None, *schema.input_shape]}
    else:
        if columns.numbers:
            names = [column.name for column in columns.numbers]
            inputs["numbers"] = {"dtype": form.number_dtype, "columns": names, "missing": "NaN"}
        if columns.categories:
            how = "names" if form.category_dtype == "string" else "places in the list of names, -1 for any other"
            values = {column.name: list(column.values) for column in columns.categories}
            inputs["categories"] = {"dtype": form.category_dtype, "columns": values, "holds": how}
    if schema.num_classes:
        names = list(schema.classes or map(str, range(schema.num_classes)))
        return {"inputs": inputs, "output": {"holds": "probabilities", "classes": names}}
    return {"inputs": inputs, "output": {"holds": "numbers", "shape": [None, *(schema.target_shape or (1,))]}}


def _difference(form: Format, served: keras.Model, path: Path, model: keras.Model, schema: Schema) -> float:
    """Writes the export, reads it back, and compares its predictions: the largest difference."""
    form.save(served, path)
    inputs, x = _draw(schema, form)
    expected, scale = _expected(model, schema, x)
    received = np.asarray(form.predict(path, inputs))
    return float(np.abs(received - expected).max() / scale) if received.shape == expected.shape else np.inf


def _draw(schema: Schema, form: Format) -> tuple[Inputs, np.ndarray]:
    """Examples as the exported model takes them, and as the plain model does."""
    import pandas as pd

    rng = rng_for(0, "export")
    columns = schema.columns
    if columns is None:
        shape = (NUM_CHECKED, *schema.input_shape)
        x = rng.integers(schema.vocabulary_size, size=shape) if schema.vocabulary_size else rng.normal(size=shape)
        x = x.astype(schema.input_dtype)
        return {"x": x}, x
    inputs, frame = {}, pd.DataFrame(index=range(NUM_CHECKED))
    if columns.numbers:
        numbers = np.stack([rng.normal(c.mean, c.std, NUM_CHECKED) for c in columns.numbers], axis=1)
        numbers[rng.random(numbers.shape) < 0.1] = np.nan
        inputs["numbers"] = numbers.astype(form.number_dtype)
        frame[[column.name for column in columns.numbers]] = inputs["numbers"].astype(np.float64)
    if columns.categories:
        places = np.stack([rng.integers(-1, len(c.values), NUM_CHECKED) for c in columns.categories], axis=1)
        texts = [[(*c.values, UNKNOWN)[at] for at in places[:, i]] for i, c in enumerate(columns.categories)]
        frame[[column.name for column in columns.categories]] = np.array(texts, object).T
        by_name = form.category_dtype == "string"
        inputs["categories"] = np.array(texts).T if by_name else places.astype(form.category_dtype)
    return inputs, encode_inputs(frame, columns)


def _expected(model: keras.Model, schema: Schema, x: np.ndarray) -> tuple[np.ndarray, float]:
    """The plain model's predictions in the data's units, and the unit that differences are counted in."""
    outputs = np.asarray(model.predict(x, batch_size=len(x), verbose=0), np.float64)
    if schema.num_classes:
        powers = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True), 1.0
    target = schema.columns.target if schema.columns and schema.columns.scaled else None
    return (outputs, 1.0) if target is None else (outputs * target.std + target.mean, target.std)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _save_keras(model: keras.Model, path: Path) -> None:
    model.save(path)


def _predict_keras(path: Path, inputs: Inputs) -> np.ndarray:
    import keras
    import tensorflow as tf

    model = keras.models.load_model(path, compile=False)
    return np.asarray(model({name: tf.constant(array) for name, array in inputs.items()}))


def _save_savedmodel(model: keras.Model, path: Path) -> None:
    model.export(path, format="tf_saved_model", verbose=False)


def _predict_savedmodel(path: Path, inputs: Inputs) -> np.ndarray:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))  # its variables live as long as it does
    outputs: np.ndarray = loaded.serve({name: tf.constant(array) for name, array in inputs.items()}).numpy()
    return outputs


def _save_onnx(model: keras.Model, path: Path) -> None:
    import tensorflow as tf
    import tf2onnx

    names = [tensor.name for tensor in model.inputs]
    signature = [tf.TensorSpec(tensor.shape, tensor.dtype, tensor.name) for tensor in model.inputs]
    function = tf.function(lambda *tensors: model(dict(zip(names, tensors, strict=True))))
    handlers: dict[str, Any] = {"Erfc": (_erfc_in_onnx, [])}
    tf2onnx.convert.from_function(function, signature, opset=18, custom_op_handlers=handlers, output_path=str(path))


def _erfc_in_onnx(context: Any, node: Any, name: str, arguments: Any) -> None:
    """erfc(x) = 1 - erf(x): in the exact GELU, and unknown to tf2onnx."""
    erf = context.make_node("Erf", node.input, name=f"{name}_erf")
    one = context.make_const(f"{name}_one", np.array(1.0, np.float32))
    context.remove_node(name)
    context.make_node("Sub", [one.output[0], erf.output[0]], outputs=node.output, name=name)


def _predict_onnx(path: Path, inputs: Inputs) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: np.ndarray = session.run(None, inputs)[0]
    return outputs


def _save_tflite(model: keras.Model, path: Path) -> None:
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        _save_savedmodel(model, Path(folder))
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())


def _predict_tflite(path: Path, inputs: Inputs) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    (outputs,) = Interpreter(str(path)).get_signature_runner()(**inputs).values()
    return np.asarray(outputs)


FORMATS = {
    "keras": Format(".keras", "float64", "string", 1e-5, _save_keras, _predict_keras),
    "savedmodel": Format("_savedmodel", "float64", "string", 1e-5, _save_savedmodel, _predict_savedmodel),
    "onnx": Format(".onnx", "float64", "int32", 1e-5, _save_onnx, _predict_onnx),
    "tflite": Format(".tflite", "float32", "int32", 1e-4, _save_tflite, _predict_tflite),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shared.export", description="Write the model of a finished run as a file for other programs."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory that the run left behind: runs/NAME")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="where (default: RUN/export.*)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the converters tell much, and nothing that helps
    try:
        path = export(options.run, options.format, options.output)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    form = FORMATS[options.format]
    print(f"export: {path}, which predicts as the run's model does, to {form.tolerance:g}; {path}.inputs.json says how")
    return 0


if __name__ == "__main__":
    sys.exit(main())
