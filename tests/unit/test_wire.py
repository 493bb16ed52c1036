"""The wire: what is packed comes out again, bit by bit, also after Flower's own serialisation."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fl_app.border import MAX_REASON_LENGTH
from fl_app.failures import Failure
from fl_app.flower.wire import (
    FORMAT,
    OWN,
    RECORD,
    is_of_strategy,
    pack_answer,
    pack_refusal,
    pack_strategy_result,
    pack_tasks,
    strategy_arrays,
    strategy_config,
    unpack_reply,
    unpack_strategy_task,
    unpack_task,
)
from fl_app.messages import (
    EVALUATE,
    TRAIN,
    Answer,
    LocalResult,
    SiloEntry,
    Task,
    TrainingRequest,
)
from fl_app.packing import pack, unpack
from fl_app.silo.data import Silo
from shared.data import Dataset, Schema

WINE = Schema((13,), 3)

ARRAYS = {
    "none": [],
    "a number": [np.array(1.5, dtype=np.float32)],
    "an empty one": [np.zeros((0, 3), np.float32)],
    "an empty one last": [np.float32([1.0]), np.zeros((4, 0), np.float64)],
    "special values": [np.array([np.nan, -np.nan, np.inf, -0.0, 1e-45], np.float32)],
    "many dtypes": [
        np.float16([[0.1, -65504.0]]),
        np.array([2**62 + 1, -1]),
        np.uint32([[2**32 - 1]]),
        np.array([True, False]),
        np.float64(np.pi).reshape(()),
        np.int8([[[-128]]]),
    ],
    "not contiguous": [
        np.arange(12.0, dtype=np.float32).reshape(3, 4).T,
        np.arange(10)[::3],
        np.arange(6.0)[::-1],
    ],
    "in Fortran's order": [np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))],
    "of odd sizes": [
        np.array([True]),
        np.float64([0.1]),
        np.int8([1, 2, 3]),
        np.float32([[0.1], [0.2]]),
    ],
    "many": [np.full((i % 3, 2), i, np.float32) for i in range(200)],
}


def bits(arrays: list[np.ndarray]) -> list[tuple[np.dtype, tuple[int, ...], bytes]]:
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def pack_task(task: Task) -> RecordDict:
    return pack_tasks({"a": task})["a"]


def training_task(arrays: list[np.ndarray], schema: Schema = WINE, evaluate: bool = True) -> Task:
    return Task(TRAIN, "a run", 7, 2, TrainingRequest(schema, evaluate, 5).to_body(), arrays)


def over_the_wire(content: RecordDict) -> RecordDict:
    """As it arrives from Flower: to bytes and back."""
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


# --- what is packed comes back


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_come_back_bit_by_bit(case: str):
    header, arrays = unpack(pack({"number": 1.5}, ARRAYS[case]))
    assert bits(arrays) == bits(ARRAYS[case])
    assert header == {"number": 1.5}


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", ">i8", ">u2"])
def test_arrays_of_the_other_byte_order_come_back_with_the_same_entries(dtype: str):
    array = np.array([[0, 1, 258], [3, 4, 5]], dtype)
    _, (unpacked,) = unpack(pack({}, [array]))
    np.testing.assert_array_equal(unpacked, array)
    assert unpacked.dtype == np.dtype(dtype).newbyteorder("<")


@pytest.mark.parametrize("length", range(0, 130, 13))
def test_arrays_come_back_whatever_the_length_of_the_header(length: int):
    header, arrays = unpack(pack({"text": "ä" * length}, ARRAYS["many dtypes"]))
    assert (header, bits(arrays)) == ({"text": "ä" * length}, bits(ARRAYS["many dtypes"]))


def test_arrays_lie_in_the_message_so_that_they_can_be_used_where_they_are():
    """Nothing is copied: a message may be as large as the memory that is left."""
    for length in range(8):
        data = pack({"text": "x" * length}, ARRAYS["many"])
        whole = np.frombuffer(data, np.uint8)
        for array in filter(np.size, unpack(data)[1]):
            assert array.flags.aligned
            assert np.shares_memory(array, whole)


@pytest.mark.parametrize("schema", [Schema((8, 8, 1), 10), Schema((13,), 0)])
@pytest.mark.parametrize("evaluate", [True, False])
@pytest.mark.parametrize("case", ARRAYS)
def test_a_task_comes_back(case: str, schema: Schema, evaluate: bool):
    sent = training_task(ARRAYS[case], schema, evaluate)
    task = unpack_task(over_the_wire(pack_task(sent)))
    assert (task.kind, task.run, task.round, task.attempt) == (TRAIN, "a run", 7, 2)
    assert bits(list(task.arrays)) == bits(ARRAYS[case])
    assert TrainingRequest.from_task(task) == TrainingRequest(schema, evaluate, 5)


def test_tasks_that_differ_in_their_bodies_share_one_record_of_the_weights():
    """So the weights are packed once and cross Flower's stores as one object, for all silos."""
    task = training_task(ARRAYS["many"])
    tasks = {
        silo: replace(task, body={**task.body, "acknowledged_round": i, "own": {silo: i}})
        for i, silo in enumerate("abc")
    }
    messages = pack_tasks(tasks)
    records = [content.array_records[RECORD] for content in messages.values()]
    assert all(record is records[0] for record in records)
    assert [len(content[OWN][OWN]) < 100 for content in messages.values()] == [True] * 3
    for silo, sent in tasks.items():
        arrived = unpack_task(over_the_wire(pack_tasks(tasks)[silo]))
        assert arrived.body == sent.body
        assert bits(list(arrived.arrays)) == bits(list(sent.arrays))


