"""The wire: what is packed comes out again, bit by bit, also after Flower's own serialisation."""

import contextlib
import json
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fl_app.local_training import LocalResult, Silo, SiloEntry
from fl_app.messages import (
    FORMAT,
    RECORD,
    is_of_strategy,
    pack,
    pack_refusal,
    pack_result,
    pack_silo,
    pack_strategy_result,
    pack_task,
    strategy_arrays,
    strategy_config,
    unpack,
    unpack_refusal,
    unpack_result,
    unpack_silo,
    unpack_strategy_task,
    unpack_task,
)
from shared.data import Dataset, Schema

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
    "not contiguous": [np.arange(12.0, dtype=np.float32).reshape(3, 4).T, np.arange(10)[::3], np.arange(6.0)[::-1]],
    "in Fortran's order": [np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))],
    "of odd sizes": [np.array([True]), np.float64([0.1]), np.int8([1, 2, 3]), np.float32([[0.1], [0.2]])],
    "many": [np.full((i % 3, 2), i, np.float32) for i in range(200)],
}


def bits(arrays: list[np.ndarray]) -> list[tuple[np.dtype, tuple[int, ...], bytes]]:
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def over_the_wire(content: RecordDict) -> RecordDict:
    """As it arrives from Flower: to bytes and back."""
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


# --- what is packed comes back


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_come_back_bit_by_bit(case: str):
    header, arrays = unpack(over_the_wire(pack({"number": 1.5}, ARRAYS[case])))
    assert bits(arrays) == bits(ARRAYS[case])
    assert header == {"number": 1.5}


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", ">i8", ">u2"])
def test_arrays_of_the_other_byte_order_come_back_with_the_same_entries(dtype: str):
    array = np.array([[0, 1, 258], [3, 4, 5]], dtype)
    _, (unpacked,) = unpack(over_the_wire(pack({}, [array])))
    np.testing.assert_array_equal(unpacked, array)
    assert unpacked.dtype == np.dtype(dtype).newbyteorder("<")


@pytest.mark.parametrize("length", range(0, 130, 13))
def test_arrays_come_back_whatever_the_length_of_the_header(length: int):
    header, arrays = unpack(over_the_wire(pack({"text": "ä" * length}, ARRAYS["many dtypes"])))
    assert (header, bits(arrays)) == ({"text": "ä" * length}, bits(ARRAYS["many dtypes"]))


def test_arrays_lie_in_the_message_so_that_they_can_be_used_where_they_are():
    """Nothing is copied: a message may be as large as the memory that is left."""
    for length in range(8):
        content = pack({"text": "x" * length}, ARRAYS["many"])
        whole = np.frombuffer(content.array_records[RECORD][RECORD].data, np.uint8)
        for array in filter(np.size, unpack(content)[1]):
            assert array.flags.aligned
            assert np.shares_memory(array, whole)


@pytest.mark.parametrize("schema", [Schema((8, 8, 1), 10), Schema((13,), 0)])
@pytest.mark.parametrize("evaluate", [True, False])
@pytest.mark.parametrize("case", ARRAYS)
def test_a_task_comes_back(case: str, schema: Schema, evaluate: bool):
    unpacked, weights, *rest = unpack_task(over_the_wire(pack_task(schema, ARRAYS[case], 7, evaluate)))
    assert (unpacked, bits(weights), rest) == (schema, bits(ARRAYS[case]), [7, evaluate])


@pytest.mark.parametrize("num_classes", [3, 0])
def test_a_silos_answer_to_the_roll_call_comes_back(make_data: Callable[..., Dataset], num_classes: int):
    train, validation = make_data(12, num_classes=num_classes), make_data(5, num_classes=num_classes)
    entry = unpack_silo(over_the_wire(pack_silo(Silo("hospital-ä", train, validation, train.schema))))
    assert entry == SiloEntry("hospital-ä", Schema((4,), num_classes), 12)


@pytest.mark.parametrize(
    ("train", "validation"), [({"loss": 0.1, "accuracy": 1.0}, {"loss": float("inf")}), ({}, {})], ids=["both", "none"]
)
def test_a_result_comes_back(train: dict[str, float], validation: dict[str, float]):
    result = LocalResult(12, 0, train, validation, ARRAYS["many dtypes"], seconds=0.125)
    unpacked = unpack_result(over_the_wire(pack_result(result)))
    assert bits(unpacked.update) == bits(result.update)
    assert (unpacked.num_examples, unpacked.num_validation, unpacked.seconds) == (12, 0, 0.125)
    assert (unpacked.train, unpacked.validation) == (train, validation)


def test_a_metric_that_is_not_a_number_comes_back():
    """A silo whose loss is lost says so: what to do about it is the server's affair."""
    result = LocalResult(12, 3, {"loss": np.nan}, {"loss": -np.inf, "accuracy": np.nan}, [])
    unpacked = unpack_result(over_the_wire(pack_result(result)))
    np.testing.assert_equal((unpacked.train, unpacked.validation), (result.train, result.validation))


def test_a_message_is_few_objects_however_many_arrays_the_model_has():
    """Flower stores, announces and asks for every object by itself."""
    for case in ("a number", "many"):
        content = pack_task(Schema((13,), 3), ARRAYS[case], 7, True)
        assert len(get_all_nested_objects(content)) == 4  # the records, the record, its array, the array's one chunk


