"""The batches of local training: global batches of an epoch, and a rank's part of each.

The order of examples is determined by (seed, owner, epoch). Global batches do not depend on the
number of ranks.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from shared.augmentation import Augmentation, augment
from shared.data import Dataset
from shared.data.rows import Rows
from shared.seeding import rng_for

EVALUATION_BATCH_SIZE = 256
NO_AUGMENTATION = Augmentation()


def batch_slices(num_examples: int, batch_size: int) -> list[slice]:
    """Partitions an epoch into ceil(n / b) global batches; no example is dropped.

    | examples                         | batches                                            |
    |----------------------------------|----------------------------------------------------|
    | a multiple of b                  | all of b                                           |
    | a remainder of half b or more    | all of b, then one of the remainder                |
    | a remainder of less than half b  | the last two share their examples evenly           |
    | b or fewer, or b = 0             | one batch of everything                            |

    So no step rests on a handful of examples, and every rank gets some.

    >>> for num_examples in (8, 10, 9, 3):
    ...     print([s.stop - s.start for s in batch_slices(num_examples, 4)])
    [4, 4]
    [4, 4, 2]
    [4, 3, 2]
    [3]
    """
    if batch_size == 0 or batch_size >= num_examples:
        return [slice(0, num_examples)]

    bounds = [*range(0, num_examples, batch_size), num_examples]
    remainder = bounds[-1] - bounds[-2]
    if remainder < batch_size / 2:
        last_two = bounds[-1] - bounds[-3]
        bounds[-2] = bounds[-3] + (last_two + 1) // 2
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class _Pipeline:
    """The batches within TensorFlow; an epoch assigns its order to the variables.

    `order`: this rank's examples in the order of its steps. `draws`: how each example is
    augmented.
    """

    order: tf.Variable
    draws: tf.Variable | None
    dataset: tf.data.Dataset


class EpochBatches:
    """A rank's batches (x, y[, sample_weight]) of one epoch after another.

    An epoch's order is one random permutation of all examples, determined by (seed, owner, epoch)
    and partitioned into global batches. Each rank takes its part of every global batch; the ranks'
    parts differ by one example at most. So every example is seen exactly once per epoch over all
    ranks, whatever their number.

    `augmentation` is of images. It depends on the example and the epoch alone, not on the rank.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        owner: str = "",
        rank: int = 0,
        world_size: int = 1,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self.owner = owner
        self.rank = rank
        self.world_size = world_size
        self.slices = batch_slices(len(dataset), batch_size)
        self._pipeline: _Pipeline | None = None
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Sets the order of examples to that of an epoch.

        `__getitem__` follows it, and every pass through `as_tf_dataset` that begins from now on.
        """
        num_examples = len(self.dataset)
        rng = rng_for(self.seed, "epoch order", self.owner, epoch)
        self.order = rng.permutation(num_examples)
        if self.augmentation:
            image_shape = self.dataset.x.shape[1:]
            self.draws = self.augmentation.draw(
                num_examples, image_shape, self.seed, self.owner, epoch
            )

        # A pass through TensorFlow reads them from variables.
        if self._pipeline is not None:
            self._pipeline.order.assign(self._order_of_rank())
            if self._pipeline.draws is not None:
                self._pipeline.draws.assign(self.draws)

    def __len__(self) -> int:
        return len(self.slices)

    def indices(self, step: int) -> np.ndarray:
        """The examples that this rank gets in a step."""
        global_batch = self.order[self.slices[step]]
        return np.array_split(global_batch, self.world_size)[self.rank]

    def __getitem__(self, step: int) -> tuple[np.ndarray, ...]:
        indices = self.indices(step)
        x, *targets = as_fit_data(self.dataset.take(indices))
        if self.augmentation:
            x = augment(x, self.draws[indices]).numpy()
        return (x, *targets)

    def as_tf_dataset(self) -> tf.data.Dataset:
        """The same batches, gathered by TensorFlow beside the training: a pass is one epoch.

        Always the same object. Its elements have the same types and shapes (None, ...) for every
        data set of a schema, so that a compiled model that has trained on one traces nothing for
        another.
        """
        if self._pipeline is None:
            self._pipeline = self._make_pipeline()
        return self._pipeline.dataset

    def _order_of_rank(self) -> np.ndarray:
        return np.concatenate([self.indices(step) for step in range(len(self))])

    def _make_pipeline(self) -> _Pipeline:
        sizes = [len(self.indices(step)) for step in range(len(self))]
        bounds = np.cumsum([0, *sizes])  # the same in every epoch

        # The data and what changes from epoch to epoch live beside the training, on the CPU.
        draws: tf.Variable | None = None
        with tf.device("CPU:0"):
            readers = [_reader(array) for array in as_fit_data(self.dataset)]
            order = tf.Variable(self._order_of_rank(), trainable=False)
            if self.augmentation:
                draws = tf.Variable(self.draws, trainable=False)

        def gather(start: tf.Tensor, stop: tf.Tensor) -> tuple[tf.Tensor, ...]:
            indices = order[start:stop]
            x, *targets = (read(indices) for read in readers)
            if draws is not None:
                x = augment(x, tf.gather(draws, indices))
            return (x, *targets)

        batches = tf.data.Dataset.from_tensor_slices((bounds[:-1], bounds[1:]))
        batches = batches.map(gather).prefetch(2).with_options(_without_autotuning())
        return _Pipeline(order, draws, batches)


def evaluation_batches(dataset: Dataset) -> tf.data.Dataset:
    """All examples in their order, in batches for `evaluate`.

    Preparing them takes longer than a small evaluation: keep them where the same examples are
    evaluated again and again.
    """
    with tf.device("CPU:0"):
        if isinstance(dataset.x, Rows):
            readers = [_reader(array) for array in as_fit_data(dataset)]
            numbers = tf.data.Dataset.range(len(dataset)).batch(EVALUATION_BATCH_SIZE)
            batches = numbers.map(lambda indices: tuple(read(indices) for read in readers))
        else:
            examples = tf.data.Dataset.from_tensor_slices(as_fit_data(dataset))
            batches = examples.batch(EVALUATION_BATCH_SIZE)
    return batches.with_options(_without_autotuning())


def as_fit_data(dataset: Dataset) -> tuple[Any, ...]:
    """(x, y) or (x, y, sample_weight), as Keras takes them."""
    if dataset.sample_weight is None:
        return (dataset.x, dataset.y)
    return (dataset.x, dataset.y, dataset.sample_weight)


def _without_autotuning() -> tf.data.Options:
    """Returns the options of a pipeline in which there is nothing to tune.

    The end of each pass would wait for the autotuner's thread, up to as long as the pass took.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def _reader(array: np.ndarray | Rows) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns the function from indices to these rows of an array, within TensorFlow's graphs.

    The array is in memory, or in a file, of which each batch reads its rows.
    """
    if isinstance(array, Rows):
        batch_shape = (None, *array.shape[1:])

        def read_from_file(indices: tf.Tensor) -> tf.Tensor:
            rows = tf.numpy_function(array.__getitem__, [indices], tf.float32)
            return tf.ensure_shape(rows, batch_shape)

        return read_from_file

    tensor = tf.convert_to_tensor(array)
    return lambda indices: tf.gather(tensor, indices)
