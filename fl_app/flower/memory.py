"""Less memory for received arrays: Flower's pieces of an array joined at once."""

import ctypes
import json
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Array

from fl_app.flower.internals import Internals, missing_internals

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK = 1 << 20  # bytes, from which on a block is mapped on its own

OBJECTS = "flwr.supercore.inflatable.inflatable_object"
INTERNALS: Internals = {
    ("flwr.app", "Array"): (),
    ("flwr.app.message.array", "ArrayChunk"): ("data",),
    (OBJECTS, "get_object_children_ids_from_object_content"): ("object_content",),
    (OBJECTS, "get_object_body"): ("object_content", "cls"),
}


def join_arrays_at_once(stype: str) -> list[str]:
    """Joins the pieces of received arrays of this serialisation type in one go, in this process.

    Two copies are in memory meanwhile, the pieces and the array; Flower's growing sum and its copy
    make it three and more. A message may hold one such array only. Large freed blocks go back to
    the system, where C's allocator would keep them. Returns the missing internals: if there are
    any, nothing is changed.
    """
    missing = missing_internals(INTERNALS)
    if missing:
        return missing

    flowers_own = vars(Array)["inflate"]
    if not isinstance(flowers_own, _InflateAtOnce):
        setattr(Array, "inflate", _InflateAtOnce(flowers_own.__func__, stype))  # noqa: B010 (for mypy)
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    return []


class _InflateAtOnce(classmethod):
    """Array.inflate, which leaves all but the joining to Flower's own.

    Flower's own gets the pieces without their data, so that it joins nothing.
    """

    def __init__(self, flowers_own: Callable[..., Array], stype: str) -> None:
        def inflate(
            cls: type[Array], object_content: bytes, children: Mapping[str, Any] | None = None
        ) -> Array:
            from flwr.supercore.inflatable import inflatable_object as objects

            body = json.loads(objects.get_object_body(object_content, cls))
            if body["stype"] != stype or children is None:
                return flowers_own(cls, object_content, children)

            # Take the data out of the pieces; all checks are then Flower's.
            pieces = {object_id: piece.data for object_id, piece in children.items()}
            for piece in children.values():
                piece.data = memoryview(b"")
            array = flowers_own(cls, object_content, children)

            # An array's body lists its pieces by their place among the object's children.
            ids = objects.get_object_children_ids_from_object_content(object_content)
            array.data = b"".join(pieces[ids[index]] for index in body["arraychunk_ids"])
            return array

        super().__init__(inflate)
