"""One side plays fair, the other sends random changes of real messages: no run ends, no silo dies.

Each test runs for about a second; ARCHIPELAGO_FUZZ_S=3600 makes them an hour in all.
"""

import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from fl_app.exchange import Roster
from fl_app.failures import Failure, MessageError, SiloFailure
from fl_app.flower.wire import pack_answer, pack_tasks, unpack_reply, unpack_task
from fl_app.messages import (
    EVALUATE,
    INFORM,
    TRAIN,
    Answer,
    Reply,
    SiloEntry,
    Task,
    TrainingRequest,
)
from fl_app.silo.handlers import HANDLERS, Site, handle
from fl_app.silo.policy import OPEN, SiloSettings
from fl_app.silo.workbench import Workbench
from shared.experiment import experiment_from_flat
from tests.arithmetic_exchange import Arithmetic
from tests.garbling import changed_bytes, changed_values, message, packed
from tests.local_exchange import WINE, configure, initial_weights, run

SECONDS = float(os.environ.get("ARCHIPELAGO_FUZZ_S", "2")) / 2
FAIR = ["silo-0", "silo-1", "silo-2"]


class OneIsHostile(Arithmetic):
    """Three silos that play fair, and "mallory", whose every message is changed at random."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(num_silos=4)
        self.rng = rng
        self._entries["mallory"] = self._entries.pop("silo-3")
        self.numbers["mallory"] = self.numbers.pop("silo-3")

    def garbled(self, answer: Answer) -> Answer | Failure:
        data = packed(pack_answer(answer))
        change = changed_bytes if self.rng.random() < 0.3 else changed_values
        return unpack_reply(message(change(data, self.rng)), "mallory")

    def silos(self) -> Roster:
        """Mallory's entry as Flower's members would read it."""
        entries = {name: self._entries[name] for name in FAIR}
        reply = self.garbled(self._entries["mallory"].to_answer())
        if isinstance(reply, Answer):
            try:
                entry = SiloEntry.from_answer(reply)
                entries.setdefault(entry.name, entry)
            except MessageError:
                pass
        return Roster(entries)

    def next(self, timeout_s: float) -> Reply | None:
        reply = super().next(timeout_s)
        if reply and reply[0] not in FAIR and isinstance(reply[1], Answer):
            return reply[0], self.garbled(reply[1])
        return reply

    def respond(self, silo: str, task: Task) -> Answer | Failure:
        return super().respond(silo if silo in FAIR else "mallory", task)


def test_a_hostile_silo_ends_no_run_and_silences_no_other(tmp_path: Path):
    rng = random.Random(0)
    deadline = time.monotonic() + SECONDS
    number = 0
    while number < 3 or time.monotonic() < deadline:
        number += 1
        changes = {
            "federation.min_silos": 3,
            "federation.min_replies": 3,
            "federation.restore_best": rng.random() < 0.5,
            "federation.cross_site_evaluation": rng.random() < 0.5,
        }
        experiment = configure(tmp_path / str(number), changes)
        result = run(experiment, OneIsHostile(rng))
        assert result["rounds"] == 3
        directory = experiment.run_directory
        for line in (directory / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
            assert set(FAIR) <= set(row.get("cohort", FAIR))


def is_too_little(outcomes: dict[str, int]) -> bool:
    """Whether to go on, on a machine so busy that the time is over after a few messages."""
    return min(outcomes.values()) < 5 and sum(outcomes.values()) < 5000


def test_a_hostile_server_gets_an_answer_or_a_sentence(tmp_path: Path):
    experiment = experiment_from_flat({"data.name": "wine", "model.name": "linear"})
    site = Site(SiloSettings("a", "wine", policy=OPEN), experiment, Workbench())
    rng = random.Random(1)
    weights = initial_weights(experiment)
    bodies = {
        TRAIN: TrainingRequest(WINE, True).to_body(),
        EVALUATE: TrainingRequest(WINE, True).to_body(),
        INFORM: {"reason": "it came late"},
    }
    deadline = time.monotonic() + SECONDS
    outcomes = {"answer": 0, "sentence": 0}
    while is_too_little(outcomes) or time.monotonic() < deadline:
        kind = rng.choice([*HANDLERS])
        task = Task(kind, "a run", 1, 0, bodies.get(kind, {}), weights if kind != INFORM else [])
        data = packed(pack_tasks({"a": task})["a"])
        change = changed_bytes if rng.random() < 0.3 else changed_values
        try:
            answer = handle(unpack_task(message(change(data, rng))), site)
            outcome = "answer"
            assert all(np.isfinite(array).all() for array in answer.arrays)
        except (MessageError, SiloFailure):
            outcome = "sentence"
        outcomes[outcome] += 1
    assert min(outcomes.values()) >= 5, outcomes
