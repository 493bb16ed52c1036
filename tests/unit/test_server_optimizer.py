"""Server optimizers against identities and closed forms."""

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_app.aggregation.aggregator import Contribution
from fl_app.aggregation.mean import RunningMean
from fl_app.server.optimizer import (
    ServerOptimizer,
    ServerOptimizerState,
    apply_update,
    initial_state,
)
from shared.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.experiment import experiment_from_flat
from shared.weights import Weights, add

SHAPES = ((3, 2), (4,), ())
ALL = [True] * len(SHAPES)
NAMES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
ETA, BETA_1, BETA_2, TAU = 0.3, 0.9, 0.8, 0.05
NUM_ROUNDS = 6


def optimizer(name: Any, **changes: float) -> ServerOptimizer:
    settings = {"learning_rate": ETA, "momentum": BETA_1, "beta_2": BETA_2, "tau": TAU}
    return ServerOptimizer(name, **{**settings, **changes})


def random_arrays(seed: int, dtype: Any = np.float64, scale: float = 1.0) -> Weights:
    rng = np.random.default_rng(seed)
    return [np.asarray(scale * rng.normal(size=shape), dtype=dtype) for shape in SHAPES]


def bits(arrays: Sequence[np.ndarray]) -> list[tuple[np.dtype, tuple[int, ...], bytes]]:
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def trajectory(
    rule: ServerOptimizer,
    weights: Weights,
    updates: Sequence[Weights],
    trainable: Sequence[bool] = ALL,
) -> list[tuple[Weights, ServerOptimizerState]]:
    """Weights and state before the first update and after each."""
    passed = [(weights, initial_state(rule, weights, trainable))]
    for update in updates:
        weights, state = passed[-1]
        passed.append(apply_update(rule, state, weights, update, trainable))
    return passed


def final_weights(
    rule: ServerOptimizer, dtype: Any = np.float64, trainable: Sequence[bool] = ALL
) -> Weights:
    updates = [random_arrays(seed, dtype) for seed in range(1, NUM_ROUNDS + 1)]
    return trajectory(rule, random_arrays(0, dtype), updates, trainable)[-1][0]


def assert_close(a: Sequence[np.ndarray], b: Sequence[np.ndarray], relative: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=relative, atol=0.0)


# --- identities


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_fedavg_with_learning_rate_1_adds_the_update_bit_by_bit(dtype: Any):
    for seed in range(20):
        weights = random_arrays(seed, dtype)
        update = random_arrays(seed + 100, dtype, scale=10.0 ** (seed % 5 - 4))
        update[1][0] = -0.0
        stepped, _ = apply_update(ServerOptimizer(), ServerOptimizerState(), weights, update, ALL)
        assert bits(stepped) == bits(add(weights, update))


def test_fedavgm_without_momentum_is_fedavg():
    without = final_weights(optimizer("fedavgm", momentum=0.0))
    assert bits(without) == bits(final_weights(optimizer("fedavg")))


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_the_first_step_without_memory_is_the_same_for_all_adaptive_ones(name: str):
    """With momentum = beta_2 = 0, v = u^2 and no bias to correct: w + eta u / (|u| + tau)."""
    weights = random_arrays(0)
    update = random_arrays(1)
    rule = optimizer(name, momentum=0.0, beta_2=0.0)
    expected = [w + ETA * u / (np.abs(u) + TAU) for w, u in zip(weights, update, strict=True)]
    assert_close(trajectory(rule, weights, [update])[1][0], expected)


@pytest.mark.parametrize("name", ["fedyogi", "fedadagrad"])
def test_a_large_tau_leaves_fedavg(name: str):
    adaptive = final_weights(optimizer(name, momentum=0.0, tau=1e9, learning_rate=1e9))
    plain = final_weights(optimizer("fedavg", learning_rate=1.0))
    assert_close(adaptive, plain, relative=1e-7)


# --- closed forms of one entry, as sums over all updates so far


def decayed(beta: float, values: Sequence[float]) -> float:
    """sum_s beta^(t-s) x_s."""
    return sum(beta ** (len(values) - 1 - s) * x for s, x in enumerate(values))


def mean_of(updates: Sequence[float]) -> float:
    return (1 - BETA_1) * decayed(BETA_1, updates)


def yogi_v(updates: Sequence[float]) -> float:
    v = 0.0
    for u in updates:
        v = v + (1 - BETA_2) * u * u if v < u * u else v - (1 - BETA_2) * u * u
    return v


def fedadam_step(updates: Sequence[float]) -> float:
    t = len(updates)
    rate = ETA * (1 - BETA_2 ** (t + 1)) ** 0.5 / (1 - BETA_1 ** (t + 1))
    v = (1 - BETA_2) * decayed(BETA_2, [u * u for u in updates])
    return rate * mean_of(updates) / (v**0.5 + TAU)


