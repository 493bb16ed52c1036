"""The federated benchmark: goals from samples, whose turn it is, what all contenders share, and how rounds are read."""

import json
import os
import subprocess
import sys
import time
import tomllib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import tomli_w
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from benchmarks import federation, federation_contenders, federation_footprint, federation_standin
from benchmarks.contest import ContenderError
from benchmarks.distributed import ROOT, read_pins
from benchmarks.federation_contenders import CONTENDERS, Case, Contender, Federation, loopback_only, measure
from benchmarks.federation_workload import SIZES, compiled_model, read_marks, read_silo, write_silos
from fl_app.local_training import LocalResult, load_silo
from fl_app.messages import pack_result, unpack_result
from shared.experiment import load_experiment
from shared.processes import ProcessGroup, child_environment
from shared.zoo import build_model

SAMPLES = {
    "ours": {"2 silos, 20kB": [0.5, 0.25, 9.0], "4 silos, 20kB": [0.1]},
    "flower_stock": {"2 silos, 20kB": [10.0]},
    "ours_stock_waits": {"2 silos, 20kB": [1.0, 4.0, 2.0], "4 silos, 20kB": [0.1]},
    "nvflare": {"2 silos, 20kB": [0.25]},
    "server_memory_mb": {"8 replies": [100.0], "64 replies": [109.0]},
    "idle_cores": {"silo": [0.01], "server": [0.03]},
}


# --- goals


def test_goals_compare_ours_with_the_others_where_all_meet():
    goals = {goal.name: (goal.value, goal.condition, goal.met) for goal in federation.make_goals(SAMPLES, {})}
    assert goals == {
        "round_vs_stock_launcher": (0.05, "<= 0.0714", True),
        "round_vs_stock_supernode": (0.25, "<= 0.25", True),
        "round_vs_nvflare": (2.0, "<= 1.0", False),
        "server_memory_ratio": (1.09, "<= 1.1", True),
        "idle_cpu_silo": (0.01, "<= 0.02", True),
        "idle_cpu_server": (0.03, "<= 0.02", False),
    }


def test_what_failed_where_all_meet_has_no_value():
    failures = {"nvflare (2 silos, 20kB)": "crashed", "ours (4 silos, 20kB)": "crashed"}
    values = {goal.name: goal.value for goal in federation.make_goals(SAMPLES, failures)}
    assert values["round_vs_nvflare"] is None
    assert values["round_vs_stock_launcher"] == 0.05


def test_what_was_asked_for_but_not_measured_is_a_goal_without_a_value():
    nothing: dict[str, dict[str, list[float]]] = {name: {} for name in SAMPLES}
    goals = federation.make_goals(nothing, {})
    assert [goal.value for goal in goals] == [None] * 6
    few = federation.make_goals({**nothing, "server_memory_mb": {"8 replies": [100.0]}}, {})
    assert [goal.value for goal in few] == [None] * 6


def test_what_was_not_asked_for_is_no_goal():
    chosen = {name: SAMPLES[name] for name in ("ours", "nvflare")}
    assert [goal.name for goal in federation.make_goals(chosen, {})] == ["round_vs_nvflare"]
    assert federation.make_goals({"flower_stock": SAMPLES["flower_stock"]}, {}) == []


# --- turns


def test_contenders_take_turns_in_the_case_of_the_goals_and_ours_goes_on_alone():
    cases = [Case(2, "20kB"), Case(4, "20kB")]
    order = [f"{name} {case.num_silos}" for name, case in federation.turns(["ours", "nvflare"], cases, 2, False)]
    assert order == ["ours 2", "nvflare 2", "nvflare 2", "ours 2", "ours 4"]
    everywhere = federation.turns(["ours", "nvflare"], cases, 1, True)
    assert everywhere[2:] == [("ours", cases[1]), ("nvflare", cases[1])]
    assert federation.turns(["ours"], cases[1:], 3, False) == [("ours", cases[1])]


def test_a_contender_that_gives_a_sample_only_has_one_turn():
    order = federation.turns(["ours", "nvflare_tuned"], [Case(2, "20kB")], 3, False)
    assert [name for name, _ in order].count("nvflare_tuned") == 1
    assert [name for name, _ in order].count("ours") == 3


