"""What the adapter does before any rank is involved. With ranks:
tests/parallel/test_equality.py.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_train.keras_horovod as hvk
from dist_train.collectives import LocalCommunicator
from dist_train.variables import bring_together


def compiled(jit_compile: bool = False) -> keras.Model:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(), "mse", jit_compile=jit_compile)
    return model


class TwoRanks(LocalCommunicator):
    """Enough of a communicator for what is checked before the first collective."""

    world_size = 2


def test_a_script_that_forgets_init_is_told_so_instead_of_training_alone() -> None:
    with pytest.raises(ValueError, match=r"Call hvk.init\(\) first"):
        hvk.distribute(compiled())


def test_a_model_must_be_compiled_first() -> None:
    with pytest.raises(ValueError, match="compile"):
        hvk.distribute(keras.Sequential([keras.layers.Dense(1)]), TwoRanks())


def test_xla_is_refused() -> None:
    with pytest.raises(ValueError, match="jit_compile=False"):
        hvk.distribute(compiled(jit_compile=True), TwoRanks())


def test_one_rank_changes_nothing() -> None:
    model = compiled()
    hvk.distribute(model, LocalCommunicator())
    assert type(model.optimizer) is keras.optimizers.Adam
    assert "fit" not in vars(model)
    assert hvk.bytes_sent(model) == 0


def test_a_model_compiled_anew_is_refused_until_it_is_distributed_again() -> None:
    """Its new optimizer would keep the gradients local without a word."""
    model = compiled()
    hvk.distribute(model, TwoRanks())
    model.compile(keras.optimizers.SGD(), "mse", jit_compile=False)
    x = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match="distribute after each compile"):
        model.fit(x, x[:, :1], verbose=0)
    hvk.distribute(model, TwoRanks())
    model.fit(x, x[:, :1], 4, 1, 0)  # positional arguments as in Keras: batch_size, epochs, verbose


@pytest.mark.parametrize("lacking", ["_clip_gradients", "scale_loss"])
def test_an_optimizer_without_the_hook_is_refused(
    monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """As in a Keras that renamed the method: gradients would stay local without a word."""
    model = compiled()
    monkeypatch.delattr(keras.src.optimizers.base_optimizer.BaseOptimizer, lacking)
    with pytest.raises(RuntimeError, match=f"lacks {lacking}"):
        hvk.distribute(model, TwoRanks())


class OptimizerOfItsOwn(keras.Model):
    """A train step past the compiled optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = keras.layers.Dense(1)
        self.own_optimizer = keras.optimizers.SGD(0.1)

    def call(self, x):
        return self.head(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        grads = tape.gradient(loss, self.trainable_variables)
        self.own_optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
        return {"loss": loss}


def test_gradients_that_pass_the_compiled_optimizer_by_are_refused() -> None:
    """As they would in a Keras that no longer calls the hooked method: they would stay local
    without a word.
    """
    model = OptimizerOfItsOwn()
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    hvk.distribute(model, TwoRanks())
    x = np.ones((4, 2), np.float32)
    with pytest.raises(RuntimeError, match="stayed local"):
        model.fit(x, x[:, :1], verbose=0)


def test_a_keras_that_no_longer_calls_the_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled()
    hvk.distribute(model, TwoRanks())
    monkeypatch.setattr(
        keras.src.optimizers.base_optimizer.BaseOptimizer,
        "_backend_apply_gradients",
        lambda self, grads, variables: self._backend_update_step(
            grads, variables, self.learning_rate
        ),
    )
    x = np.ones((4, 2), np.float32)
    with pytest.raises(RuntimeError, match="stayed local"):
        model.fit(x, x[:, :1], verbose=0)


class OverGloo(TwoRanks):
    def why_no_adasum(self) -> str:
        return "Adasum needs ranks that talk over MPI"


def test_adasum_is_refused_where_it_cannot_work() -> None:
    with pytest.raises(ValueError, match="MPI"):
        hvk.distribute(compiled(), OverGloo(), aggregation=hvk.Aggregation(op="adasum"))
    hvk.distribute(compiled(), TwoRanks(), aggregation=hvk.Aggregation(op="adasum"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"op": "sum"}, "received 'sum'"),
        ({"grouping": "some"}, "received 'some'"),
        ({"predivide_factor": 0.0}, "must be positive; received 0.0"),
        ({"op": "adasum", "predivide_factor": 2.0}, "received op='adasum'"),
    ],
)
def test_aggregations_that_make_no_sense_are_refused(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        hvk.Aggregation(**options)


@pytest.mark.parametrize("own", [False, True])
def test_a_distributed_optimizer_is_saved_as_the_plain_one(own: bool, tmp_path: Path) -> None:
    model = compiled()
    if own:
        model.compile(UsersOwn(0.5), "mse", jit_compile=False)
    plain = type(model.optimizer)
    hvk.distribute(model, TwoRanks())
    assert type(model.optimizer) is not plain
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is plain
    assert loaded.optimizer.get_config() == model.optimizer.get_config()


@keras.saving.register_keras_serializable("tests of the adapter")
class UsersOwn(keras.optimizers.Optimizer):
    def update_step(self, gradient, variable, learning_rate):
        variable.assign_sub(gradient * learning_rate)


def test_synchronised_batch_norm_is_saved_as_the_plain_one(tmp_path: Path) -> None:
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(), "mse", jit_compile=False)
    hvk.distribute(model, TwoRanks(), sync_batch_norm=True)
    assert type(model.layers[0]) is not keras.layers.BatchNormalization
    model.save(tmp_path / "model.keras")
    assert (
        type(keras.models.load_model(tmp_path / "model.keras").layers[0])
        is keras.layers.BatchNormalization
    )


