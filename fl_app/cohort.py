"""Who takes part in a round, and what becomes of their replies: quorum, deadline, refusal by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fl_app.aggregation import Contribution, RunningMean
from fl_app.local_training import LocalResult, SiloEntry
from shared.experiment import Experiment
from shared.seeding import rng_for
from shared.weights import Weights, num_bytes


class FederationError(Exception):
    """The federation cannot go on; the checkpoint of the last round stays, to resume from."""


@dataclass(frozen=True)
class Failure:
    """Why a silo that was asked gave no result."""

    reason: str


Reply = tuple[str, LocalResult | Failure]  # of a silo, by name


@dataclass
class Replies:
    """What a round's cohort answered. The updates themselves are gone: they are in the mean."""

    mean: RunningMean
    results: dict[str, LocalResult] = field(default_factory=dict)  # without their updates
    failures: dict[str, str] = field(default_factory=dict)
    bytes_received: int = 0


def draw_cohort(experiment: Experiment, silos: Iterable[str], round_number: int) -> list[str]:
    """The silos of a round: all, or `cohort_size` + `over_selection` drawn without replacement by (seed, round)."""
    names = sorted(silos)
    if experiment.federation.cohort_size == 0:
        return names
    size = min(experiment.federation.cohort_size + experiment.federation.over_selection, len(names))
    return sorted(
        str(name) for name in rng_for(experiment.seed, "cohort", round_number).choice(names, size, replace=False)
    )


def collect(
    replies: Iterable[Reply], cohort: list[str], silos: Mapping[str, SiloEntry], like: Weights, experiment: Experiment
) -> Replies:
    """Folds the replies in as they come, until those that were wanted are there.

    Wanted are `cohort_size` results (over-selected silos beyond that are not waited for), needed `min_replies`. A silo
    that fails, or whose update cannot be averaged, is left out and named. Raises FederationError as soon as too few
    can be left, or if the replies end before there are enough.
    """
    wanted = min(experiment.federation.cohort_size or len(cohort), len(cohort))
    needed = min(experiment.federation.min_replies or wanted, wanted)
    found = Replies(RunningMean(like, sum(silos[name].num_examples for name in cohort)))
    for silo, reply in replies:
        if isinstance(reply, Failure):
            found.failures[silo] = reply.reason
        else:
            _fold(found, silo, reply)
        del reply  # its update, before the next one comes
        if silo in found.failures:
            print(f"silo {silo!r} is left out of the round: {found.failures[silo]}", flush=True)
        if len(cohort) - len(found.failures) < needed or len(found.results) == wanted:
            break
    if len(found.results) < needed:
        told = "; ".join(f"silo {name!r}: {reason}" for name, reason in sorted(found.failures.items()))
        raise FederationError(
            f"The round needs {needed} results (federation.min_replies) of {len(cohort)} silos; received "
            f"{len(found.results)}. {told or 'The others did not answer'}. See the logs of these silos, lower "
            "min_replies or raise round_timeout_s; the run can be resumed."
        )
    return found


def _fold(found: Replies, silo: str, result: LocalResult) -> None:
    try:
        found.mean.add(Contribution(result.update, result.num_examples))
    except ValueError as error:
        found.failures[silo] = f"{error}."
        return
    found.bytes_received += num_bytes(result.update)
    found.results[silo] = replace(result, update=[])
