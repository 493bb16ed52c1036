"""The silo's owner, not the server, decides what leaves the silo."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fl_app.failures import SiloFailure
from fl_app.messages import DESCRIBE, INFORM, SiloEntry, Task
from fl_app.silo.data import load_silo
from fl_app.silo.handlers import Site, handle
from fl_app.silo.policy import ALL, OPEN, DataPolicy, SiloSettings
from fl_app.silo.workbench import Workbench
from shared.experiment import Experiment, experiment_from_flat


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 rows: numbers, a rare value, a category, names, and an outcome in numbers and words."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "age": rng.integers(20, 90, 200),
            "rare": [7.5] + [None] * 199,
            "sex": rng.choice(["f", "m"], 200),
            "patient": [f"Jane Doe {i}" for i in range(200)],
            "outcome": rng.integers(0, 2, 200),
            "stage": rng.choice(["I", "II"], 200),
        }
    )
    path = tmp_path_factory.mktemp("patients") / "patients.csv"
    frame.to_csv(path, index=False)
    return str(path)


def experiment(**data: Any) -> Experiment:
    changes = {f"data.{key}": value for key, value in data.items()}
    return experiment_from_flat(
        {"data.label": "outcome", "data.features": "age", "model.name": "linear", **changes}
    )


def describe(source: str, policy: DataPolicy, **data: Any) -> SiloEntry:
    settings = SiloSettings("a", source, policy=policy)
    site = Site(settings, experiment(**data), Workbench())
    return SiloEntry.from_answer(handle(Task(DESCRIBE), site))


ASKED_TOO_MUCH = {
    "one training row": ({"validation_fraction": 0.79, "test_fraction": 0.2}, "at most half"),
    "names as classes": ({"label": "patient"}, "--share-values patient"),
    "words as classes": ({"label": "stage"}, "--share-values stage"),
    "names as categories": (
        {"features": "age, patient", "categorical": "patient"},
        "--share-values patient",
    ),
    "a column of one value": (
        {"features": "age, rare", "missing": "fill"},
        "fewer than 5 values of a column",
    ),
    "classes that the server lists": (
        {"label": "stage", "classes": "I, II", "features": "age"},
        "classes or categories of stage",
    ),
    "a single held-out row": ({"validation_fraction": 0.005}, "fewer than 5 validation examples"),
    "an encoded copy": ({"stream": True}, "--cache DIR"),
}


@pytest.mark.parametrize("case", ASKED_TOO_MUCH)
def test_what_an_owner_has_not_agreed_to_does_not_leave(patients: str, case: str):
    data, reason = ASKED_TOO_MUCH[case]
    with pytest.raises(SiloFailure) as caught:
        describe(patients, DataPolicy(), **data)
    assert reason in str(caught.value)
    assert "Jane" not in str(caught.value)


def test_numbers_of_enough_rows_leave_by_themselves(patients: str):
    entry = describe(patients, DataPolicy())
    assert (entry.num_examples, entry.num_validation) == (180, 20)
    assert entry.schema.columns is not None
    assert [number.name for number in entry.schema.columns.numbers] == ["age"]


@pytest.mark.parametrize("shared", [("stage", "sex"), (ALL,)])
def test_values_leave_that_the_owner_shares(patients: str, shared: tuple[str, ...]):
    policy = DataPolicy(shared_values=shared)
    data = {"label": "stage", "features": "age, sex", "categorical": "sex"}
    schema = describe(patients, policy, **data).schema
    assert schema.classes == ("I", "II")
    assert schema.columns is not None
    assert schema.columns.inputs == ["age", "sex=f", "sex=m"]


def test_a_small_silo_may_be_described_if_its_owner_says_so(patients: str, tmp_path: Path):
    small = tmp_path / "small.csv"
    pd.read_csv(patients).head(4).to_csv(small, index=False)
    with pytest.raises(SiloFailure, match="fewer than 5 training examples"):
        describe(str(small), DataPolicy(), validation_fraction=0.0)
    entry = describe(str(small), DataPolicy(min_examples=4), validation_fraction=0.0)
    assert entry.num_examples == 4


def test_columns_that_the_owner_keeps_are_not_used(patients: str):
    policy = DataPolicy(columns=("age", "outcome"), shared_values=(ALL,))
    assert describe(patients, policy).num_examples == 180
    for data, received in (
        ({"features": "age, sex", "categorical": "sex"}, "received sex"),
        ({"label": "stage"}, "received stage"),
        ({"group": "patient"}, "received patient"),
        ({"features": "", "categorical": "sex, patient, stage", "missing": "fill"}, "received no"),
    ):
        with pytest.raises(SiloFailure, match=rf"some of its columns only.*{received}"):
            describe(patients, policy, **data)


def test_built_in_sets_are_public(tmp_path: Path):
    settings = SiloSettings("a", "promoters", policy=DataPolicy())
    assert load_silo(settings, experiment_from_flat({"data.name": "promoters"})).schema.classes


def test_the_rules_of_a_node_config_come_back():
    policy = DataPolicy(("age", 'sex, "at birth"'), (ALL, "a, b"), 7, "/scratch")
    assert DataPolicy.from_node_config(policy.to_node_config()) == policy
    assert DataPolicy.from_node_config({}) == DataPolicy()
    assert OPEN.min_examples == 1


def test_nothing_can_rest_on_no_examples():
    with pytest.raises(ValueError, match=r"received 0\. Choose 1 or more"):
        DataPolicy(min_examples=0)


def test_a_silo_that_a_run_goes_on_without_is_told_why(capsys: pytest.CaptureFixture[str]):
    site = Site(SiloSettings("a", "wine"), experiment_from_flat({}), Workbench())
    handle(Task(INFORM, body={"reason": "it came\nlate"}), site)
    line = "silo a: the coordinator leaves it out of this run: it came late\n"
    assert capsys.readouterr().out == line