def test_packing_leaves_the_arrays_as_they_are():
    before = bits(ARRAYS["not contiguous"])
    pack({}, ARRAYS["not contiguous"])
    assert bits(ARRAYS["not contiguous"]) == before


def test_a_refusal_names_silo_and_reason_and_nothing_else_is_one():
    refusal = unpack_refusal(over_the_wire(pack_refusal("hospital-a", "no data.")))
    assert refusal == "silo 'hospital-a' refuses: no data."
    assert unpack_refusal(over_the_wire(pack_result(LocalResult(1, 0, {}, {}, [])))) is None


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
    for read in (unpack, unpack_task, unpack_silo, unpack_result):
        with pytest.raises(ValueError, match="does not understand"):
            read(GARBAGE[case])


def test_a_message_that_was_cut_is_refused_wherever_it_was_cut():
    content = pack_task(Schema((13,), 3), ARRAYS["many dtypes"], 7, True)
    whole = content.array_records[RECORD][RECORD].data
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="does not understand"):
            unpack(record_of(whole[:length]))


HEADERS = {
    "task": (unpack_task, {"schema": Schema((13,), 3).to_json(), "round": 7, "evaluate": True}),
    "silo": (unpack_silo, {"silo": "a", "num_examples": 12, "schema": Schema((13,), 3).to_json()}),
    "result": (
        unpack_result,
        {"num_examples": 12, "num_validation": 3, "train": {"loss": 0.5}, "validation": {}, "seconds": 0.5},
    ),
}
KEYS = [(kind, key) for kind, (_, header) in HEADERS.items() for key in header]


@pytest.mark.parametrize(("kind", "key"), KEYS)
def test_a_header_that_lacks_a_key_is_refused(kind: str, key: str):
    read, header = HEADERS[kind]
    read(pack(header))
    with pytest.raises(ValueError, match=key):
        read(pack({name: value for name, value in header.items() if name != key}))


@pytest.mark.parametrize(("kind", "key"), KEYS)
@pytest.mark.parametrize(
    "value",
    [None, "x", [], {}, [None], {"loss": "x"}, {"loss": None}, np.nan, np.inf, 10**400],
    ids=lambda v: str(v)[:9],
)
def test_a_header_with_a_garbled_value_is_refused_or_read_but_never_the_end_of_the_run(
    kind: str, key: str, value: object
):
    read, header = HEADERS[kind]
    with contextlib.suppress(ValueError):
        read(pack(header | {key: value}))


@pytest.mark.parametrize("key", ["num_examples", "num_validation", "seconds", "train", "validation"])
@pytest.mark.parametrize("value", [None, "x", [], [None]])
def test_a_result_with_a_garbled_value_is_refused(key: str, value: object):
    read, header = HEADERS["result"]
    with pytest.raises(ValueError, match=r"lacks or garbles|invalid literal|could not convert"):
        read(pack(header | {key: value}))


@pytest.mark.parametrize("value", [-1, 10**400])
@pytest.mark.parametrize("key", ["num_examples", "num_validation"])
def test_a_result_with_a_count_that_is_none_is_refused(key: str, value: int):
    """It would skew the means, or end the run in an overflow."""
    read, header = HEADERS["result"]
    with pytest.raises(ValueError, match="garbles a count"):
        read(pack(header | {key: value}))


# --- the messages of Flower's own strategies


def strategy_task(weights: list[np.ndarray], **settings: object) -> RecordDict:
    config = ConfigRecord({**strategy_config(Schema((8, 8, 1), 10)), "server-round": 7, **settings})
    return RecordDict({"arrays": strategy_arrays(weights), "config": config})


def test_a_strategys_task_comes_back_and_is_known_as_such():
    weights = [np.float32([[0.1, 0.2]]), np.float32(3.0)]
    task = over_the_wire(strategy_task(weights))
    schema, unpacked, round_number = unpack_strategy_task(task)
    assert (schema, bits(unpacked), round_number) == (Schema((8, 8, 1), 10), bits(list(map(np.asarray, weights))), 7)
    assert is_of_strategy(task)
    assert not is_of_strategy(over_the_wire(pack_task(schema, weights, 7, True)))


def test_a_strategy_that_asks_for_what_silos_do_not_do_is_refused():
    with pytest.raises(ValueError, match="asks for proximal-mu, which silos do not know"):
        unpack_strategy_task(strategy_task([], **{"proximal-mu": 0.1}))


def test_a_strategy_receives_the_local_weights_with_the_metrics_of_training():
    weights, update = [np.float32([1.0, 2.0])], [np.float32([0.5, -0.25])]
    result = LocalResult(12, 3, {"loss": 0.5}, {"loss": 0.25}, update)
    packed = over_the_wire(pack_strategy_result(weights, result))
    assert bits(packed.array_records["arrays"].to_numpy_ndarrays()) == bits([np.float32([1.5, 1.75])])
    assert packed.metric_records["metrics"] == MetricRecord({"loss": 0.5, "num-examples": 12})


def test_a_strategy_receives_the_metrics_of_weights_that_were_only_judged():
    packed = over_the_wire(pack_strategy_result([np.float32([1.0])], LocalResult(12, 3, {}, {"loss": 0.25}, [])))
    assert not is_of_strategy(packed)
    assert packed.metric_records["metrics"] == MetricRecord({"loss": 0.25, "num-examples": 3})
