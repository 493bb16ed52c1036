"""The zoo: what every model must do. A new entry of MODELS is tested by being registered."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from shared.data import Dataset, Schema, load_dataset
from shared.data.readers.texts import PAD, VOCABULARY_SIZE, as_ids, language_model_dataset
from shared.experiment import DataSection, ModelSection, experiment_from_flat
from shared.training import EpochBatches, compile_model, fit_epochs, make_loss
from shared.weights import weights_sha256
from shared.zoo import MODELS, PRESETS, build_model
from shared.zoo.transformer import generate
from shared.zoo.wide_deep import BucketIds

SETS = {  # models that do not take tables; all others learn classes and numbers from tables
    "cnn": ["digits"],
    "resnet": ["digits"],
    "conv1d": ["motifs", "texts"],
    "transformer_lm": ["documentation"],
    "transformer_classifier": ["texts"],
    "autoencoder": ["wine to itself", "digits to itself"],
}
LEARNING_RATES = {
    "transformer_lm": 0.01,
    "transformer_classifier": 0.01,
    "resnet": 0.01,
    "conv1d": 0.01,
}
TINY = dict.fromkeys(PRESETS, 'preset = "tiny"') | {"autoencoder": "units = [64]"}
CASES = [(name, data) for name in MODELS for data in SETS.get(name, ["wine", "diabetes"])]
TABLE = Schema((4,), 3)


def eight_examples(data: str) -> Dataset:
    if data == "motifs":
        return eight_motifs()
    if data == "texts":
        words = ["the cat sat on the mat", "a dog", "birds sing in the morning", "fish"]
        ids = as_ids([*words, *(word.upper() for word in words)], 32)
        return Dataset(
            ids, np.repeat([0, 1], 4).astype(np.int32), 2, vocabulary_size=VOCABULARY_SIZE
        )
    name, to_itself, _ = data.partition(" to itself")
    dataset = load_dataset(DataSection(name=name, sequence_length=16))
    eight = dataset.take(np.linspace(0, len(dataset) - 1, 8).astype(int))  # over all classes
    return replace(eight, y=eight.x, num_classes=0) if to_itself else eight


def eight_motifs() -> Dataset:
    """Random DNA, one-hot; every second sequence holds GATTACA somewhere."""
    rng = np.random.default_rng(0)
    letters = rng.integers(0, 4, (8, 40))
    for i in range(0, 8, 2):
        letters[i, 4 * i : 4 * i + 7] = [2, 0, 3, 3, 0, 1, 0]
    y = np.tile([1, 0], 4).astype(np.int32)
    return Dataset(np.eye(4, dtype=np.float32)[letters], y, num_classes=2)


def build(name: str, schema: Schema = TABLE, seed: int = 0, **keys: str) -> keras.Model:
    keys.setdefault("options", TINY.get(name, ""))
    return build_model(ModelSection(name=name, **keys), schema, seed)


# --- every model


@pytest.mark.parametrize(("name", "data"), CASES)
def test_every_model_maps_a_batch_to_one_float_per_output(name: str, data: str):
    examples = eight_examples(data)
    outputs = np.asarray(build(name, examples.schema)(examples.x))
    per_place = (
        (*examples.y.shape, examples.num_classes) if examples.num_classes else examples.y.shape
    )
    assert outputs.shape == ((8, 1) if per_place == (8,) else per_place)
    assert outputs.dtype == np.float32
    assert np.isfinite(outputs).all()


@pytest.mark.parametrize(("name", "data"), CASES)
def test_every_model_outputs_logits_that_may_be_negative(name: str, data: str):
    """No softmax, ReLU or sigmoid at the end: the outputs move by -100 as the last bias does."""
    examples = eight_examples(data)
    model = build(name, examples.schema)
    before = np.asarray(model(examples.x))
    bias = next(v for v in reversed(model.trainable_variables) if v.path.endswith("output/bias"))
    bias.assign(bias - 100.0)
    after = np.asarray(model(examples.x))
    np.testing.assert_allclose(after, before - 100.0, atol=1e-4)  # float32 near 100


@pytest.mark.parametrize(("name", "data"), CASES)
def test_every_model_comes_back_from_its_file_with_equal_predictions(
    tmp_path: Path, name: str, data: str
):
    examples = eight_examples(data)
    model = build(name, examples.schema)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert weights_sha256(loaded.get_weights()) == weights_sha256(model.get_weights())
    np.testing.assert_array_equal(np.asarray(loaded(examples.x)), np.asarray(model(examples.x)))


@pytest.mark.parametrize(("name", "data"), CASES)
def test_every_models_weights_are_determined_by_the_seed(name: str, data: str):
    schema = eight_examples(data).schema
    one = weights_sha256(build(name, schema, seed=0).get_weights())
    keras.utils.set_random_seed(99)  # what was drawn before must not matter
    assert weights_sha256(build(name, schema, seed=0).get_weights()) == one
    assert weights_sha256(build(name, schema, seed=1).get_weights()) != one


@pytest.mark.parametrize(("name", "data"), CASES)
def test_every_model_can_learn_eight_examples_by_heart(name: str, data: str):
    examples = eight_examples(data)
    # All 100 steps in one epoch: epochs cost more than steps.
    repeated = examples.take(np.tile(np.arange(8), 100))
    experiment = experiment_from_flat({"optimizer.learning_rate": LEARNING_RATES.get(name, 0.05)})
    model = compile_model(build(name, examples.schema), experiment, examples.schema)
    loss = make_loss("auto", examples.schema)
    # Guessing costs about log(3) = 1.1 for wine, log(10) = 2.3 for digits, and for diabetes the
    # variance 1.
    assert loss(examples.y, model(examples.x)) > (0.4 if data != "digits to itself" else 0.15)
    fit_epochs(model, EpochBatches(repeated, 8, seed=0), 0, 1)
    assert loss(examples.y, model(examples.x)) < (0.1 if data != "digits to itself" else 0.05)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_refuses_an_unknown_option_and_lists_the_known_ones(name: str):
    with pytest.raises(ValueError, match=f"'{name}' takes no option 'colour'. It takes: "):
        build(name, options="colour = 3")


# --- presets, sizes and what does not fit


@pytest.mark.parametrize(
    ("name", "preset"), [(name, preset) for name in PRESETS for preset in PRESETS[name]]
)
def test_every_preset_builds_and_further_options_have_the_last_word(name: str, preset: str):
    schema = eight_examples(SETS[name][0]).schema
    model = build(name, schema, options=f'preset = "{preset}"')
    assert model.count_params() > 0
    key, value = next((k, v) for k, v in PRESETS[name][preset].items() if isinstance(v, int))
    other = build(name, schema, options=f'preset = "{preset}"\n{key} = {2 * value}')
    assert other.count_params() != model.count_params()


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'resnet' has no preset 'huge'\. It has: tiny, small, resnet20"
    ):
        build("resnet", Schema((8, 8, 1), 10), options='preset = "huge"')
    with pytest.raises(ValueError, match=r"'linear' has no preset 'huge'\. It has: none"):
        build("linear", options='preset = "huge"')


MISFITS = {
    "resnet": [Schema((4,), 3), Schema((8, 8, 1), 0, target_shape=(8, 8, 1))],
    "cnn": [Schema((4,), 3)],
    "conv1d": [Schema((4,), 3), Schema((8, 8, 1), 3), Schema((1, 4), 3)],
    "transformer_lm": [Schema((4,), 3), Schema((4,), 3, 257)],
    "transformer_classifier": [Schema((4,), 3), Schema((4,), 256, 257, (4,))],
    "autoencoder": [Schema((4,), 3), Schema((4,), 0)],
    "mlp": [Schema((4,), 3, 257), Schema((4,), 0, target_shape=(4,))],
    "linear": [Schema((4,), 3, 257)],
    "wide_deep": [Schema((8, 8, 1), 3), Schema((4,), 3, 257)],
}


@pytest.mark.parametrize(
    ("name", "schema"), [(name, schema) for name in MISFITS for schema in MISFITS[name]]
)
def test_data_that_does_not_fit_is_refused_with_what_was_received(name: str, schema: Schema):
    with pytest.raises(ValueError, match="received"):
        build(name, schema)


def test_the_resnet_normalises_by_groups_or_by_batch_as_it_is_told():
    schema = Schema((8, 8, 1), 10)
    names = {
        norm: {
            type(layer).__name__
            for layer in build("resnet", schema, options=f'norm = "{norm}"').layers
        }
        for norm in ("group", "batch")
    }
    assert "GroupNormalization" in names["group"] - names["batch"]
    assert "BatchNormalization" in names["batch"] - names["group"]
    with pytest.raises(ValueError, match="norm must be one of group, batch; received 'layer'"):
        build("resnet", schema, options='norm = "layer"')


# --- the transformers


def test_a_language_models_logits_depend_on_what_came_before_and_on_nothing_else():
    examples = eight_examples("documentation")
    model = build("transformer_lm", examples.schema)
    before = np.asarray(model(examples.x))
    later = examples.x.copy()
    later[:, 9:] = (later[:, 9:] + 1) % 256
    after = np.asarray(model(later))
    np.testing.assert_allclose(after[:, :9], before[:, :9], atol=1e-5)
    assert np.abs(after[:, 9:] - before[:, 9:]).min(axis=(0, 2)).max() > 0.0
    earlier = examples.x.copy()
    earlier[:, 0] = (earlier[:, 0] + 1) % 256
    assert (
        np.abs(np.asarray(model(earlier)) - before).max(axis=(0, 2)) > 1e-5
    ).all()  # every place sees the first


def test_padding_does_not_change_what_a_classifier_says_of_a_text():
    words = ["some words", "others"]
    short, long = (as_ids(words, length) for length in (12, 32))
    models = [build("transformer_classifier", Schema((n,), 2, VOCABULARY_SIZE)) for n in (12, 32)]
    weights = models[1].get_weights()
    fitting = [
        w if w.shape == v.shape else w[: len(v)]
        for w, v in zip(weights, models[0].get_weights(), strict=True)
    ]
    models[0].set_weights(fitting)
    np.testing.assert_allclose(np.asarray(models[0](short)), np.asarray(models[1](long)), atol=1e-5)
    assert (long == PAD).sum() == 2 * 32 - len("".join(words))
    assert np.isfinite(np.asarray(models[0](as_ids(["", ""], 12)))).all()  # nothing but padding


def test_a_language_model_continues_what_it_has_learnt_by_heart():
    text = "abcde" * 130  # windows of 16 begin with every letter
    examples = language_model_dataset([text], 16)
    experiment = experiment_from_flat({"optimizer.learning_rate": 0.01})
    model = compile_model(build("transformer_lm", examples.schema), experiment, examples.schema)
    fit_epochs(model, EpochBatches(examples, 8, seed=0), 0, 20)
    # Also beyond the 16 bytes that it gets.
    assert generate(model, b"deabc", 20, seed=0, temperature=0) == b"deabc" * 4
    assert generate(model, 7 * b"bcdea", 4, seed=0, temperature=0.05) == b"bcde"
    assert generate(model, b"abc", 20, seed=1) == generate(model, b"abc", 20, seed=1)
    assert len({generate(model, b"abc", 20, seed=seed, temperature=5.0) for seed in range(3)}) == 3
    with pytest.raises(ValueError, match="received an empty one"):
        generate(model, b"", 3, seed=0)


# --- wide_deep's buckets


def bucket_of(value: float, num_buckets: int, is_category: bool) -> int:
    """The slow oracle: look at every bucket."""
    if is_category:
        return min(range(num_buckets), key=lambda category: abs(category - value))
    upper_ends = [-3 + 6 * (i + 1) / num_buckets for i in range(num_buckets - 1)]
    return next((i for i, end in enumerate(upper_ends) if value < end), num_buckets - 1)


@pytest.mark.parametrize("num_buckets", [1, 5, 16])
@pytest.mark.parametrize("categorical_columns", [[], [1], [0, 2]])
def test_bucket_ids_are_those_of_a_slow_search(num_buckets: int, categorical_columns: list[int]):
    inside = np.random.default_rng(0).uniform(-4, num_buckets + 2, size=200)
    outside = [-1e6, -3.01, -2.99, -0.51, -0.49, 0.01, 0.49, 0.51, 2.99, 3.01, 14.6, 15.4, 1e6]
    x = np.stack([np.roll([*inside, *outside], 7 * column) for column in range(3)], axis=1).astype(
        np.float32
    )
    ids = np.asarray(BucketIds(num_buckets, categorical_columns)(x))
    for row, column in itertools.product(range(len(x)), range(3)):
        bucket = bucket_of(float(x[row, column]), num_buckets, column in categorical_columns)
        assert ids[row, column] == column * num_buckets + bucket, x[row, column]


def test_wide_deep_starts_with_no_opinion_in_its_wide_buckets_and_learns_them(
    make_data: Callable[..., Dataset],
):
    model = build("wide_deep", options="num_buckets = 8")
    (wide,) = model.get_layer("wide").get_weights()
    assert wide.shape == (4 * 8, 3)
    assert not wide.any()
    x = make_data(1).x
    before = np.asarray(model(x))
    model.get_layer("wide").set_weights([wide + np.float32([1.0, 2.0, 3.0])])
    # every one of the 4 columns is in some bucket, so their mean is the row that all have
    np.testing.assert_allclose(np.asarray(model(x)) - before, [[1.0, 2.0, 3.0]], atol=1e-5)
    assert not math.isclose(float(before.std()), 0.0)
