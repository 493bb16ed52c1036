"""The output of a federation on this machine: the run's lines, and why a run did not finish."""

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from shared.experiment import Experiment
from shared.run_record import CHECKPOINT

LEFT_OUT = r"(a silo|silo '[^']+')( \(Flower's node \d+\))? is left out: "


def relay(run: "subprocess.Popen[bytes]", num_rounds: int) -> list[str]:
    """Prints the run's lines as they come; returns those in which the server reports an error.

    A silo that is left out before the first round is one: all silos are on this machine, and the
    roll call would wait in vain for another. The run is ended then.
    """
    assert run.stdout is not None
    errors: list[str] = []
    has_begun = False
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        rounds = bar.add_task("rounds", total=num_rounds)
        for raw in run.stdout:
            line = raw.decode(errors="replace").rstrip()
            of_round = re.match(r"round (\d+)/", line)
            if of_round:
                bar.update(rounds, completed=int(of_round[1]))

            has_begun = has_begun or line.startswith("roll call: ")
            is_left_out = re.match(LEFT_OUT, line) and not has_begun
            if is_left_out:
                run.terminate()

            # After an error come Flower's tracebacks, which say no more.
            if line.startswith("error: ") or is_left_out:
                errors.append(f"server: {line}")
            elif not errors:
                print(line, flush=True)  # above the bar, on a terminal
    return errors


def explain(
    endings: Mapping[str, str], server_errors: Sequence[str], logs: Mapping[str, Path]
) -> tuple[str, str]:
    """Says why a run did not finish, and shows the ends of those of the logs that may tell more.

    The reasons are the server's errors, those in the logs, and how processes have ended by
    themselves. The logs shown are of the latter; all, if there is no reason.
    """
    reasons = [f"  {line}" for line in server_errors]
    reasons += [f"  {name} {ending}" for name, ending in endings.items()]
    for log in logs.values():
        lines = log.read_text(errors="replace").splitlines()
        reasons += [f"  {log.stem}: {line}" for line in lines if line.startswith("error:")]

    if not reasons:
        return "The run did not finish; the logs above may say why.", _tails(logs.values())
    ended_logs = [log for name, log in logs.items() if name in endings]
    return "\n".join(["The run did not finish:", *dict.fromkeys(reasons)]), _tails(ended_logs)


def how_to_go_on(experiment: Experiment) -> str:
    """What to do after a run that did not finish, by what it has left."""
    directory = experiment.run_directory
    if (directory / CHECKPOINT).is_file():
        return (
            "Its last round is saved: once the cause is gone, continue with the same command and"
            " --resume."
        )
    if directory.exists():
        return (
            f"Nothing of it can be resumed: once the cause is gone, delete {directory} or choose"
            " another --run-dir, and start again."
        )
    return "It had not begun: once the cause is gone, start again."


def _tails(logs: Iterable[Path]) -> str:
    return "\n".join(map(tail, logs))


def tail(log: Path, num_lines: int = 15) -> str:
    """The last lines of a log, below its name."""
    lines = log.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join([f"--- {log.name}", *lines])