@pytest.mark.parametrize("num_classes", [3, 0])
def test_a_silos_answer_to_the_roll_call_comes_back(
    make_data: Callable[..., Dataset], num_classes: int
):
    train = make_data(12, num_classes=num_classes)
    validation = make_data(5, num_classes=num_classes)
    entry = Silo("hospital-ä", train, validation, train.schema).entry()
    answer = unpack_reply(over_the_wire(pack_answer(entry.to_answer())))
    assert isinstance(answer, Answer)
    arrived = SiloEntry.from_answer(answer)
    assert arrived == entry == SiloEntry("hospital-ä", Schema((4,), num_classes), 12, 5)


def result_over_the_wire(result: LocalResult) -> LocalResult:
    answer = unpack_reply(over_the_wire(pack_answer(result.to_answer())))
    assert isinstance(answer, Answer)
    return LocalResult.from_answer(answer)


@pytest.mark.parametrize(
    ("train", "validation"),
    [({"loss": 0.1, "accuracy": 1.0}, {"loss": 7.5}), ({}, {})],
    ids=["both", "none"],
)
def test_a_result_comes_back(train: dict[str, float], validation: dict[str, float]):
    result = LocalResult(12, 0, train, validation, ARRAYS["many dtypes"], seconds=0.125)
    arrived = result_over_the_wire(result)
    assert bits(arrived.update) == bits(result.update)
    assert (arrived.num_examples, arrived.num_validation, arrived.seconds) == (12, 0, 0.125)
    assert (arrived.train, arrived.validation) == (train, validation)


def test_a_message_is_few_objects_however_many_arrays_the_model_has():
    """Flower stores, announces and asks for every object by itself."""
    for case in ("a number", "many"):
        content = pack_task(training_task(ARRAYS[case]))
        # The records, the record, its array, the array's one chunk.
        assert len(get_all_nested_objects(content)) == 4


def test_packing_leaves_the_arrays_as_they_are():
    before = bits(ARRAYS["not contiguous"])
    pack({}, ARRAYS["not contiguous"])
    assert bits(ARRAYS["not contiguous"]) == before


def test_a_refusal_names_silo_and_reason_and_nothing_else_is_one():
    refusal = unpack_reply(over_the_wire(pack_refusal("hospital-a", "no data.")))
    assert refusal == Failure("silo 'hospital-a' refuses: no data.")
    answer = LocalResult(1, 0, {}, {}, []).to_answer()
    assert isinstance(unpack_reply(over_the_wire(pack_answer(answer))), Answer)


def test_a_refusal_is_one_printable_line_of_bounded_length():
    """It is printed at the server: a silo must not be able to forge lines or flood the log."""
    refusal = unpack_reply(pack_refusal("a\nerror: b", "\x1b[2Jround 9/9\r" * 10**5))
    assert isinstance(refusal, Failure)
    assert refusal.reason.isprintable()
    assert len(refusal.reason) < MAX_REASON_LENGTH + 100


