"""The benchmarks' arithmetic: medians, ratios, goals, the JSON file; and the distributed one."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import distributed, environments, results, workloads
from benchmarks.contest import Contest
from benchmarks.results import Goal
from shared.processes import child_environment

SAMPLES = {
    "dist_train": {"mlp": [30.0, 10.0, 26.0], "cnn": [4.0]},
    "torch_ddp": {"mlp": [13.0, 12.0, 400.0], "cnn": [4.0]},
    "mwms": {"mlp": [20.0, 22.0], "cnn": []},
    "bare_horovod": {"mlp": [13.0], "cnn": [8.0]},
}


# --- medians, ratios, goals


def test_a_ratio_is_one_of_medians():
    found = results.medians(SAMPLES)
    assert results.ratio(found, "dist_train", "torch_ddp", "mlp") == 26.0 / 13.0
    assert results.ratio(found, "dist_train", "mwms", "mlp") == 26.0 / 21.0


def test_there_is_no_ratio_with_what_was_not_measured():
    found = results.medians(SAMPLES)
    assert results.ratio(found, "dist_train", "mwms", "cnn") is None
    assert results.ratio(found, "dist_train", "torch_ddp", "dense") is None
    assert results.ratio(found, "nobody", "torch_ddp", "mlp") is None


@pytest.mark.parametrize(
    ("value", "comparison", "met"),
    [
        (1.3, ">=", True),
        (1.2999, ">=", False),
        (1.3, "<=", True),
        (1.31, "<=", False),
        (None, ">=", False),
    ],
)
def test_a_goal_is_met_at_its_bound_and_never_without_a_value(
    value: float | None, comparison: str, met: bool
):
    goal = Goal("speed", value, 1.3, comparison)  # type: ignore[arg-type]
    assert goal.as_json() == {
        "name": "speed",
        "value": value,
        "goal": f"{comparison} 1.3",
        "met": met,
    }


def test_there_are_goals_for_each_contender_and_model_with_the_agreed_bounds():
    nothing: results.Samples = {name: {} for name in distributed.CONTENDERS}
    goals = distributed.make_goals(nothing, {}, list(workloads.WORKLOADS))
    assert {goal.name: goal.bound for goal in goals} == {
        **{"vs_ddp_mlp": 1.0, "vs_ddp_cnn": 1.3, "vs_ddp_transformer": 1.0, "vs_ddp_dense": 1.3},
        **{
            "vs_mwms_mlp": 1.3,
            "vs_mwms_cnn": 1.15,
            "vs_mwms_transformer": 1.1,
            "vs_mwms_dense": 1.9,
        },
        **{f"vs_bare_horovod_{model}": 1.0 for model in workloads.WORKLOADS},
    }
    assert not any(goal.met for goal in goals)


def test_goals_compare_ours_with_the_other():
    goals = {goal.name: goal for goal in distributed.make_goals(SAMPLES, {}, ["mlp", "cnn"])}
    assert goals["vs_ddp_mlp"].value == 2.0
    assert goals["vs_ddp_mlp"].met
    assert goals["vs_bare_horovod_cnn"].value == 0.5
    assert not goals["vs_bare_horovod_cnn"].met
    assert goals["vs_mwms_cnn"].value is None
    assert len(goals) == 6


def test_a_contender_that_failed_has_no_value_though_it_has_samples():
    goals = {
        goal.name: goal
        for goal in distributed.make_goals(SAMPLES, {"torch_ddp": "crashed"}, ["mlp"])
    }
    assert goals["vs_ddp_mlp"].value is None
    assert goals["vs_mwms_mlp"].value is not None
    without_ours = distributed.make_goals(SAMPLES, {"dist_train": "crashed"}, ["mlp"])
    assert [goal.value for goal in without_ours] == [None, None, None]


def test_what_was_not_asked_for_has_no_goal():
    chosen = {name: SAMPLES[name] for name in ("dist_train", "mwms")}
    assert [goal.name for goal in distributed.make_goals(chosen, {}, ["mlp"])] == ["vs_mwms_mlp"]


# --- the file and the tables


def test_the_file_holds_machine_samples_goals_and_failures(tmp_path: Path):
    path = tmp_path / "new" / "file.json"
    goals = [Goal("vs_ddp_mlp", 2.0, 1.0), Goal("vs_mwms_mlp", None, 1.15)]
    results.write_results(
        path, {"cores": 2}, SAMPLES, goals, {"mwms": "rank 1 ended with status 1"}
    )
    assert json.loads(path.read_text()) == {
        "machine": {"cores": 2},
        "samples": SAMPLES,
        "goals": [
            {"name": "vs_ddp_mlp", "value": 2.0, "goal": ">= 1.0", "met": True},
            {"name": "vs_mwms_mlp", "value": None, "goal": ">= 1.15", "met": False},
        ],
        "failures": {"mwms": "rank 1 ended with status 1"},
    }
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_no_json_for_others_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        results.write_results(tmp_path / "f.json", {}, {"a": {"mlp": [float("nan")]}}, [], {})
    assert not (tmp_path / "f.json").exists()


def test_the_machine_is_described():
    facts = results.machine_facts(["numpy", "no-such-package"])
    assert set(facts) == {"cpu", "cores", "kernel", "python", "load", "versions"}
    assert facts["versions"] == {"numpy": np.__version__}
    assert results.cpu_name("processor\t: 0\nmodel name\t: Some CPU: fast\n") == "Some CPU: fast"
    assert results.cpu_name("") != ""


def test_tables_show_all_figures_and_what_is_missing():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(results.medians_table(results.medians(SAMPLES), ["mlp", "cnn"], "Samples/s"))
    console.print(
        results.goals_table([Goal("vs_ddp_mlp", 2.0, 1.0), Goal("vs_mwms_mlp", None, 1.15)])
    )
    rows = [line.split() for line in console.export_text().replace("│", " ").splitlines()]
    assert ["mwms", "21", "-"] in rows
    assert ["vs_ddp_mlp", "2.000", ">=", "1.0", "yes"] in rows
    assert ["vs_mwms_mlp", "not", "measured", ">=", "1.15", "no"] in rows


# --- the workloads


@pytest.mark.parametrize(
    "workload", workloads.WORKLOADS.values(), ids=lambda workload: workload.name
)
def test_a_model_has_the_parameters_it_is_said_to_have_and_fits_its_data(
    workload: workloads.Workload,
):
    model = workloads.keras_model(workload)
    x, y = workloads.examples(workload, 2, rank=0)
    assert model.count_params() == workload.num_parameters
    assert model(x).shape == (2, workloads.NUM_CLASSES)
    assert y.shape == (2,)


def test_data_belong_to_the_rank():
    workload = workloads.WORKLOADS["mlp"]
    first, again, other = (workloads.examples(workload, 4, rank)[0] for rank in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_another_model_under_the_same_name_is_refused():
    with pytest.raises(RuntimeError, match="669706"):
        workloads.check_size(workloads.WORKLOADS["mlp"], 12)


def test_each_slice_is_a_pass_over_the_examples(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    events: list[object] = []

    def run(steps: int) -> None:
        events.append(steps)
        clock[0] += 0.1 * steps

    class Recorder:
        num_slices = 2
        begin = staticmethod(lambda: events.append("turn"))
        report = staticmethod(lambda model, figure: events.append((model, round(figure, 6))))

    mlp = workloads.WORKLOADS["mlp"]
    workloads.measure_slices(run, mlp, Recorder())  # type: ignore[arg-type]
    a_turn = ["turn", mlp.num_examples // mlp.batch_size, ("mlp", mlp.global_batch_size / 0.1)]
    assert events == [workloads.WARM_UP_STEPS, *a_turn, *a_turn]


def test_ranks_whose_weights_differ_are_noticed():
    weights = [np.ones((4, 3), np.float32), np.zeros(3, np.float32)]
    workloads.check_equal_weights(weights, lambda own: own)
    with pytest.raises(RuntimeError, match="different weights"):
        workloads.check_equal_weights(weights, lambda own: own + 0.01)


# --- the processes


def test_torch_sees_the_workloads_without_keras():
    program = (
        "import sys, benchmarks.workloads; sys.exit(bool({'keras', 'tensorflow', 'horovod'} &"
        " set(sys.modules)))"
    )
    root = str(distributed.ROOT)
    assert (
        subprocess.run(
            [sys.executable, "-c", program], env=child_environment(PYTHONPATH=root)
        ).returncode
        == 0
    )


def test_settings_of_the_shell_reach_no_contender(monkeypatch: pytest.MonkeyPatch):
    for name in (
        "HOROVOD_CYCLE_TIME",
        "OMP_NUM_THREADS",
        "TF_NUM_INTRAOP_THREADS",
        "LOCAL_RANK",
        "TORCH_X",
    ):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("HOME_OF_TF", "stays")
    found = distributed.environment({"RANK": "1"})
    assert "7" not in found.values()
    assert (found["HOME_OF_TF"], found["RANK"]) == ("stays", "1")


def test_pins_are_met_by_the_same_versions_whatever_their_local_part():
    pins = environments.read_pins((distributed.ROOT / "requirements" / "benchmark.txt").read_text())
    assert set(pins) == {"torch", "numpy"}
    python = Path(sys.executable)
    assert environments.has_packages(python, {"numpy": np.__version__})
    assert not environments.has_packages(python, {"numpy": "0.1"})
    assert not environments.has_packages(python, {"no-such-package": "1"})
    assert not environments.has_packages(python / "missing", {"numpy": np.__version__})


def test_the_run_ends_with_0_whether_or_not_goals_are_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    contest = Contest([], print)
    contest.samples, contest.failures = SAMPLES, {"mwms": "crashed"}  # type: ignore[assignment]
    monkeypatch.setattr(distributed, "run_contest", lambda *_: contest)
    path = tmp_path / "d.json"
    assert distributed.main(["--slices", "1", "--models", "mlp", "-o", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["machine"]["versions"]["torch"]
    assert {goal["name"]: goal["value"] for goal in written["goals"]}["vs_mwms_mlp"] is None
