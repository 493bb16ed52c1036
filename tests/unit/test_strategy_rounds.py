"""Rounds that a Flower strategy leads: what it needs, silos that fail, and waits that end.

The grid here calls the silos' own ClientApp; real ones are in tests/federation.
"""

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.supercore.task_identity import TaskIdentity

from fl_app.failures import FederationError
from fl_app.flower.client_app import make_app
from fl_app.flower.exchange import FlowerExchange
from fl_app.flower.strategy_rounds import run_strategy
from fl_app.flower.wire import pack_refusal
from fl_app.silo.workbench import Workbench
from shared.data import load_examples
from shared.data.sources import save_examples
from shared.experiment import DataSection, Experiment, experiment_from_flat
from shared.run_record import RunRecord, read_metrics
from tests.unit.test_flower_exchange import copy

FLOWER = "flwr.serverapp.strategy"
HERE = __name__


class SlowToWake(FedAvg):
    """Waits for more silos than it says."""

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Any:
        while len(list(grid.get_node_ids())) < 4:
            time.sleep(0.05)
        return super().configure_train(server_round, arrays, config, grid)


class Broken(FedAvg):
    """Fails at the replies."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        raise KeyError("a key\nof mine")


class Oblivious(FedAvg):
    """Says what it lacks, and aggregates nothing."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        from logging import WARNING

        from flwr.supercore import log

        log(WARNING, "At least %d replies are required.", 99)
        return None, None


def private(**options: Any) -> DifferentialPrivacyServerSideFixedClipping:
    """A strategy around another."""
    return DifferentialPrivacyServerSideFixedClipping(FedAvg(**options), 0.1, 1.0, 2)


class Silos(Grid):
    """Flower's grid over silos in this process, by node: what makes an answer, or a ClientApp."""

    def __init__(self, nodes: dict[int, Any], run_config: dict[str, Any]) -> None:
        self.app = make_app(Workbench(num_kept=5))
        self.nodes = nodes
        self.run_config = run_config
        self.replies: dict[str, Message] = {}
        self.trained: list[int] = []  # nodes that were asked to
        self.takes_messages = True

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        return [self._push(message) for message in messages] if self.takes_messages else []

    def _push(self, message: Message) -> str:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        message_id = f"{node}-{time.monotonic_ns()}"
        message.metadata.__dict__["_message_id"] = message_id
        if kind == MessageType.TRAIN:
            self.trained.append(node)

        answers = self.nodes[node]
        content = answers[kind]() if kind in answers else self._work(message, answers["silo"])
        self.replies[message_id] = Message(content, reply_to=message)
        return message_id

    def _work(self, message: Message, node_config: dict[str, Any]) -> RecordDict:
        """What the silo's app answers to the message as it arrives."""
        metadata = message.metadata
        received = Message(copy(message.content), metadata.dst_node_id, metadata.message_type)
        received.metadata.__dict__["_message_id"] = metadata.message_id
        context = Context(1, metadata.dst_node_id, node_config, RecordDict(), self.run_config)
        return self.app(received, context).content

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def get_nodes(self) -> Any: ...
    def send_and_receive(self, *args: Any, **kwargs: Any) -> Any: ...
    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...
    def set_run(self, run: Any) -> None: ...
    @property
    def run(self) -> Any: ...


@pytest.fixture(autouse=True)
def _in_a_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):  # private, and Flower's messages ask for them
        monkeypatch.setattr(TaskIdentity, name, 1)


def configure(folder: Path, **changes: Any) -> Experiment:
    flat = {
        "data.name": "wine",
        "model.name": "linear",
        "federation.num_rounds": 2,
        "federation.min_silos": 3,
        "federation.evaluate_on_server": False,
        "federation.strategy": f"{FLOWER}:FedAvg",
        "federation.silo_timeout_s": 0.5,
        "run.directory": str(folder / "run"),
    }
    return experiment_from_flat(flat | changes)


def silos_of(experiment: Experiment, *data: str, **answers: Any) -> Silos:
    """Silos named a, b, ...; `answers` of the last one, by kind of message, stand for its app's."""
    nodes: dict[int, Any] = {
        i: {"silo": {"silo": "abcdef"[i - 1], "data": source, "min-examples": 1}}
        for i, source in enumerate(data, 1)
    }
    nodes[len(data)] |= answers
    return Silos(nodes, experiment.to_flat())


def run(experiment: Experiment, silos: Silos) -> dict[str, Any]:
    exchange = FlowerExchange(silos, introduction_timeout_s=5.0)
    return run_strategy(experiment, silos, exchange, RunRecord(experiment, "flower", "round"))


# --- what a strategy needs


@pytest.mark.parametrize(
    ("strategy", "options", "min_silos", "needs"),
    [
        ("FedAvg", "", 1, "min_available_nodes = 2, min_train_nodes = 2, min_evaluate_nodes = 2"),
        ("FedAvg", "min_available_nodes = 4", 3, "min_available_nodes = 4"),
        ("FedAvg", "fraction_evaluate = 0.0\nmin_train_nodes = 4", 3, "min_train_nodes = 4"),
        ("Bulyan", "num_malicious_nodes = 1", 6, "4 * num_malicious_nodes + 3 = 7"),
        ("private", "min_available_nodes = 4", 3, "min_available_nodes = 4"),
    ],
)
def test_a_strategy_that_needs_more_silos_is_refused_before_anything_waits(
    tmp_path: Path, strategy: str, options: str, min_silos: int, needs: str
):
    experiment = configure(
        tmp_path,
        **{
            "federation.strategy": f"{HERE if strategy == 'private' else FLOWER}:{strategy}",
            "federation.strategy_options": options,
            "federation.min_silos": min_silos,
        },
    )
    silos = silos_of(experiment, "wine")
    with pytest.raises(
        ValueError,
        match=rf"has {re.escape(needs)}, received federation\.min_silos = {min_silos}\. Take part",
    ):
        run(experiment, silos)
    assert silos.replies == {}
    assert not experiment.run_directory.exists()


