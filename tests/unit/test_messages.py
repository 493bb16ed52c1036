"""The wire: what is packed comes out again, bit by bit, also after Flower's own serialisation."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fl_app.local_training import LocalResult, Silo, SiloEntry
from fl_app.messages import (
    pack_arrays,
    pack_refusal,
    pack_result,
    pack_silo,
    pack_task,
    unpack_arrays,
    unpack_refusal,
    unpack_result,
    unpack_silo,
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
    "not contiguous": [np.arange(12.0, dtype=np.float32).reshape(3, 4).T, np.arange(10)[::3]],
}


def bits(arrays: list[np.ndarray]) -> list[tuple[np.dtype, tuple[int, ...], bytes]]:
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def over_the_wire(content: RecordDict) -> RecordDict:
    """As it arrives from Flower: to bytes and back."""
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_come_back_bit_by_bit(case: str):
    packed = over_the_wire(RecordDict({"arrays": pack_arrays(ARRAYS[case])}))
    assert bits(unpack_arrays(packed.array_records["arrays"])) == bits(ARRAYS[case])


@pytest.mark.parametrize("schema", [Schema((8, 8, 1), 10), Schema((13,), 0)])
@pytest.mark.parametrize("case", ARRAYS)
def test_a_task_comes_back(case: str, schema: Schema):
    unpacked, weights, round_number = unpack_task(over_the_wire(pack_task(schema, ARRAYS[case], 7)))
    assert (unpacked, bits(weights), round_number) == (schema, bits(ARRAYS[case]), 7)


@pytest.mark.parametrize("num_classes", [3, 0])
def test_a_silos_answer_to_the_roll_call_comes_back(make_data: Callable[..., Dataset], num_classes: int):
    train, validation = make_data(12, num_classes=num_classes), make_data(5, num_classes=num_classes)
    entry = unpack_silo(over_the_wire(pack_silo(Silo("hospital-ä", train, validation))))
    assert entry == SiloEntry("hospital-ä", Schema((4,), num_classes), 12)


@pytest.mark.parametrize(
    ("train", "validation"), [({"loss": 0.1, "accuracy": 1.0}, {"loss": float("inf")}), ({}, {})], ids=["both", "none"]
)
def test_a_result_comes_back(train: dict[str, float], validation: dict[str, float]):
    result = LocalResult(12, 0, train, validation, ARRAYS["many dtypes"])
    unpacked = unpack_result(over_the_wire(pack_result(result)))
    assert bits(unpacked.update) == bits(result.update)
    assert (unpacked.num_examples, unpacked.num_validation) == (12, 0)
    assert (unpacked.train, unpacked.validation) == (train, validation)


def test_all_arrays_of_a_message_travel_as_one():
    """Flower asks for every array by itself; their number must not grow with the model's."""
    assert len(pack_arrays(ARRAYS["many dtypes"])) == len(pack_arrays(ARRAYS["a number"]))


def test_packing_leaves_the_arrays_as_they_are():
    before = bits(ARRAYS["not contiguous"])
    pack_arrays(ARRAYS["not contiguous"])
    assert bits(ARRAYS["not contiguous"]) == before


def test_a_refusal_names_silo_and_reason_and_nothing_else_is_one():
    refusal = unpack_refusal(over_the_wire(pack_refusal("hospital-a", "no data.")))
    assert refusal == "silo 'hospital-a' refuses: no data."
    assert unpack_refusal(over_the_wire(pack_result(LocalResult(1, 0, {}, {}, [])))) is None
