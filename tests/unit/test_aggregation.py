"""Aggregation rules against closed forms and exact arithmetic, in every order of arrival."""

import itertools
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest

from fl_app.aggregation.aggregator import Contribution
from fl_app.aggregation.mean import LARGEST, RunningMean, weighted_mean
from shared.weights import Weights

SHAPES = ((3, 2), (5,), ())


def contribution(seed: int, num_examples: int, scale: float = 1.0) -> Contribution:
    rng = np.random.default_rng(seed)
    return Contribution(
        [np.float32(scale * rng.normal(size=shape)) for shape in SHAPES], num_examples
    )


# Of wildly different magnitude, the large ones cancelling: the float sum of these depends on its
# order.
WILD = {
    "d": contribution(0, 1_000_003, 3e4),
    "a": contribution(1, 7, 1e-3),
    "c": contribution(0, 1_000_003, -3e4),
    "b": contribution(3, 1, 1.0),
}


def bits(arrays: Iterable[np.ndarray]) -> list[tuple[np.dtype, tuple[int, ...], bytes]]:
    return [(array.dtype, np.shape(array), array.tobytes()) for array in arrays]


def folded(contributions: Iterable[Contribution], expected_examples: int) -> Weights:
    mean = RunningMean(contribution(0, 1).update, expected_examples)
    for each in contributions:
        mean.add("a silo", each)
    return [*mean.result()]


def mean_of_numbers(numbers: dict[float, int], expected_examples: int) -> float:
    """Of {update: its examples}, updates of one float64 number each."""
    mean = RunningMean([np.zeros(1)], expected_examples)
    for number, num_examples in numbers.items():
        mean.add("a silo", Contribution([np.array([number])], num_examples))
    return float(next(mean.result())[0])


# --- the mean


def test_the_mean_is_weighted_by_examples():
    parts = {
        "a": Contribution([np.float32([8.0, -4.0]), np.float32([[1.0]])], 1),
        "b": Contribution([np.float32([0.0, 2.0]), np.float32([[5.0]])], 3),
        "c": Contribution([np.float32([-6.0, 0.5]), np.float32([[2.0]])], 4),
    }
    vector, matrix = weighted_mean(parts)
    # (1 * 8 + 3 * 0 + 4 * -6) / 8 = -16 / 8;  (1 * -4 + 3 * 2 + 4 * 0.5) / 8 = 4 / 8
    assert vector.tolist() == [-2.0, 0.5]
    assert matrix.tolist() == [[3.0]]  # (1 * 1 + 3 * 5 + 4 * 2) / 8 = 24 / 8


def test_those_that_were_expected_and_did_not_come_do_not_count():
    assert mean_of_numbers({8.0: 1, 2.0: 2}, expected_examples=3) == 4.0  # (8 + 2 * 2) / 3
    assert mean_of_numbers({8.0: 1, 2.0: 2}, expected_examples=4096) == 4.0


@pytest.mark.parametrize("num_examples", [1, 3, 1_000_003])
def test_one_contribution_comes_back_bit_by_bit_down_to_a_millionth(num_examples: int):
    """Float32 numbers from 2^-20 to 2^17 have no bits below 2^-44; of smaller ones, its multiples
    come back.
    """
    rng = np.random.default_rng(4)
    numbers = (
        rng.choice([-1.0, 1.0], 3000)
        * rng.uniform(1.0, 2.0, 3000)
        * 2.0 ** rng.integers(-20, 17, 3000)
    )
    multiples = rng.integers(-(2**24), 2**24, 3000) * 2.0**-44
    update = [
        np.float32(numbers).reshape(30, 100),
        np.float32(multiples),
        np.float32([LARGEST, -LARGEST, 0.0, 2**-20]),
    ]
    assert bits(weighted_mean({"a": Contribution(update, num_examples)})) == bits(update)


