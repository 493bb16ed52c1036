"""The local training that every runtime uses: epochs, and the numbers they lead to."""

from collections.abc import Callable

import keras
import numpy as np
import pytest

from shared.batches import EVALUATION_BATCH_SIZE
from shared.data import Dataset, Schema
from shared.experiment import Experiment, ModelSection, OptimizerSection, experiment_from_flat
from shared.training import (
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


def compiled(
    data: Dataset, model: str = "linear", options: str = "", **keys: object
) -> keras.Model:
    """A compiled model; keys are of the experiment, with __ for the dot."""
    experiment = experiment_from_flat(
        {key.replace("__", "."): value for key, value in keys.items()}
    )
    fresh = build_model(ModelSection(name=model, options=options), data.schema, seed=0)
    return compile_model(fresh, experiment, data.schema)


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
    """Nothing else differs between two epochs with one order and a learning rate of nearly 0."""
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
    """Steps along the gradient of the weighted squared error, a mean over the batch.

    dL/dW = 2/b X' (v * (X W + c - y)).
    """
    w, c = (np.float64(array) for array in weights)
    for batch in batches:
        x, y = np.float64(data.x[batch]), np.float64(data.y[batch])
        v = (
            np.ones(len(batch))
            if data.sample_weight is None
            else np.float64(data.sample_weight[batch])
        )
        error = v * ((x @ w)[:, 0] + c[0] - y)
        w = w - learning_rate * 2 / len(batch) * (x.T @ error)[:, None]
        c = c - learning_rate * 2 / len(batch) * error.sum()
    return [np.float32(w), np.float32(c)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("batch_size", "num_epochs"), [(0, 1), (8, 2)])
def test_sgd_on_a_linear_model_is_the_closed_form(
    make_data: MakeData, weighted: bool, batch_size: int, num_epochs: int
):
    """One full batch; and several batches over two epochs, which Keras must get in our order."""
    data = make_data(21, num_classes=0, weighted=weighted)
    model = compiled(data, optimizer__name="sgd", optimizer__learning_rate=0.1)
    start = model.get_weights()

    # By hand, in float64.
    batches = EpochBatches(data, batch_size, seed=0)
    slices = batch_slices(21, batch_size)
    expected = start
    for epoch in range(num_epochs):
        batches.start_epoch(epoch)
        examples = [batches.order[part].tolist() for part in slices]
        expected = sgd_by_hand(expected, data, examples, learning_rate=0.1)

    # By Keras, in float32, with entries of about 1.
    fit_epochs(model, batches, 0, num_epochs)
    assert max_difference(model.get_weights(), start) > 0.01
    assert max_difference(model.get_weights(), expected) < 1e-6


def test_validation_metrics_are_those_of_an_evaluation_after_the_epoch(make_data: MakeData):
    data, held_out = make_data(20), make_data(9, seed=1)
    model = compiled(data)
    history = fit_epochs(model, EpochBatches(data, 8, seed=0), 0, 1, validation=held_out).history
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} == set(history)
    expected = evaluate(model, held_out)
    assert {
        name[4:]: values[-1] for name, values in history.items() if name.startswith("val_")
    } == expected


def test_fitting_again_and_again_is_fitting_at_once(make_data: MakeData):
    """Epoch by epoch with the same batches, whatever epochs came before; prepared only once."""
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


