"""Checkpoints: what is written comes back; the file is whole, the old one or the new one."""

from pathlib import Path

import numpy as np
import pytest

from shared.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.experiment import Experiment, experiment_from_flat

EXPERIMENT = experiment_from_flat({"seed": 3})


def checkpoint(meta: object = 7) -> Checkpoint:
    """Dtypes and shapes as in models and optimizers.

    More than ten arrays, whose numbers sort as 1, 10, 2 in text.
    """
    rng = np.random.default_rng(0)
    arrays = {
        "model": [
            rng.normal(size=(3, 2)).astype(np.float32),
            np.array([np.nan, np.inf, -0.0, 1e-45], dtype=np.float32),
            np.arange(2**32 - 2, 2**32, dtype=np.uint32),  # the state of random layers
            np.zeros((0, 4), np.float16),
            np.asfortranarray(rng.normal(size=(4, 3))),
        ],
        "optimizer": [
            np.array(2**62 + 1, dtype=np.int64),
            *(np.float32([i]) for i in range(11)),
            np.array(True),
        ],
    }
    return Checkpoint(arrays, {"epoch": meta, "best_loss": 0.1, "stopped": False})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.npz"


def test_the_checkpoint_of_another_runtime_is_refused(path: Path):
    save_checkpoint(path, EXPERIMENT, checkpoint())
    load_checkpoint(path, EXPERIMENT, "model", "optimizer")
    with pytest.raises(
        ValueError, match=r"another runtime: it holds \['model', 'optimizer'\].*Resume it with"
    ):
        load_checkpoint(path, EXPERIMENT, "weights")
    with pytest.raises(ValueError, match=r"another runtime: .*\['model', 'weights'\] are needed"):
        load_checkpoint(path, EXPERIMENT, "model", "weights")


def test_a_checkpoint_may_hold_more_than_is_needed(path: Path):
    save_checkpoint(path, EXPERIMENT, checkpoint())
    assert set(load_checkpoint(path, EXPERIMENT, "model").arrays) == {"model", "optimizer"}


def test_arrays_and_metadata_come_back_bit_by_bit(path: Path):
    save_checkpoint(path, EXPERIMENT, checkpoint())
    loaded = load_checkpoint(path, EXPERIMENT)
    assert loaded.meta == checkpoint().meta
    assert set(loaded.arrays) == set(checkpoint().arrays)
    for name, arrays in checkpoint().arrays.items():
        for saved, array in zip(arrays, loaded.arrays[name], strict=True):
            assert (array.dtype, array.shape, array.tobytes()) == (
                saved.dtype,
                saved.shape,
                saved.tobytes(),
            )


def test_infinity_comes_back(path: Path):  # the best loss of a run without validation
    save_checkpoint(path, EXPERIMENT, Checkpoint({}, {"best_loss": float("inf")}))
    assert load_checkpoint(path, EXPERIMENT).meta == {"best_loss": float("inf")}


def test_saving_replaces_the_old_checkpoint_and_leaves_nothing_else(path: Path):
    save_checkpoint(path, EXPERIMENT, checkpoint(meta=1))
    save_checkpoint(path, EXPERIMENT, checkpoint(meta=2))
    assert load_checkpoint(path, EXPERIMENT).meta["epoch"] == 2
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (checkpoint(meta=object()), TypeError),  # fails before a byte is written
        (
            Checkpoint({"model": [np.ones(1000), np.array([None])]}, {}),
            ValueError,
        ),  # fails after the first array
    ],
)
def test_a_write_that_fails_leaves_the_old_checkpoint(
    path: Path, broken: Checkpoint, error: type[Exception]
):
    save_checkpoint(path, EXPERIMENT, checkpoint(meta=1))
    with pytest.raises(error):
        save_checkpoint(path, EXPERIMENT, broken)
    assert load_checkpoint(path, EXPERIMENT).meta["epoch"] == 1


def test_the_file_is_never_there_in_part(path: Path, monkeypatch: pytest.MonkeyPatch):
    """The new file is whole when it takes its name."""
    sizes = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        sizes.append((path.exists(), self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    save_checkpoint(path, EXPERIMENT, checkpoint())
    assert sizes == [(False, path.stat().st_size)]


def test_more_epochs_or_rounds_and_another_speed_may_resume(path: Path):
    save_checkpoint(path, EXPERIMENT, checkpoint())
    longer = {"training.epochs": 99, "federation.num_rounds": 99, "federation.silo_timeout_s": 1.0}
    longer |= {"federation.round_timeout_s": 1.0, "federation.cross_site_evaluation": True}
    other = experiment_from_flat(
        {"seed": 3, "name": "b", "performance.steps_per_execution": 5, **longer}
    )
    assert load_checkpoint(path, other).meta["epoch"] == 7


def test_another_experiment_is_refused_and_the_keys_that_differ_are_named(path: Path):
    save_checkpoint(path, EXPERIMENT, checkpoint())
    other = experiment_from_flat({"seed": 4, "optimizer.learning_rate": 0.5, "training.epochs": 99})
    with pytest.raises(ValueError, match="belongs to another experiment") as caught:
        load_checkpoint(path, other)
    assert (
        "seed is 4 here and 3 there; optimizer.learning_rate is 0.5 here and 0.001 there."
        in str(caught.value)
    )
    assert "training.epochs" not in str(caught.value)
    assert "Resume with the experiment.toml that lies beside it" in str(caught.value)


def test_a_missing_checkpoint_is_refused(path: Path):
    with pytest.raises(
        ValueError,
        match=rf"Nothing to resume: there is no checkpoint at {path}.*Run without resume",
    ):
        load_checkpoint(path, EXPERIMENT)


def test_a_damaged_file_is_refused_wherever_it_is_cut(path: Path):
    save_checkpoint(path, EXPERIMENT, checkpoint())
    whole = path.read_bytes()
    for size in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"not a readable checkpoint .*Delete the run directory"
        ):
            load_checkpoint(path, EXPERIMENT)


def test_a_flipped_byte_in_an_array_is_found(path: Path):
    save_checkpoint(path, EXPERIMENT, Checkpoint({"model": [np.zeros(1000)]}, {}))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path, EXPERIMENT)


def test_a_file_that_is_no_checkpoint_is_refused(path: Path):
    for content in (
        b"garbage",
        b"\x80\x04K\x01.",
    ):  # the second is a pickle, which must never be opened
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            load_checkpoint(path, Experiment())
    np.savez(path, x=np.ones(3))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path, Experiment())


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"arr_0": np.zeros(3)}, "header"),  # as numpy.savez writes arrays without names
        ({"header": b"{}", "arr_0": np.zeros(3)}, "another kind"),
        ({"header": b"[1]"}, "another kind"),
        ({"header": b'{"experiment": 3, "meta": {}}'}, "another kind"),
        ({"header": b'{"experiment": {}, "meta": {}}', "arr_0": np.zeros(3)}, "'arr_0'"),
        ({"header": b'{"experiment": {}, "meta": {}}', "model/x": np.zeros(3)}, "'model/x'"),
        ({"header": b'{"experiment": {}, "meta": {}}', "/0": np.zeros(3)}, "'/0'"),
    ],
)
def test_a_foreign_npz_is_refused(path: Path, members: dict, reason: str):
    arrays = {
        name: np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
        for name, value in members.items()
    }
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"not a readable checkpoint .*{reason}.*Delete the run"):
        load_checkpoint(path, EXPERIMENT, "model")
