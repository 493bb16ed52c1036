"""Data: sources, splits, shards, and every way in which a user's file can be wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.data import Dataset, Schema, load_dataset, shard, split, split_pool
from shared.data.readers.arrays import save_npz
from shared.data.splits import split_validation
from shared.experiment import DataSection

# As scikit-learn documents them: number of examples, shape of one, number of classes (0:
# regression).
DOCUMENTED = {
    "digits": (1797, (8, 8, 1), 10),
    "breast_cancer": (569, (30,), 2),
    "wine": (178, (13,), 3),
    "diabetes": (442, (10,), 0),
}


def load(path: Path | str, **keys: Any) -> Dataset:
    return load_dataset(DataSection(name=str(path), **keys))


def same(a: Dataset, b: Dataset) -> bool:
    """Equal in every bit, dtype and shape."""
    pairs = [(a.x, b.x), (a.y, b.y)]
    if a.sample_weight is not None and b.sample_weight is not None:
        pairs.append((a.sample_weight, b.sample_weight))
    equal = all(
        (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()) for x, y in pairs
    )
    return (
        equal
        and a.num_classes == b.num_classes
        and (a.sample_weight is None) == (b.sample_weight is None)
    )


# --- the built-in sets


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_built_in_set_is_as_documented_and_the_same_each_time(name: str):
    dataset = load(name)
    num_examples, input_shape, num_classes = DOCUMENTED[name]
    assert (dataset.schema.input_shape, dataset.schema.num_classes) == (input_shape, num_classes)
    assert len(dataset) == len(dataset.y) == num_examples
    assert dataset.x.dtype == np.float32
    assert dataset.y.dtype == (np.int32 if num_classes else np.float32)
    if num_classes:
        assert np.unique(dataset.y).tolist() == list(range(num_classes))
    assert same(dataset, load(name))


def test_tables_are_standardised_and_pixels_lie_between_0_and_1():
    for name in ("breast_cancer", "wine", "diabetes"):
        x = load(name).x
        np.testing.assert_allclose(
            x.mean(axis=0, dtype=np.float64), 0.0, atol=1e-6
        )  # float32 rounds each entry
        np.testing.assert_allclose(x.std(axis=0, dtype=np.float64), 1.0, atol=1e-6)
    y = load("diabetes").y
    assert (y.mean(dtype=np.float64), y.std(dtype=np.float64)) == pytest.approx(
        (0.0, 1.0), abs=1e-6
    )
    assert (load("digits").x.min(), load("digits").x.max()) == (0.0, 1.0)


def test_a_schema_tells_the_task_and_the_number_of_outputs():
    assert (Schema((4,), 3).task, Schema((4,), 3).num_outputs) == ("classification", 3)
    assert (Schema((4,), 0).task, Schema((4,), 0).num_outputs) == ("regression", 1)


def test_the_hash_of_a_set_tells_any_other_example_target_weight_or_order():
    x, y = np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0, 1, 1], np.int32)
    base, weights = Dataset(x, y, 2), np.array([1.0, 2.0, 1.0], np.float32)
    others = [
        Dataset(x + 1, y, 2),
        Dataset(x, 1 - y, 2),
        Dataset(x, y, 2, weights),
        base.take(np.array([0, 2, 1])),
    ]
    assert base.sha256() == Dataset(x.copy(), y.copy(), 2).sha256()
    assert len({each.sha256() for each in (base, *others)}) == 5


def test_taking_examples_takes_their_targets_and_weights_along(numbered: Callable[..., Dataset]):
    taken = numbered(5, weighted=True).take(np.array([3, 1]))
    assert (taken.x[:, 0].tolist(), taken.y.tolist(), taken.sample_weight.tolist()) == (
        [3, 1],
        [3, 1],
        [3, 1],
    )


# --- splits and shards


def held_out(test_fraction: float, validation_fraction: float) -> DataSection:
    return DataSection(test_fraction=test_fraction, validation_fraction=validation_fraction)


@pytest.mark.parametrize("num_examples", [1, 2, 7, 100])
@pytest.mark.parametrize("fractions", [(0.0, 0.0), (0.2, 0.1), (0.5, 0.0), (0.0, 0.5), (0.3, 0.4)])
def test_a_split_is_a_disjoint_cover_with_the_stated_sizes(
    numbered: Callable[..., Dataset], num_examples: int, fractions: tuple[float, float]
):
    test_fraction, validation_fraction = fractions
    parts = split(numbered(num_examples), held_out(*fractions), 0)
    everything = np.concatenate([parts.train.y, parts.validation.y, parts.test.y])
    assert sorted(everything) == list(range(num_examples))
    assert len(parts.test) == round(test_fraction * num_examples)
    assert len(parts.validation) == round(validation_fraction * (num_examples - len(parts.test)))


def test_a_split_depends_on_the_seed_and_on_nothing_else(numbered: Callable[..., Dataset]):
    one, again, other = (split(numbered(100), held_out(0.2, 0.1), seed) for seed in (0, 0, 1))
    for name in ("train", "validation", "test"):
        assert same(getattr(one, name), getattr(again, name))
        assert set(getattr(one, name).y) != set(getattr(other, name).y)


@pytest.mark.parametrize("validation_fraction", [0.0, 0.1, 0.7])
def test_the_test_examples_do_not_depend_on_the_validation_fraction(
    numbered: Callable[..., Dataset], validation_fraction: float
):
    parts = split(numbered(100), held_out(0.2, validation_fraction), 0)
    assert same(parts.test, split_pool(numbered(100), 0, 0.2)[1])


def test_silos_choose_their_validation_examples_independently(numbered: Callable[..., Dataset]):
    chosen = {
        owner: tuple(split_validation(numbered(100), 0, 0.5, owner)[1].y)
        for owner in ("", "a", "b")
    }
    assert len(set(chosen.values())) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_examples", [0, 1, 2, 3, 4, 5, 11])
def test_shards_cover_the_set_once_unless_there_are_fewer_examples_than_ranks(
    numbered: Callable[..., Dataset], num_examples: int, world_size: int
):
    shards = [shard(numbered(num_examples), rank, world_size) for rank in range(world_size)]
    if num_examples < world_size:
        assert all(same(part, numbered(num_examples)) for part in shards)
    else:
        assert [i for part in shards for i in part.y] == list(range(num_examples))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


# --- NPZ


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_classes", [3, 0])
def test_what_save_npz_writes_comes_back_bit_by_bit(
    tmp_path: Path, make_data: Callable[..., Dataset], num_classes: int, weighted: bool
):
    dataset = make_data(20, num_classes=num_classes, weighted=weighted)
    save_npz(tmp_path / "a.npz", dataset)
    assert same(load(tmp_path / "a.npz"), dataset)


def test_images_come_back_with_their_shape(tmp_path: Path):
    part = load("digits").take(np.arange(7))
    save_npz(tmp_path / "images.npz", part)
    assert same(load(tmp_path / "images.npz"), part)


def test_a_silo_without_the_last_class_still_knows_of_it(
    tmp_path: Path, make_data: Callable[..., Dataset]
):
    dataset = make_data(20, num_classes=3)
    part = dataset.take(np.flatnonzero(dataset.y < 2))
    save_npz(tmp_path / "a.npz", part)
    assert load(tmp_path / "a.npz").num_classes == 3


def test_a_part_of_a_regression_set_whose_targets_happen_to_be_whole_stays_regression(
    tmp_path: Path, numbered: Callable[..., Dataset]
):
    save_npz(tmp_path / "a.npz", numbered(5))
    assert same(load(tmp_path / "a.npz"), numbered(5))


def test_numbers_of_any_dtype_are_taken(tmp_path: Path):
    for dtype in (np.uint8, np.int64, np.float16, np.float64, bool):
        np.savez(tmp_path / "a.npz", x=np.eye(2, dtype=dtype), y=np.array([0, 1], dtype=dtype))
        dataset = load(tmp_path / "a.npz")
        assert (dataset.x.dtype, dataset.y.dtype, dataset.y.tolist()) == (
            np.float32,
            np.int32,
            [0, 1],
        )


# --- CSV


@pytest.fixture
def csv(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "table.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_csv_file_of_whole_targets_is_a_classification(csv: Callable[[str], Path]):
    dataset = load(csv("a,kind,b\n1,0,2\n3,2,-4.5\n"), label="kind", scaling="none")
    assert dataset.x.tolist() == [[1.0, 2.0], [3.0, -4.5]]
    assert (dataset.y.tolist(), dataset.num_classes) == ([0, 2], 3)
    assert (dataset.x.dtype, dataset.y.dtype) == (np.float32, np.int32)


def test_a_csv_file_of_fractional_targets_is_a_regression(csv: Callable[[str], Path]):
    dataset = load(csv("a,label\n1,0.5\n3,2\n"), scaling="none")
    assert (dataset.y.tolist(), dataset.num_classes, dataset.y.dtype) == ([0.5, 2.0], 0, np.float32)


def test_the_task_decides_where_the_targets_could_be_both(csv: Callable[[str], Path]):
    path = csv("a,label\n1,0\n3,2\n")
    assert load(path, task="classification").num_classes == 3
    assert load(path, task="regression").num_classes == 0


# --- what cannot be used: one ValueError that names the file and the remedy

X, Y = np.arange(6.0).reshape(3, 2), np.array([0, 1, 2])

BAD_CSV = {
    "no label column": ("a,b\n1,2\n", ["'a', 'b'", "data.label"]),
    "other separator": ("a;label\n1;2\n", ["'a;label'", "data.delimiter = ';'"]),
    "text in a feature": (
        "a,label\n1,0\nred,1\n",
        ["column 'a' must be numeric", "'red' in line 3", "data.categorical"],
    ),
    "text and numbers in the label": (
        "a,label\n1,0\n2,yes\n",
        ["'label' mixes numbers and text: 'yes' in line 3"],
    ),
    "two columns of a name": ("a,a,label\n1,2,0\n", ["two columns of the name 'a'"]),
    "no such feature": (
        "a,label\n1,0\n",
        ["no column 'b' (data.features)", "Nearest"],
        {"features": "a, b"},
    ),
    "two roles": ("a,label\n1,0\n", ["'a' has two roles"], {"features": "a", "weight": "a"}),
    "an id that comes twice": (
        "a,n,label\n1,x,0\n2,x,1\n",
        ["'x' again in line 3", "data.id"],
        {"id": "n"},
    ),
    "a negative weight": (
        "a,w,label\n1,-2,0\n",
        ["negative; received -2.0 in line 2"],
        {"weight": "w"},
    ),
    "a gap in a category": (
        "a,s,label\n1,x,0\n1,,1\n",
        ["'s' has no value in line 3"],
        {"categorical": "s"},
    ),
    "another encoding": (
        "a,s,label\n1,ä,0\n".encode("latin-1"),
        ["not UTF-8 in line 2"],
        {"categorical": "s"},
    ),
    "a header in another encoding": (
        "ä,label\n1,0\n".encode("latin-1"),
        ["encoding 'utf-8'", "data.encoding"],
    ),
    "no such encoding": (
        "a,label\n1,0\n",
        ["encoding 'utf-9'", "data.encoding"],
        {"encoding": "utf-9"},
    ),
    "empty file": ("", ["is empty", "a header line and at least one row"]),
    "only line ends": ("\n\n", ["is empty", "a header line and at least one row"]),
    "header without rows": ("a,label\n", ["holds no examples", "at least one"]),
    "no column is left to learn from": (
        "label\n1\n",
        ["no column is left to learn from", "Add at least one feature"],
    ),
    "missing feature": ("a,label\n1,0\n,1\n", ["'a' has no value in line 3", "take the rows out"]),
    "missing label": (
        "a,label\n1,0\n2,\n",
        ["'label' has no value in line 3", "take the rows out"],
    ),
    "short row": (
        "a,b,label\n1,2,0\n2\n",
        ["line 3 has 1 fields where the header has 3", "Fix that line"],
    ),
    "one long row": ("a,label\n1,0\n1,2,3\n", ["line 3 has 3 fields where the header has 2"]),
    "only long rows": ("a,label\n0,5,1\n1,7,0\n", ["line 2 has 3 fields where the header has 2"]),
    "no text": (b"\xf8\xfe\x00\x01", ["is not in the encoding 'utf-8'"]),
    "open quote": ('a,label\n"1,2\n', ["line 2 has 1 fields where the header has 2"]),
    "infinite feature": ("a,label\ninf,0\n", ["'a' must be finite", "received inf in line 2"]),
    "infinite label": ("a,label\n1,inf\n", ["'label'", "received inf in line 2"]),
    "feature beyond float32": (
        "a,label\n1e300,0\n",
        ["'a' must be finite", "received 1e+300 in line 2"],
    ),
    "negative class": (
        "a,label\n1,-1\n",
        ["whole numbers from 0 on", "-1", "data.task = 'regression'"],
    ),
    "class beyond int32": (
        "a,label\n1,5000000000\n",
        ["whole numbers from 0 on", "data.task = 'regression'"],
    ),
    "class beyond int64": (
        f"a,label\n1,{10**30}\n",
        ["whole numbers from 0 on", "data.task = 'regression'"],
    ),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_csv_file_that_cannot_be_used_is_refused_by_name(
    csv: Callable[[str | bytes], Path], case: str
):
    content, words, *keys = BAD_CSV[case]
    path = csv(content)
    with pytest.raises(ValueError, match=str(path)) as caught:
        load(path, **dict(*keys))
    for word in words:
        assert word in str(caught.value)


BAD_NPZ = {
    "no x": ({"y": Y}, ["must hold the arrays x and y", "['y']", "np.savez"]),
    "no y": ({"x": X}, ["must hold the arrays x and y", "['x']", "np.savez"]),
    "nothing": ({}, ["must hold the arrays x and y", "no arrays", "np.savez"]),
    "flat x": ({"x": Y, "y": Y}, ["must have shape (n, ...)", "(3,) and (3,)"]),
    "deep y": ({"x": X, "y": X[:, :1]}, ["y shape (n,)", "(3, 2) and (3, 1)"]),
    "other length": ({"x": X, "y": Y[:2]}, ["with the same n", "(3, 2) and (2,)"]),
    "text x": ({"x": X.astype(str), "y": Y}, ["x must be numeric", "<U"]),
    "text y": ({"x": X, "y": Y.astype(str)}, ["y must be numeric", "<U"]),
    "objects": (
        {"x": X, "y": np.array([None, 1, 2])},
        ["cannot be read as an .npz file", "Object arrays"],
    ),
    "complex": ({"x": X * 1j, "y": Y}, ["x must be numeric", "complex"]),
    "no examples": ({"x": X[:0], "y": Y[:0]}, ["holds no examples", "at least one"]),
    "NaN in x": ({"x": X * np.nan, "y": Y}, ["not finite", "Fill them in"]),
    "infinity in x": ({"x": X + np.inf, "y": Y}, ["not finite", "Fill them in"]),
    "NaN in y": ({"x": X, "y": Y * np.nan}, ["not finite", "Fill them in"]),
    "infinity in y": ({"x": X, "y": Y + np.inf}, ["not finite", "Fill them in"]),
    "x beyond float32": ({"x": X * 1e300, "y": Y}, ["not finite", "Fill them in"]),
    "negative class": (
        {"x": X, "y": Y - 1},
        ["whole numbers from 0 on", "-1", "Number the classes 0, 1, 2"],
    ),
    "class beyond int32": ({"x": X, "y": Y + 2**40}, ["whole numbers from 0 on", str(2**40)]),
    "deep weights": (
        {"x": X, "y": Y, "sample_weight": X},
        ["sample_weight must have shape (3,)", "(3, 2)"],
    ),
    "text weights": (
        {"x": X, "y": Y, "sample_weight": Y.astype(str)},
        ["sample_weight must be numeric", "<U"],
    ),
    "NaN weight": (
        {"x": X, "y": Y, "sample_weight": [1, np.nan, 1]},
        ["sample_weight must be finite"],
    ),
    "negative weight": ({"x": X, "y": Y, "sample_weight": [1, -1, 1]}, ["not negative"]),
    "many num_classes": (
        {"x": X, "y": Y, "num_classes": Y},
        ["num_classes must have shape ()", "(3,)"],
    ),
    "text num_classes": (
        {"x": X, "y": Y, "num_classes": "ten"},
        ["num_classes must be numeric", "<U"],
    ),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_an_npz_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, case: str):
    arrays, words = BAD_NPZ[case]
    path = tmp_path / "arrays.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=str(path)) as caught:
        load(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("target", [0.5, -1.0, np.nan, np.inf])
def test_targets_that_are_no_classes_are_refused_for_a_classification(
    tmp_path: Path, target: float
):
    np.savez(tmp_path / "a.npz", x=X, y=np.array([0.0, 1.0, target]))
    with pytest.raises(
        ValueError, match=rf"a\.npz: class targets must be whole .* received {target}.*'regression'"
    ):
        load(tmp_path / "a.npz", task="classification")


def test_a_damaged_npz_file_is_refused_whatever_its_damage(tmp_path: Path):
    good, path = tmp_path / "good.npz", tmp_path / "damaged.npz"
    np.savez_compressed(good, x=X, y=Y)
    whole, rng = good.read_bytes(), np.random.default_rng(0)
    damaged = [whole[:size] for size in range(0, len(whole), 7)]  # cut off
    for position in rng.integers(len(whole), size=150):  # or one byte changed
        damaged.append(
            whole[:position]
            + bytes([whole[position] ^ rng.integers(1, 256)])
            + whole[position + 1 :]
        )
    num_refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            dataset = load(path)
        except ValueError as error:
            num_refused += str(path) in str(error)
        else:
            assert same(dataset, load(good))  # some bytes, like those of a date, do not matter
    assert num_refused > len(damaged) / 2


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04K\x01."])  # the last is a pickle
def test_what_is_no_npz_file_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} cannot be read as an \.npz file: .*np\.savez"):
        load(path)


def test_a_single_array_under_the_name_of_an_npz_file_is_refused(tmp_path: Path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, X)
    with pytest.raises(ValueError, match=rf"{path} cannot be read as an \.npz file: .*np\.savez"):
        load(path)


@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_a_missing_file_is_refused_with_the_nearest_name_in_its_folder(tmp_path: Path, suffix: str):
    with pytest.raises(
        ValueError, match=rf"No data file at .*tabel\{suffix}.*holds no \{suffix} file"
    ):
        load(tmp_path / f"tabel{suffix}")
    (tmp_path / f"table{suffix}").touch()
    (tmp_path / f"zzz{suffix}").touch()
    with pytest.raises(
        ValueError,
        match=rf"No data file at .*tabel\{suffix}\. Nearest in that folder: table\{suffix}\.",
    ):
        load(tmp_path / f"tabel{suffix}")
    with pytest.raises(ValueError, match="No data file at"):
        load(tmp_path / "no folder" / f"table{suffix}")


def test_a_misspelt_name_is_refused_with_the_nearest(tmp_path: Path):
    with pytest.raises(ValueError, match=r"received 'wime'\. Nearest: wine\."):
        load("wime")
    with pytest.raises(
        ValueError,
        match=(
            r"built-in set, the path of a folder or of a file of the kinds \.npz, \.csv.*; received"
            r" 'a\.txt'"
        ),
    ):
        load("a.txt")


def test_a_task_that_does_not_fit_a_built_in_set_is_refused():
    with pytest.raises(
        ValueError, match=r"'regression' does not fit wine, .* Set data\.task = 'auto'"
    ):
        load("wine", task="regression")
    with pytest.raises(ValueError, match=r"'classification' does not fit diabetes"):
        load("diabetes", task="classification")
