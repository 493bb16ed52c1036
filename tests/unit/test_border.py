"""The border: whatever another party sends becomes typed, bounded values or one clean sentence.

The fuzz test runs for a second; ARCHIPELAGO_FUZZ_S=3600 makes it an hour.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fl_app.border import MAX_EXAMPLES, MAX_REASON_LENGTH, printable_line, read_schema
from fl_app.failures import Failure, MessageError
from fl_app.flower.wire import (
    OWN,
    pack_answer,
    pack_tasks,
    unpack_reply,
    unpack_strategy_task,
    unpack_task,
)
from fl_app.messages import (
    TRAIN,
    Answer,
    LocalResult,
    SiloEntry,
    Task,
    TrainingRequest,
    result_of,
)
from fl_app.packing import MAX_ARRAYS, MAX_VALUES, pack, unpack
from shared.data import Schema
from shared.data.schema import Category, Columns, Number
from tests.garbling import changed_bytes, changed_values, message, packed

AGE = Number("age", 10, 50.0, 4.0)
TABLE = Schema((3,), 2, columns=Columns((AGE,), (Category("sex", ("f", "m")),), None, True))
ENTRY = SiloEntry("a", TABLE, 10, 2)
RESULT = LocalResult(10, 2, {"loss": 0.5}, {"loss": 0.4}, [np.zeros(3, np.float32)], 0.1)

# --- numbers


@pytest.mark.parametrize("num_examples", [0, -5, MAX_EXAMPLES + 1, 2**45, 10**400, math.nan])
def test_a_claim_that_no_silo_can_hold_is_refused(num_examples: Any):
    body = {**ENTRY.to_answer().body, "num_examples": num_examples}
    with pytest.raises(MessageError, match="an answer to the roll call"):
        SiloEntry.from_answer(Answer(body))


@pytest.mark.parametrize(("num_examples", "num_validation"), [(11, 2), (30, 2), (10, 3)])
def test_a_result_rests_on_no_more_examples_than_were_claimed(
    num_examples: int, num_validation: int
):
    result = LocalResult(num_examples, num_validation, {}, {}, [])
    assert isinstance(result_of(result.to_answer()), LocalResult)
    failure = result_of(result.to_answer(), ENTRY)
    assert isinstance(failure, Failure)
    assert "where it claimed" in failure.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e30])
@pytest.mark.parametrize("kind", ["train", "validation"])
def test_a_metric_that_is_not_finite_or_absurd_is_no_number(kind: str, value: float):
    """It would win "best", end early stopping, or overflow in the mean."""
    result = result_of(Answer({**RESULT.to_answer().body, kind: {"loss": value}}))
    assert isinstance(result, LocalResult)
    assert math.isnan(getattr(result, kind)["loss"])


# --- schemas


def changed(path: str, value: Any) -> dict[str, Any]:
    """The JSON of a schema with the value at a path such as "columns.numbers.0.count"."""
    schema = json.loads(json.dumps(TABLE.to_json()))
    *parents, last = path.split(".")
    place: Any = schema
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[int(last) if last.isdigit() else last] = value
    return schema


ABSURD = {
    "a negative count": ("columns.numbers.0.count", -1),
    "a count beyond float64": ("columns.numbers.0.count", 10**30),
    "a mean that overflows": ("columns.numbers.0.mean", 1e308),
    "a mean that is none": ("columns.numbers.0.mean", math.nan),
    "a negative variance": ("columns.numbers.0.variance", -1e-9),
    "a variance that overflows": ("columns.numbers.0.variance", 1e200),
    "more counts than classes": ("class_counts", [1, 2, 3]),
    "a negative class count": ("class_counts", [1, -2]),
    "more names than classes": ("classes", ["a", "b", "c"]),
    "one name for two classes": ("classes", ["a", "a"]),
    "a billion classes": ("num_classes", 10**9),
    "negative classes": ("num_classes", -1),
    "a million names": ("classes", [str(i) for i in range(10**6)]),
    "another shape than its columns": ("input_shape", [4]),
    "a negative length": ("target_shape", [-1]),
    "a huge target": ("target_shape", [10**9, 10**9]),
    "a huge vocabulary": ("vocabulary_size", 10**12),
    "a column twice": ("columns.categories.0.name", "age"),
    "a name of a megabyte": ("columns.categories.0.values.0", "x" * 10**6),
}


@pytest.mark.parametrize("case", ABSURD)
def test_an_absurd_schema_is_refused_in_one_printable_line(case: str):
    body = {**ENTRY.to_answer().body, "schema": changed(*ABSURD[case])}
    with pytest.raises(MessageError) as caught:
        SiloEntry.from_answer(Answer(body))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < MAX_REASON_LENGTH + 200
    with pytest.raises(MessageError):
        TrainingRequest.from_task(Task(TRAIN, body={"schema": body["schema"]}))


def test_a_schema_without_a_table_is_bounded_too():
    assert read_schema(Schema((8, 8, 1), 10).to_json()) == Schema((8, 8, 1), 10)
    with pytest.raises(ValueError, match="numbers in an example"):
        read_schema(Schema((10**6, 10**6), 10).to_json())


# --- text


def test_text_of_others_is_one_line_however_long_and_whatever_is_in_it():
    line = printable_line("a\nerror: b\x1b[2J\u2028" + "x" * 10**7)
    assert line.isprintable()
    assert line.startswith("a error: b [2J ")
    assert len(line) < MAX_REASON_LENGTH + 10


def test_a_refusal_goes_by_the_name_that_the_server_knows():
    reply = unpack_reply(pack_refusal_of("b"), silo="a")
    assert reply == Failure("silo 'a' refuses: no.")


def pack_refusal_of(name: str) -> RecordDict:
    from fl_app.flower.wire import pack_refusal

    return pack_refusal(name, "no.")


# --- bytes


def with_header(text: bytes) -> bytes:
    return len(text).to_bytes(64, "little") + text


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 10**5,
        b'{"header": {"a": ' + b"[" * 10**5 + b"]" * 10**5 + b'}, "arrays": []}',
        b'{"header": {"a": [' + b"[]," * (MAX_VALUES // 2) + b'[]]}, "arrays": []}',
        b'{"header": {}, "arrays": [' + b'["|u1", [0]],' * MAX_ARRAYS + b'["|u1", [0]]]}',
        b'{"header": {}, "arrays": [["<f4", [-1]]]}',
        b'{"header": {}, "arrays": [["<f4", [0, 1' + b"0" * 400 + b"]]]}",
        b'{"header": {}, "arrays": [["<f4", [' + b"1," * 70 + b"1]]]}",
    ],
    ids=["open", "deep", "many values", "many arrays", "negative", "endless", "of 71 dimensions"],
)
def test_a_header_that_would_take_time_or_memory_is_refused_at_once(text: bytes):
    started = time.process_time()
    with pytest.raises(MessageError, match="a message that this version"):
        unpack(with_header(text))
    assert time.process_time() - started < 5


STRATEGY = {
    "no settings": RecordDict({"arrays": ArrayRecord([np.zeros(3)])}),
    "no schema": RecordDict(
        {"arrays": ArrayRecord([np.zeros(3)]), "config": ConfigRecord({"server-round": 1})}
    ),
    "a schema without end": RecordDict(
        {
            "arrays": ArrayRecord([np.zeros(3)]),
            "config": ConfigRecord({"server-round": 1, "schema": "[" * 10**5}),
        }
    ),
}


@pytest.mark.parametrize("case", STRATEGY)
def test_a_strategys_message_that_lacks_a_part_is_refused_in_a_sentence(case: str):
    with pytest.raises(MessageError, match="a task of a strategy that this version"):
        unpack_strategy_task(STRATEGY[case], TRAIN)


def test_the_values_of_one_silos_own_are_read_as_carefully():
    content = pack_tasks({"a": Task(TRAIN, "run", 1, 0, {}, [])})["a"]
    content[OWN] = ConfigRecord({OWN: "[" * 10**5})
    with pytest.raises(MessageError, match="a task that this version"):
        unpack_task(content)


# --- everything at once


def read_task(data: bytes) -> None:
    TrainingRequest.from_task(unpack_task(message(data)))


def read_entry(data: bytes) -> None:
    reply = unpack_reply(message(data))
    if isinstance(reply, Answer):
        SiloEntry.from_answer(reply)


def read_result(data: bytes) -> None:
    result_of(unpack_reply(message(data)), ENTRY)


READERS: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    "task": (
        read_task,
        packed(
            pack_tasks({"a": Task(TRAIN, "r", 1, 0, TrainingRequest(TABLE, True).to_body(), [])})[
                "a"
            ]
        ),
    ),
    "entry": (read_entry, packed(pack_answer(ENTRY.to_answer()))),
    "result": (read_result, packed(pack_answer(RESULT.to_answer()))),
}


@pytest.mark.parametrize("kind", READERS)
def test_no_message_is_anything_but_read_or_refused(kind: str):
    """Random changes of real messages: of bytes, and of values in their headers."""
    read, data = READERS[kind]
    read(data)
    seconds = float(os.environ.get("ARCHIPELAGO_FUZZ_S", "1")) / len(READERS)
    rng = random.Random(kind)
    deadline = time.monotonic() + seconds
    num_tried = 0
    while time.monotonic() < deadline:
        garbled = changed_bytes(data, rng) if rng.random() < 0.3 else changed_values(data, rng)
        refusal = ""
        try:
            read(garbled)
        except MessageError as error:
            refusal = str(error)
        assert refusal.isprintable()
        assert len(refusal) < MAX_REASON_LENGTH + 500
        num_tried += 1
    assert num_tried > 50


def test_packing_and_reading_are_inverse_where_nothing_is_wrong():
    header, arrays = unpack(pack(RESULT.to_answer().header(), RESULT.update))
    assert LocalResult.from_answer(Answer(header["answer"], arrays), ENTRY).train == RESULT.train
