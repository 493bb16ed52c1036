"""The strategies under Flower's own `start`, beside Flower's own strategies."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

from fl_app.flower.optimizer_strategies import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedOpt, FedYogi
from fl_app.server.optimizer import ServerOptimizer
from shared.weights import Weights

SHAPES = ((3, 2), (4,), ())
EXAMPLES = {11: 3, 5: 40, 7: 17}  # num_examples of each node
NUM_ROUNDS = 5
EXACT = 1e-11  # for float64: the mean is a sum of multiples of 2^-44
SETTINGS = {"fraction_evaluate": 0.0}

Reply = Callable[[int, int], RecordDict | None]  # of a node in a round; None: it fails

PAIRS: dict[str, tuple[Callable[..., FedOpt], Callable[..., Any]]] = {
    "FedAvg": (FedAvg, flower.FedAvg),
    "FedAvgM": (
        lambda **options: FedAvgM(0.7, 0.9, **options),
        lambda **options: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.9, **options),
    ),
    "FedAdam": (
        lambda **options: FedAdam(0.3, 0.8, 0.95, 0.05, **options),
        lambda **options: flower.FedAdam(eta=0.3, beta_1=0.8, beta_2=0.95, tau=0.05, **options),
    ),
    "FedYogi": (
        lambda **options: FedYogi(0.3, 0.8, 0.95, 0.05, **options),
        lambda **options: flower.FedYogi(eta=0.3, beta_1=0.8, beta_2=0.95, tau=0.05, **options),
    ),
    "FedAdagrad": (
        lambda **options: FedAdagrad(0.3, tau=0.05, **options),
        lambda **options: flower.FedAdagrad(eta=0.3, tau=0.05, **options),
    ),
}


@pytest.fixture(autouse=True)
def _in_a_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):  # private, and Flower's messages ask for them
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Answers at once, in the order of the nodes or in reverse."""

    def __init__(self, reply: Reply, backwards: bool = False) -> None:
        self.reply = reply
        self.backwards = backwards

    def get_node_ids(self) -> list[int]:
        return list(EXAMPLES)

    def send_and_receive(
        self, messages: Iterable[Message], timeout: float | None = None
    ) -> list[Message]:
        by_node = {message.metadata.dst_node_id: message for message in messages}
        nodes = sorted(by_node, reverse=self.backwards)
        return [self._answer(by_node[node]) for node in nodes]

    def _answer(self, message: Message) -> Message:
        round_number = message.content.config_records["config"]["server-round"]
        content = self.reply(message.metadata.dst_node_id, round_number)
        if content is None:
            return Message(Error(code=1, reason="out of memory"), reply_to=message)
        return Message(content, reply_to=message)


def arrays_of(*seed: int, dtype: Any = np.float64) -> Weights:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape), dtype=dtype) for shape in SHAPES]


def content(node: int, arrays: Weights) -> RecordDict:
    metrics = MetricRecord({"num-examples": EXAMPLES[node], "loss": float(node)})
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})


def local_weights(
    dtype: Any = np.float64, failing: Callable[[int, int], bool] = lambda *_: False
) -> Reply:
    def reply(node: int, r: int) -> RecordDict | None:
        return None if failing(node, r) else content(node, arrays_of(node, r, dtype=dtype))

    return reply


def run(strategy: Any, reply: Reply, dtype: Any = np.float64, backwards: bool = False) -> Any:
    initial = ArrayRecord(arrays_of(0, dtype=dtype))
    return strategy.start(Grid(reply, backwards), initial, num_rounds=NUM_ROUNDS)


def final_weights(strategy: Any, reply: Reply, **options: Any) -> Weights:
    return run(strategy, reply, **options).arrays.to_numpy_ndarrays()


def bits(arrays: Weights) -> list[tuple[np.dtype, tuple[int, ...], bytes]]:
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def relative_difference(a: Weights, b: Weights, dtype: Any) -> float:
    """The largest difference, relative to the largest change of the run."""

    def flat(arrays: Weights) -> np.ndarray:
        return np.concatenate([np.ravel(x).astype(np.float64) for x in arrays])

    change = flat(b) - flat(arrays_of(0, dtype=dtype))
    return float(np.max(np.abs(flat(a) - flat(b))) / np.max(np.abs(change)))


