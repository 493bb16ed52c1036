"""The tasks of a SuperNode, for a worker that lives on: taken one by one, and answered.

Flower's executor starts a process for each task. Its runtime API, on a port of this machine, is
spoken here directly: whoever holds a task's token may answer it.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
from flwr.app import Context, Error, Message, RecordDict

from fl_app.flower.internals import Internals, shorten_backoff

HEARTBEAT_S = 10.0  # a SuperNode gives a task up after half a minute without one

CLIENT_RUN = "flwr.supernode.runtime.run_clientapp"
INFLATABLE = "flwr.supercore.inflatable.inflatable_utils"
INTERNALS: Internals = {
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
    (INFLATABLE, "ObjectPullError"): (),
    (INFLATABLE, "ObjectPushError"): (),
}


class TaskWithdrawn(Exception):
    """The SuperNode wants no answer any more: the task's time is over, or it has been answered."""


class NodeTask:
    """One task of a SuperNode: a message to a ClientApp, and the way back for the answer.

    Its methods raise TaskWithdrawn when no answer is wanted any more. `run_id` is Flower's number
    of the run that it belongs to; whoever only answers it needs none.
    """

    def __init__(self, runtime_api: str, token: str, run_id: int = 0) -> None:
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

        self.token = token
        self.run_id = run_id
        authorize = RuntimeTokenHttpInterceptor(token)
        self._client = _runtime_client(runtime_api, "flwr-clientapp", authorize)

    def pull(self) -> tuple[Message, Context, bytes]:
        """The message, its context, and the FAB that the run's owner sent."""
        from flwr.supernode.runtime.run_clientapp import pull_task_input

        with _withdrawn():
            message, context, _, fab = pull_task_input(self._client)
        return message, context, fab.content

    def answer(self, reply: Message, context: Context) -> None:
        """Sends the reply and ends the task."""
        from flwr.common.constant import SubStatus
        from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

        with _withdrawn():
            push_message(self._client, reply, context)
            push_task_output(self._client, context, SubStatus.COMPLETED, "")

    def fail(self, message: Message, reason: str) -> None:
        """Sends an error in place of a result, in the name of a worker that cannot."""
        from flwr.common.constant import ErrorCode, SubStatus
        from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

        reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, reason), reply_to=message)
        metadata = message.metadata
        context = Context(metadata.run_id, metadata.dst_node_id, {}, RecordDict(), {})
        with _withdrawn():
            push_message(self._client, reply, context)
            push_task_output(self._client, None, SubStatus.FAILED, reason)

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Signals, while its block runs, that the task is being worked on.

        Flower's own sender interrupts the process when a task is withdrawn; ours would lose the
        data and the compiled model that it keeps.
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


class TaskSource:
    """The tasks of the SuperNode whose runtime API is at this address, one by one."""

    def __init__(self, runtime_api: str) -> None:
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.constant import TaskType
        from flwr.supernode.runtime import run_clientapp

        self.runtime_api = runtime_api
        self._client = _runtime_client(runtime_api, "SuperExec")
        self._request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        shorten_backoff(run_clientapp, "pull_and_inflate_object_from_tree")

    def next_task(self) -> NodeTask | None:
        """The next task, if there is one now; it is the caller's alone, who must answer it."""
        try:
            response = self._client.AcquireTask(self._request)
        except httpx.TransportError:  # the SuperNode is ending; its supervisor will end us
            return None
        if not response.token:
            return None
        return NodeTask(self.runtime_api, response.token, response.task.run_id)


class Backlog:
    """The tasks that wait at a SuperNode, oldest first, and which of them are outdated.

    A server that sends a silo the next task of a run no longer waits for the one before: the round
    of that one is over, or is repeated. All are taken at once to see it; meanwhile they are kept
    alive by heartbeats.
    """

    def __init__(self, source: TaskSource) -> None:
        self._source = source
        self._waiting: deque[tuple[NodeTask, ExitStack]] = deque()

    def next_task(self) -> tuple[NodeTask, bool] | None:
        """The oldest task, and true if a newer one of its run is there; None if none waits."""
        while (task := self._source.next_task()) is not None:
            heartbeat = ExitStack()
            heartbeat.enter_context(task.heartbeat())
            self._waiting.append((task, heartbeat))
        if not self._waiting:
            return None

        task, heartbeat = self._waiting.popleft()
        heartbeat.close()
        return task, any(newer.run_id == task.run_id for newer, _ in self._waiting)


def _runtime_client(runtime_api: str, component: str, *interceptors: Any) -> Any:
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    say_version = RuntimeVersionHttpInterceptor(component_name=component)
    return RuntimeHttpClient.from_server_address(
        server_address=runtime_api,
        insecure=True,
        root_certificates=None,
        interceptors=[say_version, *interceptors],
    )


@contextmanager
def _withdrawn() -> Iterator[None]:
    """Turns Flower's errors for a task that has ended into TaskWithdrawn."""
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

    try:
        yield
    except (httpx.HTTPError, ObjectPullError, ObjectPushError) as error:
        raise TaskWithdrawn(str(error)) from None


# --- messages on disk


def message_to_bytes(message: Message) -> bytes:
    """A message without its content: all that an answer to it needs."""
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto

    header = remove_content_from_message(message)
    return bytes(message_to_proto(header).SerializeToString())


def message_from_bytes(data: bytes) -> Message:
    """The message that `message_to_bytes` wrote."""
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as MessageProto

    return message_from_proto(MessageProto.FromString(data))
