"""The formats of exports: how each is written, and how its own runtime predicts from the file.

NumPy, TensorFlow and the converters are imported within the functions: a mistake in the command is
reported at once, and some are not installed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import keras
    import numpy as np

Inputs: TypeAlias = "dict[str, np.ndarray]"


class FormatError(ValueError):
    """A model that a format cannot hold; the message goes on after a colon."""


@dataclass(frozen=True)
class Format:
    """A file format, with the types in which its models take a table.

    category_dtype: "string" takes categories by name; an integer type by index in the list of
    names, -1 for any other.
    tolerance: of a probability, or of a number in standard deviations of the label.
    """

    suffix: str
    number_dtype: str
    category_dtype: str
    tolerance: float
    save: Callable[[keras.Model, Path], None]
    predict: Callable[[Path, Inputs], np.ndarray]

    @property
    def takes_names(self) -> bool:
        """True if categories go in by name."""
        return self.category_dtype == "string"


def _save_keras(model: keras.Model, path: Path) -> None:
    model.save(path)


def _predict_keras(path: Path, inputs: Inputs) -> np.ndarray:
    import keras
    import numpy as np
    import tensorflow as tf

    try:
        model = keras.models.load_model(path, compile=False)
    except (TypeError, ValueError) as error:
        raise FormatError(
            "Keras reads back only registered classes and functions, with get_config() where they"
            " have arguments that are no numbers or texts, and no Lambda; received a model with"
            " others. Decorate yours with @keras.saving.register_keras_serializable()"
        ) from error
    tensors = {name: tf.constant(array) for name, array in inputs.items()}
    return np.asarray(model(tensors))


def _save_savedmodel(model: keras.Model, path: Path) -> None:
    model.export(path, format="tf_saved_model", verbose=False)


def _predict_savedmodel(path: Path, inputs: Inputs) -> np.ndarray:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))  # its variables live as long as it does
    tensors = {name: tf.constant(array) for name, array in inputs.items()}
    outputs: np.ndarray = loaded.serve(tensors).numpy()
    return outputs


def _save_onnx(model: keras.Model, path: Path) -> None:
    import tensorflow as tf
    import tf2onnx

    names = [tensor.name for tensor in model.inputs]
    signature = [tf.TensorSpec(tensor.shape, tensor.dtype, tensor.name) for tensor in model.inputs]

    def call(*tensors: Any) -> Any:
        return model(dict(zip(names, tensors, strict=True)))

    handlers: dict[str, Any] = {"Erfc": (_erfc_in_onnx, [])}
    tf2onnx.convert.from_function(
        tf.function(call),
        signature,
        opset=18,
        custom_op_handlers=handlers,
        output_path=str(path),
    )


def _erfc_in_onnx(context: Any, node: Any, name: str, arguments: Any) -> None:
    """erfc(x) = 1 - erf(x): in the exact GELU, and unknown to tf2onnx."""
    import numpy as np

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

    from shared.export.recurrent import unrolled
    from shared.zoo.own import describe_error

    with tempfile.TemporaryDirectory() as folder:
        with unrolled(model):
            _save_savedmodel(model, Path(folder))
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        try:
            path.write_bytes(converter.convert())
        except Exception as error:  # with hundreds of lines of the compiler's
            lacking = sorted(set(re.findall(r"'tf\.(\w+)' op", str(error))))
            raise FormatError(
                "the converter has no TFLite operation for TensorFlow's"
                f" {', '.join(lacking) or describe_error(error)}"
            ) from error


def _predict_tflite(path: Path, inputs: Inputs) -> np.ndarray:
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(str(path)).get_signature_runner()
    (outputs,) = run(**inputs).values()
    return np.asarray(outputs)


FORMATS = {
    "keras": Format(".keras", "float64", "string", 1e-5, _save_keras, _predict_keras),
    "savedmodel": Format(
        "_savedmodel", "float64", "string", 1e-5, _save_savedmodel, _predict_savedmodel
    ),
    "onnx": Format(".onnx", "float64", "int32", 1e-5, _save_onnx, _predict_onnx),
    "tflite": Format(".tflite", "float32", "int32", 1e-4, _save_tflite, _predict_tflite),
}