# --- beside Flower's


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, EXACT), (np.float32, 1e-6)])
@pytest.mark.parametrize("name", PAIRS)
def test_the_weights_are_those_of_flowers_strategy(name: str, dtype: Any, tolerance: float):
    ours, theirs = (make(**SETTINGS) for make in PAIRS[name])
    a = final_weights(ours, local_weights(dtype), dtype=dtype)
    b = final_weights(theirs, local_weights(dtype), dtype=dtype)
    assert relative_difference(a, b, dtype) <= tolerance


@pytest.mark.parametrize(
    "failing", [lambda node, r: node == 5, lambda node, r: r == 2], ids=["a silo", "a round"]
)
@pytest.mark.parametrize("name", PAIRS)
def test_they_are_also_when_a_silo_or_a_whole_round_fails(
    name: str, failing: Callable[[int, int], bool]
):
    ours, theirs = (make(**SETTINGS) for make in PAIRS[name])
    a = final_weights(ours, local_weights(failing=failing))
    b = final_weights(theirs, local_weights(failing=failing))
    assert relative_difference(a, b, np.float64) <= EXACT


@pytest.mark.parametrize("name", PAIRS)
def test_the_metrics_are_those_of_flowers_strategy(name: str):
    ours, theirs = (
        run(make(**SETTINGS), local_weights()).train_metrics_clientapp for make in PAIRS[name]
    )
    assert list(ours) == list(theirs) == list(range(1, NUM_ROUNDS + 1))
    expected = sum(node * n for node, n in EXAMPLES.items()) / sum(EXAMPLES.values())
    for r in ours:
        assert ours[r] == theirs[r]
        assert ours[r]["loss"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (FedAvg, flower.FedAvg, lambda theirs: ServerOptimizer("fedavg", 1.0)),
        (
            FedAvgM,
            flower.FedAvgM,
            lambda theirs: ServerOptimizer(
                "fedavgm", theirs.server_learning_rate, theirs.server_momentum
            ),
        ),
        (
            FedAdam,
            flower.FedAdam,
            lambda theirs: ServerOptimizer(
                "fedadam", theirs.eta, theirs.beta_1, theirs.beta_2, theirs.tau
            ),
        ),
        (
            FedYogi,
            flower.FedYogi,
            lambda theirs: ServerOptimizer(
                "fedyogi", theirs.eta, theirs.beta_1, theirs.beta_2, theirs.tau
            ),
        ),
        (
            FedAdagrad,
            flower.FedAdagrad,
            lambda theirs: ServerOptimizer("fedadagrad", theirs.eta, theirs.beta_1, tau=theirs.tau),
        ),
    ],
)
def test_the_defaults_are_flowers(
    ours: Callable[..., FedOpt],
    theirs: Callable[..., Any],
    expected: Callable[[Any], ServerOptimizer],
):
    assert ours().optimizer == expected(theirs())


# --- what Flower's do not promise


@pytest.mark.parametrize("name", PAIRS)
def test_the_order_of_replies_does_not_matter_to_a_bit_and_dtypes_stay(name: str):
    make, _ = PAIRS[name]
    reply = local_weights(np.float32)
    forwards = final_weights(make(**SETTINGS), reply, dtype=np.float32)
    backwards = final_weights(make(**SETTINGS), reply, dtype=np.float32, backwards=True)
    assert bits(forwards) == bits(backwards)
    expected = [(np.float32, shape) for shape in SHAPES]
    assert [(array.dtype, array.shape) for array in forwards] == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", PAIRS)
