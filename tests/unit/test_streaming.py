"""Tables that stay on disk: the same examples, schema, batches and weights as with everything in
memory.
"""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest

from benchmarks.streaming_memory import compare
from dist_train.collectives import LocalCommunicator
from dist_train.trainer import train
from fl_app.silo.data import load_silo, make_silo
from fl_app.silo.policy import OPEN, SiloSettings
from shared.data import Dataset, load_examples, split, split_pool, streaming
from shared.data.partition import partition
from shared.data.readers.tfrecord_files import write_tfrecord
from shared.data.rows import Rows
from shared.data.sources import save_examples
from shared.experiment import DataSection, Experiment, PartitionSection, experiment_from_flat
from shared.training import EpochBatches, evaluation_batches
from shared.weights import max_difference

NUM_ROWS = 300
KEYS: dict[str, Any] = {
    "label": "outcome",
    "features": "age, pressure, sex",
    "categorical": "sex",
    "weight": "trust",
    "id": "visit",
    "group": "patient",
    "missing": "fill",
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK_ROWS", 37)


def patients(num_rows: int = NUM_ROWS) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    age = rng.normal(50, 10, num_rows)
    pressure = np.where(rng.random(num_rows) < 0.1, np.nan, rng.normal(1e5, 1e3, num_rows))
    return pd.DataFrame(
        {
            "visit": np.arange(num_rows),
            "patient": rng.integers(0, 60, num_rows),
            "age": age,
            "pressure": pressure,
            "sex": rng.choice(["f", "m"], num_rows),
            "trust": rng.uniform(0.5, 2.0, num_rows),
            "outcome": np.where(age + rng.normal(0, 5, num_rows) > 50, "ill", "well"),
        }
    )


def written(folder: Path, suffix: str = ".parquet", frame: pd.DataFrame | None = None) -> Path:
    path = folder / f"patients{suffix}"
    frame = patients() if frame is None else frame
    if suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif suffix == ".arrow":
        frame.to_feather(path)
    else:
        write_tfrecord(path, frame)
    return path


def config(path: Path, stream: bool = True, **keys: Any) -> DataSection:
    return DataSection(**{**KEYS, "name": str(path), "stream": stream, **keys})


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".tfrecord"])
def test_splits_and_schema_are_those_of_the_table_in_memory(tmp_path: Path, suffix: str):
    path = written(tmp_path, suffix)
    here, there = (
        split(load_examples(c), c, seed=4) for c in (config(path, stream=False), config(path))
    )
    assert here.schema.classes == there.schema.classes == ("ill", "well")
    assert here.schema.columns is not None
    assert there.schema.columns is not None
    assert here.schema.columns.categories == there.schema.columns.categories
    for a, b in zip(here.schema.columns.numbers, there.schema.columns.numbers, strict=True):
        assert (a.name, a.count) == (b.name, b.count)
        assert (b.mean, b.variance) == pytest.approx((a.mean, a.variance), rel=1e-12)
    for name in ("train", "validation", "test"):
        a, b = getattr(here, name), getattr(there, name)
        assert isinstance(b.x, Rows)
        np.testing.assert_allclose(b.x[:], a.x, atol=1e-6)
        np.testing.assert_array_equal(b.y, a.y)
        np.testing.assert_array_equal(b.sample_weight, a.sample_weight)
        np.testing.assert_array_equal(b.groups, a.groups)


@pytest.mark.parametrize(
    "keys", [{}, {"data.label": "age", "data.features": "pressure, sex", "data.task": "regression"}]
)
def test_a_run_ends_with_the_weights_of_the_one_in_memory(tmp_path: Path, keys: dict[str, Any]):
    path = written(tmp_path)
    weights = []
    for stream in (False, True):
        directory = tmp_path / f"run{stream}"
        flat = {f"data.{key}": value for key, value in KEYS.items()} | {
            "data.name": str(path),
            "data.stream": stream,
        }
        flat |= {"model.name": "mlp", "training.epochs": 3, "run.directory": str(directory)}
        train(experiment_from_flat({**flat, **keys}), LocalCommunicator())
        weights.append(
            keras.models.load_model(directory / "model.keras", compile=False).get_weights()
        )
    assert max_difference(*weights) <= 1e-5  # means and variances are added up in another order


