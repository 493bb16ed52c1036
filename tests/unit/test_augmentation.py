"""Augmentation: what is drawn, what is done, and that neither depends on the ranks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shared.augmentation import Augmentation, augment, augmentation_of
from shared.data import Dataset, load_dataset
from shared.experiment import DataSection
from shared.training import EpochBatches

BOTH = Augmentation(flip=True, shift=True)


def slow_augment(image: np.ndarray, flip: int, down: int, right: int) -> np.ndarray:
    image = image[:, ::-1] if flip else image
    moved = np.zeros_like(image)
    height, width = image.shape[:2]
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                moved[i, j] = image[i - down, j - right]
    return moved


def test_images_are_mirrored_and_moved_as_the_slow_loop_says():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(12, 16, 24, 2)).astype(np.float32)
    drawn = BOTH.draw(12, images.shape[1:], seed=1, owner="", epoch=0)
    expected = np.stack(
        [slow_augment(image, *each) for image, each in zip(images, drawn, strict=True)]
    )
    np.testing.assert_array_equal(augment(images, drawn).numpy(), expected)
    assert len(np.unique(drawn, axis=0)) > 6


def test_draws_are_within_an_eighth_and_even():
    drawn = BOTH.draw(9000, (16, 24, 1), seed=0, owner="", epoch=0)
    assert abs(drawn[:, 0].mean() - 0.5) < 4 * 0.5 / 9000**0.5
    for column, most in ((1, 2), (2, 3)):
        values, counts = np.unique(drawn[:, column], return_counts=True)
        assert values.tolist() == list(range(-most, most + 1))
        expected = 9000 / len(values)
        assert (
            (counts - expected) ** 2 / expected
        ).sum() < 30  # chi square of at most 6 degrees; 99.99 %: 28
    nothing = Augmentation(flip=False, shift=True).draw(100, (16, 24, 1), 0, "", 0)
    assert not nothing[:, 0].any()
    assert not Augmentation(flip=True).draw(100, (16, 24, 1), 0, "", 0)[:, 1:].any()


def batches(dataset: Dataset, rank: int = 0, world_size: int = 1, **keys: Any) -> EpochBatches:
    return EpochBatches(dataset, 16, 3, rank=rank, world_size=world_size, augmentation=BOTH, **keys)


def test_the_ranks_together_see_what_one_process_sees_and_each_epoch_differs():
    dataset = load_dataset(DataSection(name="digits")).take(np.arange(40))
    one, two = batches(dataset), [batches(dataset, rank, 2) for rank in range(2)]
    seen = []
    for epoch in (0, 1):
        for each in (one, *two):
            each.start_epoch(epoch)
        for step in range(len(one)):
            together = np.concatenate([each[step][0] for each in two])
            np.testing.assert_array_equal(together, one[step][0])
        in_graphs = [x.numpy() for x, _ in one.as_tf_dataset()]
        for step, x in enumerate(in_graphs):
            np.testing.assert_array_equal(x, one[step][0])
        seen.append(np.concatenate(in_graphs)[np.argsort(one.order)])  # by example
    assert not np.array_equal(*seen)
    plain = EpochBatches(dataset, 16, 3)
    assert not np.array_equal(plain[0][0], one[0][0])


def test_targets_and_weights_stay_as_they_are():
    dataset = load_dataset(DataSection(name="digits")).take(np.arange(40))
    dataset = replace(dataset, sample_weight=np.arange(40, dtype=np.float32))
    plain, augmented = EpochBatches(dataset, 16, 3), batches(dataset)
    for (_, y, weight), (_, y_too, weight_too) in zip(
        plain.as_tf_dataset(), augmented.as_tf_dataset(), strict=True
    ):
        np.testing.assert_array_equal(y, y_too)
        np.testing.assert_array_equal(weight, weight_too)


def test_kinds_that_there_are_not_and_tables_are_refused():
    assert augmentation_of(DataSection(), (4,)) == Augmentation()
    assert augmentation_of(DataSection(augmentation="shift,flip"), (8, 8, 1)) == BOTH
    with pytest.raises(ValueError, match="names some of flip, shift; received 'rotate'"):
        augmentation_of(DataSection(augmentation="flip, rotate"), (8, 8, 1))
    with pytest.raises(
        ValueError, match=r"is for images \(height, width, channels\); received examples of \(4,\)"
    ):
        augmentation_of(DataSection(augmentation="flip"), (4,))