@pytest.mark.parametrize("num_examples", [1, 3, 1_000_003])
def test_a_smaller_number_comes_back_as_the_nearest_multiple_of_the_resolution(num_examples: int):
    rng = np.random.default_rng(5)
    numbers = np.float32(rng.uniform(-1.0, 1.0, 3000) * 2.0 ** rng.integers(-60, -20, 3000))
    (mean,) = weighted_mean({"a": Contribution([numbers], num_examples)})
    assert np.abs(np.float64(mean) - numbers).max() <= 2.0**-45
    assert set((np.float64(mean) * 2.0**44 % 1.0).tolist()) == {0.0}


def test_equal_contributions_come_back_bit_by_bit():
    updates = contribution(4, 1).update
    parts = {
        name: Contribution(updates, num_examples)
        for name, num_examples in (("a", 3), ("b", 7), ("c", 11))
    }
    assert bits(weighted_mean(parts)) == bits(updates)


@pytest.mark.parametrize(
    "expected_examples", [2_000_014, 5_000_000], ids=["all came", "some did not"]
)
def test_the_mean_is_that_of_exact_arithmetic_up_to_rounding(expected_examples: int):
    mean = folded(WILD.values(), expected_examples)
    counts = [c.num_examples for c in WILD.values()]
    for i, shape in enumerate(SHAPES):
        for at in np.ndindex(shape):
            exact, tolerance = exact_mean(
                [float(c.update[i][at]) for c in WILD.values()], counts, expected_examples
            )
            as_float32 = abs(exact) * Fraction(2) ** -23
            assert abs(Fraction(float(mean[i][at])) - exact) <= tolerance + as_float32


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 3e4])
@pytest.mark.parametrize("expected_examples", [200, 5_000], ids=["all came", "some did not"])
def test_a_mean_of_float64_is_that_of_exact_arithmetic_up_to_the_resolution(
    scale: float, expected_examples: int
):
    rng = np.random.default_rng(6)
    updates, counts = scale * rng.normal(size=(10, 300)), [1, 3, 7, 11, 13, 17, 19, 23, 29, 77]
    mean = RunningMean([updates[0]], expected_examples)
    for update, num_examples in zip(updates, counts, strict=True):
        mean.add("a silo", Contribution([update], num_examples))
    for numbers, found in zip(updates.T.tolist(), next(mean.result()).tolist(), strict=True):
        exact, tolerance = exact_mean(numbers, counts, expected_examples)
        assert abs(Fraction(found) - exact) <= tolerance


def exact_mean(
    numbers: list[float], counts: list[int], expected_examples: int
) -> tuple[Fraction, Fraction]:
    """And how far from it the mean may be: half the resolution for each term, and float64's share
    of each product.
    """
    terms = [
        Fraction(number) * num_examples
        for number, num_examples in zip(numbers, counts, strict=True)
    ]
    half_the_resolution = Fraction(2) ** -45 * len(terms) * Fraction(expected_examples, sum(counts))
    products = Fraction(2) ** -51 * sum(map(abs, terms)) / sum(counts)
    return sum(terms) / sum(counts), half_the_resolution + products


# --- every order of arrival


@pytest.mark.parametrize(
    "expected_examples", [2_000_014, 5_000_000], ids=["all came", "some did not"]
)
def test_the_mean_is_bit_equal_for_every_order_of_arrival(expected_examples: int):
    orders = list(itertools.permutations(WILD.values()))
    assert len({str(bits(folded(order, expected_examples))) for order in orders}) == 1
    assert (
        len(
            {
                str(bits(weighted_mean(dict(order))))
                for order in itertools.permutations(WILD.items())
            }
        )
        == 1
    )


def test_the_order_of_arrival_would_matter_to_a_sum_of_floats():
    """The law above is no accident of its numbers: their plain float64 mean depends on the order,
    even as float32.
    """
    total = sum(c.num_examples for c in WILD.values())
    means = {
        np.float32(sum(np.float64(c.update[0]) * c.num_examples for c in order) / total).tobytes()
        for order in itertools.permutations(WILD.values())
    }
    assert len(means) > 1


