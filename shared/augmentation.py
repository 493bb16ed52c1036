"""Random variants of training images, the same on any rank.

They are determined by (seed, owner, epoch) and the example, not by the batch or the rank it is in.
"""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from shared.experiment import DataSection
from shared.seeding import rng_for

KINDS = ("flip", "shift")
# The largest shift, as a share of the height and of the width: 4 pixels of 32 (He et al. 2015,
# arXiv:1512.03385, section 4.2).
MAX_SHIFT = 1 / 8

HEIGHT_AXIS, WIDTH_AXIS = 1, 2  # of images (n, height, width, channels)


@dataclass(frozen=True)
class Augmentation:
    """The kinds of variation in use.

    `flip`: half of the images are mirrored, left to right. `shift`: all are moved by up to an
    eighth of their height and width; what moves in is 0.
    """

    flip: bool = False
    shift: bool = False

    def __bool__(self) -> bool:
        return self.flip or self.shift

    def draw(
        self, num_examples: int, shape: tuple[int, ...], seed: int, owner: str, epoch: int
    ) -> np.ndarray:
        """Returns (flip, down, right) of each example, int32 of shape (num_examples, 3).

        flip: 1 if it is mirrored, else 0; down, right: pixels it is moved by. `shape` is that of
        one image.
        """
        rng = rng_for(seed, "augmentation", owner, epoch)
        height, width, *_ = shape
        max_down = int(MAX_SHIFT * height) if self.shift else 0
        max_right = int(MAX_SHIFT * width) if self.shift else 0

        flip = rng.integers(0, 1 + self.flip, num_examples)
        down = rng.integers(-max_down, max_down + 1, num_examples)
        right = rng.integers(-max_right, max_right + 1, num_examples)
        return np.stack([flip, down, right], axis=1).astype(np.int32)


def augmentation_of(config: DataSection, input_shape: tuple[int, ...]) -> Augmentation:
    """Returns the augmentation that data.augmentation names.

    Raises ValueError for a kind that is not one of `KINDS`, or examples that are no images.
    """
    fields = [field.strip() for field in config.augmentation.split(",")]
    kinds = [field for field in fields if field]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(
            f"data.augmentation names some of {', '.join(KINDS)}; received {unknown[0]!r}."
        )
    if kinds and len(input_shape) != 3:
        raise ValueError(
            f"data.augmentation = {config.augmentation!r} is for images (height, width, channels);"
            f" received examples of {input_shape}. Set data.augmentation = ''."
        )
    return Augmentation(flip="flip" in kinds, shift="shift" in kinds)


def augment(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
    """Returns images (n, height, width, channels), each varied by its row (flip, down, right).

    `drawn`: these rows of what `Augmentation.draw` returned.
    """
    flip, down, right = tf.unstack(drawn, axis=1)
    is_flipped = flip[:, None, None, None] == 1
    images = tf.where(is_flipped, images[:, :, ::-1], images)
    images = _shift(images, down, HEIGHT_AXIS)
    return _shift(images, right, WIDTH_AXIS)


def _shift(images: tf.Tensor, pixels: tf.Tensor, axis: int) -> tf.Tensor:
    """Images whose place i along the axis is what was at place i - pixels, or 0 if there is none.

    `pixels`: int32 of shape (n,), one number for each image.
    """
    side = tf.shape(images)[axis]
    sources = tf.range(side)[None] - pixels[:, None]  # (n, side)
    clipped = tf.clip_by_value(sources, 0, side - 1)
    moved = tf.gather(images, clipped, axis=axis, batch_dims=1)

    is_inside = (sources >= 0) & (sources < side)
    other_axis = WIDTH_AXIS if axis == HEIGHT_AXIS else HEIGHT_AXIS
    is_inside = tf.expand_dims(is_inside[..., None], other_axis)  # of every column or row, channel
    return tf.where(is_inside, moved, tf.zeros_like(moved))
