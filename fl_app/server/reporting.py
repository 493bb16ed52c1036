"""What a round leaves behind: a row of the record, a row for each silo, a line on the screen."""

from collections.abc import Iterator, Mapping
from typing import Any

from fl_app.messages import LocalResult
from fl_app.protocols.protocol import RoundReport
from fl_app.server.evaluation import Metrics
from fl_app.server.state import ServerState
from shared.metrics import describe

Timing = Mapping[str, float]  # seconds by part


def timing_of(total_s: float, computed_s: float, transferred_s: float) -> Timing:
    """Seconds of a round: the slowest silo's computation, the server's own transfers, the rest."""
    wait_s = max(0.0, total_s - computed_s - transferred_s)
    return {"round": total_s, "compute": computed_s, "wait": wait_s, "transfer": transferred_s}


def round_row(
    state: ServerState, metrics: Metrics, report: RoundReport, timing: Timing
) -> dict[str, Any]:
    """The row of a round in metrics.jsonl."""
    row: dict[str, Any] = {
        "round": state.round,
        **metrics,
        "bytes_sent": state.bytes_sent,
        "cohort": sorted(report.results),
    }
    if report.failures:
        failures = sorted(report.failures.items())
        row["failures"] = {silo: failure.reason for silo, failure in failures}
    row["timing"] = {name: round(seconds, 4) for name, seconds in timing.items()}
    return row


def silo_rows(round_number: int, report: RoundReport) -> Iterator[dict[str, Any]]:
    """The rows of a round in silos.jsonl, one for each result."""
    for silo, result in sorted(report.results.items()):
        yield {"round": round_number, "silo": silo, **_without_update(result)}


def round_line(
    round_number: int,
    num_rounds: int,
    metrics: Metrics,
    report: RoundReport,
    timing: Timing,
    num_bytes: int,
) -> str:
    """The line that reports a round to the user."""
    parts = ", ".join(
        f"{name} {seconds:.2f}" for name, seconds in timing.items() if name != "round"
    )
    return (
        f"round {round_number}/{num_rounds}: {describe(metrics)}, {len(report.results)} silos,"
        f" {timing['round']:.2f} s ({parts}), {num_bytes / 1e6:.3g} MB"
    )


def _without_update(result: LocalResult) -> dict[str, Any]:
    return {name: value for name, value in vars(result).items() if name != "update"}