def test_a_layer_is_synchronised_once_however_often_its_model_is_compiled() -> None:
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    for _ in range(2):
        model.compile(keras.optimizers.SGD(), "mse", jit_compile=False)
        hvk.distribute(model, TwoRanks(), sync_batch_norm=True)
    assert [base.__name__ for base in type(model.layers[0]).__mro__].count("_GlobalMoments") == 1
    assert type(model.layers[0]).__mro__[2] is keras.layers.BatchNormalization
    assert model.layers[0]._archipelago is model.optimizer._archipelago


# --- a loop of one's own


@pytest.mark.parametrize(
    "shape",
    [
        lambda a, b: a,
        lambda a, b: [a, b],
        lambda a, b: (a, b),
        lambda a, b: {"a": a, "b": b},
        lambda a, b: {"a": [a], "b": (b, {"again": a})},
    ],
)
def test_the_tape_takes_sources_in_every_structure(shape: Any) -> None:
    """As tf.GradientTape does."""
    sources = shape(tf.Variable([1.0, 2.0]), tf.Variable(3.0))
    flat = tf.nest.flatten(sources)
    with hvk.DistributedGradientTape(communicator=TwoRanks()) as tape:
        loss = tf.add_n(
            [tf.reduce_sum(tf.square(source)) for source in {id(s): s for s in flat}.values()]
        )
    found = tape.gradient(loss, sources)
    tf.nest.assert_same_structure(found, sources)
    for grad, source in zip(tf.nest.flatten(found), flat, strict=True):
        # a world of two, of which this fake adds but one
        np.testing.assert_allclose(grad, source.numpy())


# --- callbacks


def compiled_with(optimizer: keras.optimizers.Optimizer) -> keras.Model:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def rates_of_fit(
    model: keras.Model, callbacks: list[keras.callbacks.Callback], first: int, last: int
) -> list[float]:
    """The learning rate of each step of these epochs, two an epoch."""
    seen: list[float] = []
    see = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(float(model.optimizer.learning_rate))
    )
    x = np.ones((4, 2), np.float32)
    model.fit(
        x,
        x[:, :1],
        batch_size=2,
        initial_epoch=first,
        epochs=last,
        verbose=0,
        callbacks=[*callbacks, see],
    )
    return seen


def rates(
    callback: keras.callbacks.Callback, epochs: int, optimizer: keras.optimizers.Optimizer
) -> list[float]:
    """The learning rate of each step, two an epoch."""
    return rates_of_fit(compiled_with(optimizer), [callback], 0, epochs)


def test_warmup_climbs_linearly_to_the_compiled_rate_and_stays() -> None:
    found = rates(hvk.LearningRateWarmup(4, warmup_epochs=2), 4, keras.optimizers.SGD(0.8))
    np.testing.assert_allclose(found, [0.2, 0.35, 0.5, 0.65, 0.8, 0.8, 0.8, 0.8], rtol=1e-6)


