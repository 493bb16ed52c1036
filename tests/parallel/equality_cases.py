"""The cases of test_equality.py: all that is special about each is said in its `Case`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

import dist_train.keras_horovod as hvk
from dist_train.collectives import Communicator
from shared.augmentation import Augmentation
from shared.data import Dataset
from shared.data.readers.texts import language_model_dataset
from shared.training import EpochBatches, StartEpoch, fit_epochs
from shared.zoo import autoencoder, cnn, transformer
from tests.parallel.equality_models import (
    NUM_CLASSES,
    NUM_FEATURES,
    MaskedTokens,
    OwnLossTerm,
    OwnTrainStep,
    TwoOutputs,
    UsersOwn,
    adapted_mlp,
    batch_norm,
    deferred_mlp,
    embeddings,
    half_precision_mlp,
    mlp,
    regularised_mlp,
)

GLOBAL_BATCH_SIZE = 24
STEPS_PER_EPOCH = 10
NUM_EPOCHS = 2  # 20 steps

optimizers = keras.optimizers

# --- data


def make_data(num_examples: int, weighted: bool = False) -> Dataset:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(num_examples, NUM_FEATURES)).astype(np.float32)
    noise = 0.3 * rng.normal(size=(num_examples, NUM_CLASSES))
    y = np.argmax(x[:, :NUM_CLASSES] + noise, axis=1).astype(np.int32)
    weight = rng.exponential(size=num_examples).astype(np.float32) if weighted else None
    return Dataset(x, y, NUM_CLASSES, weight)


def make_tokens(base: Dataset) -> Dataset:
    """A class for every feature, in the place of one for every example."""
    y = np.stack([np.roll(base.y, shift) for shift in range(NUM_FEATURES)], axis=1)
    return Dataset(base.x, y, NUM_CLASSES)


EVEN = make_data(STEPS_PER_EPOCH * GLOBAL_BATCH_SIZE)
UNEVEN = make_data(229)  # the last batch is smaller, and the ranks' parts of it differ in size
WEIGHTED = make_data(229, weighted=True)
TOKENS = make_tokens(UNEVEN)
WEIGHTED_TOKENS = replace(TOKENS, sample_weight=WEIGHTED.sample_weight[:, None])
RECONSTRUCTED = replace(UNEVEN, y=UNEVEN.x, num_classes=0)
IMAGES = replace(UNEVEN, x=np.random.default_rng(5).normal(size=(229, 8, 8, 1)).astype(np.float32))
NUMBERS_AS_TEXT = " ".join(str(number) for number in range(700))
LETTERS = language_model_dataset([NUMBERS_AS_TEXT], sequence_length=12)

# --- losses and metrics


def cross_entropy(reduction: str = "sum_over_batch_size") -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


CROSS_ENTROPY = cross_entropy()
WEIGHTED_MEAN = cross_entropy("mean_with_sample_weight")

# --- ways to train

History: TypeAlias = dict[str, list[float]]
Train: TypeAlias = Callable[[keras.Model, EpochBatches, Dataset, Communicator], History]


def with_fit(
    model: keras.Model, batches: EpochBatches, validation: Dataset, communicator: Communicator
) -> History:
    return fit_epochs(model, batches, 0, NUM_EPOCHS, validation=validation).history


def with_warmup(
    model: keras.Model, batches: EpochBatches, validation: Dataset, communicator: Communicator
) -> History:
    warmup = hvk.LearningRateWarmup(4, warmup_epochs=1)
    return fit_epochs(
        model, batches, 0, NUM_EPOCHS, validation=validation, callbacks=[warmup]
    ).history


def with_class_weights(
    model: keras.Model, batches: EpochBatches, validation: Dataset, communicator: Communicator
) -> History:
    return model.fit(
        batches.as_tf_dataset(),
        epochs=NUM_EPOCHS,
        callbacks=[StartEpoch(batches)],
        class_weight={0: 0.5, 1: 1.0, 2: 3.0},
        verbose=0,
    ).history


def with_two_targets(
    model: keras.Model, batches: EpochBatches, validation: Dataset, communicator: Communicator
) -> History:
    data = batches.as_tf_dataset().map(lambda x, y: (x, {"tokens": y, "number": x[:, :1]}))
    return model.fit(data, epochs=NUM_EPOCHS, callbacks=[StartEpoch(batches)], verbose=0).history


def with_own_loop(
    model: keras.Model, batches: EpochBatches, validation: Dataset, communicator: Communicator
) -> History:
    """Plain TensorFlow with the distributed tape; optimizer and loss are the compiled ones."""
    hvk.broadcast_variables(model)

    @tf.function(reduce_retracing=True)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with hvk.DistributedGradientTape() as tape:
            loss = model.loss(y, model(x, training=True))
        grads = tape.gradient(loss, model.trainable_variables, num_examples=tf.shape(x)[0])
        model.optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        return loss

    losses = []
    for epoch in range(NUM_EPOCHS):
        batches.start_epoch(epoch)
        own_loss = 0.0
        own_examples = 0
        for number in range(len(batches)):
            x, y = batches[number]
            own_loss += float(step(x, y)) * len(x)
            own_examples += len(x)
        by_rank = communicator.all_gather_object((own_loss, own_examples))
        total_loss, num_examples = np.sum(by_rank, axis=0)
        losses.append(total_loss / num_examples)
    return {"loss": losses}


# --- the cases


@dataclass(frozen=True)
class Case:
    """A training of 20 steps that must end with the same weights on any number of ranks.

    tolerance: of a weight's difference from one process, for sums in another order.
    is_one_process: whether the law holds at all; else ranks must only equal each other.
    has_exact_metrics: whether the reported loss is that of one process. Keras weighs each batch's
        loss by its examples, also where the loss itself was divided by something else (weights,
        unmasked tokens, nothing): then it depends on the partition of a batch, and the gradient
        does not.
    """

    optimizer: Callable[[], optimizers.Optimizer]
    model: Callable[[], keras.Model] = mlp
    loss: Any = CROSS_ENTROPY
    data: Dataset = UNEVEN
    train: Train = with_fit
    steps_per_execution: int = 1
    measures_accuracy: bool = True
    augmentation: Augmentation = field(default_factory=Augmentation)

    # Of `distribute`; None: the model is not distributed.
    distribute_options: Mapping[str, Any] | None = field(default_factory=dict)

    saves_model: bool = False
    tolerance: float = 1e-5
    is_one_process: bool = True
    has_exact_metrics: bool = True


CASES: dict[str, Case] = {
    # every optimizer
    "sgd": Case(lambda: optimizers.SGD(0.1)),
    "rmsprop": Case(lambda: optimizers.RMSprop(0.01, momentum=0.5, centered=True)),
    "adagrad": Case(lambda: optimizers.Adagrad(0.05)),
    "adadelta": Case(lambda: optimizers.Adadelta(1.0)),
    "adamax": Case(lambda: optimizers.Adamax(0.01)),
    "nadam": Case(lambda: optimizers.Nadam(0.01, clipvalue=0.05)),
    "ftrl": Case(lambda: optimizers.Ftrl(0.05)),
    "lion": Case(lambda: optimizers.Lion(0.001)),
    "lamb": Case(lambda: optimizers.Lamb(0.01)),
    "adafactor": Case(lambda: optimizers.Adafactor(0.01)),
    "amsgrad": Case(lambda: optimizers.Adam(0.01, amsgrad=True, weight_decay=0.01)),
    "users_own": Case(lambda: UsersOwn(0.01), distribute_options={"compile_update": True}),
    "scheduled": Case(
        lambda: optimizers.SGD(optimizers.schedules.CosineDecay(0.2, 20), momentum=0.9)
    ),
    "sgd_momentum": Case(lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True), data=EVEN),
    "adam": Case(lambda: optimizers.Adam(0.01), data=EVEN),
    "adamw_global_clip": Case(
        lambda: optimizers.AdamW(0.01, global_clipnorm=0.05), data=EVEN, saves_model=True
    ),
    "ema": Case(lambda: optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=4), data=EVEN),
    "clipped": Case(lambda: optimizers.SGD(0.3, global_clipnorm=0.3)),
    "accumulation": Case(
        lambda: optimizers.Adam(0.01, gradient_accumulation_steps=2, clipnorm=0.05)
    ),
    # parts of a batch that differ in size or weight
    "uneven_last_batch": Case(lambda: optimizers.SGD(0.1, momentum=0.9)),
    "sample_weights": Case(lambda: optimizers.Adam(0.01), data=WEIGHTED),
    "class_weights": Case(lambda: optimizers.SGD(0.1), train=with_class_weights),
    "weighted_mean_loss": Case(
        lambda: optimizers.SGD(0.1), loss=WEIGHTED_MEAN, data=WEIGHTED, has_exact_metrics=False
    ),
    "masked_tokens": Case(
        lambda: optimizers.SGD(0.2), model=MaskedTokens, data=TOKENS, has_exact_metrics=False
    ),
    "weighted_masked_mean": Case(
        lambda: optimizers.SGD(0.2),
        model=MaskedTokens,
        loss=WEIGHTED_MEAN,
        data=WEIGHTED_TOKENS,
        has_exact_metrics=False,
    ),
    "two_outputs": Case(
        lambda: optimizers.SGD(0.1),
        model=TwoOutputs,
        loss={"tokens": CROSS_ENTROPY, "number": "mse"},
        data=TOKENS,
        train=with_two_targets,
        measures_accuracy=False,
        has_exact_metrics=False,
    ),
    "summed_loss": Case(
        lambda: optimizers.SGD(0.01), loss=cross_entropy("sum"), has_exact_metrics=False
    ),
    # models and steps of the user's own
    "embeddings": Case(
        lambda: optimizers.Adam(0.01, global_clipnorm=0.1), model=embeddings, data=EVEN
    ),
    "uneven_embeddings": Case(lambda: optimizers.SGD(0.5), model=embeddings),
    "deferred_build": Case(lambda: optimizers.Adam(0.01), model=deferred_mlp, data=EVEN),
    "regularised": Case(lambda: optimizers.SGD(0.1), model=regularised_mlp),
    "adapters": Case(lambda: optimizers.Adam(0.01), model=adapted_mlp),
    "own_train_step": Case(lambda: optimizers.SGD(0.1), model=OwnTrainStep),
    "own_loss_term": Case(lambda: optimizers.SGD(0.1), model=OwnLossTerm),
    "own_loop": Case(lambda: optimizers.Adam(0.01), train=with_own_loop, distribute_options=None),
    "warmup": Case(lambda: optimizers.SGD(0.3, momentum=0.9), data=EVEN, train=with_warmup),
    # settings of the adapter, of batch normalisation and of precision
    "steps_per_execution": Case(lambda: optimizers.Adam(0.01), steps_per_execution=4),
    "per_tensor": Case(
        lambda: optimizers.Adam(0.01),
        distribute_options={
            "aggregation": hvk.Aggregation(grouping="per_tensor"),
            "compile_update": False,
        },
    ),
    "predivided": Case(
        lambda: optimizers.Adam(0.01),
        distribute_options={"aggregation": hvk.Aggregation(predivide_factor=1.0)},
    ),
    "sync_batch_norm": Case(
        lambda: optimizers.SGD(0.1), model=batch_norm, distribute_options={"sync_batch_norm": True}
    ),
    "batch_norm": Case(  # each rank's own statistics: another computation
        lambda: optimizers.SGD(0.1), model=batch_norm, is_one_process=False
    ),
    "loss_scale": Case(
        lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01), dynamic_growth_steps=4)
    ),
    "mixed_precision": Case(
        lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.1), initial_scale=2.0**8),
        model=half_precision_mlp,
        tolerance=2e-3,
        has_exact_metrics=False,
    ),
    # models of the zoo
    "language_model": Case(
        # Adam would blow up the rounding of a key's bias, whose gradient is 0
        lambda: optimizers.SGD(0.2, momentum=0.9),
        model=lambda: transformer.build_language_model(
            LETTERS.schema, dim=16, num_heads=2, num_layers=1
        ),
        data=LETTERS,
    ),
    "autoencoder": Case(
        lambda: optimizers.SGD(0.1, momentum=0.9),
        model=lambda: autoencoder.build(RECONSTRUCTED.schema, units=[4]),
        loss="mse",
        data=RECONSTRUCTED,
        measures_accuracy=False,
    ),
    "augmentation": Case(
        lambda: optimizers.SGD(0.1),
        model=lambda: cnn.build(IMAGES.schema),
        data=IMAGES,
        augmentation=Augmentation(flip=True, shift=True),
    ),
}
