"""archipelago status RUN: how far a run is, from the files that it has written."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.experiment import Experiment, load_experiment
from shared.metrics import describe
from shared.run_record import METRICS, RESULT, read_metrics, read_result, step_name_of

SPLITS = ("train", "validation", "test")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="archipelago status",
        description="Say how far a run is, from the files that it has written.",
        epilog="Example: archipelago status runs/experiment",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory: runs/NAME")
    run = parser.parse_args(arguments).run
    try:
        lines = status_lines(run, time.time())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def status_lines(run: Path, now_s: float) -> list[str]:
    """What is known of the run at this time of the system's clock.

    Raises ValueError if the directory holds no run.
    """
    if not (run / "experiment.toml").is_file():
        raise ValueError(
            f"A run directory holds an experiment.toml; received {run}. Name one, such as"
            " runs/NAME; a federation writes its own once the silos are registered."
        )
    experiment = load_experiment(run / "experiment.toml")
    rows = read_metrics(run)
    if (run / RESULT).is_file():
        return [f"{experiment.name}: finished", *_result_lines(read_result(run))]
    if not rows:
        return [f"{experiment.name}: has begun, nothing is trained yet"]

    last = rows[-1]
    step_name = step_name_of(last)
    num_steps = _num_steps(experiment, step_name)
    idle_s = max(0.0, now_s - (run / METRICS).stat().st_mtime)
    lines = [
        f"{experiment.name}: {step_name} {last[step_name]} of {num_steps},"
        f" {last['seconds']:.0f} s of training, last written {idle_s:.0f} s ago",
        f"  {_metrics(last)}",
    ]
    return lines + _silo_lines(last)


def _num_steps(experiment: Experiment, step_name: str) -> int:
    if step_name == "round":
        return experiment.federation.num_rounds
    return experiment.training.epochs


def _metrics(row: dict[str, Any]) -> str:
    return describe({split: row[split] for split in SPLITS if split in row}) or "no metrics yet"


def _silo_lines(row: dict[str, Any]) -> list[str]:
    if "bytes_sent" not in row:
        return []
    lines = [f"  {row['bytes_sent'] / 1e6:.3g} MB sent so far, over all silos and both ways"]
    if "cohort" in row:
        lines.append(f"  answered in that round: {', '.join(row['cohort'])}")
    for silo, reason in row.get("failures", {}).items():
        lines.append(f"  left out of that round: {silo}: {reason}")
    return lines


def _result_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"  {describe(result['metrics'])}", f"  {result['seconds']:.0f} s"]
    if "bytes_sent" in result:
        lines.append(f"  {result['bytes_sent'] / 1e6:.3g} MB sent, over all silos and both ways")
    return lines


if __name__ == "__main__":
    sys.exit(main())
