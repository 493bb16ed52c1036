"""The local training that every runtime uses: batches, epochs, and the numbers they lead to."""

import itertools
import math
from collections.abc import Callable

import keras
import numpy as np
import pytest

from shared.data import Dataset, Schema
from shared.experiment import Experiment, ModelSection, OptimizerSection, experiment_from_flat
from shared.training import (
    EVALUATION_BATCH_SIZE,
    EpochBatches,
    batch_slices,
    compile_model,
    evaluate,
    evaluation_batches,
    fit_epochs,
    make_loss,
    make_optimizer,
)
from shared.weights import max_difference, weights_sha256
from shared.zoo import build_model

MakeData = Callable[..., Dataset]


def compiled(data: Dataset, model: str = "linear", options: str = "", **keys: object) -> keras.Model:
    """A compiled model; keys are of the experiment, with __ for the dot."""
    experiment = experiment_from_flat({key.replace("__", "."): value for key, value in keys.items()})
    fresh = build_model(ModelSection(name=model, options=options), data.schema, seed=0)
    return compile_model(fresh, experiment, data.schema)


def orders(batches: EpochBatches, epochs: range) -> list[list[int]]:
    """The numbers of the examples, in the order in which each epoch shows them."""
    shown = []
    for epoch in epochs:
        batches.start_epoch(epoch)
        shown.append([int(i) for step in range(len(batches)) for i in batches[step][1]])
    return shown


# --- cutting an epoch into batches


@pytest.mark.parametrize("batch_size", range(1, 14))
def test_slices_cover_the_epoch_in_so_few_steps_that_none_is_smaller_than_half_a_batch(batch_size: int):
    for num_examples in range(1, 60):
        slices = batch_slices(num_examples, batch_size)
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(num_examples))
        assert len(slices) == math.ceil(num_examples / batch_size)
        sizes = [s.stop - s.start for s in slices]
        assert max(sizes) <= batch_size
        assert min(sizes) >= min(batch_size / 2, num_examples)
        assert set(sizes[:-2]) <= {batch_size}  # only the last two may be evened out


def test_a_batch_size_of_0_or_of_more_than_there_is_means_one_batch_of_everything():
    for batch_size in (0, 7, 8, 1000):
        assert batch_slices(7, batch_size) == [slice(0, 7)]