def test_refused_updates_in_between_change_nothing_in_any_order():
    like = contribution(0, 1).update
    broken = Contribution([np.full_like(array, np.nan) for array in like], 5)
    for order in itertools.permutations([*WILD.values(), broken]):
        mean = RunningMean(like, 2_000_014)
        for each in order:
            if each is broken:
                with pytest.raises(ValueError, match="finite"):
                    mean.add("a silo", each)
            else:
                mean.add("a silo", each)
        assert bits([*mean.result()]) == bits(weighted_mean(WILD))


# --- arrays of all kinds


def test_the_mean_has_dtypes_and_shapes_of_the_updates():
    update = [
        np.float16([[1.5]]),
        np.float64([0.25]),
        np.float32(2.0),
        np.zeros((0, 3), np.float32),
    ]
    mean = weighted_mean({"a": Contribution(update, 1), "b": Contribution(update, 2)})
    assert bits(mean) == bits(update)


def test_arrays_of_any_layout_count_by_their_entries():
    plain = np.arange(24, dtype=np.float32).reshape(4, 6)
    backing = np.zeros((8, 12), np.float32)
    backing[::2, ::2] = plain
    read_only = plain.copy()
    read_only.flags.writeable = False
    expected = bits(weighted_mean({"a": Contribution([plain], 1)}))
    for other in (np.asfortranarray(plain), backing[::2, ::2], read_only):
        assert bits(weighted_mean({"a": Contribution([other], 1)})) == expected


def test_arrays_are_folded_block_by_block_to_the_same_mean(monkeypatch: pytest.MonkeyPatch):
    whole = bits(weighted_mean(WILD))
    monkeypatch.setattr("shared.weights.BLOCK", 2)  # of arrays with 6, 5 and 1 entries
    assert bits(weighted_mean(WILD)) == whole


def test_the_contributions_are_left_as_they_are():
    before = {name: bits(part.update) for name, part in WILD.items()}
    weighted_mean(WILD)[0][:] = 0.0
    assert {name: bits(part.update) for name, part in WILD.items()} == before
    alone = contribution(4, 1)
    weighted_mean({"a": alone})[0][:] = 0.0
    assert bits(alone.update) == bits(contribution(4, 1).update)


def test_a_mean_that_was_taken_stays_when_more_is_added():
    mean = RunningMean([np.zeros(1)], 2)
    mean.add("a silo", Contribution([np.array([1.0])], 1))
    first = [*mean.result()]
    mean.add("a silo", Contribution([np.array([3.0])], 1))
    assert (first[0].tolist(), next(mean.result()).tolist()) == ([1.0], [2.0])


# --- what is refused


def with_entry(value: float, place: int) -> Weights:
    update = [np.array(array) for array in contribution(1, 1).update]
    update[place].reshape(-1)[-1] = value
    return update


