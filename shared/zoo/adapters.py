"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685).

A layer's weights become W + A B, with A and B of rank r, which alone are trained.
"""

import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np


def enable_adapters(model: keras.Model, rank: int) -> None:
    """Gives an adapter to each layer for which Keras has one, and freezes everything else.

    These are Dense, EinsumDense (so attention too), Embedding and convolutions. B begins at 0, so
    the model's outputs stay what they were. Raises ValueError if there is no such layer.
    """
    layers = model._flatten_layers(include_self=False)
    leaves = [layer for layer in layers if not [*layer._flatten_layers(include_self=False)]]
    adapted = [layer for layer in leaves if hasattr(layer, "enable_lora")]
    if not adapted:
        kinds = sorted({type(layer).__name__ for layer in leaves})
        raise ValueError(
            "model.adapter = 'lora' adapts Dense, EinsumDense, Embedding and convolution layers;"
            f" received a model of {', '.join(kinds)}. Set model.adapter = 'none'."
        )

    for layer in leaves:
        layer.trainable = layer in adapted  # batch normalisation keeps its statistics too
    for layer in adapted:
        layer.enable_lora(rank)

    # Biases of adapted layers are still trainable.
    for variable in model.variables:
        variable.trainable = variable.trainable and is_adapter(variable)


def is_adapter(variable: Any) -> bool:
    """Returns True for the A or the B of an adapter."""
    return "lora_" in variable.path.rpartition("/")[2]


def adapter_weights(model: keras.Model) -> dict[str, np.ndarray]:
    """A and B of every adapter by their path in the model; empty for a model without."""
    return {
        variable.path: np.asarray(variable) for variable in model.variables if is_adapter(variable)
    }


def merge_adapters(model: keras.Model, plain: keras.Model) -> keras.Model:
    """Sets the weights of `plain`, the same model without adapters, to W + A B; returns it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "merged.weights.h5"
        model.save_weights(file)  # Keras merges adapters into what it saves
        plain.load_weights(file)
    return plain
