"""Random changes of real messages, as a hostile party would send them."""

import copy
import json
import math
import random
from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict

from fl_app.flower.wire import FORMAT, RECORD

SPITEFUL: list[Any] = [
    None,
    True,
    -1,
    0,
    2**45,
    2**63,
    10**400,
    1e308,
    math.nan,
    -math.inf,
    "",
    "x\nerror: y",
    "\x1b[2J",
    "é" * 3000,
    [],
    {},
    [[]] * 100,
    {"loss": math.nan},
    {"a" * 200: 1.0},
    ["|O", [1]],
]


def message(data: bytes) -> RecordDict:
    return RecordDict({RECORD: ArrayRecord({RECORD: Array("uint8", (len(data),), FORMAT, data)})})


def packed(content: RecordDict) -> bytes:
    return content.array_records[RECORD][RECORD].data


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    garbled = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        garbled[rng.randrange(len(garbled))] = rng.randrange(256)
    return bytes(garbled[: rng.randint(1, len(garbled))] if rng.random() < 0.2 else garbled)


def changed_values(data: bytes, rng: random.Random) -> bytes:
    """Some values of the header are replaced, taken out, or doubled in depth."""
    length = int.from_bytes(data[:64], "little")
    text = json.loads(data[64 : 64 + length])
    for _ in range(rng.randint(1, 3)):
        change_somewhere(text, rng)
    encoded = json.dumps(text).encode()
    encoded += b" " * (-len(encoded) % 64)
    return len(encoded).to_bytes(64, "little") + encoded + data[64 + length :]


def change_somewhere(value: Any, rng: random.Random) -> None:
    while isinstance(value, (dict, list)) and value:
        key = rng.choice([*value]) if isinstance(value, dict) else rng.randrange(len(value))
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        if isinstance(value, dict) and rng.random() < 0.2:
            del value[key]
        else:
            value[key] = copy.deepcopy(rng.choice(SPITEFUL))
        return