# --- what is not ours is refused


def record_of(data: bytes, record: str = RECORD, array: str = RECORD) -> RecordDict:
    return RecordDict({record: ArrayRecord({array: Array("uint8", (len(data),), FORMAT, data)})})


def with_text(text: object, data: bytes = bytes(64)) -> RecordDict:
    """A message with this in place of its JSON text."""
    encoded = text if isinstance(text, bytes) else json.dumps(text).encode()
    return record_of(len(encoded).to_bytes(64, "little") + encoded + data)


def with_arrays(*forms: object) -> RecordDict:
    return with_text({"header": {}, "arrays": forms})


GARBAGE = {
    "nothing": RecordDict(),
    "another record": record_of(bytes(128), record="weights"),
    "another array": record_of(bytes(128), array="weights"),
    "settings": RecordDict({RECORD: ConfigRecord({RECORD: "text"})}),
    "no bytes": record_of(b""),
    "zeros": record_of(bytes(1000)),
    "noise": record_of(np.random.default_rng(0).bytes(1000)),
    "a header that never ends": record_of(b"\xff" * 64 + b"{}"),
    "no JSON": with_text(b"{"),
    "no text": with_text(b"\xff\xfe"),
    "a list": with_text([]),
    "a number": with_text(3),
    "no header": with_text({"arrays": []}),
    "no arrays": with_text({"header": {}}),
    "objects": with_arrays(["|O", [1]]),
    "records": with_arrays(["f4,f4", [1]]),
    "times": with_arrays(["<M8[s]", [1]]),
    "text": with_arrays(["<U4", [1]]),
    "complex numbers": with_arrays(["<c8", [1]]),
    "an unknown dtype": with_arrays(["<f3", [1]]),
    "half a dtype": with_arrays(["f4, (2,", [1]]),
    "more than there is": with_arrays(["<f4", [17]]),
    "far more than there is": with_arrays(["<f4", [10**30]]),
    "less than nothing": with_arrays(["<f4", [-2, -2]]),
    "a shape of text": with_arrays(["<f4", ["4"]]),
    "a shape of fractions": with_arrays(["<f4", [1.5]]),
    "no shape": with_arrays(["<f4", None]),
    "no form": with_arrays(None),
    "another form": with_arrays(["<f4", [1], [2]]),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_what_was_not_packed_here_is_refused(case: str):
    with pytest.raises(ValueError, match="does not understand"):
        unpack_task(copy_of(GARBAGE[case]))
    reply = unpack_reply(copy_of(GARBAGE[case]))
    assert isinstance(reply, Failure)
    assert "does not understand" in reply.reason


def copy_of(content: RecordDict) -> RecordDict:
    """Another message with these bytes, which are taken out of a message that is read."""
    return over_the_wire(content)


def test_a_message_that_was_cut_is_refused_wherever_it_was_cut():
    whole = pack(training_task(ARRAYS["many dtypes"]).header(), ARRAYS["many dtypes"])
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="does not understand"):
            unpack(whole[:length])


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], dict[str, Any]]] = {
    "task": (
        lambda header: Task.from_header(header, []),
        {"kind": "train", "run": "a", "round": 7, "attempt": 0, "body": {}},
    ),
    "request": (
        lambda body: TrainingRequest.from_task(Task(TRAIN, body=body)),
        TrainingRequest(WINE, True, 5).to_body(),
    ),
    "silo": (
        lambda body: SiloEntry.from_answer(Answer(body)),
        {"silo": "a", "num_examples": 12, "num_validation": 3, "schema": WINE.to_json()},
    ),
    "result": (
        lambda body: LocalResult.from_answer(Answer(body)),
        {
            "num_examples": 12,
            "num_validation": 3,
            "train": {"loss": 0.5},
            "validation": {},
            "seconds": 0.5,
        },
    ),
}
KEYS = [(kind, key) for kind, (_, header) in HEADERS.items() for key in header]