def test_batches_for_training_and_evaluation_hold_the_same_examples(tmp_path: Path):
    c = config(written(tmp_path))
    streamed = split(load_examples(c), c, seed=4).train
    in_memory = Dataset(streamed.x[:], streamed.y, 2, streamed.sample_weight)
    for a, b in (
        (
            EpochBatches(in_memory, 16, 1).as_tf_dataset(),
            EpochBatches(streamed, 16, 1).as_tf_dataset(),
        ),
        (evaluation_batches(in_memory), evaluation_batches(streamed)),
    ):
        for one, other in zip(a, b, strict=True):
            for x, y in zip(one, other, strict=True):
                np.testing.assert_array_equal(x, y)


class Watched(np.ndarray):
    """Notes which rows are read."""

    def __getitem__(self, key: Any) -> Any:
        self.read.extend(np.atleast_1d(key).tolist())
        return np.asarray(self)[key]


def test_a_rank_reads_its_part_and_nothing_else():
    array = np.arange(60, dtype=np.float32)[:, None].view(Watched)
    array.read = []
    rows = Rows(array, np.arange(40) + 10, "")
    dataset = Dataset(rows, np.zeros(40, np.int32), 1)  # type: ignore[arg-type]
    parts = []
    for rank in range(2):
        array.read = []
        for _ in EpochBatches(dataset, 8, seed=0, rank=rank, world_size=2).as_tf_dataset():
            pass
        parts.append(array.read)
    assert len(parts[0]) == len(parts[1]) == 20
    assert sorted(parts[0] + parts[1]) == list(range(10, 50))


def asked_to_write_in(folder: Path) -> Experiment:
    keys = {f"data.{key}": value for key, value in KEYS.items()} | {
        "data.stream": True,
        "data.cache": str(folder),
    }
    return experiment_from_flat(keys)


def test_silos_share_a_streamed_table_and_stream_their_parts(tmp_path: Path):
    c = config(written(tmp_path))
    pool, _ = split_pool(load_examples(c), 0, 0.2)
    whole, _ = split_pool(
        load_examples(config(tmp_path / "patients.parquet", stream=False)), 0, 0.2
    )
    parts = partition(PartitionSection(), pool, 3, 0)
    for i, (part, expected) in enumerate(
        zip(parts, partition(PartitionSection(), whole, 3, 0), strict=True)
    ):
        path = save_examples(tmp_path / f"silo-{i}", part)
        again = load_examples(config(path))
        in_file_order = expected.frame.sort_index()
        pd.testing.assert_frame_equal(
            load_examples(config(path, stream=False)).frame.reset_index(drop=True),
            in_file_order.reset_index(drop=True),
        )
        assert not load_silo(
            SiloSettings("a", str(path), policy=OPEN), asked_to_write_in(tmp_path / "elsewhere")
        ).train.config.cache
        silo = make_silo(
            f"silo-{i}", again, experiment_from_flat({"data.validation_fraction": 0.2})
        )
        assert len(silo.train) + len(silo.validation) == len(part)


def test_the_encoded_file_is_written_once_for_the_owner_alone_and_anew_for_new_data(tmp_path: Path):
    path, cache = written(tmp_path), tmp_path / "cache"
    c = config(path, cache=str(cache))
    split(load_examples(c), c, seed=4)
    (data,) = cache.glob("*.f32")
    assert data.stat().st_mode & 0o777 == 0o600
    assert data.stat().st_size == NUM_ROWS * 4 * 4  # age, pressure, sex=f, sex=m
    before = data.stat().st_mtime_ns
    split(load_examples(c), c, seed=4)
    assert data.stat().st_mtime_ns == before
    written(tmp_path, frame=patients(NUM_ROWS + 20))
    split(load_examples(c), c, seed=4)
    (newer,) = cache.glob("*.f32")
    assert newer != data
    assert not (tmp_path / ".encoded").exists()


