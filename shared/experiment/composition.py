"""Combinations of several sections that are refused: the only place for them.

| a part with the trait              | needs                                                      |
|------------------------------------|------------------------------------------------------------|
| training.selects_by_validation     | data.has_validation_examples                               |
| federation.selects_by_validation   | data.has_validation_examples, federation.evaluate_on_silos |
| federation.cross_site_evaluation   | data.has_validation_examples                               |
| performance.splits_average         | training.averages_gradients                                |
| keys_for_own_rounds of any section | federation.has_own_rounds                                  |
| run.resume                         | federation.has_own_rounds, which leave checkpoints         |

A rule asks for traits, the properties of the sections, not for pairs of names: a method that is
added to a section declares its traits there and falls under these rules.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shared.experiment.sections import Rule

if TYPE_CHECKING:
    from shared.experiment import Experiment


def rules(experiment: "Experiment") -> Iterator[Rule]:
    """The rules over keys of several sections; each section by itself is valid."""
    data = experiment.data
    training = experiment.training
    federation = experiment.federation
    performance = experiment.performance

    # The validation loss needs validation examples, and someone who evaluates them.
    yield Rule(
        is_broken=training.selects_by_validation and not data.has_validation_examples,
        keys=(
            "training.early_stopping_patience",
            "training.restore_best",
            "data.validation_fraction",
        ),
        message=(
            "training.early_stopping_patience and training.restore_best go by the validation loss;"
            " received data.validation_fraction = 0. Hold out some examples, for example"
            " data.validation_fraction = 0.1."
        ),
    )

    silos_validate = federation.evaluate_on_silos and data.has_validation_examples
    yield Rule(
        is_broken=federation.selects_by_validation and not silos_validate,
        keys=(
            "federation.early_stopping_patience",
            "federation.restore_best",
            "federation.evaluate_on_silos",
            "data.validation_fraction",
        ),
        message=(
            "federation.early_stopping_patience and federation.restore_best go by the silos'"
            " validation loss; received evaluate_on_silos ="
            f" {str(federation.evaluate_on_silos).lower()} and data.validation_fraction ="
            f" {data.validation_fraction:g}. Set both, for example data.validation_fraction = 0.1."
        ),
    )

    yield Rule(
        is_broken=federation.cross_site_evaluation and not data.has_validation_examples,
        keys=("federation.cross_site_evaluation", "data.validation_fraction"),
        message=(
            "federation.cross_site_evaluation evaluates models on the silos' validation examples;"
            " received data.validation_fraction = 0. Hold out some, for example"
            " data.validation_fraction = 0.1."
        ),
    )

    # Two divisions around a sum make an average; other reductions are no sum.
    yield Rule(
        is_broken=performance.splits_average and not training.averages_gradients,
        keys=("performance.predivide_factor", "training.aggregation"),
        message=(
            "performance.predivide_factor splits an average; received"
            f" {performance.predivide_factor:g} with training.aggregation ="
            f" {training.aggregation!r}. Set predivide_factor = 0.0 or aggregation = 'average'."
        ),
    )

    # A Flower strategy in place of our rounds follows none of their settings and keeps no state.
    own_keys = [
        f"{name}.{key}"
        for name, section in experiment.sections.items()
        for key in section.keys_for_own_rounds
    ]
    yield Rule(
        is_broken=bool(own_keys) and not federation.has_own_rounds,
        keys=("federation.strategy", *own_keys),
        message=(
            f"federation.strategy runs by its own rules; received {federation.strategy!r} together"
            f" with {', '.join(own_keys)}. Leave these out, or the strategy; its own settings go"
            " into federation.strategy_options."
        ),
    )

    yield Rule(
        is_broken=experiment.run.resume and not federation.has_own_rounds,
        keys=("federation.strategy", "run.resume"),
        message=(
            "A run by a Flower strategy leaves no checkpoint; received run.resume with"
            f" federation.strategy = {federation.strategy!r}. Start it again in another directory."
        ),
    )
