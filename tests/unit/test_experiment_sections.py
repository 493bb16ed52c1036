"""The sections' own methods: the meaning of 0, and the traits that rules ask for."""

import pytest

from shared.experiment import (
    FederationSection,
    OptimizerSection,
    PerformanceSection,
    ServerOptimizerSection,
    TrainingSection,
)


@pytest.mark.parametrize(
    ("cohort_size", "over_selection", "num_silos", "drawn", "wanted"),
    [
        (0, 0, 4, 4, 4),  # all
        (3, 0, 7, 3, 3),
        (3, 2, 7, 5, 3),  # the round ends with the first 3
        (3, 9, 7, 7, 3),  # no more than there are
        (3, 2, 2, 2, 2),  # fewer than the cohort, after some have gone
    ],
)
def test_silos_drawn_and_results_wanted(
    cohort_size: int, over_selection: int, num_silos: int, drawn: int, wanted: int
):
    section = FederationSection(min_silos=7, cohort_size=cohort_size, over_selection=over_selection)
    assert section.num_drawn(num_silos) == drawn
    assert section.num_wanted(drawn) == wanted


@pytest.mark.parametrize(
    ("cohort_size", "min_replies", "num_drawn", "quorum"),
    [
        (0, 0, 4, 4),  # all that are drawn
        (0, 2, 4, 2),
        (0, 9, 4, 4),  # no more than are drawn
        (2, 0, 4, 2),  # the whole cohort, without those over-selected
        (2, 1, 4, 1),
        (2, 2, 1, 1),
    ],
)
def test_results_that_a_round_needs(
    cohort_size: int, min_replies: int, num_drawn: int, quorum: int
):
    section = FederationSection(min_silos=4, cohort_size=cohort_size, min_replies=min_replies)
    assert section.quorum(num_drawn) == quorum


def test_rounds_are_evaluated_on_schedule_and_at_the_end():
    section = FederationSection(num_rounds=7, evaluate_every=3)
    assert [r for r in range(8) if section.is_evaluated(r)] == [0, 3, 6, 7]


@pytest.mark.parametrize("kind", [TrainingSection, FederationSection])
def test_early_stopping_and_restoring_the_best_select_by_validation(
    kind: type[TrainingSection] | type[FederationSection],
):
    assert not kind().selects_by_validation
    assert kind(early_stopping_patience=1).selects_by_validation
    assert kind(restore_best=True).selects_by_validation


@pytest.mark.parametrize("kind", [TrainingSection, FederationSection])
def test_training_stops_when_patience_is_at_its_end_and_never_without_patience(
    kind: type[TrainingSection] | type[FederationSection],
):
    assert [kind(early_stopping_patience=3).stops_early(n) for n in range(5)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert not kind().stops_early(0)
    assert not kind().stops_early(1000)


def test_the_batch_grows_with_the_ranks_only_if_it_is_given_per_rank():
    assert TrainingSection(global_batch_size=30).batch_size(world_size=3) == 30
    growing = TrainingSection(global_batch_size=30, per_rank_batch_size=8)
    assert [growing.batch_size(world_size) for world_size in (1, 3)] == [8, 24]


def test_steps_per_execution_are_those_set_or_by_the_number_of_ranks():
    automatic = PerformanceSection()
    assert [automatic.steps_per_execution_on(world_size) for world_size in (1, 2, 4)] == [1, 8, 8]
    fixed = PerformanceSection(steps_per_execution=3)
    assert [fixed.steps_per_execution_on(world_size) for world_size in (1, 4)] == [3, 3]


def test_the_average_is_split_only_by_a_factor():
    assert PerformanceSection().predivision is None
    assert PerformanceSection(predivide_factor=2.0).predivision == 2.0


def test_traits_of_the_optimizers():
    traits = {name: OptimizerSection(name=name).traits for name in ("sgd", "adam", "adamw")}
    assert [name for name in traits if traits[name].has_momentum] == ["sgd"]
    assert [name for name in traits if traits[name].has_weight_decay] == ["sgd", "adamw"]


def test_all_server_optimizers_but_fedavg_have_momentum():
    names = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
    with_momentum = [name for name in names if ServerOptimizerSection(name=name).has_momentum]
    assert with_momentum == ["fedavgm", "fedadam", "fedyogi", "fedadagrad"]


def test_only_settings_of_our_own_rounds_that_are_not_the_defaults_are_theirs():
    section = FederationSection(num_rounds=3, cohort_size=1, restore_best=True)
    assert section.keys_for_own_rounds == ["cohort_size", "restore_best"]
    assert TrainingSection(restore_best=True).keys_for_own_rounds == []


def test_every_setting_of_the_server_optimizer_is_of_our_own_rounds():
    assert set(ServerOptimizerSection.own_rounds_only) == set(ServerOptimizerSection.model_fields)