@pytest.mark.parametrize("steps_per_execution", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_compiled_model_traces_nothing_for_the_data_of_another_silo_and_trains_as_its_own_would(
    make_data: MakeData, weighted: bool, steps_per_execution: int
):
    """With another number of examples and of steps, and a fresh optimizer."""
    keys = {"performance__steps_per_execution": steps_per_execution}
    first, second = make_data(20, weighted=weighted), make_data(37, seed=1, weighted=weighted)
    shared_model = compiled(first, "mlp", **keys)
    traced = counting_traces(shared_model)
    start = [np.array(v) for v in optimizer_and_model_variables(shared_model)]

    # The first silo: Keras traces its step for training, and for evaluation.
    train_and_evaluate(shared_model, first, owner="a")
    num_traced = dict(traced)
    assert min(num_traced.values()) > 0

    # The second: the same compiled model, set back to where it started.
    for variable, value in zip(optimizer_and_model_variables(shared_model), start, strict=True):
        variable.assign(value)
    metrics = train_and_evaluate(shared_model, second, owner="b")
    assert traced == num_traced

    own_model = compiled(second, "mlp", **keys)
    assert train_and_evaluate(own_model, second, owner="b") == metrics
    assert weights_sha256(own_model.get_weights()) == weights_sha256(shared_model.get_weights())


def train_and_evaluate(model: keras.Model, data: Dataset, owner: str) -> dict[str, float]:
    validation = data.take(np.arange(len(data) // 4))
    batches = EpochBatches(data, 8, seed=0, owner=owner)
    fit_epochs(model, batches, 0, 2, validation=validation)
    return evaluate(model, validation)


def optimizer_and_model_variables(model: keras.Model) -> list[keras.Variable]:
    model.optimizer.build(model.trainable_variables)
    return [*model.optimizer.variables, *model.variables]


def counting_traces(model: keras.Model) -> dict[str, int]:
    """Counts how often the Python of a step runs: only when TensorFlow traces it."""
    traced = {"train_step": 0, "test_step": 0}

    def counted(name: str, step: Callable[..., object]) -> Callable[..., object]:
        def traced_step(data: object) -> object:
            traced[name] += 1
            return step(data)

        return traced_step

    for name in traced:
        setattr(model, name, counted(name, getattr(model, name)))
    return traced


def test_no_validation_examples_are_no_validation(make_data: MakeData):
    data = make_data(20)
    history = fit_epochs(
        compiled(data), EpochBatches(data, 0, seed=0), 0, 1, validation=data.take(np.arange(0))
    )
    assert set(history.history) == {"loss", "accuracy"}


# --- evaluation


@pytest.mark.parametrize("weighted", [False, True])
def test_evaluation_of_classes_is_cross_entropy_and_accuracy_by_hand(
    make_data: MakeData, weighted: bool
):
    data = make_data(EVALUATION_BATCH_SIZE + 44, weighted=weighted)  # a whole batch and a part
    model = compiled(data)
    logits = np.float64(data.x) @ np.float64(model.get_weights()[0]) + np.float64(
        model.get_weights()[1]
    )
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    cross_entropy, hit = -log_p[np.arange(len(data)), data.y], logits.argmax(axis=1) == data.y
    v = np.ones(len(data)) if data.sample_weight is None else np.float64(data.sample_weight)
    metrics = evaluate(model, data)
    # Weights are of the loss, which is divided by the number of examples, and of no other metric.
    expected = {"loss": (v * cross_entropy).sum() / len(data), "accuracy": hit.mean()}
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_evaluation_of_numbers_is_squared_and_absolute_error_by_hand(make_data: MakeData):
    data = make_data(EVALUATION_BATCH_SIZE + 44, num_classes=0)
    model = compiled(data)
    error = (np.float64(data.x) @ np.float64(model.get_weights()[0]))[:, 0] - data.y
    assert evaluate(model, data) == pytest.approx(
        {"loss": (error**2).mean(), "mae": abs(error).mean()}, rel=1e-5
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_batches_that_are_evaluated_again_and_again_give_what_their_examples_give(
    make_data: MakeData, weighted: bool
):
    data = make_data(EVALUATION_BATCH_SIZE + 44, weighted=weighted)
    model, batches = compiled(data), evaluation_batches(data)
    expected = evaluate(model, data)
    assert evaluate(model, batches) == evaluate(model, batches) == expected
    model.set_weights([-w for w in model.get_weights()])
    assert evaluate(model, batches) == evaluate(model, data) != expected


# --- losses


def test_the_automatic_loss_suits_the_task():
    logits = np.float32([[2.0, -1.0, 0.5]])
    of_classes = make_loss("auto", Schema((4,), 3))
    expected = np.log(1 + np.exp(-3.0) + np.exp(-1.5))  # -log softmax(2, -1, 0.5)_0
    assert float(of_classes(np.array([0]), logits)) == pytest.approx(expected)
    of_numbers = make_loss("auto", Schema((4,), 0))
    assert float(of_numbers(np.float32([[1.0]]), np.float32([[4.0]]))) == 9.0


def test_a_loss_can_be_named():
    logits = np.float32([[1.0, 2.0, 4.0]])
    by_name = make_loss("SparseCategoricalCrossentropy", Schema((4,), 3))  # on logits
    automatic = make_loss("auto", Schema((4,), 3))
    assert float(by_name(np.array([0]), logits)) == float(automatic(np.array([0]), logits))
    loss = make_loss("MeanAbsoluteError", Schema((4,), 0))
    assert float(loss(np.float32([[1.0]]), np.float32([[4.0]]))) == 3.0


@pytest.mark.parametrize("name", ["MeanSquareError", "Loss", "get", "mean_squared_error", ""])
def test_what_is_no_loss_of_keras_is_refused_with_the_nearest(name: str):
    with pytest.raises(
        ValueError, match=r"training\.loss must be 'auto' or a class of keras\.losses"
    ) as caught:
        make_loss(name, Schema((4,), 0))
    assert f"received {name!r}. Nearest: " in str(caught.value)
    if name == "MeanSquareError":
        assert "Nearest: MeanSquaredError" in str(caught.value)


# --- optimizers


def step(
    optimizer: keras.optimizers.Optimizer, weights: list[float], gradient: list[float]
) -> np.ndarray:
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
    without = make_optimizer(OptimizerSection(name="adamw"), 0.5)
    assert step(without, [8.0], [0.0]).tolist() == [8.0]  # Keras's own default decays by 0.004


def test_adams_first_step_is_the_learning_rate_against_the_sign_of_the_gradient():
    adam = make_optimizer(OptimizerSection(name="adam"), 0.125)
    stepped = step(adam, [1.0, 1.0], [1e-2, -1e3])
    np.testing.assert_allclose(stepped, [0.875, 1.125], rtol=1e-4)  # Keras adds an epsilon


def test_a_learning_rate_may_be_given_apart_from_the_experiment(make_data: MakeData):
    data = make_data(4)
    model = compile_model(
        build_model(ModelSection(name="linear"), data.schema, 0), Experiment(), data.schema, 0.75
    )
    assert float(model.optimizer.learning_rate) == 0.75
    assert float(compiled(data, optimizer__learning_rate=0.25).optimizer.learning_rate) == 0.25
    assert not model.jit_compile
