"""Models as users write them: layers, activations, lambdas and losses of their own."""

import itertools
from typing import Any

import keras
import tensorflow as tf
from keras import layers, ops

from shared.data import Schema


def doubled_relu(x: Any) -> Any:
    """An activation that Keras does not know."""
    return 2 * ops.relu(x)


class Scale(layers.Layer):
    """Multiplies by a number of each feature, and adds a loss to keep them small."""

    def __init__(self, penalty: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        self.penalty = penalty

    def build(self, shape: tuple[int, ...]) -> None:
        self.factors = self.add_weight(shape=shape[-1:], initializer="ones", name="factors")

    def call(self, x: Any) -> Any:
        self.add_loss(self.penalty * ops.sum(ops.square(self.factors)))
        return x * self.factors


def build_layers(schema: Schema) -> keras.Model:
    """Keras's functional way, with nothing registered."""
    inputs = keras.Input(schema.input_shape)
    x = Scale(penalty=0.02)(inputs)
    x = layers.Dense(4, activation=doubled_relu)(x)
    x = layers.Lambda(lambda x: x + 1.0)(x)
    return keras.Model(inputs, layers.Dense(schema.num_outputs)(x))


class Network(keras.Model):
    """A plain subclass without `build`, whose variables come with its first call."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.hidden = [layers.Dense(5), Scale()]
        self.norm = layers.BatchNormalization()
        self.dropout = layers.Dropout(0.1)
        self.outputs_ = layers.Dense(num_outputs)

    def call(self, x: Any, training: bool = False) -> Any:
        for layer in self.hidden:
            x = doubled_relu(layer(x))
        x = self.dropout(self.norm(x, training=training), training=training)
        return self.outputs_(x)

    def compute_loss(self, x: Any, y: Any, y_pred: Any, *rest: Any, **options: Any) -> Any:
        """The compiled loss, and one of its own."""
        loss = super().compute_loss(x, y, y_pred, *rest, **options)
        return loss + 0.001 * ops.mean(ops.square(y_pred))


def build_network(schema: Schema) -> keras.Model:
    return Network(schema.num_outputs)


def build_sequential(schema: Schema) -> keras.Model:
    return keras.Sequential([Scale(), layers.Dense(schema.num_outputs)])


# --- registered, as Keras's guide has it


@keras.saving.register_keras_serializable("tests")
class Shift(layers.Layer):
    """Adds a number to each feature."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.shift = self.add_weight(shape=shape[-1:], name="shift")

    def call(self, x: Any) -> Any:
        return x + self.shift


def build_registered(schema: Schema) -> keras.Model:
    inputs = keras.Input(schema.input_shape)
    return keras.Model(inputs, layers.Dense(schema.num_outputs)(Shift()(inputs)))


# --- recurrent


def build_recurrent(schema: Schema, layer: str = "LSTM") -> keras.Model:
    """Two recurrent layers, the first in both directions; ids are embedded, with a mask."""
    inputs = keras.Input(schema.input_shape, dtype=schema.input_dtype)
    x: Any = inputs
    if schema.vocabulary_size:
        x = layers.Embedding(schema.vocabulary_size, 3, mask_zero=True)(x)
    make = getattr(layers, layer)
    x = layers.Bidirectional(make(3, return_sequences=True))(x)
    return keras.Model(inputs, layers.Dense(schema.num_outputs)(make(4)(x)))


class Digamma(layers.Layer):
    """An operation that TFLite does not have."""

    def call(self, x: Any) -> Any:
        return tf.math.digamma(ops.abs(x) + 1.0)


def build_unconvertible(schema: Schema) -> keras.Model:
    inputs = keras.Input(schema.input_shape)
    return keras.Model(inputs, layers.Dense(schema.num_outputs)(Digamma()(inputs)))


class Opaque(layers.Layer):
    """A layer of an argument that no file can hold, without a get_config."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)


def build_opaque(schema: Schema) -> keras.Model:
    inputs = keras.Input(schema.input_shape)
    x = Opaque(doubled_relu)(inputs)
    return keras.Model(inputs, layers.Dense(schema.num_outputs)(x))


# --- what cannot be trained


class Unsaveable(Opaque):
    """Its get_config returns what no file can hold."""

    def get_config(self) -> dict[str, Any]:
        return {**super(Opaque, self).get_config(), "function": object()}


def build_unsaveable(schema: Schema) -> keras.Model:
    inputs = keras.Input(schema.input_shape)
    x = Unsaveable(doubled_relu)(inputs)
    return keras.Model(inputs, layers.Dense(schema.num_outputs)(x))


class Failing(keras.Model):
    def call(self, x: Any) -> Any:
        return x.no_such_thing


def build_failing(schema: Schema) -> keras.Model:
    return Failing()


class TwoOutputs(keras.Model):
    def call(self, x: Any) -> Any:
        return {"first": x, "second": x}


def build_two_outputs(schema: Schema) -> keras.Model:
    return TwoOutputs()


class LateVariables(keras.Model):
    """Makes a layer in training alone."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.last = layers.Dense(num_outputs)

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.late = layers.Dense(4)
            x = self.late(x)
        return self.last(x)


def build_late_variables(schema: Schema) -> keras.Model:
    return LateVariables(schema.num_outputs)


_sizes = itertools.count(2)


def build_changing(schema: Schema) -> keras.Model:
    """Another model at each call."""
    size = next(_sizes)
    return keras.Sequential([layers.Dense(size), layers.Dense(schema.num_outputs)])