GOOD = contribution(1, 1).update
REFUSED = {
    "no examples": (Contribution(GOOD, 0), "must rest on examples, .* received 0"),
    "fewer than none": (Contribution(GOOD, -1), "must rest on examples, .* received -1"),
    "no number of examples": (
        Contribution(GOOD, float("nan")),
        "must rest on examples, .* received nan",
    ),
    "far more than expected": (
        Contribution(GOOD, 10**9),
        r"no more than the roll call lets expect \(10 in all\)",
    ),
    "endless examples": (
        Contribution(GOOD, float("inf")),
        "no more than the roll call lets expect .* received inf",
    ),
    "too few arrays": (
        Contribution(GOOD[:1], 1),
        r"3 arrays; received 1, of which array 1 is none and should be",
    ),
    "too many arrays": (
        Contribution([*GOOD, GOOD[0]], 1),
        r"3 arrays; received 4, of which array 3 is float32",
    ),
    "no arrays": (
        Contribution([], 1),
        r"received 0, of which array 0 is none and should be float32 of shape \(3, 2\)",
    ),
    "another order": (
        Contribution([GOOD[1], GOOD[0], GOOD[2]], 1),
        r"array 0 is float32 of shape \(5,\) and should be",
    ),
    "same size, another shape": (
        Contribution([GOOD[0].T, *GOOD[1:]], 1),
        r"array 0 is float32 of shape \(2, 3\) and should be float32 of shape \(3, 2\)",
    ),
    "another dtype": (
        Contribution([GOOD[0], np.float64(GOOD[1]), GOOD[2]], 1),
        r"array 1 is float64 of shape \(5,\) and should be float32 of shape \(5,\)",
    ),
    "a little too large": (
        Contribution(with_entry(np.nextafter(np.float32(LARGEST), np.float32(np.inf)), 1), 1),
        "no entry larger than 131072; received 131072",
    ),
}
for value in (np.nan, np.inf, -np.inf, -1e30):
    for place in range(len(SHAPES)):
        REFUSED[f"{value} in array {place}"] = (
            Contribution(with_entry(value, place), 1),
            rf"must be finite.* received ({abs(value):g}|1e\+30).*Lower optimizer\.learning_rate",
        )


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_averaged_is_refused_and_leaves_the_sum_as_it_was(case: str):
    refused, message = REFUSED[case]
    mean = RunningMean(GOOD, expected_examples=10)
    mean.add("a silo", contribution(2, 3))
    before, num_examples = bits([*mean.result()]), mean.num_examples
    with pytest.raises(ValueError, match=message):
        mean.add("a silo", refused)
    assert (bits([*mean.result()]), mean.num_examples) == (before, num_examples)
    mean.add("a silo", contribution(4, 7))
    assert bits([*mean.result()]) == bits(folded([contribution(2, 3), contribution(4, 7)], 10))


@pytest.mark.parametrize("entry", [LARGEST, -LARGEST])
def test_no_number_of_the_largest_updates_makes_the_sum_overflow(entry: float):
    """However many examples the silos say they have: they are refused before that."""
    mean = RunningMean([np.zeros(1)], expected_examples=1000)

    def add_again_and_again() -> None:
        for _ in range(100):
            mean.add("a silo", Contribution([np.array([entry])], 500))
            assert next(mean.result()).tolist() == [entry]

    with pytest.raises(ValueError, match="no more than the roll call lets expect"):
        add_again_and_again()
    assert mean.num_examples >= 1000


def test_all_that_were_expected_are_averaged():
    mean = RunningMean([np.zeros(1)], expected_examples=30)
    for i in range(30):
        mean.add("a silo", Contribution([np.array([float(i)])], 1))
    np.testing.assert_allclose(
        next(mean.result()), [14.5], rtol=0.0, atol=2.0**-40
    )  # (0 + ... + 29) / 30


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs examples; received 0 in all"):
        RunningMean(GOOD, 0)
    with pytest.raises(ValueError, match="needs examples; received no update"):
        RunningMean(GOOD, 10).result()
    with pytest.raises(ValueError, match="needs examples; received no update"):
        weighted_mean({})
    with pytest.raises(ValueError, match="needs examples; received 0 in all"):
        weighted_mean({"a": Contribution(GOOD, 0)})


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (with_entry(np.nan, 2), "must be finite"),
        (GOOD[:1], "must have the model's 3 arrays; received 1"),
    ],
)
def test_the_silo_whose_update_cannot_be_averaged_is_named(refused: Weights, message: str):
    with pytest.raises(ValueError, match=f"silo 'bad': an update {message}"):
        weighted_mean(
            {
                "good": contribution(1, 5),
                "bad": Contribution(refused, 4),
                "late": contribution(2, 5),
            }
        )