def test_a_schedule_multiplies_the_compiled_rate_between_its_epochs() -> None:
    schedule = hvk.LearningRateSchedule(lambda epoch: 0.1**epoch, first_epoch=1, last_epoch=3)
    np.testing.assert_allclose(
        rates(schedule, 4, keras.optimizers.SGD(0.8)),
        [0.8, 0.8, 0.08, 0.08, 0.008, 0.008, 0.008, 0.008],
        rtol=1e-6,
    )


def test_a_rate_that_follows_a_schedule_of_its_own_is_refused() -> None:
    scheduled = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 10))
    with pytest.raises(ValueError, match="received an optimizer with a CosineDecay"):
        rates(hvk.LearningRateWarmup(4, warmup_epochs=1), 1, scheduled)


def warmup_and_schedule(**base: float) -> list[keras.callbacks.Callback]:
    return [
        hvk.LearningRateWarmup(4, warmup_epochs=2, **base),
        hvk.LearningRateSchedule(lambda epoch: 0.1 ** (epoch - 1), first_epoch=2, **base),
    ]


WARMED_UP = [0.2, 0.35, 0.5, 0.65, 0.08, 0.08, 0.008, 0.008]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [[0, 4], [0, 1, 2, 3, 4], [0, 3, 4]])
def test_the_rate_does_not_depend_on_how_epochs_are_shared_among_fits(
    bounds: list[int], reverse: bool
) -> None:
    model = compiled_with(keras.optimizers.SGD(0.8))
    found = [
        rate
        for first, last in itertools.pairwise(bounds)
        for rate in rates_of_fit(model, warmup_and_schedule()[:: -1 if reverse else 1], first, last)
    ]
    np.testing.assert_allclose(found, WARMED_UP, rtol=1e-6)


def test_a_loaded_models_rate_is_not_taken_for_the_compiled_one(tmp_path: Path) -> None:
    model = compiled_with(keras.optimizers.SGD(0.8))
    rates_of_fit(model, warmup_and_schedule(), 0, 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"taken 6 steps before, with the rate 0.08.*base=\.\.\."):
        rates_of_fit(loaded, warmup_and_schedule(), 3, 4)
    found = rates_of_fit(loaded, warmup_and_schedule(base=0.8), 3, 4)
    np.testing.assert_allclose(found, WARMED_UP[-2:], rtol=1e-6)


def test_a_rate_that_the_user_sets_between_two_fits_is_the_next_ones_base() -> None:
    model = hvk.distribute(compiled_with(keras.optimizers.SGD(0.8)), LocalCommunicator())
    rates_of_fit(model, [], 0, 1)
    halve = hvk.LearningRateSchedule(lambda epoch: 0.5)
    np.testing.assert_allclose(rates_of_fit(model, [halve], 1, 2), [0.4, 0.4])
    model.optimizer.learning_rate = 0.2
    np.testing.assert_allclose(rates_of_fit(model, [halve], 2, 3), [0.1, 0.1])


class Another(TwoRanks):
    """Rank 0 of two, of which the other logs 3."""

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, replace(value, value={"norm": 3.0})]


def test_logs_of_other_callbacks_are_averaged_over_ranks() -> None:
    logs = {"norm": 1.0, "loss": 5.0}
    hvk.AverageLogs(Another(), "norm").on_epoch_end(0, logs)
    assert logs == {"norm": 2.0, "loss": 5.0}
    with pytest.raises(ValueError, match=r"received 'loss', logged by ranks \[0\]"):
        hvk.AverageLogs(Another(), "loss").on_epoch_end(0, logs)


class OtherStatistics(TwoRanks):
    """Rank 0 of two, of which the other has three times its moving statistics and metrics."""

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, replace(value, value=[3 * array for array in value.value])]


def test_moving_statistics_are_the_mean_over_ranks() -> None:
    layer = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((2,)), layer])
    before = np.asarray(layer.moving_variance)
    bring_together(model, [], OtherStatistics())
    np.testing.assert_allclose(np.asarray(layer.moving_variance), 2 * before)
