"""Random variants of training images, determined by (seed, owner, epoch) and the example: the same on any rank."""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from shared.experiment import DataSection
from shared.seeding import rng_for

KINDS = ("flip", "shift")
SHIFT = 1 / 8  # of the height and the width, at most: 4 pixels of 32 (He et al. 2015, arXiv:1512.03385, section 4.2)


@dataclass(frozen=True)
class Augmentation:
    """What is done to images: `flip`: half of them, left to right; `shift`: by up to an eighth, then black."""

    flip: bool = False
    shift: bool = False

    def __bool__(self) -> bool:
        return self.flip or self.shift

    def draw(self, num_examples: int, shape: tuple[int, ...], seed: int, owner: str, epoch: int) -> np.ndarray:
        """For each example (flip, down, right), int32 of shape (n, 3): mirrored or not, and pixels it is moved by."""
        rng = rng_for(seed, "augmentation", owner, epoch)
        most = [int(SHIFT * side) if self.shift else 0 for side in shape[:2]]
        flips = rng.integers(0, 1 + self.flip, num_examples)
        moves = [rng.integers(-side, side + 1, num_examples) for side in most]
        return np.stack([flips, *moves], axis=1).astype(np.int32)


def augmentation_of(config: DataSection, input_shape: tuple[int, ...]) -> Augmentation:
    """The experiment's. Raises ValueError for kinds that there are not, or examples that are no images."""
    names = [name.strip() for name in config.augmentation.split(",") if name.strip()]
    if unknown := [name for name in names if name not in KINDS]:
        raise ValueError(f"data.augmentation names some of {', '.join(KINDS)}; received {unknown[0]!r}.")
    if names and len(input_shape) != 3:
        raise ValueError(
            f"data.augmentation = {config.augmentation!r} is for images (height, width, channels); received examples "
            f"of {input_shape}. Set data.augmentation = ''."
        )
    return Augmentation(**dict.fromkeys(names, True))


def augment(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
    """Images (n, height, width, channels), each as (flip, down, right) of `drawn` says."""
    flip, down, right = tf.unstack(drawn, axis=1)
    images = tf.where(flip[:, None, None, None] == 1, images[:, :, ::-1], images)
    return _moved(_moved(images, down, 1), right, 2)


def _moved(images: tf.Tensor, by: tf.Tensor, axis: int) -> tf.Tensor:
    """Pixel i of the axis is what was pixel i - by, or 0."""
    side = tf.shape(images)[axis]
    sources = tf.range(side)[None] - by[:, None]
    taken = tf.gather(images, tf.clip_by_value(sources, 0, side - 1), axis=axis, batch_dims=1)
    inside = (sources >= 0) & (sources < side)
    inside = inside[:, :, None, None] if axis == 1 else inside[:, None, :, None]
    return tf.where(inside, taken, tf.zeros_like(taken))
