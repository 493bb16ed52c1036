"""The local training that every runtime uses: compile, batches in a seeded order, epochs, evaluation.

One process, a rank of a cluster and a silo of a federation run this same code; the adapters change only who owns which
examples and what happens to the gradient or to the weights afterwards.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from shared.augmentation import Augmentation, augment
from shared.data import Dataset, Schema
from shared.data.rows import Rows
from shared.experiment import Experiment, OptimizerSection, nearest_names
from shared.seeding import rng_for

EVALUATION_BATCH_SIZE = 256
NO_AUGMENTATION = Augmentation()
LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule


def make_optimizer(config: OptimizerSection, learning_rate: LearningRate) -> keras.optimizers.Optimizer:
    common: dict[str, Any] = {"global_clipnorm": config.global_clip_norm} if config.global_clip_norm > 0 else {}
    if config.accumulation_steps > 1:
        common["gradient_accumulation_steps"] = config.accumulation_steps
    match config.name:
        case "sgd":
            decay = config.weight_decay or None
            return keras.optimizers.SGD(learning_rate, momentum=config.momentum, weight_decay=decay, **common)
        case "adam":
            return keras.optimizers.Adam(learning_rate, **common)
        case "adamw":
            return keras.optimizers.AdamW(learning_rate, weight_decay=config.weight_decay, **common)


def make_loss(name: str, schema: Schema) -> keras.losses.Loss:
    """auto: cross-entropy for classes, mean squared error for numbers; otherwise a Keras loss by name.

    Models output logits, so every loss that can be told so is.
    """
    if name == "auto":
        if schema.task == "classification":
            return keras.losses.SparseCategoricalCrossentropy(from_logits=True, name="loss")
        return keras.losses.MeanSquaredError(name="loss")
    base = keras.losses.Loss
    classes = {n: c for n, c in vars(keras.losses).items() if isinstance(c, type) and issubclass(c, base) and c != base}
    if name not in classes:
        raise ValueError(
            f"training.loss must be 'auto' or a class of keras.losses; received {name!r}. "
            f"Nearest: {', '.join(nearest_names(name, classes)[:3])}."
        )
    wants_logits = "from_logits" in inspect.signature(classes[name]).parameters
    return classes[name](from_logits=True) if wants_logits else classes[name]()


def compile_model(
    model: keras.Model,
    experiment: Experiment,
    schema: Schema,
    learning_rate: LearningRate | None = None,
    default_steps_per_execution: int = 1,
) -> keras.Model:
    """Compiles in place: optimizer, loss, and accuracy (classes) or mean absolute error (numbers)."""
    metric = (
        keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        if schema.task == "classification"
        else keras.metrics.MeanAbsoluteError(name="mae")
    )
    model.compile(
        optimizer=make_optimizer(experiment.optimizer, learning_rate or experiment.optimizer.learning_rate),
        loss=make_loss(experiment.training.loss, schema),
        metrics=[metric],
        steps_per_execution=experiment.performance.steps_per_execution or default_steps_per_execution,
        jit_compile=False,  # XLA cannot hold a collective, and its rounding differs: one path keeps all runtimes equal
    )
    return model


def batch_slices(num_examples: int, batch_size: int) -> list[slice]:
    """Cuts an epoch into ceil(n / b) global batches with nothing dropped.

    All have `batch_size` examples but the last; a last one of less than half that is evened out with its neighbour, so
    that no step rests on a handful of examples and every rank gets some. `batch_size` 0 means one batch of everything.

    >>> [s.stop - s.start for s in batch_slices(9, 4)]
    [4, 3, 2]
    """
    if batch_size == 0 or batch_size >= num_examples:
        return [slice(0, num_examples)]
    bounds = [*range(0, num_examples, batch_size), num_examples]
    if bounds[-1] - bounds[-2] < batch_size / 2:
        bounds[-2] = bounds[-3] + (bounds[-1] - bounds[-3] + 1) // 2
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


class EpochBatches:
    """A rank's batches of an epoch: (x, y[, sample_weight]) in an order determined by (seed, owner, epoch).

    `augmentation` is of images, and depends on the example and the epoch alone.

    The order is one random permutation of all examples per epoch, cut into global batches; each rank takes its part of
    every global batch. So every example is seen exactly once per epoch over all ranks, and the global batches do not
    depend on the number of ranks (sizes of the ranks' parts differ by at most one).
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
        self.seed, self.owner = seed, owner
        self.rank, self.world_size = rank, world_size
        self.slices = batch_slices(len(dataset), batch_size)
        self._order_in_graphs: tf.Variable | None = None  # what `as_tf_dataset` gathers: this rank's examples in order
        self._drawn_in_graphs: tf.Variable | None = None  # how it augments each of them
        self._in_graphs: tf.data.Dataset | None = None
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """The epoch whose order `__getitem__`, and every pass through `as_tf_dataset` begun from now on, follows."""
        self.order = rng_for(self.seed, "epoch order", self.owner, epoch).permutation(len(self.dataset))
        if self._order_in_graphs is not None:
            self._order_in_graphs.assign(np.concatenate([self.indices(step) for step in range(len(self))]))
        if self.augmentation:
            n, shape = len(self.dataset), self.dataset.x.shape[1:]
            self.drawn = self.augmentation.draw(n, shape, self.seed, self.owner, epoch)
            if self._drawn_in_graphs is not None:
                self._drawn_in_graphs.assign(self.drawn)

    def __len__(self) -> int:
        return len(self.slices)

    def indices(self, step: int) -> np.ndarray:
        """Which examples this rank gets in a step."""
        return np.array_split(self.order[self.slices[step]], self.world_size)[self.rank]

    def __getitem__(self, step: int) -> tuple[np.ndarray, ...]:
        indices = self.indices(step)
        x, *others = as_fit_data(self.dataset.take(indices))
        return (augment(x, self.drawn[indices]).numpy() if self.augmentation else x, *others)

    def as_tf_dataset(self) -> tf.data.Dataset:
        """The same batches, gathered by TensorFlow beside the training: a pass is one epoch. Always the same object."""
        if self._in_graphs is None:
            self._in_graphs = self._make_tf_dataset()
        return self._in_graphs

    def _make_tf_dataset(self) -> tf.data.Dataset:
        parts = [self.indices(step) for step in range(len(self))]
        bounds = np.cumsum([0, *map(len, parts)])  # the same in every epoch
        with tf.device("CPU:0"):
            readers = [_reader(array) for array in as_fit_data(self.dataset)]
            self._order_in_graphs = order = tf.Variable(np.concatenate(parts), trainable=False)
            if self.augmentation:
                self._drawn_in_graphs = drawn = tf.Variable(self.drawn, trainable=False)

        def gather(start: tf.Tensor, stop: tf.Tensor) -> tuple[tf.Tensor, ...]:
            indices = order[start:stop]
            x, *others = (read(indices) for read in readers)
            return (augment(x, tf.gather(drawn, indices)) if self.augmentation else x, *others)

        options = tf.data.Options()
        options.autotune.enabled = False  # nothing to tune, and the end of each pass waits for its thread: up to a pass
        return (
            tf.data.Dataset.from_tensor_slices((bounds[:-1], bounds[1:])).map(gather).prefetch(2).with_options(options)
        )


class StartEpoch(keras.callbacks.Callback):
    """Before each epoch: its order of examples, and random layers reseeded by (seed, owner, rank, epoch).

    So an epoch does not depend on how the ones before it were run: a resumed run draws what the undisturbed one drew.
    """

    def __init__(self, batches: EpochBatches) -> None:
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.batches.start_epoch(epoch)
        rng = rng_for(self.batches.seed, "random layers", self.batches.owner, self.batches.rank, epoch)
        for variable in self.model.variables:
            if variable.path.endswith("seed_generator_state"):
                variable.assign(rng.integers(2**32, size=variable.shape, dtype=np.uint32))


def fit_epochs(
    model: keras.Model,
    batches: EpochBatches,
    first_epoch: int,
    last_epoch: int,
    validation: Dataset | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int = 0,
) -> keras.callbacks.History:
    """Runs the epochs first_epoch .. last_epoch - 1 of a compiled model; `callbacks` see the metrics of each."""
    return model.fit(
        batches.as_tf_dataset(),
        initial_epoch=first_epoch,
        epochs=last_epoch,
        validation_data=evaluation_batches(validation) if validation else None,
        callbacks=[StartEpoch(batches), *callbacks],
        shuffle=False,
        verbose=verbose,
    )


def evaluation_batches(dataset: Dataset) -> tf.data.Dataset:
    """All examples in their order, for who evaluates the same ones again and again: to prepare them takes longer."""
    options = tf.data.Options()
    options.autotune.enabled = False
    with tf.device("CPU:0"):
        if isinstance(dataset.x, Rows):
            readers = [_reader(array) for array in as_fit_data(dataset)]
            numbers = tf.data.Dataset.range(len(dataset)).batch(EVALUATION_BATCH_SIZE)
            batches = numbers.map(lambda indices: tuple(read(indices) for read in readers))
        else:
            batches = tf.data.Dataset.from_tensor_slices(as_fit_data(dataset)).batch(EVALUATION_BATCH_SIZE)
    return batches.with_options(options)


def _reader(array: np.ndarray | Rows) -> Callable[[tf.Tensor], tf.Tensor]:
    """From indices to these rows of an array, in memory or in a file, within TensorFlow's graphs."""
    if isinstance(array, Rows):
        shape = (None, *array.shape[1:])
        return lambda indices: tf.ensure_shape(tf.numpy_function(array.__getitem__, [indices], tf.float32), shape)
    tensor = tf.convert_to_tensor(array)
    return lambda indices: tf.gather(tensor, indices)


def evaluate(model: keras.Model, dataset: Dataset | tf.data.Dataset) -> dict[str, float]:
    """Mean loss and metrics of a compiled model over a data set, or over its `evaluation_batches`."""
    batches = evaluation_batches(dataset) if isinstance(dataset, Dataset) else dataset
    results = model.evaluate(batches, verbose=0, return_dict=True)
    return {name: float(value) for name, value in results.items()}


def as_fit_data(dataset: Dataset) -> tuple[Any, ...]:
    """(x, y) or (x, y, sample_weight), as Keras takes them."""
    weight = () if dataset.sample_weight is None else (dataset.sample_weight,)
    return (dataset.x, dataset.y, *weight)
