"""Models and optimizers for the cases of test_equality.py: small, each with a trap of its own."""

import keras
import tensorflow as tf

from shared.data import Schema
from shared.zoo import wide_deep
from shared.zoo.adapters import enable_adapters

NUM_FEATURES = 6
NUM_CLASSES = 3

layers = keras.layers


def mlp(**output_options: object) -> keras.Model:
    inputs = keras.Input((NUM_FEATURES,))
    hidden = layers.Dense(16, activation="tanh")(inputs)
    return keras.Model(inputs, layers.Dense(NUM_CLASSES, **output_options)(hidden))


def regularised_mlp() -> keras.Model:
    return mlp(kernel_regularizer="l2")


def half_precision_mlp() -> keras.Model:
    return mlp(dtype="mixed_float16")


def adapted_mlp() -> keras.Model:
    model = mlp()
    enable_adapters(model, rank=2)
    return model


def deferred_mlp() -> keras.Model:
    """Built by fit."""
    return keras.Sequential([layers.Dense(16, activation="tanh"), layers.Dense(NUM_CLASSES)])


def embeddings() -> keras.Model:
    schema = Schema((NUM_FEATURES,), NUM_CLASSES)
    return wide_deep.build(schema, embedding_dim=3, units=(8,), num_buckets=5)


def batch_norm() -> keras.Model:
    inputs = keras.Input((NUM_FEATURES,))
    hidden = layers.Dense(16, activation="tanh")(inputs)
    normalised = layers.BatchNormalization(momentum=0.9)(hidden)
    return keras.Model(inputs, layers.Dense(NUM_CLASSES)(normalised))


class MaskedTokens(keras.Model):
    """Predicts a class for every feature taken as a token; small ones are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = layers.Embedding(8, 4, mask_zero=True)
        self.head = layers.Dense(NUM_CLASSES)

    def call(self, x):
        tokens = tf.cast(tf.clip_by_value(tf.abs(x) * 3.0, 0.0, 7.0), tf.int32)
        embedded = self.embedding(tokens)
        return self.head(embedded)


class TwoOutputs(keras.Model):
    """Predicts a class for each token of a sequence (masked where it is padding), and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = MaskedTokens()
        self.number = layers.Dense(1)

    def call(self, x):
        return {"tokens": self.tokens(x), "number": self.number(x)}


class OwnTrainStep(keras.Model):
    """A custom train step that never calls scale_loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers.Dense(16, activation="tanh")
        self.head = layers.Dense(NUM_CLASSES)

    def call(self, x):
        return self.head(self.body(x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        weights = self.trainable_variables
        grads = tape.gradient(loss, weights)
        self.optimizer.apply_gradients(zip(grads, weights, strict=True))
        self._loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return self.compute_metrics(x, y, y_pred)


class OwnLossTerm(keras.Model):
    """Adds a term of its own to the compiled loss, as users do in compute_loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = layers.Dense(NUM_CLASSES)

    def call(self, x):
        return self.head(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 0.1 * tf.reduce_sum(tf.square(self.head.kernel))


@keras.saving.register_keras_serializable("tests")
class UsersOwn(keras.optimizers.Optimizer):
    """Sign descent with decay, written as the Keras guide tells users to."""

    def update_step(self, gradient, variable, learning_rate):
        rate = tf.cast(learning_rate, variable.dtype)
        variable.assign_sub(rate * (tf.math.tanh(100.0 * gradient) + 0.01 * variable))