def test_an_update_that_is_not_finite_is_left_out_and_its_node_named(
    name: str, value: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)

    def diverging(node: int, r: int) -> RecordDict:
        arrays = arrays_of(node, r)
        if (node, r) == (5, 3):
            arrays[1][2] = value
        return content(node, arrays)

    make, _ = PAIRS[name]
    result = run(make(**SETTINGS), diverging)
    without = run(make(**SETTINGS), local_weights(failing=lambda node, r: (node, r) == (5, 3)))
    weights = result.arrays.to_numpy_ndarrays()
    expected = without.arrays.to_numpy_ndarrays()
    assert relative_difference(weights, expected, np.float64) <= EXACT
    assert result.train_metrics_clientapp == without.train_metrics_clientapp

    (warning,) = [record for record in caplog.records if "left out" in record.getMessage()]
    assert warning.levelno == logging.WARNING
    assert warning.getMessage().startswith(
        "The reply of node 5 is left out: an update must be finite"
    )


@pytest.mark.parametrize("num_examples", [0, -3, float("nan"), float("inf")])
def test_a_reply_without_a_number_of_examples_is_left_out(num_examples: float):
    def uncounted(node: int, r: int) -> RecordDict:
        reply = content(node, arrays_of(node, r))
        if node == 7:
            reply.metric_records["metrics"]["num-examples"] = num_examples
        return reply

    without = final_weights(FedAvg(**SETTINGS), local_weights(failing=lambda node, r: node == 7))
    assert bits(final_weights(FedAvg(**SETTINGS), uncounted)) == bits(without)


def test_a_round_without_a_usable_reply_leaves_the_weights():
    def diverging(node: int, r: int) -> RecordDict:
        return content(node, [np.full(shape, np.nan) for shape in SHAPES])

    diverged = run(FedAvg(**SETTINGS), diverging)
    # Flower's way of saying that there were never any but the initial ones.
    assert list(diverged.arrays) == []
    assert dict(diverged.train_metrics_clientapp) == {}


@pytest.mark.parametrize("name", PAIRS)
def test_arrays_that_are_not_trainable_follow_plain_fedavg(name: str):
    make, _ = PAIRS[name]
    mixed = final_weights(make(trainable=[True, False, True], **SETTINGS), local_weights())
    plain = final_weights(FedAvg(**SETTINGS), local_weights())
    optimized = final_weights(make(**SETTINGS), local_weights())
    assert bits(mixed) == bits([optimized[0], plain[1], optimized[2]])


@pytest.mark.parametrize("name", PAIRS)
def test_with_the_state_of_another_it_goes_on_bit_by_bit(name: str):
    make, _ = PAIRS[name]
    undisturbed = final_weights(make(**SETTINGS), local_weights())

    first = make(**SETTINGS)
    begun = first.start(Grid(local_weights()), ArrayRecord(arrays_of(0)), num_rounds=2)
    second = make(**SETTINGS)
    second.state = first.state
    later = Grid(lambda node, r: content(node, arrays_of(node, r + 2)))
    rest = second.start(later, begun.arrays, NUM_ROUNDS - 2)
    assert bits(rest.arrays.to_numpy_ndarrays()) == bits(undisturbed)


def test_arrays_are_matched_by_key_not_by_place():
    def turned(node: int, r: int) -> RecordDict:
        reply = content(node, arrays_of(node, r))
        arrays = reply.array_records["arrays"]
        reversed_arrays = {key: arrays[key] for key in reversed(list(arrays))}
        reply.array_records["arrays"] = ArrayRecord(reversed_arrays)
        return reply

    in_order = final_weights(FedAdam(**SETTINGS), local_weights())
    assert bits(final_weights(FedAdam(**SETTINGS), turned)) == bits(in_order)


@pytest.mark.parametrize(
    "arrays",
    [arrays_of(1)[:2], [*arrays_of(1), np.zeros(2)], [arrays_of(1)[0][:1], *arrays_of(1)[1:]]],
    ids=["one missing", "one too many", "one that would broadcast"],
)
def test_arrays_that_are_not_those_sent_are_refused_and_the_node_named(arrays: Weights):
    with pytest.raises(
        ValueError,
        match=r"arrays that were sent, by key and shape: .*'2': \(\).* from node 5\. Let",
    ):
        run(
            FedAvg(min_train_nodes=1, **SETTINGS),
            lambda node, r: content(node, arrays) if node == 5 else None,
        )
