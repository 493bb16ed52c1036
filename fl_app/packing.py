"""A header of JSON values and arrays as one sequence of bytes: the form of every message.

64 bytes: length of the text, little-endian | text: JSON {header, arrays: [[dtype, shape]]},
padded with blanks | the arrays' bytes, little-endian, one after the other
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fl_app.border import understood
from shared.weights import Weights

ALIGNMENT = 64  # bytes; of the header, so that arrays of four-byte numbers lie well
MAX_HEADER_BYTES = 64 << 20  # of a schema with a million categories, and far more
MAX_VALUES = 4 << 20  # in a header: what each takes in memory is far more than its text
MAX_ARRAYS = 1 << 16


def pack(header: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> bytes:
    """The header and the arrays as bytes."""
    # The text says where each array lies.
    forms = [[_wire_dtype(array).str, list(array.shape)] for array in arrays]
    text = json.dumps({"header": dict(header), "arrays": forms}).encode()
    padding = b" " * (-len(text) % ALIGNMENT)
    length = len(text) + len(padding)

    parts: list[Any] = [length.to_bytes(ALIGNMENT, "little"), text, padding]
    for array in arrays:
        if array.size > 0:  # the bytes of an empty one cannot be cast
            plain = np.ascontiguousarray(array, _wire_dtype(array))
            parts.append(plain.data.cast("B"))
    return b"".join(parts)


def unpack(data: bytes) -> tuple[dict[str, Any], Weights]:
    """The header, and the arrays as views of the bytes.

    Raises MessageError for anything but what `pack` made.
    """
    with understood("a message"):
        start = ALIGNMENT + int.from_bytes(data[:ALIGNMENT], "little")
        if start > ALIGNMENT + MAX_HEADER_BYTES:
            raise ValueError(f"a header of {start} bytes; at most {MAX_HEADER_BYTES} are read")
        encoded = data[ALIGNMENT:start]
        num_values = sum(encoded.count(sign) for sign in (b",", b"[", b"{"))
        if num_values > MAX_VALUES:
            raise ValueError(f"a header of {num_values} values; at most {MAX_VALUES} are read")
        text = json.loads(encoded)
        header = text["header"]
        forms = text["arrays"]
        if not isinstance(header, dict):
            raise ValueError("the header")
        if len(forms) > MAX_ARRAYS:
            raise ValueError(f"{len(forms)} arrays; at most {MAX_ARRAYS} are read")

        arrays = []
        for name, shape in forms:
            dtype = _plain_dtype(name)
            if any(length < 0 for length in shape):
                raise ValueError(f"a shape without negative lengths: {shape}")
            count = math.prod(shape)
            array = np.frombuffer(data, dtype, count=count, offset=start).reshape(shape)
            arrays.append(array)
            start += array.nbytes
    return header, arrays


def _wire_dtype(array: np.ndarray) -> np.dtype:
    return array.dtype.newbyteorder("<")


def _plain_dtype(name: str) -> np.dtype:
    if not re.fullmatch("[<|][biuf][0-9]{1,2}", name):
        raise ValueError(f"arrays hold numbers; received {name!r}")
    return np.dtype(name)
