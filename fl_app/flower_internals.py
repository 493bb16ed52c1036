"""What we use of Flower beyond its public interface, all in this file, and checked before it is used.

Flower 1.41 waits by fixed sleeps: a SuperNode looks for messages every 3 s and for its app's reply every 0.5 s, and
whoever asks for an object a moment before it is stored waits for 1 s. Its executor starts a process for each message.
Where the names below are no longer what they were, `missing_internals` says so, and the callers fall back on Flower as
it is.
"""

import ctypes
import importlib
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
from flwr.app import Array, Context, Error, Message, RecordDict

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.02, 1.0  # between attempts to get an object that is announced but not stored
HEARTBEAT_S = 10  # the shortest that a SuperLink accepts: a node that is silent for twice as long is gone

M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20  # malloc.h; bytes from which on blocks are mapped on their own

NODE_LOOP = "flwr.supernode.start_client_internal"
CLIENT_RUN = "flwr.supernode.runtime.run_clientapp"
GRID = "flwr.superlink.grid.http_grid"
CONNECTION = "flwr.supernode.fleet_http_connection"
HEARTBEAT = "flwr.supercore.heartbeat"

# Module and name, and the parameters by which it is called here.
WAITS: dict[tuple[str, str], tuple[str, ...]] = {
    (NODE_LOOP, "time"): (),
    (NODE_LOOP, "pull_objects"): ("initial_backoff", "backoff_cap"),
    (NODE_LOOP, "_pull_and_store_message"): ("pull_object", "confirm_message_received"),
    (CONNECTION, "HEARTBEAT_DEFAULT_INTERVAL"): (),
    (HEARTBEAT, "HEARTBEAT_DEFAULT_INTERVAL"): (),
    ("flwr.supernode.cli.flower_supernode", "flower_supernode"): (),
}
EXECUTOR: dict[tuple[str, str], tuple[str, ...]] = {
    (CLIENT_RUN, "pull_task_input"): ("client",),
    (CLIENT_RUN, "push_message"): ("client", "message", "context"),
    (CLIENT_RUN, "push_task_output"): ("client", "context", "sub_status", "details"),
    (CLIENT_RUN, "pull_and_inflate_object_from_tree"): ("initial_backoff", "backoff_cap"),
    ("flwr.supercore.runtime", "RuntimeHttpClient"): (),
    ("flwr.supercore.interceptors", "RuntimeVersionHttpInterceptor"): ("component_name",),
    ("flwr.supercore.interceptors", "RuntimeTokenHttpInterceptor"): ("token",),
    ("flwr.proto.runtime_pb2", "AcquireTaskRequest"): (),
    ("flwr.proto.runtime_pb2", "SendTaskHeartbeatRequest"): (),
    ("flwr.supercore.constant", "TaskType"): (),
    ("flwr.common.constant", "SubStatus"): (),
    ("flwr.common.constant", "ErrorCode"): (),
    ("flwr.common.serde", "message_to_proto"): (),
    ("flwr.common.serde", "message_from_proto"): (),
    ("flwr.app.message", "remove_content_from_message"): (),
    ("flwr.supercore.inflatable.inflatable_utils", "ObjectPullError"): (),
    ("flwr.supercore.inflatable.inflatable_utils", "ObjectPushError"): (),
}
JOINING: dict[tuple[str, str], tuple[str, ...]] = {
    ("flwr.app", "Array"): (),
    ("flwr.app.message.array", "ArrayChunk"): ("data",),
    ("flwr.supercore.inflatable.inflatable_object", "get_object_children_ids_from_object_content"): ("object_content",),
    ("flwr.supercore.inflatable.inflatable_object", "get_object_body"): ("object_content", "cls"),
}
SERVER_WAITS: dict[tuple[str, str], tuple[str, ...]] = {(GRID, "pull_objects"): ("initial_backoff", "backoff_cap")}


def missing_internals(needed: dict[tuple[str, str], tuple[str, ...]]) -> list[str]:
    """The names that this Flower lacks, or that take other parameters: one phrase for each."""
    missing = []
    for (module_name, name), parameters in needed.items():
        try:
            found = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError):
            missing.append(f"{module_name}.{name}")
            continue
        if parameters and not set(parameters) <= set(inspect.signature(found).parameters):
            missing.append(f"{module_name}.{name}({', '.join(parameters)})")
    return missing


