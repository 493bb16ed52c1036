"""The federated benchmark: goals from samples, the order of turns, and footprints."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from benchmarks import federation, federation_footprint, federation_standin
from benchmarks.contest import ContenderError
from benchmarks.federation_contenders import CONTENDERS, Case, Contender, Federation
from fl_app.flower.wire import pack_answer, unpack_reply
from fl_app.messages import Answer, LocalResult
from shared.processes import ProcessGroup, child_environment

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
    goals = {
        goal.name: (goal.value, goal.condition, goal.met)
        for goal in federation.make_goals(SAMPLES, {})
    }
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
    order = [
        f"{name} {case.num_silos}"
        for name, case in federation.turns(["ours", "nvflare"], cases, 2, False)
    ]
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
    # The logs of the one that failed stay.
    assert [folder.is_dir() for folder in folders] == [False, True, False]


# --- memory and processor


def test_the_high_water_mark_stays_when_memory_is_given_back():
    before = federation_footprint.peak_memory_kb(psutil.Process())
    ballast = np.ones(40_000_000, np.float32)
    del ballast
    assert federation_footprint.peak_memory_kb(psutil.Process()) >= before
    assert (
        federation_footprint.peak_memory_kb(psutil.Process())
        > psutil.Process().memory_info().rss / 1024 - 1
    )
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
        while (
            federation_footprint.spent(before, federation_footprint.cpu_seconds(process.pid)) < 0.5
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_only_the_first_stand_in_trains_and_no_two_replies_are_alike(
    monkeypatch: pytest.MonkeyPatch,
):
    asked: list[int] = []
    result = LocalResult(14, 2, {"loss": 1.0}, {}, [np.ones((3, 2), np.float32)])

    def app(message: Message, context: Context) -> Message:
        asked.append(context.node_id)
        return Message(pack_answer(result.to_answer()), reply_to=message)

    monkeypatch.setattr(federation_standin, "app", app)
    for name in ("_run_id", "_node_id", "_task_id"):  # of the process that makes the messages
        monkeypatch.setattr(TaskIdentity, name, 1)
    node: Any = SimpleNamespace(context=lambda run_id: Context(run_id, 1, {}, RecordDict(), {}))
    for trains, num_asked in ((True, 1), (False, 3)):
        asked.clear()
        messages = [
            Message(RecordDict(), dst_node_id=i, message_type=MessageType.QUERY) for i in range(3)
        ]
        replies = list(federation_standin.answers([node] * 3, messages, trains))
        assert len(asked) == num_asked
        assert len(replies) == 3
        arrived = [unpack_reply(reply.content) for reply in replies]
        updates = [answer.arrays[0] for answer in arrived if isinstance(answer, Answer)]
        assert {update.dtype for update in updates} == {np.dtype(np.float32)}
        assert len({update.tobytes() for update in updates}) == (3 if trains else 1)


# --- the whole


def test_the_run_ends_with_0_whether_or_not_goals_are_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def measured(contender: Contender, run: Federation) -> list[float]:
        if contender == CONTENDERS["nvflare"]:
            raise ContenderError("no network namespaces here")
        return [1.0] * run.num_rounds

    monkeypatch.setattr(federation, "measure", measured)
    monkeypatch.setattr(federation, "server_memory", lambda number, folder: float(number))
    monkeypatch.setattr(federation, "idle_cpu", lambda folder: {"silo": 0.5, "server": 0.001})
    path = tmp_path / "f.json"
    assert (
        federation.main(["--silos", "2", "--sizes", "20kB", "--rounds", "2", "-o", str(path)]) == 0
    )
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


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--repetitions", "0"], ["--silos", "9"], ["--silos", "0"]]
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        federation.parse_arguments(arguments)
    assert "received" in capsys.readouterr().err


def test_default_contenders_are_those_of_the_goals_and_a_sample():
    assert federation.DEFAULT_CONTENDERS == (
        "ours",
        "flower_stock",
        "ours_stock_waits",
        "nvflare",
        "nvflare_tuned",
    )
    assert set(federation.DEFAULT_CONTENDERS) <= set(CONTENDERS)
