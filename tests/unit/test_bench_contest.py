"""Interleaved contenders: one runs at a time, and one that fails is out."""

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import distributed
from benchmarks.contest import ContenderError, Contestant, Launch, run_contest
from shared.processes import ProcessGroup, child_environment

# A contender of one process, which notes when it ran.
CONTENDER = """
import sys, time, pathlib
from benchmarks.turns import Turns
folder, models = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
slices, fails_at = int(sys.argv[3]), sys.argv[4]
turns = Turns(folder, slices, True, float)
for model in models:
    for i in range(slices):
        turns.begin()
        started = time.monotonic()
        while time.monotonic() < started + 0.1:
            (folder / "ticks").open("a").write(f"{time.monotonic()} ")
            time.sleep(0.005)
        if fails_at == f"{model}{i}":
            sys.exit(3)
        turns.report(model, 100.0 * i + len(model))
"""
TICKER = (
    "import sys, time\nwhile True: open(sys.argv[1] + '/ticks', 'a').write(f'{time.monotonic()} ');"
    " time.sleep(0.005)"
)


def launches(models: str, num_slices: int, fails_at: str = "") -> Callable[[Path], list[Launch]]:
    environment = child_environment(PYTHONPATH=str(distributed.ROOT))
    return lambda folder: [
        Launch(
            [sys.executable, "-c", CONTENDER, folder, models, str(num_slices), fails_at],
            environment,
        )
    ]


def test_contenders_take_turns_and_none_runs_beside_another(tmp_path: Path):
    told: list[str] = []
    both = {"a": launches("x,yy", 3), "b": launches("x,yy", 3)}
    found = run_contest(both, ["x", "yy"], 3, tmp_path, told.append)
    figures = {"x": [1.0, 101.0, 201.0], "yy": [2.0, 102.0, 202.0]}
    assert found.samples == {"a": figures, "b": figures}
    assert found.failures == {}
    ticks = sorted(
        (float(at), name) for name in both for at in (tmp_path / name / "ticks").read_text().split()
    )
    # ab, then b begins, and so on: adjacent turns of one contender are one group.
    handovers = "".join(name for name, _ in itertools.groupby(name for _, name in ticks))
    assert handovers == "abababab"


def test_a_contender_is_stopped_between_its_turns(tmp_path: Path):
    """Also processes of its own that would go on in the meantime, as Horovod's threads do."""

    def restless(folder: Path) -> list[Launch]:
        (starter,) = launches("x", 2)(folder)
        wait = (
            "import os, time\nwhile not os.path.exists(sys.argv[1] + '/ticks'): time.sleep(0.01)\n"
        )
        ticker = (
            f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {TICKER!r},"
            " sys.argv[1]])\n"
        )
        program = ticker + wait + CONTENDER
        return [Launch([sys.executable, "-c", program, *starter.command[3:]], starter.environment)]

    with ProcessGroup() as group:
        contestant = Contestant("a", group, tmp_path)
        contestant.start(restless(tmp_path))
        time.sleep(0.1)
        before = (tmp_path / "ticks").read_text()
        time.sleep(0.3)
        assert (tmp_path / "ticks").read_text() == before
        assert contestant.turn() == [("x", 1.0)]
        assert (tmp_path / "ticks").read_text() != before
        contestant.resume()


def test_a_contender_that_fails_is_named_and_has_no_further_turns(tmp_path: Path):
    told: list[str] = []
    found = run_contest(
        {"a": launches("x", 3), "b": launches("x", 3, fails_at="x1")},
        ["x"],
        3,
        tmp_path,
        told.append,
    )
    assert found.samples == {"a": {"x": [1.0, 101.0, 201.0]}, "b": {"x": [1.0]}}
    assert found.failures == {"b": f"b rank 0 ended with status 3: see {tmp_path}/b/*.log"}
    assert f"b FAILED: {found.failures['b']}" in told


def test_a_contender_that_cannot_be_started_is_named(tmp_path: Path):
    def broken(folder: Path) -> list[Launch]:
        raise ContenderError("PyTorch could not be installed")

    found = run_contest({"a": broken, "b": launches("x", 1)}, ["x"], 1, tmp_path, lambda line: None)
    assert found.failures == {"a": "PyTorch could not be installed"}
    assert found.samples == {"a": {}, "b": {"x": [1.0]}}
