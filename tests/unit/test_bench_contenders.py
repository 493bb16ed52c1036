"""The contenders of the federated benchmark: their common workload, their rounds, their start."""

import json
import os
import subprocess
import sys
import time
import tomllib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tomli_w

from benchmarks import federation_contenders
from benchmarks.contest import ContenderError
from benchmarks.distributed import ROOT
from benchmarks.environments import read_pins
from benchmarks.federation_contenders import (
    CONTENDERS,
    Case,
    Contender,
    Federation,
    loopback_only,
    measure,
)
from benchmarks.federation_workload import SIZES, compiled_model, read_marks, read_silo, write_silos
from fl_app.silo.data import load_silo
from fl_app.silo.policy import SiloSettings
from shared.experiment import load_experiment
from shared.processes import ProcessGroup, child_environment
from shared.zoo import build_model

# --- what all contenders share


@pytest.mark.parametrize(("size", "num_bytes"), [("20kB", 20e3), ("5MB", 5e6), ("100MB", 100e6)])
def test_a_model_has_the_size_that_it_is_named_after(size: str, num_bytes: float):
    widths = [64, *SIZES[size], 10]
    num_parameters = sum(i * o + o for i, o in pairwise(widths))
    assert 4 * num_parameters == pytest.approx(num_bytes, rel=0.05)
    if size != "100MB":
        assert compiled_model(size).count_params() == num_parameters


def test_silos_hold_equally_many_examples_and_share_none(tmp_path: Path):
    paths = write_silos(tmp_path / "data", 8)
    (x, y), (x_evaluated, y_evaluated) = read_silo(paths[1])
    assert (x.shape, y.shape, x_evaluated.shape, y_evaluated.shape) == (
        (180, 64),
        (180,),
        (20, 64),
        (20,),
    )
    rows = [np.concatenate([part[0] for part in read_silo(path)]) for path in paths]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 8 * 200
    with pytest.raises(ValueError, match="1797"):
        write_silos(tmp_path / "data", 9)


def test_ours_trains_the_same_model_on_as_many_examples(tmp_path: Path):
    (path,) = write_silos(tmp_path / "data", 1)
    (tmp_path / "experiment.toml").write_text(
        tomli_w.dumps(federation_contenders.experiment("20kB", 3))
    )
    settings = load_experiment(tmp_path / "experiment.toml", [])
    silo = load_silo(SiloSettings("silo-0", str(path)), settings)
    assert (len(silo.train), len(silo.validation)) == (180, 20)
    shapes = [
        weights.shape for weights in build_model(settings.model, silo.schema, 0).get_weights()
    ]
    assert shapes == [weights.shape for weights in compiled_model("20kB").get_weights()]
    assert (settings.federation.num_rounds, settings.federation.evaluate_on_silos) == (3, True)


def test_nvflare_runs_on_the_same_tensorflow():
    requirements = {
        name: (ROOT / "requirements" / f"{name}.txt").read_text()
        for name in ("nvflare", "common", "cpu")
    }
    theirs = read_pins(requirements["nvflare"])
    ours = read_pins(requirements["common"] + requirements["cpu"])
    for package in ("tensorflow-cpu", "keras", "numpy"):
        assert theirs[package] == ours[package]


def test_nvflare_sees_the_workload_without_our_packages():
    program = (
        "import sys, benchmarks.federation_workload; sys.exit(bool({'keras', 'sklearn', 'flwr'} &"
        " set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], env=child_environment(PYTHONPATH=str(ROOT))
        ).returncode
        == 0
    )


# --- how rounds are read


def test_rounds_of_ours_end_with_the_first_row_of_each(tmp_path: Path):
    # Silos evaluate the weights of a round one round later.
    rows = [(0, 0.5), (0, 3.0), (1, 4.0), (1, 4.5), (2, 6.0)]
    (tmp_path / "run").mkdir()
    lines = [json.dumps({"round": number, "seconds": seconds}) + "\n" for number, seconds in rows]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    assert CONTENDERS["ours"].marks(Federation(Case(2, "20kB"), 1, tmp_path)) == [0.5, 4.0, 6.0]


def test_a_mark_that_is_not_yet_written_whole_does_not_count(tmp_path: Path):
    assert read_marks(tmp_path / "marks") == []
    (tmp_path / "marks").write_text("1.5\n2.5\n12")
    assert read_marks(tmp_path / "marks") == [1.5, 2.5]


MARKER = """
import sys, time
from pathlib import Path
from benchmarks.federation_workload import write_mark
for pause in sys.argv[2].split(","):
    time.sleep(float(pause))
    write_mark(Path(sys.argv[1]))
if sys.argv[3] == "stay":
    time.sleep(600)
"""


