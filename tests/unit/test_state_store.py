"""The state that a silo keeps from round to round: never lost, never doubled, whatever happens to
answers and processes.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fl_app.exchange import Exchange
from fl_app.failures import Failure
from fl_app.messages import TRAIN, Answer, Task
from fl_app.silo.state_store import MAX_RUNS, StateStore
from fl_app.simulation import exchange as simulation
from fl_app.simulation.exchange import InProcessExchange, exchange_of_silos
from shared.experiment import Experiment
from shared.state import State, load_state, save_state
from tests.counting_method import CountingWorkbench
from tests.local_exchange import configure, run, wine_silos


def state(number: int) -> State:
    return {"count": [np.array(number)], "buffer": [np.full((2, 3), number, np.float32)]}


def number_of(found: State) -> int | None:
    return int(found["count"][0]) if found else None


# --- files


def test_a_state_comes_back_with_its_names_order_and_dtypes(tmp_path: Path):
    parts = {
        "a/b": [np.float16([0.5]), np.array(2**62 + 1)],
        "many": [np.full(i % 3, i, np.int8) for i in range(12)],
    }
    save_state(tmp_path / "state.npz", parts)
    found = load_state(tmp_path / "state.npz")
    assert list(found) == list(parts)
    for name, arrays in parts.items():
        for array, expected in zip(found[name], arrays, strict=True):
            assert (array.dtype, array.tolist()) == (expected.dtype, expected.tolist())
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


# --- the two phases


def begun(folder: Path) -> StateStore:
    """The states of a run whose round 3 is committed and whose round 4 is proposed."""
    store = StateStore(folder)
    store.propose("run", 3, state(3))
    store.load("run", 3)
    store.propose("run", 4, state(4))
    return store


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return begun(tmp_path / "state")


def test_an_acknowledged_proposal_is_committed(store: StateStore):
    assert number_of(store.load("run", 4)) == 4
    store.propose("run", 5, state(5))
    assert number_of(store.load("run", 4)) == 4  # the answer of round 5 was late


def test_a_proposal_that_is_not_acknowledged_is_dropped(store: StateStore):
    assert number_of(store.load("run", 3)) == 3
    store.propose("run", 5, state(5))
    assert number_of(store.load("run", 5)) == 5


def test_a_repeated_task_goes_on_from_the_same_state(store: StateStore):
    for _ in range(3):
        assert number_of(store.load("run", 3)) == 3
        store.propose("run", 4, state(4))
    assert number_of(store.load("run", 4)) == 4


def test_another_process_goes_on_from_what_the_first_has_left(store: StateStore):
    for acknowledged_round in (3, 3):
        again = StateStore(store.folder)
        assert number_of(again.load("run", acknowledged_round)) == acknowledged_round


def test_runs_have_states_of_their_own(store: StateStore):
    assert store.load("another run", 0) == {}
    store.propose("another run", 1, state(10))
    assert number_of(store.load("run", 4)) == 4
    assert number_of(store.load("another run", 1)) == 10


def test_a_run_that_begins_again_begins_without_state(store: StateStore):
    assert store.load("run", 0) == {}
    assert store.load("run", 4) == {}


def test_a_state_that_is_not_here_is_refused_and_what_is_here_stays(store: StateStore):
    for wrong in (2, 5):
        with pytest.raises(ValueError, match=rf"acknowledged, {wrong}; it keeps those of \[3, 4\]"):
            store.load("run", wrong)
    assert number_of(store.load("run", 4)) == 4


def test_methods_without_state_leave_nothing(tmp_path: Path):
    store = StateStore(tmp_path / "state")
    for acknowledged_round in range(3):
        assert store.load("run", acknowledged_round) == {}
        store.propose("run", acknowledged_round + 1, {})
    assert list(tmp_path.iterdir()) == []


def test_a_silo_without_a_place_for_state_refuses_methods_that_need_one():
    store = StateStore(None)
    assert store.load("run", 7) == {}
    store.propose("run", 8, {})
    with pytest.raises(ValueError, match=r"without a place for it.*python -m fl_app\.silo"):
        store.propose("run", 8, state(8))


@pytest.mark.parametrize("run_name", ["../../etc", "/etc/passwd", "", "a" * 10_000, "\0"])
def test_the_name_of_a_run_leads_nowhere_but_into_the_folder(tmp_path: Path, run_name: str):
    StateStore(tmp_path / "state").propose(run_name, 1, state(1))
    (folder,) = (tmp_path / "state").iterdir()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert [path.name for path in folder.iterdir()] == ["round-1.npz"]


def test_the_states_of_old_runs_are_forgotten(tmp_path: Path):
    store = StateStore(tmp_path)
    for i in range(MAX_RUNS + 3):
        store.propose(f"run {i}", 1, state(i))
    assert len([*tmp_path.iterdir()]) == MAX_RUNS
    assert number_of(store.load(f"run {MAX_RUNS + 2}", 1)) == MAX_RUNS + 2


@pytest.mark.parametrize("acknowledged_round", [3, 4])
@pytest.mark.parametrize("num_changes", [0, 1])
def test_a_process_that_dies_before_any_change_of_a_file_leaves_a_store_that_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    acknowledged_round: int,
    num_changes: int,
):
    """A task removes the state that is not acknowledged, then puts its own in place."""
    store = begun(tmp_path)
    changes: list[Path] = []

    def dying(change: Callable[..., object]) -> Callable[..., object]:
        def wrapper(path: Path, *arguments: object, **options: object) -> object:
            if len(changes) == num_changes:
                raise KeyboardInterrupt
            changes.append(path)
            return change(path, *arguments, **options)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying(Path.unlink))
        patch.setattr(Path, "replace", dying(Path.replace))

        def task() -> None:
            store.load("run", acknowledged_round)
            store.propose("run", 5, state(5))

        with pytest.raises(KeyboardInterrupt):
            task()
    assert len(changes) == num_changes
    for _ in range(2):
        assert number_of(store.load("run", acknowledged_round)) == acknowledged_round
        store.propose("run", 5, state(5))
    assert number_of(store.load("run", 5)) == 5


# --- a method with state, through a whole federation


class Unreliable(InProcessExchange):
    """Silos whose answers are lost, late or asked for twice, by chance: all have trained then."""

    def __init__(self, plain: InProcessExchange, seed: int) -> None:
        super().__init__(plain.silos().entries.values(), self.respond)
        self.plain = plain
        self.random = random.Random(seed)
        self.num_lost = self.num_repeated = 0

    def respond(self, silo: str, task: Task) -> Answer | Failure:
        reply = self.plain._respond(silo, task)
        if task.kind == TRAIN and self.random.random() < 0.3:
            self.num_repeated += 1
            reply = self.plain._respond(silo, task)
        if task.kind == TRAIN and self.random.random() < 0.3:
            self.num_lost += 1
            return Failure("no answer within 1 s")
        return reply


def counts(experiment: Experiment) -> dict[str, list[float]]:
    """By silo: the counts that it reported in the rounds whose answer was used."""
    found: dict[str, list[float]] = {}
    for line in (experiment.run_directory / "silos.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["silo"], []).append(row["train"]["count"])
    return found


@pytest.mark.parametrize("seed", range(3))
def test_neither_lost_nor_repeated_answers_lose_or_double_a_silos_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
):
    monkeypatch.setattr(simulation, "Workbench", CountingWorkbench)
    settings = {
        "federation.num_rounds": 12,
        "federation.min_replies": 1,
        "federation.evaluate_on_silos": False,
    }

    def exchange(experiment: Experiment) -> Unreliable:
        silos = wine_silos(experiment, 3)
        folder = str(tmp_path / "state")
        return Unreliable(exchange_of_silos(experiment, silos, folder), seed)

    # Half of the rounds, then the rest by a resumed server: another process of the silos too.
    half = configure(tmp_path, {**settings, "federation.num_rounds": 6})
    first: Exchange = exchange(half)
    run(half, first)
    whole = configure(tmp_path, settings, resume=True)
    second = exchange(whole)
    run(whole, second)
    assert min(second.num_lost, second.num_repeated) > 0
    for silo, reported in counts(whole).items():
        assert reported == list(range(1, len(reported) + 1)), silo
    assert sum(map(len, counts(whole).values())) < 36
