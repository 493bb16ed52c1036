"""The rules of an experiment over several keys: what breaks them, and the remedies they give."""

import pytest

from shared.experiment import Experiment, Scalar, experiment_from_flat
from shared.experiment.sections import Rule

# Each rule: what breaks it, what its message must say, and each remedy that it names.
RULES = {
    "adapter": (
        {"model.adapter": "lora"},
        ["adapts a trained model", "'lora'", "no model.initial"],
        [{"model.initial": "trained.keras"}, {"model.adapter": "none"}],
    ),
    "held-out fractions": (
        {"data.test_fraction": 0.6, "data.validation_fraction": 0.5},
        ["below 1", "received 1.1"],  # 0.6 + 0.5
        [{"data.test_fraction": 0.4}, {"data.validation_fraction": 0.3}],
    ),
    "one sign for two things": (
        {"data.decimal": ",", "data.thousands": ","},
        ["must be different signs", "','"],
        [{"data.decimal": "."}, {"data.thousands": ""}],
    ),
    "classes of a regression": (
        {"data.classes": "low, high", "data.task": "regression"},
        ["data.classes is for a classification", "'regression'"],
        [{"data.classes": ""}, {"data.task": "auto"}],
    ),
    "predivide factor": (
        {"training.aggregation": "adasum", "performance.predivide_factor": 2.0},
        ["splits an average", "received 2", "adasum"],
        [{"training.aggregation": "average"}, {"performance.predivide_factor": 0.0}],
    ),
    "momentum": (
        {"optimizer.momentum": 0.75},
        ["optimizer.momentum belongs to sgd", "0.75", "'adam'"],
        [{"optimizer.name": "sgd"}, {"optimizer.momentum": 0.0}],
    ),
    "weight decay": (
        {"optimizer.weight_decay": 0.25},
        ["optimizer.weight_decay is decoupled", "0.25", "'adam'"],
        [{"optimizer.name": "adamw"}, {"optimizer.weight_decay": 0.0}],
    ),
    "selecting by nothing": (
        {"training.early_stopping_patience": 3, "data.validation_fraction": 0.0},
        ["go by the validation loss", "data.validation_fraction = 0"],
        [{"data.validation_fraction": 0.1}],
    ),
    "a fixed batch does not scale": (
        {"training.scale_learning_rate": True},
        ["training.scale_learning_rate", "per_rank_batch_size = 0"],
        [{"training.per_rank_batch_size": 16}],
    ),
    "warming up to nothing": (
        {"training.warmup_epochs": 5, "training.per_rank_batch_size": 16},
        ["training.warmup_epochs climbs", "warmup_epochs = 5", "scale_learning_rate = false"],
        [{"training.scale_learning_rate": True}],
    ),
    "cohort": (
        {"federation.cohort_size": 5, "federation.min_silos": 2},
        ["federation.min_silos must reach federation.cohort_size", "2 and 5"],
        [{"federation.min_silos": 5}, {"federation.cohort_size": 2}],
    ),
    "over-selection from all": (
        {"federation.over_selection": 2},
        [
            "federation.over_selection draws silos beyond cohort_size",
            "received 2 with cohort_size = 0",
        ],
        [{"federation.cohort_size": 1}, {"federation.over_selection": 0}],
    ),
    "more replies than were asked for": (
        {"federation.cohort_size": 3, "federation.min_silos": 5, "federation.min_replies": 4},
        ["federation.min_replies cannot exceed federation.cohort_size", "4 and 3"],
        [{"federation.min_replies": 3}, {"federation.cohort_size": 4}],
    ),
    "silos that validate nothing": (
        {"federation.early_stopping_patience": 3, "data.validation_fraction": 0.0},
        [
            "go by the silos' validation loss",
            "evaluate_on_silos = true and data.validation_fraction = 0.",
        ],
        [{"data.validation_fraction": 0.1}],
    ),
    "a strategy beside our rounds": (
        {"federation.strategy": "a.b:C", "federation.min_replies": 1},
        [
            "runs by its own rules",
            "'a.b:C' together with federation.min_replies.",
            "federation.strategy_options",
        ],
        [{"federation.min_replies": 0}, {"federation.strategy": ""}],
    ),
    "resuming a strategy": (
        {"federation.strategy": "a.b:C", "run.resume": True},
        ["leaves no checkpoint", "'a.b:C'", "Start it again in another directory"],
        [{"run.resume": False}],
    ),
    "evaluating each silo's model on nothing": (
        {"federation.cross_site_evaluation": True, "data.validation_fraction": 0.0},
        ["federation.cross_site_evaluation evaluates", "data.validation_fraction = 0."],
        [{"data.validation_fraction": 0.1}],
    ),
    "the server's momentum": (
        {"server_optimizer.momentum": 0.75},
        ["server_optimizer.momentum belongs to an optimizer with momentum", "0.75 with 'fedavg'"],
        [{"server_optimizer.name": "fedavgm"}, {"server_optimizer.momentum": 0.0}],
    ),
    "sizes": (
        {"partition.kind": "size"},
        ["needs partition.sizes", "received none"],
        [{"partition.sizes": "[100, 200]"}],
    ),
}


def all_rules(experiment: Experiment) -> list[Rule]:
    owners = [*experiment.sections.values(), experiment]
    return [rule for owner in owners for rule in owner.rules()]


def test_every_rule_over_several_keys_is_broken_above():
    assert len(RULES) == len(all_rules(Experiment()))


def test_the_keys_of_every_rule_exist():
    keys = {key for rule in all_rules(Experiment()) for key in rule.keys}
    assert keys <= set(Experiment().to_flat())


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_over_several_keys_gives_a_remedy_that_helps(rule: str):
    broken, words, remedies = RULES[rule]
    with pytest.raises(ValueError, match="the run config: ") as caught:
        experiment_from_flat(broken)
    for word in words:
        assert word in str(caught.value)
    for remedy in remedies:
        (key,) = remedy
        assert key.partition(".")[2] in str(caught.value)
        experiment_from_flat(broken | remedy)


def test_restore_best_goes_by_the_validation_loss_too():
    with pytest.raises(ValueError, match="restore_best go by the validation loss"):
        experiment_from_flat({"training.restore_best": True, "data.validation_fraction": 0.0})


@pytest.mark.parametrize("selecting", [{"early_stopping_patience": 3}, {"restore_best": True}])
def test_selection_by_the_silos_validation_loss_needs_silos_that_evaluate(
    selecting: dict[str, Scalar],
):
    section = {f"federation.{key}": value for key, value in selecting.items()}
    with pytest.raises(
        ValueError, match="go by the silos' validation loss; received evaluate_on_silos = false"
    ):
        experiment_from_flat(section | {"federation.evaluate_on_silos": False})
    experiment_from_flat(section)


@pytest.mark.parametrize(
    "settings",
    [
        {"federation.cohort_size": 1},
        {"federation.cohort_size": 1, "federation.over_selection": 2},
        {"federation.min_replies": 1},
        {"federation.early_stopping_patience": 1},
        {"federation.restore_best": True},
        {"federation.cross_site_evaluation": True},
        {"server_optimizer.learning_rate": 0.5},
        {"federation.min_replies": 1, "server_optimizer.name": "fedavgm"},
    ],
)
def test_a_strategy_excludes_every_rule_of_our_rounds(settings: dict[str, Scalar]):
    experiment_from_flat(settings)
    keys = ", ".join(settings)
    with pytest.raises(
        ValueError, match=rf"runs by its own rules; received 'a\.b:C' together with {keys}\. Leave"
    ):
        experiment_from_flat(settings | {"federation.strategy": "a.b:C"})