def test_only_the_copies_used_last_stay_and_one_that_is_open_is_read_on(tmp_path: Path):
    c = config(written(tmp_path), cache=str(tmp_path / "cache"))
    first = split(load_examples(c), c, seed=0).train
    expected = np.array(first.x[:])
    (unused,) = (tmp_path / "cache").glob("*.f32")
    split(load_examples(c), c, seed=1)
    (used,) = set((tmp_path / "cache").glob("*.f32")) - {unused}
    for seed in (2, 3, 4):
        split(load_examples(c), c, seed=seed)
        split(load_examples(c), c, seed=1)  # used again and again
    left = set((tmp_path / "cache").glob("*.f32"))
    assert len(left) == streaming.NUM_COPIES == 3
    assert {path.stem for path in (tmp_path / "cache").glob("*.json")} == {p.stem for p in left}
    assert unused not in left
    assert used in left
    np.testing.assert_array_equal(first.x[:], expected)


def test_what_a_killed_writer_left_is_removed_and_other_tables_copies_stay(tmp_path: Path):
    cache = tmp_path / "cache"
    c = config(written(tmp_path), cache=str(cache))
    split(load_examples(c), c, seed=0)
    (whole,) = cache.glob("*.f32")
    (cache / whole.name.replace("-", "-0123456789abcdef-", 1)).touch()  # of another table
    killed = whole.with_name(whole.name[:-20] + "0123456789abcdef.f32")
    killed.touch()
    for seed in (1, 2):
        split(load_examples(c), c, seed=seed)
    assert not killed.exists()
    assert len(list(cache.glob("*.f32"))) == 4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: f.astype({"age": object}).replace({"age": {f["age"][123]: "old"}}),
            r"'age' .*'old' in row 124",
        ),
        (
            lambda f: f.assign(trust=np.where(f.index == 200, -1.0, 1.0)),
            r"'trust' holds weights .* in row 201",
        ),
        (
            lambda f: f.assign(visit=f["visit"] % 299),
            r"'visit' names each example .*received '0' again in row 300",
        ),
        (lambda f: f.iloc[:0], r"holds no examples"),
        (lambda f: f.drop(columns="sex"), r"has no column 'sex'"),
    ],
)
def test_what_is_wrong_is_named_with_its_row_in_the_whole_file(
    tmp_path: Path, spoil: Any, message: str
):
    frame = spoil(patients())
    path = tmp_path / "patients.tfrecord"
    if "old" in message:
        write_tfrecord(path, frame)
    else:
        path = written(tmp_path, frame=frame)
    with pytest.raises(ValueError, match=message):
        load_examples(config(path))


def test_cut_files_other_kinds_and_a_cache_without_room_are_refused(tmp_path: Path):
    path = written(tmp_path)
    c = config(path, cache=str(path))
    with pytest.raises(
        ValueError, match=r"could not be written: .* Set data\.cache to a directory with room"
    ):
        split(load_examples(c), c, seed=0)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cannot be read as a Parquet file: .* Is it whole\?"):
        load_examples(config(path))
    (tmp_path / "a.csv").write_text("a,label\n1,2\n")
    with pytest.raises(
        ValueError, match=r"data\.stream is for \.parquet, \.arrow, \.tfrecord; received .*a\.csv"
    ):
        load_examples(config(tmp_path / "a.csv"))


@pytest.mark.slow
def test_a_streamed_table_takes_a_fraction_of_the_memory():
    found = compare(num_rows=400_000)  # 160 MB
    assert found["streamed"]["peak_mib"] < 0.45 * found["in_memory"]["peak_mib"], found


def test_a_run_from_the_cache_is_the_first_one_again(tmp_path: Path):
    path = written(tmp_path)
    weights = []
    for name in ("first", "second"):
        flat = {f"data.{key}": value for key, value in KEYS.items()} | {
            "data.name": str(path),
            "data.stream": True,
        }
        flat |= {"model.name": "mlp", "training.epochs": 2, "run.directory": str(tmp_path / name)}
        train(experiment_from_flat(flat), LocalCommunicator())
        weights.append(
            keras.models.load_model(tmp_path / name / "model.keras", compile=False).get_weights()
        )
    assert max_difference(*weights) == 0
