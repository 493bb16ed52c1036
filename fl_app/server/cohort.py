"""The silos of a round, drawn by the seed, and how many of their results it needs."""

from collections.abc import Container, Iterable

from fl_app.protocols.protocol import Quorum
from shared.experiment import Experiment, FederationSection
from shared.seeding import rng_for


def draw_cohort(
    experiment: Experiment, silos: Iterable[str], connected: Container[str], round_number: int
) -> list[str]:
    """The silos of a round, sorted: all, or as many as the experiment says, drawn without
    replacement by (seed, round).

    | of the silos                      | drawn are                                          |
    |-----------------------------------|----------------------------------------------------|
    | all are connected                 | any                                                |
    | enough are connected              | none of those that are gone                        |
    | fewer are connected than it takes | all of these, and of the others, as they may be back |
    """
    names = sorted(silos)
    size = experiment.federation.num_drawn(len(names))
    if size == len(names):
        return names

    rng = rng_for(experiment.seed, "cohort", round_number)
    present = [name for name in names if name in connected]
    gone = [name for name in names if name not in connected]
    num_present = min(size, len(present))
    drawn = [
        *rng.choice(present, num_present, replace=False),
        *rng.choice(gone, size - num_present, replace=False),
    ]
    return sorted(map(str, drawn))


def quorum_of(settings: FederationSection, num_drawn: int) -> Quorum:
    """The results that end a round early, and those that it needs, of a cohort of this size."""
    return Quorum(settings.num_wanted(num_drawn), settings.quorum(num_drawn))