class AdaptiveWait:
    """Waits that grow with the time since something last happened: a share of it, within bounds.

    So what was long in coming is noticed at most `share` later than it came, and who idles looks rarely.
    """

    def __init__(self, shortest_s: float = 0.02, longest_s: float = 2.0, share: float = 0.05) -> None:
        self.shortest_s, self.longest_s, self.share = shortest_s, longest_s, share
        self.happened()

    def happened(self) -> None:
        """Something did: the next waits are short."""
        self.since = time.monotonic()

    @property
    def seconds(self) -> float:
        return min(max(self.share * (time.monotonic() - self.since), self.shortest_s), self.longest_s)

    def wait(self) -> None:
        time.sleep(self.seconds)


class QuickTime:
    """Stands for the module `time` in the SuperNode's loop, whose sleeps it shortens."""

    def __init__(self) -> None:
        self.idle = AdaptiveWait()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        if seconds > 1:  # no message has come
            self.idle.wait()
        else:  # a message is being worked on: this looks into the SuperNode's own memory, which costs little
            self.idle.happened()
            time.sleep(min(seconds, self.idle.shortest_s))


def run_quick_supernode() -> None:
    """Runs `flower-supernode` on sys.argv in this process, with its waits shortened."""
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection, start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    vars(start_client_internal)["time"] = QuickTime()
    _forget_messages_of_ended_runs(start_client_internal)
    _shorten_backoff(start_client_internal, "pull_objects")
    for module in (fleet_http_connection, heartbeat):
        vars(module)["HEARTBEAT_DEFAULT_INTERVAL"] = HEARTBEAT_S
    flower_supernode()


def _forget_messages_of_ended_runs(loop: ModuleType) -> None:
    """Makes a SuperNode drop a message whose run ends while it comes in.

    Flower 1.41 keeps it: its task waits for content that never comes, and its late answer takes the place of the next
    one, so that from then on each answer is sent when the next message comes.
    """
    from flwr.supercore.run import RunNotRunningException

    plain = loop._pull_and_store_message

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            try:
                return call(*arguments)
            except RunNotRunningException:  # a BaseException: Flower's own handler of exceptions clears away
                raise RuntimeError("the run has ended") from None

        return wrapper

    def pull_and_store_message(**calls: Any) -> int | None:
        for name in ("pull_object", "confirm_message_received"):
            calls[name] = failing(calls[name])
        return plain(**calls)

    vars(loop)["_pull_and_store_message"] = pull_and_store_message


def shorten_server_waits() -> list[str]:
    """Makes this process's Flower grid look again sooner for replies that are announced. Returns what is missing."""
    missing = missing_internals(SERVER_WAITS)
    if not missing:
        from flwr.superlink.grid import http_grid

        _shorten_backoff(http_grid, "pull_objects")
    return missing


def join_arrays_at_once(stype: str) -> list[str]:
    """Joins the pieces of received arrays of this serialisation type in one go. Returns what is missing.

    So two copies are in memory meanwhile, the pieces and the array; Flower's growing sum and its copy make it three and
    more. A message may hold one such array only. Large freed blocks go back to the system, where C's allocator would
    keep them.
    """
    missing = missing_internals(JOINING)
    if not missing and not isinstance(vars(Array)["inflate"], _InflateAtOnce):
        setattr(Array, "inflate", _InflateAtOnce(vars(Array)["inflate"].__func__, stype))  # noqa: B010 (for mypy)
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    return missing


class _InflateAtOnce(classmethod):
    """Array.inflate, which leaves all but the joining to Flower's own: that gets the pieces without their data."""

    def __init__(self, flowers_own: Callable[..., Array], stype: str) -> None:
        def inflate(cls: type[Array], object_content: bytes, children: Mapping[str, Any] | None = None) -> Array:
            from flwr.supercore.inflatable import inflatable_object as objects

            body = json.loads(objects.get_object_body(object_content, cls))
            if body["stype"] != stype or children is None:
                return flowers_own(cls, object_content, children)
            pieces = {object_id: piece.data for object_id, piece in children.items()}
            for piece in children.values():
                piece.data = memoryview(b"")
            array = flowers_own(cls, object_content, children)
            ids = objects.get_object_children_ids_from_object_content(object_content)
            array.data = b"".join(pieces[ids[index]] for index in body["arraychunk_ids"])
            return array

        super().__init__(inflate)


