"""Weights as a vector space, and their identity."""

import math

import numpy as np
import pytest

from shared.weights import add, max_difference, num_bytes, subtract, weights_sha256


def weights(seed: int = 0) -> list[np.ndarray]:
    """Two arrays of multiples of 1/8 below 128: their float32 sums and differences are exact."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(-1023, 1024, size=shape) / 8).astype(np.float32) for shape in ((3, 2), (4,))
    ]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


# --- a vector space


def test_zero_is_neutral():
    zero = [np.zeros_like(w) for w in weights()]
    assert same(add(weights(), zero), weights())
    assert same(subtract(weights(), zero), weights())
    assert same(subtract(weights(), weights()), zero)


def test_the_update_added_to_the_old_weights_gives_the_new_ones():
    old, new = weights(1), weights(2)
    assert same(add(old, subtract(new, old)), new)


def test_addition_is_commutative_and_associative():
    a, b, c = weights(1), weights(2), weights(3)
    assert same(add(a, b), add(b, a))
    assert same(add(add(a, b), c), add(a, add(b, c)))


def test_a_sum_has_the_dtype_of_its_first_term():
    (total,) = add([np.float32([0.5])], [np.float64([0.25])])
    assert (total.dtype, total.tolist()) == (np.float32, [0.75])


def test_the_operands_are_left_as_they_are():
    a, b = weights(1), weights(2)
    add(a, b)
    subtract(a, b)
    assert same(a, weights(1))
    assert same(b, weights(2))


@pytest.mark.parametrize("operation", [add, subtract, max_difference])
def test_weights_of_different_length_are_refused(operation):
    with pytest.raises(ValueError, match="zip"):
        operation(weights(), weights()[:1])


# --- distance


def test_the_largest_difference_is_a_distance():
    a, b, c = weights(1), weights(2), weights(3)
    assert max_difference(a, a) == 0.0
    assert max_difference(a, b) == max_difference(b, a) > 0.0
    assert max_difference(a, c) <= max_difference(a, b) + max_difference(b, c)


def test_the_largest_difference_is_found_in_every_place():
    for array, entry in ((0, (2, 1)), (1, (0,)), (1, (3,))):
        moved = weights()
        moved[array][entry] -= 0.5
        assert max_difference(weights(), moved) == 0.5


def test_one_nan_anywhere_makes_the_largest_difference_nan():
    for array in (0, 1):
        broken = weights()
        broken[array].flat[1] = np.nan
        broken[1 - array].flat[0] += 100.0  # larger than any, but no number
        assert math.isnan(max_difference(weights(), broken))
        assert math.isnan(max_difference(broken, weights()))


def test_the_difference_of_unsigned_numbers_does_not_wrap_around():
    assert max_difference([np.uint32([1, 5])], [np.uint32([4, 5])]) == 3.0  # not 2 ** 32 - 3


def test_nothing_differs_by_nothing():
    assert max_difference([], []) == max_difference([np.zeros((0, 3))], [np.zeros((0, 3))]) == 0.0


# --- identity


def test_equal_bits_give_equal_sha256_however_they_lie_in_memory():
    expected = weights_sha256(weights())
    assert weights_sha256([np.asfortranarray(w) for w in weights()]) == expected
    assert weights_sha256([np.repeat(w, 2, axis=0)[::2] for w in weights()]) == expected
    assert weights_sha256([w.astype(">f4") for w in weights()]) == expected


def test_each_flipped_bit_changes_the_sha256():
    seen = {weights_sha256(weights())}
    for i in range(2):
        for bit in range(weights()[i].nbytes * 8):
            flipped = weights()
            flipped[i].reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
            seen.add(weights_sha256(flipped))
    assert len(seen) == 1 + 32 * (6 + 4)  # 32 bits in each of 3 * 2 and 4 numbers


def test_the_sha256_tells_zero_from_minus_zero_and_depends_on_the_order():
    assert weights_sha256([np.float32([0.0])]) != weights_sha256([np.float32([-0.0])])
    assert weights_sha256(weights()) != weights_sha256(weights()[::-1])


def test_the_number_of_bytes_counts_all_entries():
    assert num_bytes(weights()) == 4 * (3 * 2 + 4)
    assert num_bytes([np.zeros(3, np.float16), np.zeros((), np.float64)]) == 2 * 3 + 8