def marker(pauses: str, end: str, started: list[subprocess.Popen[bytes]]) -> Contender:
    """A contender that marks its rounds after these pauses, and then stays or ends."""

    def start(group: ProcessGroup, run: Federation) -> None:
        command = [sys.executable, "-c", MARKER, run.marks, pauses, end]
        started.append(
            group.start(
                "marker", command, child_environment(PYTHONPATH=str(ROOT)), run.folder / "x.log"
            )
        )

    return Contender(start)


def test_seconds_of_rounds_are_measured_without_the_first_and_all_is_ended(tmp_path: Path):
    started: list[subprocess.Popen[bytes]] = []
    run = Federation(Case(2, "20kB"), 2, tmp_path)
    first, second = measure(marker("0,0.9,0.1,0.4,5", "stay", started), run)
    assert first == pytest.approx(0.1, abs=0.09)
    assert second == pytest.approx(0.4, abs=0.09)
    assert started[0].poll() is not None
    assert all(path.is_file() for path in run.silos)


def test_a_contender_that_ends_too_early_is_named_with_what_it_did(tmp_path: Path):
    with pytest.raises(ContenderError, match=r"marker ended after 2 of 3 rounds: see .*log"):
        measure(marker("0,0,0", "end", []), Federation(Case(2, "20kB"), 2, tmp_path))


def test_a_contender_that_ends_after_its_last_round_has_done_all(tmp_path: Path):
    figures = measure(marker("0,0,0,0", "end", []), Federation(Case(2, "20kB"), 2, tmp_path))
    assert len(figures) == 2


def test_a_contender_that_hangs_is_ended(tmp_path: Path):
    started: list[subprocess.Popen[bytes]] = []
    with pytest.raises(ContenderError, match="1 s were enough for 0 of 3 rounds"):
        measure(
            marker("0", "stay", started), Federation(Case(2, "20kB"), 2, tmp_path), timeout_s=1.0
        )
    assert started[0].poll() is not None


# --- how contenders are started


def test_settings_of_the_shell_reach_no_contender(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in (
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL",
        "FLWR_HOME",
        "NVFLARE_POC_WORKSPACE",
        "TF_NUM_INTRAOP_THREADS",
    ):
        monkeypatch.setenv(name, "7")
    found = federation_contenders.environment(tmp_path)
    assert "7" not in found.values()
    assert Path(found["FLWR_HOME"]).is_relative_to(tmp_path)
    assert Path(found["NVFLARE_POC_WORKSPACE"]).is_relative_to(tmp_path)


def test_the_stock_app_takes_the_settings_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Flower refuses a key that an app does not name."""
    commands: dict[str, list[str]] = {}
    group = SimpleNamespace(
        start=lambda name, command, *_: commands.update({name: [str(part) for part in command]})
    )
    monkeypatch.setattr(federation_contenders, "start_superlink", lambda *_: "127.0.0.1:1")
    CONTENDERS["flower_stock"].start(group, Federation(Case(3, "5MB"), 2, tmp_path))  # type: ignore[arg-type]
    assert list(commands) == ["silo-0", "silo-1", "silo-2", "flwr run"]
    given = tomllib.loads((tmp_path / "run-config.toml").read_text())
    app = tomllib.loads((federation_contenders.STOCK_APP / "pyproject.toml").read_text())["tool"][
        "flwr"
    ]["app"]
    assert set(given) <= set(app["config"])
    assert (given["num-server-rounds"], given["num-nodes"], given["size"]) == (3, 3, "5MB")
    assert str(federation_contenders.STOCK_APP) in commands["flwr run"]


def test_a_process_in_a_network_of_its_own_sees_only_loopback_and_leaves_nothing_behind(
    tmp_path: Path,
):
    seen = tmp_path / "seen"
    program = (
        "import pathlib, subprocess, sys, time\n"
        "subprocess.Popen(['sleep', sys.argv[2]], start_new_session=True)\n"
        "pathlib.Path(sys.argv[1]).write_text(pathlib.Path('/proc/net/dev').read_text())\n"
        "time.sleep(600)\n"
    )
    duration = f"600.{os.getpid()}"  # by which to find the sleeper
    with ProcessGroup() as group:
        process = group.start(
            "x",
            loopback_only([sys.executable, "-c", program, seen, duration]),
            child_environment(),
            tmp_path / "log",
        )
        while not seen.is_file() or not seen.read_text():
            if process.poll() is not None:
                pytest.skip(f"namespaces are not to be had here: {(tmp_path / 'log').read_text()}")
            time.sleep(0.02)
        assert ["sleep", duration] in [
            each.info["cmdline"] for each in psutil.process_iter(["cmdline"])
        ]
        process.kill()  # as if the benchmark had been killed: nobody is asked to end
        process.wait()
        interfaces = [
            line.split(":")[0].strip() for line in seen.read_text().splitlines() if ":" in line
        ]
        assert interfaces == ["lo"]
        deadline = time.monotonic() + 10
        while ["sleep", duration] in [
            each.info["cmdline"] for each in psutil.process_iter(["cmdline"])
        ]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
