"""Small residual network for images (He et al. 2015, arXiv:1512.03385, section 4.2)."""

from collections.abc import Sequence
from typing import Any

import keras

from shared.data import Schema

PRESETS = {
    "tiny": {"filters": [8, 16], "blocks": 1},
    "small": {"filters": [16, 32, 64], "blocks": 2},
    "resnet20": {"filters": [16, 32, 64], "blocks": 3},  # of the paper, for CIFAR-10
}
NORMS = ("group", "batch")
GROUP_SIZE = 8  # channels


def build(
    schema: Schema, filters: Sequence[int] = (16, 32), blocks: int = 1, norm: str = "group"
) -> keras.Model:
    """A stage of `blocks` residual blocks per entry of `filters`, the mean, a linear output.

    Each stage but the first is at half the resolution of the one before. `norm` = "group": over
    groups of 8 channels (Wu and He 2018, arXiv:1803.08494), which needs no statistics of a batch
    and so suits silos with unlike data (Hsieh et al. 2020, arXiv:1910.00189, section 5); "batch":
    batch normalisation.
    """
    _check(schema, filters, norm)
    inputs = keras.Input(schema.input_shape, name="image")
    x = _conv(inputs, filters[0], 1, "stem")
    x = _norm(x, norm, "stem_norm")
    x = keras.layers.ReLU(name="stem_relu")(x)

    for stage, width in enumerate(filters):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            x = _block(x, width, stride, norm, f"stage{stage}_block{block}")

    x = keras.layers.GlobalAveragePooling2D(name="mean")(x)
    outputs = keras.layers.Dense(schema.num_outputs, dtype="float32", name="output")(x)
    return keras.Model(inputs, outputs, name="resnet")


def _check(schema: Schema, filters: Sequence[int], norm: str) -> None:
    if len(schema.input_shape) != 3 or schema.target_shape or schema.vocabulary_size:
        raise ValueError(
            f"The resnet takes images (height, width, channels); received {schema}. Take mlp or"
            " conv1d."
        )
    if norm not in NORMS:
        raise ValueError(f"The resnet's norm must be one of {', '.join(NORMS)}; received {norm!r}.")
    if min(schema.input_shape[:2]) < 2 ** (len(filters) - 1):
        raise ValueError(
            f"The resnet halves the image {len(filters) - 1} times; received images of"
            f" {schema.input_shape}. Shorten model.options 'filters'."
        )


def _block(x: Any, width: int, stride: int, norm: str, name: str) -> Any:
    """ReLU(F(x) + x); a 1 x 1 convolution where shapes differ (option B of the paper)."""
    y = _conv(x, width, stride, f"{name}_conv0")
    y = _norm(y, norm, f"{name}_norm0")
    y = keras.layers.ReLU(name=f"{name}_relu0")(y)
    y = _conv(y, width, 1, f"{name}_conv1")
    y = _norm(y, norm, f"{name}_norm1")

    if stride != 1 or x.shape[-1] != width:
        x = _conv(x, width, stride, f"{name}_shortcut", kernel_size=1)
    y = keras.layers.Add(name=f"{name}_add")([y, x])
    return keras.layers.ReLU(name=f"{name}_relu1")(y)


def _conv(x: Any, width: int, stride: int, name: str, kernel_size: int = 3) -> Any:
    convolution = keras.layers.Conv2D(
        width, kernel_size, stride, padding="same", use_bias=False, name=name
    )
    return convolution(x)


def _norm(x: Any, norm: str, name: str) -> Any:
    if norm == "batch":
        return keras.layers.BatchNormalization(name=name)(x)
    num_channels = x.shape[-1]
    num_groups = num_channels // GROUP_SIZE if num_channels % GROUP_SIZE == 0 else 1
    return keras.layers.GroupNormalization(num_groups, name=name)(x)
