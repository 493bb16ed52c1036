"""The plain protocol: one exchange; each silo sends its update as it is."""

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace

from fl_app.aggregation.aggregator import Aggregator, Contribution
from fl_app.exchange import Exchange, ask
from fl_app.failures import Failure, QuorumError
from fl_app.messages import LocalResult, Reply, SiloEntry, Task, result_of
from fl_app.protocols.protocol import Quorum, RoundReport

NO_CLAIMS: Mapping[str, SiloEntry] = {}


@dataclass(frozen=True)
class PlainProtocol:
    """Implements `RoundProtocol`: asks once, adds each update when it comes, forgets it."""

    exchange: Exchange
    timeout_s: float
    claims: Mapping[str, SiloEntry] = field(default_factory=dict)  # of the roll call, by silo

    def run(self, tasks: Mapping[str, Task], aggregator: Aggregator, quorum: Quorum) -> RoundReport:
        with closing(ask(self.exchange, tasks, self.timeout_s)) as replies:
            return collect(replies, aggregator, quorum, len(tasks), self.claims)


def collect(
    replies: Iterable[Reply],
    aggregator: Aggregator,
    quorum: Quorum,
    num_asked: int,
    claims: Mapping[str, SiloEntry] = NO_CLAIMS,
) -> RoundReport:
    """Folds the replies in as they come, until `quorum.wanted` results are there.

    | reply | becomes |
    |---|---|
    | a result that can be averaged | a result |
    | one that cannot: other shapes, NaN, no examples | a failure with the aggregator's reason |
    | garbled, a refusal, lost, late | a failure with its reason |
    | one that rests on more examples than the silo's claim | a failure that says so |
    | still to come when enough are there | neither |

    A failed silo is reported by name. Raises QuorumError as soon as fewer than `quorum.needed` can
    be left, or if the replies end before there are enough.
    """
    report = RoundReport()
    for silo, reply in replies:
        failure = _fold(report, aggregator, silo, result_of(reply, claims.get(silo)))
        del reply  # its update, before the next one comes
        if failure:
            report.failures[silo] = failure
            print(f"silo {silo!r} is left out of the round: {failure.reason}", flush=True)

        num_left = num_asked - len(report.failures)
        if num_left < quorum.needed or len(report.results) == quorum.wanted:
            break
    if len(report.results) < quorum.needed:
        raise _too_few_results(report, quorum, num_asked)
    return report


def _fold(
    report: RoundReport, aggregator: Aggregator, silo: str, result: LocalResult | Failure
) -> Failure | None:
    """Adds a result to the aggregator and the report; the failure if it cannot be."""
    if isinstance(result, Failure):
        return result
    try:
        aggregator.add(silo, Contribution(result.update, result.num_examples))
    except ValueError as error:
        return Failure(f"{error}.")
    report.results[silo] = replace(result, update=[])
    return None


def _too_few_results(report: RoundReport, quorum: Quorum, num_asked: int) -> QuorumError:
    reasons = [f"silo {silo!r}: {f.reason}" for silo, f in sorted(report.failures.items())]
    return QuorumError(
        f"The round needs {quorum.needed} results (federation.min_replies) of {num_asked} silos;"
        f" received {len(report.results)}. {'; '.join(reasons) or 'The others did not answer'}. See"
        " the logs of these silos, lower min_replies or raise round_timeout_s; the run can be"
        " resumed.",
        report.failures,
    )