def _shorten_backoff(module: ModuleType, name: str) -> None:
    plain = getattr(getattr(module, name), "func", getattr(module, name))
    vars(module)[name] = partial(plain, initial_backoff=FIRST_BACKOFF_S, backoff_cap=LONGEST_BACKOFF_S)


class TaskWithdrawn(Exception):
    """The SuperNode does not want the answer any more: the task's time is over, or it has been answered."""


class Task:
    """A ClientApp task of a SuperNode: its message, and where the answer goes. Who holds the token may answer."""

    def __init__(self, runtime_api: str, token: str) -> None:
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

        self.token = token
        self._client = _runtime_client(runtime_api, "flwr-clientapp", RuntimeTokenHttpInterceptor(token))

    def pull(self) -> tuple[Message, Context, bytes]:
        """The message, its context, and the bundle of the app that the run's owner sent."""
        from flwr.supernode.runtime.run_clientapp import pull_task_input

        with _withdrawn():
            message, context, _, fab = pull_task_input(self._client)
        return message, context, fab.content

    def answer(self, reply: Message, context: Context) -> None:
        from flwr.common.constant import SubStatus
        from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

        with _withdrawn():
            push_message(self._client, reply, context)
            push_task_output(self._client, context, SubStatus.COMPLETED, "")

    def fail(self, message: Message, reason: str) -> None:
        """Answers with an error instead of a result, in the name of a worker that cannot."""
        from flwr.common.constant import ErrorCode, SubStatus
        from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

        reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, reason), reply_to=message)
        context = Context(message.metadata.run_id, message.metadata.dst_node_id, {}, RecordDict(), {})
        with _withdrawn():
            push_message(self._client, reply, context)
            push_task_output(self._client, None, SubStatus.FAILED, reason)

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Tells the SuperNode that the task is being worked on; else it gives the task up after half a minute.

        Flower's own sender interrupts the process when a task is withdrawn; ours would lose what is warm.
        """
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT_S):
                with suppress(httpx.HTTPError):
                    self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def close(self) -> None:
        self._client.close()


@contextmanager
def _withdrawn() -> Iterator[None]:
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

    try:
        yield
    except (httpx.HTTPError, ObjectPullError, ObjectPushError) as error:
        raise TaskWithdrawn(str(error)) from None


class TaskSource:
    """Where a SuperNode's tasks come from, one by one."""

    def __init__(self, runtime_api: str) -> None:
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.constant import TaskType
        from flwr.supernode.runtime import run_clientapp

        self.runtime_api = runtime_api
        self._client = _runtime_client(runtime_api, "SuperExec")
        self._request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        _shorten_backoff(run_clientapp, "pull_and_inflate_object_from_tree")

    def next_task(self) -> Task | None:
        """The next task, if there is one now. It is ours alone from here on, and must be answered."""
        try:
            response = self._client.AcquireTask(self._request)
        except httpx.TransportError:  # the SuperNode is ending: whoever watches it ends us
            return None
        return Task(self.runtime_api, response.token) if response.token else None


def _runtime_client(runtime_api: str, component: str, *interceptors: Any) -> Any:
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    return RuntimeHttpClient.from_server_address(
        server_address=runtime_api,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *interceptors],
    )


def message_to_bytes(message: Message) -> bytes:
    """A message without its content: all that an answer to it needs."""
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto

    return bytes(message_to_proto(remove_content_from_message(message)).SerializeToString())


def message_from_bytes(data: bytes) -> Message:
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as MessageProto

    return message_from_proto(MessageProto.FromString(data))


def installed_bundle(project: Path, packages: Sequence[str]) -> bytes:
    """The bundle that `flwr run` makes of the project in this folder, whose code lies in `packages`."""
    from flwr.cli.build import build_fab_from_files

    files = [project / "pyproject.toml", *(file for package in packages for file in (project / package).rglob("*.py"))]
    bundle, _ = build_fab_from_files({file.relative_to(project).as_posix(): file for file in files})
    return bundle