def test_one_silo_will_do_where_the_options_say_so(tmp_path: Path):
    options = "min_available_nodes = 1\nmin_train_nodes = 1\nmin_evaluate_nodes = 1"
    changes = {"federation.min_silos": 1, "federation.strategy_options": options}
    experiment = configure(tmp_path, **changes)
    assert run(experiment, silos_of(experiment, "wine"))["silos"] == ["a"]


def test_a_strategy_that_waits_for_silos_all_the_same_is_ended(tmp_path: Path):
    experiment = configure(tmp_path, **{"federation.strategy": f"{HERE}:SlowToWake"})
    with pytest.raises(
        FederationError, match=r"waits for more silos than the 3 that.*within 0\.5 s.*Start them"
    ):
        run(experiment, silos_of(experiment, "wine", "wine", "wine"))


# --- silos that fail


@pytest.fixture
def few(tmp_path: Path) -> str:
    """A file with so few examples that none is held out for validation."""
    wine = load_examples(DataSection(name="wine"))
    return str(save_examples(tmp_path / "few", wine.take(np.arange(0, 178, 60))))


def test_a_silo_without_validation_examples_is_left_out_of_that_message_alone(
    tmp_path: Path, few: str, capsys: pytest.CaptureFixture[str]
):
    experiment = configure(tmp_path)
    silos = silos_of(experiment, "wine", "wine", few)
    result = run(experiment, silos)
    assert result["silos"] == ["a", "b", "c"]
    assert sorted(silos.trained) == [1, 1, 2, 2, 3, 3]
    assert result["metrics"]["validation"]["loss"] > 0
    out = capsys.readouterr().out
    assert out.count("silo 'c' refuses: it has no validation examples") == 1


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: pack_refusal("c", "its disk is full."), "silo 'c' refuses: its disk is full."),
        (lambda: Error(3, "Traceback\nMemoryError"), r"MemoryError \(Flower's code 3\)"),
    ],
    ids=["refusal", "crash"],
)
def test_a_silo_that_cannot_answer_one_of_the_messages_is_named_and_the_others_go_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    answer: Callable[[], RecordDict | Error],
    reason: str,
):
    experiment = configure(tmp_path)
    result = run(experiment, silos_of(experiment, "wine", "wine", "wine", **{kind: answer}))
    assert result["rounds"] == 2
    rounds = [row["round"] for row in read_metrics(experiment.run_directory) if "train" in row]
    assert rounds == [1, 2]
    assert len(re.findall(f"left out by the strategy: {reason}", capsys.readouterr().out)) == 1


def test_a_node_that_the_roll_call_left_out_takes_no_part(tmp_path: Path):
    experiment = configure(tmp_path)
    silos = silos_of(experiment, "wine", "wine", "wine", "wine")
    silos.nodes[4]["silo"]["silo"] = "a"  # a name in use
    run(experiment, silos)
    assert sorted(silos.trained) == [1, 1, 2, 2, 3, 3]


# --- strategies that cannot go on, each in one sentence


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (f"{FLOWER}:FedProx", "", "asks for proximal-mu, which silos do not know. Choose another"),
        (f"{FLOWER}:FedAvg", "arrayrecord_key = 'w'", "record 'arrays', and settings as 'config'"),
        (f"{HERE}:Broken", "", "'.*:Broken' has given up: KeyError: 'a key.*of mine'"),
        (f"{HERE}:Oblivious", "", "nothing in any round; it said: At least 99 replies are requ"),
    ],
)
def test_a_strategy_that_cannot_go_on_says_so_in_one_sentence(
    tmp_path: Path, strategy: str, options: str, message: str
):
    changes = {"federation.strategy": strategy, "federation.strategy_options": options}
    experiment = configure(tmp_path, **changes)
    with pytest.raises(FederationError, match=message) as caught:
        run(experiment, silos_of(experiment, "wine", "wine", "wine"))
    assert "\n" not in str(caught.value)


def test_messages_that_are_too_large_are_no_endless_wait(tmp_path: Path):
    experiment = configure(tmp_path, **{"federation.strategy": f"{HERE}:Deaf"})
    silos = silos_of(experiment, "wine", "wine", "wine")
    Deaf.silos = silos
    with pytest.raises(FederationError, match=r"takes no messages as large .* MB of weights"):
        run(experiment, silos)


class Deaf(FedAvg):
    """Begins its rounds when the SuperLink takes nothing any more."""

    silos: Silos

    def configure_train(self, *arguments: Any) -> Any:
        self.silos.takes_messages = False
        return super().configure_train(*arguments)


def test_an_array_of_a_foreign_kind_is_no_refusal():
    from fl_app.flower.wire import is_refusal

    assert not is_refusal(RecordDict({"arrays": ArrayRecord({"0": Array(np.zeros(1))})}))
