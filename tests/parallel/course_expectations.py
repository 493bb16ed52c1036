"""What the cases of course_job.py must end with, on every rank; those of `QUICK` in make test."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Expected:
    """facts: of every rank. line, error: patterns of a sentence that every rank logs, or raises."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    line: str = ""
    error: str = ""


WHOLE = {"steps": 40, "epochs": [0, 1, 2, 3]}
RESTORED = Expected(
    {"steps": 40, "epochs": [2, 3], "as_undisturbed": True}, r"restored the epochs \[2, 0\]"
)
DATA_ENDED = Expected(
    {"steps": 14, "epochs": [0, 1]}, r"data of ranks \[1\] ended after 7 steps of epoch 1"
)
ROOTS_RATE = r"Ranks \[1\] have another sgd\w*/learning_rate than rank 0 at the begin of epoch"
ROOTS_WEIGHTS = r"Ranks \[1\] have another [\w/]+/kernel and 1 other variables than rank 0 at the "
SAME_POINT = r"AgreedError: .*rank 0 at the metrics .*; rank 1 at the end of epoch 2"

EXPECTED = {
    "early_stopping": Expected({"steps": 20}, r"Ranks \[0\] stop in epoch 2: all ranks stop"),
    "early_stopping_restores": Expected({"steps": 30}, ROOTS_WEIGHTS + "end of fit"),
    "stop_of_rank_1": Expected({"steps": 20}, r"Ranks \[1\] stop in epoch 2"),
    "stop_at_a_step": Expected({"steps": 15}, r"Ranks \[1\] stop in epoch 2"),
    "stop_at_the_last_step": Expected({"steps": 20}, r"Ranks \[1\] stop in epoch 2"),
    "stop_from_a_thread": Expected({"epochs": True}, r"Ranks \[1\] stop in epoch"),
    "reduce_on_plateau": Expected({**WHOLE, "rate": 0.0125}, ROOTS_RATE),
    "scheduler": Expected({**WHOLE, "rate": 0.0125}, ROOTS_RATE),
    "rate_of_rank_1": Expected({**WHOLE, "rate": 0.1}, ROOTS_RATE),
    "rate_by_step": Expected({**WHOLE, "as_everywhere": True}),
    "weights_at_the_begin": Expected(WHOLE, ROOTS_WEIGHTS + "begin of epoch 3"),
    "weights_at_the_end": Expected({**WHOLE, "first_weight": 1.0}, ROOTS_WEIGHTS + "end of fit"),
    "weights_after_the_end": Expected({**WHOLE, "first_weight": 1.0}, ROOTS_WEIGHTS + "end of fit"),
    "weights_of_rank_1": Expected(WHOLE, ROOTS_WEIGHTS + "begin of epoch 3"),
    "backup_on_the_root": RESTORED,
    "backup_in_one_folder": RESTORED,
    "backup_on_rank_1": Expected(error=r"BackupAndRestore on ranks \[1\] alone"),
    "known_data_ends": DATA_ENDED,
    "data_ends": DATA_ENDED,
    "data_ends_within_a_block": DATA_ENDED,
    "endless_data": Expected(WHOLE),
    "evaluates_alone": Expected(error=SAME_POINT),
    "fails_before_the_begin": Expected(error="ValueError: Data cardinality is ambiguous"),
    "other_settings": Expected(error=r"received optimizer.clipnorm = \[1.0, 2.0\] by rank"),
    "other_epochs": Expected(error=r"received epochs = \[1, 2\] by rank"),
    "maximum": Expected({"is_largest": [True, True]}),
    "undeclared_metric": Expected(error=r"'largest' of the class Undeclared .*over_ranks = 'sum'"),
    "fails_in_a_callback": Expected(error=r"KeyError: .*a mistake of this rank's callback"),
    "fails_at_a_step": Expected(error=r"KeyError: .*a mistake of this rank's callback"),
    "data_fails": Expected(error="a mistake of this rank's data"),
}

# These end their job.
FAILURES = ("fails_in_a_callback", "fails_at_a_step", "data_fails")
QUICK = (
    "early_stopping",
    "stop_at_a_step",
    "rate_by_step",
    "weights_at_the_begin",
    "backup_in_one_folder",
    "data_ends",
    "evaluates_alone",
    "maximum",
    "fails_at_a_step",
)


def check_case(folder: Path, name: str) -> None:
    """Checks that all ranks ended a case alike, and as expected."""
    paths = sorted(folder.glob("course.*.json"))
    by_rank = [json.loads(path.read_text())[name] for path in paths]
    assert len(by_rank) == 2
    expected = EXPECTED[name]
    for facts in by_rank:
        assert re.search(expected.error, facts.get("error", "")), facts
        assert expected.error or "error" not in facts, facts
        assert expected.line == "" or any(re.search(expected.line, line) for line in facts["lines"])
        for key, value in expected.facts.items():
            is_close = isinstance(value, float) and abs(facts[key] - value) < 1e-6
            assert is_close or facts[key] == value, (key, facts)
    assert len({facts.get("weights") for facts in by_rank}) == 1, by_rank
