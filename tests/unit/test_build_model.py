"""Models by name: options, the user's own builder, and initial weights."""

from pathlib import Path

import keras
import pytest

from shared.data import Schema
from shared.weights import weights_sha256
from shared.zoo import parse_options
from tests.unit.test_zoo import TABLE, build

# --- options


def test_a_misspelt_option_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"no option 'unit'\. It takes: units, activation, dropout_rate; nearest: units",
    ):
        build("mlp", options="unit = [3]")
    with pytest.raises(ValueError, match=r"It takes: none"):
        build("linear", options="units = [3]")


@pytest.mark.parametrize("options", ["units = 3", "dropout_rate = 'high'"])
def test_an_option_of_the_wrong_type_is_refused(options: str):
    with pytest.raises(ValueError, match=r"model\.options = .* does not suit 'mlp'") as caught:
        build("mlp", options=options)
    assert repr(options) in str(caught.value)


def test_options_that_are_no_toml_are_refused_with_an_example():
    with pytest.raises(
        ValueError, match=r"TOML text like 'units = \[64, 32\]'; received 'units \[3'"
    ):
        parse_options("units [3")
    with pytest.raises(ValueError, match="brackets are nested too deeply"):
        parse_options(f"units = {'[' * 5000}")


def test_options_reach_the_model():
    model = build("mlp", options="units = [5, 6]\ndropout_rate = 0.5\nactivation = 'tanh'")
    assert [w.shape for w in model.get_weights()] == [(4, 5), (5,), (5, 6), (6,), (6, 3), (3,)]
    assert [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)] == [
        0.5,
        0.5,
    ]
    assert model.get_layer("dense0").activation is keras.activations.tanh


@pytest.mark.parametrize(
    ("name", "schema", "options", "message"),
    [
        ("cnn", TABLE, "", r"takes images .* received examples of \(4,\)"),
        (
            "cnn",
            Schema((2, 9, 1), 3),
            "",
            r"halves the image 2 times; received images of \(2, 9, 1\).*'filters'",
        ),
        ("wide_deep", Schema((8, 8, 1), 3), "", r"takes tables.*received examples of \(8, 8, 1\)"),
        (
            "wide_deep",
            TABLE,
            "categorical_columns = [0, 4, -1]",
            r"must lie in 0\.\.3; received \[4, -1\]",
        ),
    ],
)
def test_data_that_does_not_suit_a_model_is_refused(
    name: str, schema: Schema, options: str, message: str
):
    with pytest.raises(ValueError, match=message):
        build(name, schema, options=options)


def test_an_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"zoo entry or 'package\.module:function'; received 'wide_dep'.*: wide_deep\.",
    ):
        build("wide_dep")


# --- the user's own builder


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, in the folder where they start the program."""
    name = f"own_models_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text("""
import keras

def build(schema, width=2):
    return keras.Sequential([keras.layers.Dense(width), keras.layers.Dense(schema.num_outputs)])

def build_anything(schema, **options):
    return build(schema, options["any_width"])

def build_nothing(schema):
    return None

LIMIT = 3
""")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_dotted_path_names_the_users_own_model_even_if_it_is_not_built_yet(own_module: str):
    shapes = [w.shape for w in build(f"{own_module}:build", options="width = 7").get_weights()]
    assert shapes == [(4, 7), (7,), (7, 3), (3,)]


def test_a_builder_that_takes_any_option_gets_it(own_module: str):
    assert build(f"{own_module}:build_anything", options="any_width = 5").get_weights()[
        0
    ].shape == (4, 5)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("no_such_module:build", "", r"no module 'no_such_module' can be imported.*PYTHONPATH"),
        ("{own}:bild", "", r"has no function 'bild'\. Nearest: build"),
        ("{own}:LIMIT", "", r"has no function 'LIMIT'"),
        ("{own}:build_nothing", "", r"must return a keras\.Model; received NoneType"),
        ("{own}:build", "wide = 3", r"takes no option 'wide'\. It takes: width; nearest: width"),
    ],
)
def test_a_dotted_path_that_leads_nowhere_is_refused(
    own_module: str, path: str, options: str, message: str
):
    with pytest.raises(ValueError, match=message):
        build(path.format(own=own_module), options=options)


# --- initial weights


def test_initial_weights_replace_the_fresh_ones(tmp_path: Path):
    trained = build("mlp", seed=5)
    trained.save(tmp_path / "trained.keras")
    started = build("mlp", seed=0, initial=str(tmp_path / "trained.keras"))
    assert weights_sha256(started.get_weights()) == weights_sha256(trained.get_weights())


def test_initial_weights_of_other_shapes_are_refused_and_the_first_that_differs_is_named(
    tmp_path: Path,
):
    path = str(tmp_path / "trained.keras")
    build("mlp").save(path)  # (4, 64) (64,) (64, 32) (32,) (32, 3) (3,)
    cases = [
        (
            {"name": "mlp", "options": "units = [64, 33]"},
            "6 arrays against 6",
            "number 2, received [(64, 32)]",
        ),
        (
            {"name": "mlp", "options": "units = [64, 32, 3]"},
            "6 arrays against 8",
            "number 6, received []",
        ),
        (
            {"name": "linear"},
            "6 arrays against 2",
            "number 0, received [(4, 64)], expected [(4, 3)]",
        ),
    ]
    for model, *words in cases:
        with pytest.raises(
            ValueError, match=r"other weights than the model.*Use the same model\.name"
        ) as caught:
            build(initial=path, **model)
        for word in words:
            assert word in str(caught.value)


def test_a_file_of_initial_weights_that_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.initial names no file: .*none\.keras"):
        build("mlp", initial=str(tmp_path / "none.keras"))
    (tmp_path / "garbage.keras").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"model\.initial = '.*garbage\.keras' cannot be loaded"):
        build("mlp", initial=str(tmp_path / "garbage.keras"))
