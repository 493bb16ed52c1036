"""Low-rank adapters and mixed precision: what is trained, what is left alone, what is saved."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from dist_train.collectives import LocalCommunicator
from dist_train.trainer import train
from shared.data import Schema
from shared.experiment import Experiment, ModelSection, experiment_from_flat
from shared.weights import weights_sha256
from shared.zoo import MODELS, build_model
from shared.zoo.adapters import adapter_weights
from tests.unit.test_zoo import CASES, SETS, build, eight_examples


def adapted(folder: Path, name: str, data: str, rank: int = 2) -> tuple[keras.Model, keras.Model]:
    """A plain model, and the one with adapters that begins with its weights."""
    plain = build(name, eight_examples(data).schema, seed=3)
    plain.save(folder / "plain.keras")
    options = {"initial": str(folder / "plain.keras"), "adapter": "lora", "adapter_rank": rank}
    return plain, build(name, eight_examples(data).schema, **options)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_begin_with_the_outputs_of_the_initial_model_and_alone_are_trainable(
    tmp_path: Path, name: str
):
    examples = eight_examples(SETS.get(name, ["wine"])[0])
    plain, model = adapted(tmp_path, name, SETS.get(name, ["wine"])[0])
    np.testing.assert_allclose(
        np.asarray(model(examples.x)), np.asarray(plain(examples.x)), atol=1e-6
    )
    assert {variable.path for variable in model.trainable_variables} == set(adapter_weights(model))
    shapes = {
        path.rpartition("/")[2]: weights.shape for path, weights in adapter_weights(model).items()
    }
    assert any(shape[-1] == 2 for kind, shape in shapes.items() if kind.endswith("_a"))


def fine_tuning(folder: Path, **changes: object) -> Experiment:
    common = {
        "data.name": "digits",
        "model.name": "resnet",
        "model.options": 'preset = "tiny"\nnorm = "batch"',
        "training.epochs": 2,
        "optimizer.learning_rate": 0.01,
        "run.directory": str(folder / "run"),
    }
    return experiment_from_flat({**common, **changes})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and one that adapted its model."""
    folder = tmp_path_factory.mktemp("tuned")
    train(fine_tuning(folder, **{"training.epochs": 1}), LocalCommunicator())
    keys = {
        "model.initial": str(folder / "run" / "model.keras"),
        "model.adapter": "lora",
        "model.adapter_rank": 3,
    }
    best = {"training.restore_best": True, "run.directory": str(folder / "adapted")}
    train(fine_tuning(folder, **keys, **best), LocalCommunicator())
    return folder


def test_training_changes_nothing_but_the_adapters_which_are_merged_into_the_model_and_saved_apart(
    tuned: Path,
):
    first, second = (
        keras.models.load_model(tuned / run / "model.keras") for run in ("run", "adapted")
    )
    apart = np.load(tuned / "adapted" / "adapter.npz")
    assert {"output/lora_kernel_a", "output/lora_kernel_b", "stem/lora_kernel_a"} <= set(apart)
    for before, after in zip(
        first.variables, second.variables, strict=True
    ):  # of batch normalisation too
        change = np.asarray(after) - np.asarray(before)
        layer, _, kind = before.path.rpartition("/")
        if kind == "kernel":
            low_rank = apart[f"{layer}/lora_kernel_a"] @ apart[f"{layer}/lora_kernel_b"]
            np.testing.assert_allclose(change, low_rank, atol=1e-6)
            assert np.abs(change).max() > 1e-3
        elif "seed_generator" not in before.path:
            assert not change.any(), before.path
    assert not (tuned / "run" / "adapter.npz").exists()


def test_the_result_is_that_of_the_merged_model_which_is_a_plain_one(tuned: Path):
    result = json.loads((tuned / "adapted" / "result.json").read_text())
    merged = keras.models.load_model(tuned / "adapted" / "model.keras")
    assert result["weights_sha256"] == weights_sha256(merged.get_weights())
    assert [w.shape for w in merged.get_weights()] == [
        w.shape for w in keras.models.load_model(tuned / "run" / "model.keras").get_weights()
    ]
    of_first = json.loads((tuned / "run" / "result.json").read_text())["metrics"]["train"]["loss"]
    assert result["metrics"]["train"]["loss"] < of_first
    config = {"name": "resnet", "options": 'preset = "tiny"\nnorm = "batch"'}
    build_model(
        ModelSection(**config, initial=str(tuned / "adapted" / "model.keras")),
        Schema((8, 8, 1), 10),
        0,
    )


def test_a_model_without_a_layer_that_can_be_adapted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "own_norm.py").write_text(
        "import keras\n\ndef build(schema):\n    return"
        " keras.Sequential([keras.Input(schema.input_shape), keras.layers.LayerNormalization(),"
        " keras.layers.GlobalAveragePooling2D()])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    schema = Schema((8, 8, 1), 2)
    build("own_norm:build", schema).save(tmp_path / "plain.keras")
    with pytest.raises(
        ValueError, match="adapts Dense, EinsumDense, Embedding and convolution layers; received"
    ):
        build("own_norm:build", schema, initial=str(tmp_path / "plain.keras"), adapter="lora")


def test_an_adapter_without_a_trained_model_is_refused():
    with pytest.raises(
        ValueError, match=r"'lora' adapts a trained model; received no model\.initial\. Set"
    ):
        experiment_from_flat({"model.adapter": "lora"})


@pytest.mark.parametrize(("name", "data"), CASES)
def test_in_mixed_precision_variables_and_outputs_are_float32_and_predictions_near(
    name: str, data: str
):
    examples = eight_examples(data)
    full, mixed = (
        build(name, examples.schema),
        build(name, examples.schema, precision="mixed_bfloat16"),
    )
    outputs, expected = np.asarray(mixed(examples.x)), np.asarray(full(examples.x))
    assert outputs.dtype == np.float32
    assert {variable.dtype for variable in mixed.trainable_variables} == {"float32"}
    assert weights_sha256(mixed.get_weights()) == weights_sha256(full.get_weights())
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(outputs - expected).max() <= 0.05 * scale  # 8 bits of mantissa: 0.4 %
    assert keras.config.dtype_policy().name == "float32"
    if len(full.trainable_variables) > 4:  # hidden layers
        assert {layer.compute_dtype for layer in mixed.layers} >= {"bfloat16"}
        assert np.abs(outputs - expected).max() > 0