def test_a_failure_is_told_and_ends_the_turns_in_that_case_alone(tmp_path: Path):
    told: list[str] = []
    tally = federation.Tally(tmp_path, told.append)
    folders: list[Path] = []

    def good(folder: Path) -> dict[str, list[float]]:
        (folder / "log").touch()  # fails unless the folder is there
        folders.append(folder)
        return {"2 silos": [1.0, 2.0]}

    def bad(folder: Path) -> dict[str, list[float]]:
        (folder / "log").touch()
        folders.append(folder)
        raise ContenderError("it crashed")

    tally.add("a", "2 silos", good)
    tally.add("a", "4 silos", bad)
    tally.add("a", "4 silos", bad)
    tally.add("a", "2 silos", good)
    assert tally.samples == {"a": {"2 silos": [1.0, 2.0, 1.0, 2.0]}}
    assert tally.failures == {"a (4 silos)": "it crashed"}
    assert len(folders) == 3
    assert "a (4 silos) FAILED: it crashed" in told
    assert [folder.is_dir() for folder in folders] == [False, True, False]  # the logs of what failed stay


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
    assert (x.shape, y.shape, x_evaluated.shape, y_evaluated.shape) == ((180, 64), (180,), (20, 64), (20,))
    rows = [np.concatenate([part[0] for part in read_silo(path)]) for path in paths]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 8 * 200
    with pytest.raises(ValueError, match="1797"):
        write_silos(tmp_path / "data", 9)


def test_ours_trains_the_same_model_on_as_many_examples(tmp_path: Path):
    (path,) = write_silos(tmp_path / "data", 1)
    (tmp_path / "experiment.toml").write_text(tomli_w.dumps(federation_contenders.experiment("20kB", 3)))
    settings = load_experiment(tmp_path / "experiment.toml", [])
    silo = load_silo("silo-0", str(path), settings)
    assert (len(silo.train), len(silo.validation)) == (180, 20)
    shapes = [weights.shape for weights in build_model(settings.model, silo.schema, 0).get_weights()]
    assert shapes == [weights.shape for weights in compiled_model("20kB").get_weights()]
    assert (settings.federation.num_rounds, settings.federation.evaluate_on_silos) == (3, True)


def test_nvflare_runs_on_the_same_tensorflow():
    requirements = {name: (ROOT / "requirements" / f"{name}.txt").read_text() for name in ("nvflare", "common", "cpu")}
    theirs, ours = read_pins(requirements["nvflare"]), read_pins(requirements["common"] + requirements["cpu"])
    for package in ("tensorflow-cpu", "keras", "numpy"):
        assert theirs[package] == ours[package]


