"""Whoever connects, restarts or claims a name while a run goes on: none of them ends it."""

import os
import signal
import sys
from dataclasses import dataclass

import pandas as pd
import pytest

from tests.federation.consortium import PLAIN, Consortium, experiment, wait_for_task
from tests.federation.processes import finished, lines_until, rows
from tests.parallel.launching import ROOT

pytestmark = pytest.mark.federation

TWO_SILOS = {"silo-0": PLAIN, "silo-1": PLAIN}
LONG = {"federation.local_epochs": 200}  # a task of some seconds


@dataclass(frozen=True)
class Crowded:
    """A run of two silos, of which one was killed and restarted while two others connected."""

    output: str
    cohorts: list[list[str]]


@pytest.fixture(scope="module")
def crowded(superlink: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Crowded:
    folder = tmp_path_factory.mktemp("crowded")
    pd.DataFrame({"a": ["x", "y"]}).to_csv(folder / "unusable.csv", index=False)
    superlink.gather(TWO_SILOS)
    quorum = {"federation.min_replies": 1, "federation.num_rounds": 9}
    e = experiment(folder / "run", **quorum, **LONG)
    run = superlink.start_run(e)
    output = lines_until(run, "round 1/9")

    # A silo without usable data, and one with a name that is in use.
    superlink.start_silo("newcomer", str(folder / "unusable.csv"))
    command = [sys.executable, "-m", "fl_app.silo", "--insecure", "--silo", "silo-0"]
    command += ["--superlink", f"127.0.0.1:{superlink.port}", "--data", "wine"]
    log = folder / "impostor.log"
    impostor = superlink.group.start("impostor", command, superlink.environment(), log)
    try:
        # A silo that is killed outright, and restarted while Flower still counts it as connected.
        wait_for_task(superlink.worker("silo-1"))
        superlink.group.processes["silo-1"].kill()
        superlink.group.processes["silo-1"].wait()
        superlink.start_silo("silo-1", superlink.data["silo-1"])
        output += finished(run)
    finally:
        impostor.terminate()
        impostor.wait()
        superlink.end_silo("newcomer")
    found = [row["cohort"] for row in rows(e.run_directory) if "cohort" in row]
    return Crowded(output, found)


@pytest.mark.slow
def test_a_run_that_has_its_quorum_goes_on_whoever_connects(crowded: Crowded) -> None:
    assert "round 9/9" in crowded.output, crowded.output
    assert set().union(*crowded.cohorts) == {"silo-0", "silo-1"}


@pytest.mark.slow
def test_a_newcomer_without_usable_data_is_left_out_by_name(crowded: Crowded) -> None:
    reason = " is left out: silo 'newcomer' refuses: its data or settings cannot be used"
    assert crowded.output.count(reason) == 1, crowded.output


@pytest.mark.slow
def test_a_newcomer_with_a_name_in_use_is_left_out_by_name(crowded: Crowded) -> None:
    reason = " is left out: the name 'silo-0' is that of a connected silo"
    assert crowded.output.count(reason) == 1, crowded.output


@pytest.mark.slow
def test_a_silo_that_is_killed_and_restarted_takes_part_again(crowded: Crowded) -> None:
    assert "silo 'silo-1' is left out of the round" in crowded.output, crowded.output
    assert crowded.cohorts[-1] == ["silo-0", "silo-1"]
    assert ["silo-0"] in crowded.cohorts


# --- state at the silos


COUNTING = """
import sys
if "fl_app.flower.worker" in sys.orig_argv:
    from fl_app.silo import workbench
    from tests.counting_method import CountingWorkbench
    workbench.Workbench = CountingWorkbench
"""


@pytest.fixture(scope="module")
def counted(superlink: Consortium, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """By silo, the counts that it reported in the rounds whose answer was used.

    One silo's worker is killed, once on a task and once between two; the other's is frozen beyond
    the end of a round, so that its reply comes late.
    """
    folder = tmp_path_factory.mktemp("counted")
    (folder / "sitecustomize.py").write_text(COUNTING)
    path = f"{folder}{os.pathsep}{ROOT}"
    superlink.gather({})
    for name in ("killed", "late"):
        superlink.start_silo(name, "wine", PYTHONPATH=path)
    quorum = {"federation.min_replies": 1, "federation.round_timeout_s": 6.0}
    fast = {"federation.evaluate_on_silos": False, "federation.num_rounds": 14}
    e = experiment(folder / "run", **quorum, **fast)
    with superlink.guests("killed", "late"):
        first = experiment(folder / "first", **fast | {"federation.num_rounds": 1})
        assert "round 1/1" in finished(superlink.start_run(first))  # TensorFlow is there now
        run = superlink.start_run(e)
        lines_until(run, "round 2/14")
        frozen = superlink.worker("late")
        os.kill(frozen, signal.SIGSTOP)
        lines_until(run, "silo 'late' is left out of the round: no answer within")
        os.kill(frozen, signal.SIGCONT)

        # Afterwards: there is always one silo that answers, however long a worker's start takes.
        lines_until(run, "round 6/14")
        os.kill(superlink.worker("killed"), signal.SIGKILL)
        output = finished(run)
    assert "round 14/14" in output, output
    counts: dict[str, list[float]] = {"killed": [], "late": []}
    for row in rows(e.run_directory, "silos.jsonl"):
        counts[row["silo"]].append(row["train"]["count"])
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("silo", ["killed", "late"])
def test_killed_workers_and_late_replies_neither_lose_nor_double_a_silos_state(
    counted: dict, silo: str
) -> None:
    counts = counted[silo]
    assert len(counts) >= 4
    assert counts == list(range(1, len(counts) + 1))
    assert len(counted["late"]) < 14