# --- the order of examples


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_examples", [8, 23, 24])
def test_the_ranks_parts_of_a_global_batch_are_the_batch_of_one_process(
    numbered: Callable[..., Dataset], num_examples: int, world_size: int
):
    data = numbered(num_examples, weighted=True)
    alone = EpochBatches(data, 8, seed=0)
    ranks = [EpochBatches(data, 8, seed=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(2):
        for batches in (alone, *ranks):
            batches.start_epoch(epoch)
            assert len(batches) == len(alone)
        for step in range(len(alone)):
            parts = [batches[step] for batches in ranks]
            for whole, *part in zip(alone[step], *parts, strict=True):  # x, y and weights
                np.testing.assert_array_equal(np.concatenate(part), whole)
            sizes = [len(y) for _, y, _ in parts]
            assert max(sizes) - min(sizes) <= 1


def test_every_example_is_shown_once_per_epoch(numbered: Callable[..., Dataset]):
    for order in orders(EpochBatches(numbered(23), 5, seed=0), range(3)):
        assert sorted(order) == list(range(23))


def test_the_order_differs_by_epoch_seed_and_owner(numbered: Callable[..., Dataset]):
    data = numbered(23)
    seen = [
        order
        for seed, owner in itertools.product((0, 1), ("", "a", "b"))
        for order in orders(EpochBatches(data, 5, seed, owner), range(3))
    ]
    assert len({tuple(order) for order in seen}) == 2 * 3 * 3
    assert list(range(23)) not in seen


def test_the_order_of_an_epoch_does_not_depend_on_the_epochs_before(numbered: Callable[..., Dataset]):
    data = numbered(23)
    *_, after_the_others = orders(EpochBatches(data, 5, seed=0), range(4))
    (directly,) = orders(EpochBatches(data, 5, seed=0), range(3, 4))
    assert directly == after_the_others


def test_the_order_does_not_depend_on_the_batch_size(numbered: Callable[..., Dataset]):
    data = numbered(23)
    assert orders(EpochBatches(data, 5, seed=0), range(2)) == orders(EpochBatches(data, 0, seed=0), range(2))


def test_sample_weights_travel_with_their_examples(numbered: Callable[..., Dataset]):
    batches = EpochBatches(numbered(23, weighted=True), 5, seed=0)
    for step in range(len(batches)):
        x, y, weight = batches[step]
        assert x[:, 0].tolist() == y.tolist() == weight.tolist()
    assert len(EpochBatches(numbered(23), 5, seed=0)[0]) == 2  # none, where there are none


# --- epochs


def adam_with_dropout(make_data: MakeData) -> tuple[keras.Model, EpochBatches]:
    data = make_data(20)
    model = compiled(data, "mlp", "units = [8]\ndropout_rate = 0.5", optimizer__learning_rate=0.05)
    return model, EpochBatches(data, 8, seed=0)


def test_epochs_in_two_halves_are_the_epochs_in_one_bit_by_bit(make_data: MakeData):
    """With random layers, and with an optimizer that has a memory."""
    whole, batches = adam_with_dropout(make_data)
    fit_epochs(whole, batches, 0, 4)
    halved, batches = adam_with_dropout(make_data)
    fit_epochs(halved, batches, 0, 2)
    after_half = weights_sha256(halved.get_weights())
    fit_epochs(halved, batches, 2, 4)
    assert weights_sha256(halved.get_weights()) == weights_sha256(whole.get_weights()) != after_half
    for a, b in zip(halved.optimizer.variables, whole.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_random_layers_draw_anew_in_each_epoch(make_data: MakeData):
    """With one order of examples and a rate of nearly 0, two epochs differ in nothing but what is dropped."""
    data = make_data(8)
    keys = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e-12}
    model = compiled(data, "mlp", "units = [64]\ndropout_rate = 0.5", **keys)
    losses = fit_epochs(model, EpochBatches(data, 0, seed=0), 0, 3).history["loss"]
    again = fit_epochs(model, EpochBatches(data, 0, seed=0), 0, 3).history["loss"]
    other_owner = fit_epochs(model, EpochBatches(data, 0, seed=0, owner="a"), 0, 3).history["loss"]
    assert losses == pytest.approx(again, rel=1e-6)  # the sum of the batch is in another order
    assert len({round(loss, 4) for loss in (*losses, *other_owner)}) == 6


def sgd_by_hand(
    weights: list[np.ndarray], data: Dataset, batches: list[list[int]], learning_rate: float
) -> list[np.ndarray]:
    """Gradient of the weighted squared error, mean over the batch: dL/dW = 2/b X' (v * (X W + c - y))."""
    w, c = (np.float64(array) for array in weights)
    for batch in batches:
        x, y = np.float64(data.x[batch]), np.float64(data.y[batch])
        v = np.ones(len(batch)) if data.sample_weight is None else np.float64(data.sample_weight[batch])
        error = v * ((x @ w)[:, 0] + c[0] - y)
        w = w - learning_rate * 2 / len(batch) * (x.T @ error)[:, None]
        c = c - learning_rate * 2 / len(batch) * error.sum()
    return [np.float32(w), np.float32(c)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("batch_size", "num_epochs"), [(0, 1), (8, 2)])
def test_sgd_on_a_linear_model_is_the_closed_form(
    make_data: MakeData, weighted: bool, batch_size: int, num_epochs: int
):
    """One full batch; and several batches over two epochs, which shows that Keras sees them in our order."""
    data = make_data(21, num_classes=0, weighted=weighted)
    model = compiled(data, optimizer__name="sgd", optimizer__learning_rate=0.1)
    batches = EpochBatches(data, batch_size, seed=0)
    expected, slices = model.get_weights(), batch_slices(21, batch_size)
    for epoch in range(num_epochs):
        batches.start_epoch(epoch)
        expected = sgd_by_hand(expected, data, [batches.order[s].tolist() for s in slices], learning_rate=0.1)
    start = model.get_weights()
    fit_epochs(model, batches, 0, num_epochs)
    assert max_difference(model.get_weights(), start) > 0.01
    assert max_difference(model.get_weights(), expected) < 1e-6  # float32 against float64, entries of about 1


def test_validation_metrics_are_those_of_an_evaluation_after_the_epoch(make_data: MakeData):
    data, held_out = make_data(20), make_data(9, seed=1)
    model = compiled(data)
    history = fit_epochs(model, EpochBatches(data, 8, seed=0), 0, 1, validation=held_out).history
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} == set(history)
    expected = evaluate(model, held_out)
    assert {name[4:]: values[-1] for name, values in history.items() if name.startswith("val_")} == expected


def test_fitting_again_and_again_is_fitting_at_once(make_data: MakeData):
    """Epoch by epoch with the same batches, in any order of epochs before: the pass is prepared only once."""
    data = make_data(20)
    batches = EpochBatches(data, 8, seed=0)
    start = compiled(data, optimizer__name="sgd").get_weights()
    again, at_once = compiled(data, optimizer__name="sgd"), compiled(data, optimizer__name="sgd")
    fit_epochs(again, batches, 5, 7)
    again.set_weights(start)
    for epoch in range(3):
        fit_epochs(again, batches, epoch, epoch + 1)
    fit_epochs(at_once, EpochBatches(data, 8, seed=0), 0, 3)
    assert weights_sha256(again.get_weights()) == weights_sha256(at_once.get_weights())
    assert batches.as_tf_dataset() is batches.as_tf_dataset()


def test_no_validation_examples_are_no_validation(make_data: MakeData):
    data = make_data(20)
    history = fit_epochs(compiled(data), EpochBatches(data, 0, seed=0), 0, 1, validation=data.take(np.arange(0)))
    assert set(history.history) == {"loss", "accuracy"}


# --- evaluation


@pytest.mark.parametrize("weighted", [False, True])
def test_evaluation_of_classes_is_cross_entropy_and_accuracy_by_hand(make_data: MakeData, weighted: bool):
    data = make_data(EVALUATION_BATCH_SIZE + 44, weighted=weighted)  # a whole batch and a part
    model = compiled(data)
    logits = np.float64(data.x) @ np.float64(model.get_weights()[0]) + np.float64(model.get_weights()[1])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    cross_entropy, hit = -log_p[np.arange(len(data)), data.y], logits.argmax(axis=1) == data.y
    v = np.ones(len(data)) if data.sample_weight is None else np.float64(data.sample_weight)
    metrics = evaluate(model, data)
    # weights are of the loss, which is divided by the number of examples; they do not touch other metrics
    expected = {"loss": (v * cross_entropy).sum() / len(data), "accuracy": hit.mean()}
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_evaluation_of_numbers_is_squared_and_absolute_error_by_hand(make_data: MakeData):
    data = make_data(EVALUATION_BATCH_SIZE + 44, num_classes=0)
    model = compiled(data)
    error = (np.float64(data.x) @ np.float64(model.get_weights()[0]))[:, 0] - data.y
    assert evaluate(model, data) == pytest.approx({"loss": (error**2).mean(), "mae": abs(error).mean()}, rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_batches_that_are_evaluated_again_and_again_give_what_their_examples_give(make_data: MakeData, weighted: bool):
    data = make_data(EVALUATION_BATCH_SIZE + 44, weighted=weighted)
    model, batches = compiled(data), evaluation_batches(data)
    expected = evaluate(model, data)
    assert evaluate(model, batches) == evaluate(model, batches) == expected
    model.set_weights([-w for w in model.get_weights()])
    assert evaluate(model, batches) == evaluate(model, data) != expected


# --- losses


def test_the_automatic_loss_suits_the_task():
    logits = np.float32([[2.0, -1.0, 0.5]])
    loss = make_loss("auto", Schema((4,), 3))(np.array([0]), logits)
    assert float(loss) == pytest.approx(np.log(1 + np.exp(-3.0) + np.exp(-1.5)))  # -log softmax(2, -1, 0.5)_0
    assert float(make_loss("auto", Schema((4,), 0))(np.float32([[1.0]]), np.float32([[4.0]]))) == 9.0


def test_a_loss_can_be_named():
    logits = np.float32([[1.0, 2.0, 4.0]])
    by_name = make_loss("SparseCategoricalCrossentropy", Schema((4,), 3))  # told that models output logits
    assert float(by_name(np.array([0]), logits)) == float(make_loss("auto", Schema((4,), 3))(np.array([0]), logits))
    loss = make_loss("MeanAbsoluteError", Schema((4,), 0))
    assert float(loss(np.float32([[1.0]]), np.float32([[4.0]]))) == 3.0


@pytest.mark.parametrize("name", ["MeanSquareError", "Loss", "get", "mean_squared_error", ""])
def test_what_is_no_loss_of_keras_is_refused_with_the_nearest(name: str):
    with pytest.raises(ValueError, match=r"training\.loss must be 'auto' or a class of keras\.losses") as caught:
        make_loss(name, Schema((4,), 0))
    assert f"received {name!r}. Nearest: " in str(caught.value)
    if name == "MeanSquareError":
        assert "Nearest: MeanSquaredError" in str(caught.value)


# --- optimizers


def step(optimizer: keras.optimizers.Optimizer, weights: list[float], gradient: list[float]) -> np.ndarray:
    variable = keras.Variable(np.float32(weights))
    optimizer.apply([keras.ops.convert_to_tensor(np.float32(gradient))], [variable])
    return np.asarray(variable)


def test_sgd_steps_against_the_gradient_and_keeps_its_momentum():
    plain = make_optimizer(OptimizerSection(name="sgd"), 0.5)
    assert step(plain, [1.0, 2.0], [4.0, -2.0]).tolist() == [-1.0, 3.0]  # 1 - 0.5 * 4, 2 + 0.5 * 2
    heavy = make_optimizer(OptimizerSection(name="sgd", momentum=0.5), 0.5)
    variable = keras.Variable(np.float32([0.0]))
    for _ in range(2):
        heavy.apply([keras.ops.convert_to_tensor(np.float32([4.0]))], [variable])
    assert np.asarray(variable).tolist() == [-5.0]  # -2, then the velocity 0.5 * -2 - 2 = -3


def test_the_global_norm_of_the_gradient_is_clipped_and_a_small_one_is_not():
    for name in ("sgd", "adam", "adamw"):
        optimizer = make_optimizer(OptimizerSection(name=name, global_clip_norm=2.5), 1.0)
        assert optimizer.global_clipnorm == 2.5
        assert make_optimizer(OptimizerSection(name=name), 1.0).global_clipnorm is None
    # the norm of (3, 4) is 5: half of it is left; that of (0.3, 0.4) is below 2.5
    for gradient, expected in (([3.0, 4.0], [-1.5, -2.0]), ([0.3, 0.4], [-0.3, -0.4])):
        clipped = make_optimizer(OptimizerSection(name="sgd", global_clip_norm=2.5), 1.0)
        np.testing.assert_allclose(step(clipped, [0.0, 0.0], gradient), expected, rtol=1e-6)


def test_weight_decay_is_decoupled_from_the_gradient():
    for name in ("sgd", "adamw"):
        optimizer = make_optimizer(OptimizerSection(name=name, weight_decay=0.25), 0.5)
        # w - rate * decay * w, without a gradient
        np.testing.assert_allclose(step(optimizer, [8.0], [0.0]), [7.0], rtol=1e-6)
    without = make_optimizer(OptimizerSection(name="adamw"), 0.5)  # Keras itself would decay by 0.004
    assert step(without, [8.0], [0.0]).tolist() == [8.0]


def test_adams_first_step_is_the_learning_rate_against_the_sign_of_the_gradient():
    adam = make_optimizer(OptimizerSection(name="adam"), 0.125)
    np.testing.assert_allclose(step(adam, [1.0, 1.0], [1e-2, -1e3]), [0.875, 1.125], rtol=1e-4)  # Keras adds an epsilon


def test_a_learning_rate_may_be_given_apart_from_the_experiment(make_data: MakeData):
    data = make_data(4)
    model = compile_model(build_model(ModelSection(name="linear"), data.schema, 0), Experiment(), data.schema, 0.75)
    assert float(model.optimizer.learning_rate) == 0.75
    assert float(compiled(data, optimizer__learning_rate=0.25).optimizer.learning_rate) == 0.25
    assert not model.jit_compile