CLOSED_FORMS: dict[str, Callable[[Sequence[float]], float]] = {
    "fedavg": lambda updates: ETA * updates[-1],
    "fedavgm": lambda updates: ETA * decayed(BETA_1, updates),
    "fedadam": fedadam_step,
    "fedyogi": lambda updates: ETA * mean_of(updates) / (yogi_v(updates) ** 0.5 + TAU),
    "fedadagrad": lambda updates: (
        ETA * mean_of(updates) / (sum(u * u for u in updates) ** 0.5 + TAU)
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_follows_the_closed_form(name: str):
    updates = [random_arrays(seed) for seed in range(1, NUM_ROUNDS + 1)]
    passed = trajectory(optimizer(name), random_arrays(0), updates)
    entries = [(i, at) for i, shape in enumerate(SHAPES) for at in np.ndindex(shape)]
    for i, at in entries:
        of_entry = [float(update[i][at]) for update in updates]
        w = float(passed[0][0][i][at])
        for t in range(1, NUM_ROUNDS + 1):
            w += CLOSED_FORMS[name](of_entry[:t])
            assert float(passed[t][0][i][at]) == pytest.approx(w, rel=1e-12, abs=1e-13)
    assert [state.step for _, state in passed] == list(range(NUM_ROUNDS + 1))


def test_yogi_lets_v_go_by_the_size_of_the_update_not_of_v():
    rule = optimizer("fedyogi", beta_2=0.75)
    updates = [[np.array([u])] for u in (4.0, 1.0, 2.0)]
    _, state = trajectory(rule, [np.zeros(1)], updates, [True])[-1]
    # 0.25 * 16 = 4, above 1: less 0.25; then 3.75, below 4: more.
    assert state.second_moment[0].tolist() == [4.0 - 0.25 + 0.25 * 4.0]


# --- arrays that are not trainable


@pytest.mark.parametrize("name", NAMES)
def test_arrays_that_are_not_trainable_follow_plain_fedavg(name: str):
    updates = [random_arrays(seed, np.float32) for seed in range(1, 4)]
    mixed = trajectory(optimizer(name), random_arrays(0, np.float32), updates, [True, False, True])
    all_trainable = trajectory(optimizer(name), random_arrays(0, np.float32), updates)
    statistics = random_arrays(0, np.float32)[1]
    for t, update in enumerate(updates, start=1):
        statistics = statistics + update[1]
        assert bits([mixed[t][0][1]]) == bits([statistics])
        assert bits(mixed[t][0][::2]) == bits(all_trainable[t][0][::2])  # the others do not notice
        for moment in (mixed[t][1].first_moment, mixed[t][1].second_moment):
            assert [array.shape for array in moment] in ([], [SHAPES[0], SHAPES[2]])


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_a_variance_stays_positive_where_an_adaptive_step_would_not_leave_it_so(name: str):
    variance = [np.float32([0.01])]
    update = [np.float32([-0.005])]
    rule = optimizer(name, learning_rate=1.0, momentum=0.0, tau=1e-3)
    assert trajectory(rule, variance, [update], [False])[1][0][0] > 0
    assert trajectory(rule, variance, [update], [True])[1][0][0] < 0


# --- purity, dtypes, state


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_stay_as_they_are_and_share_no_memory_with_the_result(name: str):
    rule = optimizer(name)
    trainable = [True, False, True]
    _, state = trajectory(rule, random_arrays(0), [random_arrays(1)], trainable)[-1]
    weights = random_arrays(2)
    update = random_arrays(3)
    arguments = [*weights, *update, *state.first_moment, *state.second_moment]
    before = bits(arguments)

    stepped, after = apply_update(rule, state, weights, update, trainable)
    result = [*stepped, *after.first_moment, *after.second_moment]
    assert bits(arguments) == before
    assert state.step == 1
    assert not any(np.shares_memory(a, b) for a in arguments for b in result)

    again, after_again = apply_update(rule, state, weights, update, trainable)
    assert bits([*again, *after_again.first_moment, *after_again.second_moment]) == bits(result)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_are_stepped_block_by_block_to_the_same_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    weights = [np.array(w, order="F") for w in random_arrays(0)]
    updates = [random_arrays(1), random_arrays(2)]
    whole, _ = trajectory(optimizer(name), weights, updates)[-1]
    monkeypatch.setattr("shared.weights.BLOCK", 2)  # of arrays with 6, 4 and 1 entries
    in_blocks, _ = trajectory(optimizer(name), weights, updates)[-1]
    assert bits(in_blocks) == bits(whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_takes_the_memory_of_what_it_returns_and_of_two_arrays_of_the_mean(name: str):
    rule = optimizer(name)
    like = [np.zeros(1 << 20, np.float32) for _ in range(4)]
    state = initial_state(rule, like, [True] * 4)
    mean = RunningMean(like, 1)
    mean.add("a silo", Contribution([array + 1 for array in like], 1))
    tracemalloc.start()
    apply_update(rule, state, like, mean.result(), [True] * 4)
    peak = tracemalloc.get_traced_memory()[1] / like[0].nbytes
    tracemalloc.stop()
    assert peak < 4 * (1 + len(rule.moments)) + 2.75  # arrays; the rest is for the blocks


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_weights_keep_their_dtype_and_moments_have_float32_at_least(name: str, dtype: Any):
    updates = [random_arrays(seed, dtype) for seed in (1, 2)]
    for weights, state in trajectory(optimizer(name), random_arrays(0, dtype), updates):
        assert {array.dtype for array in weights} == {np.dtype(dtype)}
        moments = {array.dtype for array in [*state.first_moment, *state.second_moment]}
        assert moments <= {np.result_type(dtype, np.float32)}


def test_small_updates_of_float16_have_squares():
    update = [np.full(1, 1e-4, np.float16)]  # its square is 0 in float16
    weights = [np.zeros(1, np.float16)]
    _, state = trajectory(optimizer("fedadagrad"), weights, [update], [True])[-1]
    np.testing.assert_allclose(state.second_moment, [[1e-8]], rtol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_from_the_checkpoint_of_any_round_it_goes_on_bit_by_bit(name: str, tmp_path: Path):
    rule = optimizer(name)
    experiment = experiment_from_flat({})
    path = tmp_path / "checkpoint.npz"
    updates = [random_arrays(seed, np.float32) for seed in range(1, NUM_ROUNDS + 1)]
    undisturbed = trajectory(rule, random_arrays(0, np.float32), updates)
    last_weights, last_state = undisturbed[-1]
    for t, (weights, state) in enumerate(undisturbed):
        arrays = {"weights": weights} | {moment: getattr(state, moment) for moment in rule.moments}
        save_checkpoint(path, experiment, Checkpoint(arrays, {"step": state.step}))
        loaded = load_checkpoint(path, experiment, "weights", *rule.moments)
        moments = {name: list(loaded.arrays[name]) for name in rule.moments}

        weights = list(loaded.arrays["weights"])
        state = ServerOptimizerState(loaded.meta["step"], **moments)
        for update in updates[t:]:
            weights, state = apply_update(rule, state, weights, update, ALL)
        assert bits(weights) == bits(last_weights)
        assert state.step == last_state.step
        for moment in ("first_moment", "second_moment"):
            assert bits(getattr(state, moment)) == bits(getattr(last_state, moment))


# --- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable": ALL[:2]}, r"received 2 values for 3 arrays\. Pass \[variable\.trainable"),
        (
            {"mean_update": random_arrays(1)[:2]},
            r"Array 2 of mean_update must have shape \(\); received none\. Average",
        ),
        (
            {"mean_update": [*random_arrays(1), np.zeros(5)]},
            r"Array 3 of mean_update must have shape none; received \(5,\)",
        ),
        (
            {"mean_update": [random_arrays(1)[0][:1], *random_arrays(1)[1:]]},  # would broadcast
            r"Array 0 of mean_update must have shape \(3, 2\); received \(1, 2\)",
        ),
        (
            {"state": initial_state(optimizer("fedadam"), random_arrays(0), [True, False, True])},
            (
                r"Array 1 of first_moment must have shape \(4,\); received \(\)\. Begin with"
                r" initial_state"
            ),
        ),
        (
            {"state": initial_state(optimizer("fedavgm"), random_arrays(0), ALL)},
            (
                r"Array 0 of second_moment must have shape \(3, 2\); received none\. Begin with"
                r" initial_state"
            ),
        ),
        (
            {
                "state": initial_state(optimizer("fedadam"), random_arrays(0), ALL),
                "optimizer": optimizer("fedavg"),
            },
            r"Array 0 of first_moment must have shape none; received \(3, 2\)",
        ),
    ],
)
def test_shapes_that_do_not_match_are_refused(change: dict[str, Any], message: str):
    rule = optimizer("fedadam")
    good = {
        "optimizer": rule,
        "state": initial_state(rule, random_arrays(0), ALL),
        "weights": random_arrays(0),
        "mean_update": random_arrays(1),
        "trainable": ALL,
    }
    apply_update(**good)
    with pytest.raises(ValueError, match=message):
        apply_update(**(good | change))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("learning_rate", float("nan")),
        ("tau", 0.0),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("beta_2", 1.0),
        ("beta_2", float("nan")),
    ],
)
def test_a_setting_out_of_range_is_refused(setting: str, value: float):
    with pytest.raises(ValueError, match=rf"{setting} must be .*; received {value}\. Choose"):
        replace(optimizer("fedadam"), **{setting: value})


def test_an_optimizer_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"one of fedavg, fedavgm, .*; received 'adam'\. Choose"):
        ServerOptimizer("adam")