@pytest.mark.parametrize(("kind", "key"), KEYS)
def test_a_header_that_lacks_a_key_is_refused(kind: str, key: str):
    read, header = HEADERS[kind]
    read(header)
    with pytest.raises(ValueError, match=key):
        read({name: value for name, value in header.items() if name != key})


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(("kind", "key"), KEYS)
@pytest.mark.parametrize(
    "value",
    [
        None,
        "x",
        [],
        {},
        [None],
        {"loss": "x"},
        {"loss": None},
        np.nan,
        np.inf,
        10**400,
        nested(500),
    ],
    ids=lambda v: str(v)[:9],
)
def test_a_header_with_a_garbled_value_is_refused_or_read_but_never_the_end_of_the_run(
    kind: str, key: str, value: object
):
    read, header = HEADERS[kind]
    with contextlib.suppress(ValueError):
        read(header | {key: value})


def test_a_header_that_is_nested_without_end_is_refused():
    text = b'{"header": ' + b"[" * 10**6 + b"]" * 10**6 + b', "arrays": []}'
    with pytest.raises(ValueError, match="does not understand"):
        unpack(len(text).to_bytes(64, "little") + text)


@pytest.mark.parametrize(
    "key", ["num_examples", "num_validation", "seconds", "train", "validation"]
)
@pytest.mark.parametrize("value", [None, "x", [], [None]])
def test_a_result_with_a_garbled_value_is_refused(key: str, value: object):
    read, header = HEADERS["result"]
    with pytest.raises(ValueError, match=r"lacks or garbles|invalid literal|could not convert"):
        read(header | {key: value})


@pytest.mark.parametrize("value", [-1, 10**400])
@pytest.mark.parametrize("key", ["num_examples", "num_validation"])
def test_a_result_with_a_count_that_is_none_is_refused(key: str, value: int):
    """It would skew the means, or end the run in an overflow."""
    read, header = HEADERS["result"]
    with pytest.raises(ValueError, match="garbles a count"):
        read(header | {key: value})


@pytest.mark.parametrize("name", ["", "a" * 101, "a\nerror: b", "\x1b[2J"])
def test_a_name_that_cannot_be_printed_on_a_line_is_refused(name: str):
    for kind, key, value in (("silo", "silo", name), ("result", "train", {name: 1.0})):
        read, header = HEADERS[kind]
        with pytest.raises(ValueError, match="a name of 1 to 100 printable characters"):
            read(header | {key: value})


# --- the messages of Flower's own strategies


def strategy_task(weights: list[np.ndarray], **settings: object) -> RecordDict:
    config = ConfigRecord({**strategy_config(Schema((8, 8, 1), 10)), "server-round": 7, **settings})
    return RecordDict({"arrays": strategy_arrays(weights), "config": config})


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_a_strategys_task_comes_back(kind: str):
    weights = [np.float32([[0.1, 0.2]]), np.float32(3.0)]
    task = unpack_strategy_task(over_the_wire(strategy_task(weights)), kind)
    assert (task.kind, task.round) == (kind, 7)
    assert bits(list(task.arrays)) == bits(list(map(np.asarray, weights)))
    request = TrainingRequest.from_task(task)
    assert request == TrainingRequest(Schema((8, 8, 1), 10), evaluate=kind == EVALUATE)
    assert is_of_strategy(strategy_task(weights))
    assert not is_of_strategy(pack_task(training_task(weights)))


def test_a_strategy_that_asks_for_what_silos_do_not_do_is_refused():
    with pytest.raises(ValueError, match="asks for proximal-mu, which silos do not know"):
        unpack_strategy_task(strategy_task([], **{"proximal-mu": 0.1}), TRAIN)


def test_a_strategy_receives_the_local_weights_with_the_metrics_of_training():
    task = training_task([np.float32([1.0, 2.0])])
    result = LocalResult(12, 3, {"loss": 0.5}, {"loss": 0.25}, [np.float32([0.5, -0.25])])
    packed = over_the_wire(pack_strategy_result(task, result))
    local_weights = packed.array_records["arrays"].to_numpy_ndarrays()
    assert bits(local_weights) == bits([np.float32([1.5, 1.75])])
    assert packed.metric_records["metrics"] == MetricRecord({"loss": 0.5, "num-examples": 12})


def test_a_strategy_receives_the_metrics_of_weights_that_were_only_evaluated():
    task = replace(training_task([np.float32([1.0])]), kind=EVALUATE)
    packed = over_the_wire(pack_strategy_result(task, LocalResult(12, 3, {}, {"loss": 0.25}, [])))
    assert packed.array_records == {}
    assert packed.metric_records["metrics"] == MetricRecord({"loss": 0.25, "num-examples": 3})
