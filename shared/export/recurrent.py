"""Recurrent layers without a loop, for formats that have none.

TFLite has no counterpart of the lists of tensors that TensorFlow's loop keeps its steps in, where
the number of examples is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras


@contextmanager
def unrolled(model: keras.Model) -> Iterator[None]:
    """Has the model's recurrent layers run step by step within the block."""
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.RNN)]
    with ExitStack() as block:
        for layer in layers:
            block.enter_context(_setting(layer, "unroll", True))
            if layer.go_backwards:
                block.enter_context(_setting(layer, "inner_loop", _reversed_loop(layer)))
        yield


def _reversed_loop(layer: keras.layers.RNN) -> Any:
    """The loop of a layer that goes backwards: forwards, over reversed sequences.

    Keras 3.15 takes the mask the wrong way round in a layer that is unrolled and goes backwards.
    """
    loop = layer.inner_loop

    def reversed_loop(
        sequences: Any, initial_state: Any, mask: Any = None, training: bool = False
    ) -> Any:
        if mask is not None:
            mask = keras.ops.flip(mask, axis=1)
        sequences = keras.ops.flip(sequences, axis=1)
        with _setting(layer, "go_backwards", False):
            return loop(sequences, initial_state, mask=mask, training=training)

    return reversed_loop


@contextmanager
def _setting(layer: keras.layers.Layer, name: str, value: Any) -> Iterator[None]:
    """Gives one layer another attribute within the block."""
    attributes = vars(layer)
    had = name in attributes
    before = attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if had:
            attributes[name] = before
        else:
            del attributes[name]
