"""What the adapter does before any rank is involved. With ranks: tests/parallel/test_equality.py."""

import keras
import numpy as np
import pytest

import dist_train.keras_horovod as hvk
from dist_train.collectives import LocalCommunicator


def compiled(jit_compile: bool = False) -> keras.Model:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(), "mse", jit_compile=jit_compile)
    return model


class TwoRanks(LocalCommunicator):
    """Enough of a communicator for what is checked before the first collective."""

    world_size = 2


def test_a_script_that_forgets_init_is_told_so_instead_of_training_alone() -> None:
    with pytest.raises(ValueError, match=r"Call hvk.init\(\) first"):
        hvk.distribute(compiled())


def test_a_model_must_be_compiled_first() -> None:
    with pytest.raises(ValueError, match="compile"):
        hvk.distribute(keras.Sequential([keras.layers.Dense(1)]), TwoRanks())


def test_xla_is_refused() -> None:
    with pytest.raises(ValueError, match="jit_compile=False"):
        hvk.distribute(compiled(jit_compile=True), TwoRanks())


def test_one_rank_changes_nothing() -> None:
    model = compiled()
    hvk.distribute(model, LocalCommunicator())
    assert type(model.optimizer) is keras.optimizers.Adam
    assert "fit" not in vars(model)
    assert hvk.bytes_sent(model) == 0


def test_a_model_compiled_anew_is_refused_until_it_is_distributed_again() -> None:
    """Its new optimizer would keep the gradients local without a word."""
    model = compiled()
    hvk.distribute(model, TwoRanks())
    model.compile(keras.optimizers.SGD(), "mse", jit_compile=False)
    x = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match="distribute after each compile"):
        model.fit(x, x[:, :1], verbose=0)
    hvk.distribute(model, TwoRanks())
    model.fit(x, x[:, :1], 4, 1, 0)  # positional arguments as in Keras: batch_size, epochs, verbose


@pytest.mark.parametrize("lacking", ["_clip_gradients", "scale_loss"])
def test_an_optimizer_without_the_hook_is_refused(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """As in a Keras that renamed the method: gradients would stay local without a word."""
    model = compiled()
    monkeypatch.delattr(keras.src.optimizers.base_optimizer.BaseOptimizer, lacking)
    with pytest.raises(RuntimeError, match=f"lacks {lacking}"):
        hvk.distribute(model, TwoRanks())