def test_nvflare_sees_the_workload_without_our_packages():
    program = (
        "import sys, benchmarks.federation_workload; sys.exit(bool({'keras', 'sklearn', 'flwr'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], env=child_environment(PYTHONPATH=str(ROOT))).returncode == 0


# --- how rounds are read


def test_rounds_of_ours_end_with_the_first_row_of_each(tmp_path: Path):
    rows = [(0, 0.5), (0, 3.0), (1, 4.0), (1, 4.5), (2, 6.0)]  # silos judge a round's weights one round later
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
        started.append(group.start("marker", command, child_environment(PYTHONPATH=str(ROOT)), run.folder / "x.log"))

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
        measure(marker("0", "stay", started), Federation(Case(2, "20kB"), 2, tmp_path), timeout_s=1.0)
    assert started[0].poll() is not None


# --- how contenders are started


def test_settings_of_the_shell_reach_no_contender(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "FLWR_HOME", "NVFLARE_POC_WORKSPACE", "TF_NUM_INTRAOP_THREADS"):
        monkeypatch.setenv(name, "7")
    found = federation_contenders.environment(tmp_path)
    assert "7" not in found.values()
    assert Path(found["FLWR_HOME"]).is_relative_to(tmp_path)
    assert Path(found["NVFLARE_POC_WORKSPACE"]).is_relative_to(tmp_path)


def test_the_stock_app_takes_the_settings_that_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Flower refuses a key that an app does not name."""
    commands: dict[str, list[str]] = {}
    group = SimpleNamespace(start=lambda name, command, *_: commands.update({name: [str(part) for part in command]}))
    monkeypatch.setattr(federation_contenders, "start_superlink", lambda *_: "127.0.0.1:1")
    CONTENDERS["flower_stock"].start(group, Federation(Case(3, "5MB"), 2, tmp_path))  # type: ignore[arg-type]
    assert list(commands) == ["silo-0", "silo-1", "silo-2", "flwr run"]
    given = tomllib.loads((tmp_path / "run-config.toml").read_text())
    app = tomllib.loads((federation_contenders.STOCK_APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert set(given) <= set(app["config"])
    assert (given["num-server-rounds"], given["num-nodes"], given["size"]) == (3, 3, "5MB")
    assert str(federation_contenders.STOCK_APP) in commands["flwr run"]


def test_a_process_in_a_network_of_its_own_sees_only_loopback_and_leaves_nothing_behind(tmp_path: Path):
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
            "x", loopback_only([sys.executable, "-c", program, seen, duration]), child_environment(), tmp_path / "log"
        )
        while not seen.is_file() or not seen.read_text():
            if process.poll() is not None:
                pytest.skip(f"namespaces are not to be had here: {(tmp_path / 'log').read_text()}")
            time.sleep(0.02)
        assert ["sleep", duration] in [each.info["cmdline"] for each in psutil.process_iter(["cmdline"])]
        process.kill()  # as if the benchmark had been killed: nobody is asked to end
        process.wait()
        interfaces = [line.split(":")[0].strip() for line in seen.read_text().splitlines() if ":" in line]
        assert interfaces == ["lo"]
        deadline = time.monotonic() + 10
        while ["sleep", duration] in [each.info["cmdline"] for each in psutil.process_iter(["cmdline"])]:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# --- memory and processor


def test_the_high_water_mark_stays_when_memory_is_given_back():
    before = federation_footprint.peak_memory_kb(psutil.Process())
    ballast = np.ones(40_000_000, np.float32)
    del ballast
    assert federation_footprint.peak_memory_kb(psutil.Process()) >= before
    assert federation_footprint.peak_memory_kb(psutil.Process()) > psutil.Process().memory_info().rss / 1024 - 1
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        process = psutil.Process(child.pid)
    assert federation_footprint.peak_memory_kb(process) == 0


def test_the_processor_seconds_of_descendants_count():
    busy = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    with ProcessGroup() as group:
        process = group.start("parent", [sys.executable, "-c", program], child_environment())
        before = federation_footprint.cpu_seconds(process.pid)
        deadline = time.monotonic() + 30
        while federation_footprint.spent(before, federation_footprint.cpu_seconds(process.pid)) < 0.5:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_only_the_first_stand_in_trains_and_no_two_replies_are_alike(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    result = LocalResult(14, 2, {"loss": 1.0}, {}, [np.ones((3, 2), np.float32)])

    def app(message: Message, context: Context) -> Message:
        asked.append(context.node_id)
        return Message(pack_result(result), reply_to=message)

    monkeypatch.setattr(federation_standin, "app", app)
    for name in ("_run_id", "_node_id", "_task_id"):  # of the process that makes the messages
        monkeypatch.setattr(TaskIdentity, name, 1)
    node: Any = SimpleNamespace(context=lambda run_id: Context(run_id, 1, {}, RecordDict(), {}))
    for kind, num_asked in ((MessageType.TRAIN, 1), (MessageType.QUERY, 3)):
        asked.clear()
        messages = [Message(RecordDict(), dst_node_id=i, message_type=kind) for i in range(3)]
        replies = list(federation_standin.answers([node] * 3, messages))
        assert len(asked) == num_asked
        assert len(replies) == 3
        updates = [unpack_result(reply.content).update[0] for reply in replies]
        assert {update.dtype for update in updates} == {np.dtype(np.float32)}
        assert len({update.tobytes() for update in updates}) == (3 if kind == MessageType.TRAIN else 1)


# --- the whole


def test_the_run_ends_with_0_whether_or_not_goals_are_met(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def measured(contender: Contender, run: Federation) -> list[float]:
        if contender == CONTENDERS["nvflare"]:
            raise ContenderError("no network namespaces here")
        return [1.0] * run.num_rounds

    monkeypatch.setattr(federation, "measure", measured)
    monkeypatch.setattr(federation, "server_memory", lambda number, folder: float(number))
    monkeypatch.setattr(federation, "idle_cpu", lambda folder: {"silo": 0.5, "server": 0.001})
    path = tmp_path / "f.json"
    assert federation.main(["--silos", "2", "--sizes", "20kB", "--rounds", "2", "-o", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["samples"]["ours"] == {"2 silos, 20kB": [1.0] * 6}
    assert written["samples"]["nvflare_tuned"] == {"2 silos, 20kB": [1.0] * 2}
    assert written["failures"] == {"nvflare (2 silos, 20kB)": "no network namespaces here"}
    assert {goal["name"]: goal["value"] for goal in written["goals"]} == {
        "round_vs_stock_launcher": 1.0,
        "round_vs_stock_supernode": 1.0,
        "round_vs_nvflare": None,
        "server_memory_ratio": 8.0,
        "idle_cpu_silo": 0.5,
        "idle_cpu_server": 0.001,
    }
    assert written["machine"]["versions"]["nvflare"]


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--repetitions", "0"], ["--silos", "9"], ["--silos", "0"]])
def test_what_cannot_be_measured_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        federation.parse_arguments(arguments)
    assert "received" in capsys.readouterr().err


def test_default_contenders_are_those_of_the_goals_and_a_sample():
    assert federation.DEFAULT_CONTENDERS == ("ours", "flower_stock", "ours_stock_waits", "nvflare", "nvflare_tuned")
    assert set(federation.DEFAULT_CONTENDERS) <= set(CONTENDERS)
