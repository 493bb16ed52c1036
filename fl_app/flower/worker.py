"""python -m fl_app.flower.worker: does the tasks of a SuperNode one after the other, in one living
process.

It runs the code that is installed here: a FAB (Flower's bundle of an app) with other code is
refused. Started by `python -m fl_app.silo`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Never, TypeAlias

from flwr.app import Context, Message

from fl_app.failures import MessageError, SiloFailure
from fl_app.flower.client_app import make_app
from fl_app.flower.fab import fab_digest, installed_digest
from fl_app.flower.memory import join_arrays_at_once
from fl_app.flower.node_tasks import (
    Backlog,
    NodeTask,
    TaskSource,
    TaskWithdrawn,
    message_to_bytes,
)
from fl_app.flower.wire import FORMAT, pack_refusal
from fl_app.silo.settings import add_cluster_arguments, cluster_of
from fl_app.silo.task_file import TaskFile
from fl_app.silo.workbench import Bench, Workbench
from shared.polling import AdaptiveWait

App: TypeAlias = Callable[[Message, Context, bytes], Message]  # message, context, FAB -> reply


def work(
    source: TaskSource,
    file: TaskFile,
    app: App,
    when_idle: Callable[[], None] = lambda: None,
) -> Never:
    """Takes tasks and answers them, for ever. The file holds the task in hand meanwhile."""
    wait = AdaptiveWait()
    backlog = Backlog(source)
    while True:
        found = backlog.next_task()
        if found is None:
            when_idle()
            wait.wait()
            continue

        task, is_outdated = found
        try:
            _do(task, file, decline_outdated if is_outdated else app)
        except TaskWithdrawn as error:
            print(f"the task in hand was withdrawn: {error}", flush=True)
        file.clear()
        wait.happened()


def _do(task: NodeTask, file: TaskFile, app: App) -> None:
    file.write(task.token)
    try:
        with task.heartbeat():
            message, context, fab = task.pull()
            file.write(task.token, message_to_bytes(message))
            reply = app(message, context, fab)
            task.answer(reply, context)
    finally:
        task.close()


def decline_outdated(message: Message, context: Context, fab: bytes) -> Message:
    """An app that does nothing of a task for whose answer no server waits any more."""
    print("a task is declined: a newer one of its run is there", flush=True)
    return _refuse(message, context, "a newer task has come meanwhile.")


def checked_app(installed: str, workbench: Bench) -> App:
    """The ClientApp of the installed code, on this workbench.

    It refuses a message whose FAB does not have the digest `installed`.
    """
    client_app = make_app(workbench)
    digest_of = lru_cache(maxsize=1)(fab_digest)

    def app(message: Message, context: Context, fab: bytes) -> Message:
        digest = ""
        try:
            digest = digest_of(fab)
            received = f"the app {digest[:16]}"
        except MessageError as error:
            received = str(error)
        if digest != installed:
            reason = (
                f"it runs the app that is installed here, {installed[:16]}; received"
                f" {received}. Install the same version of Archipelago on both sides."
            )
            print(f"error: {reason}", file=sys.stderr, flush=True)
            return _refuse(message, context, reason)
        return client_app(message=message, context=context)

    return app


def _refuse(message: Message, context: Context, reason: str) -> Message:
    silo = str(context.node_config.get("silo", "without a name"))
    return Message(pack_refusal(silo, reason), reply_to=message)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    file = TaskFile(options.task_file)
    file.clear()
    join_arrays_at_once(FORMAT)
    source = TaskSource(options.runtime_api)
    installed = installed_digest()

    if options.num_workers == 1:
        print("the worker is ready", flush=True)
        work(source, file, checked_app(installed, Workbench()))

    # Several workers: this process leads a Horovod job, which does the training.
    from fl_app.silo.cluster import ClusterWorkbench, JobLost

    try:
        with ClusterWorkbench(cluster_of(options)) as workbench:
            workbench.start()
            print("the worker is ready", flush=True)
            work(source, file, checked_app(installed, workbench), workbench.restart_if_lost)
    except (JobLost, SiloFailure) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except (ImportError, FileNotFoundError) as error:
        print(
            f"error: several workers need Horovod, which make setup builds; {error}",
            file=sys.stderr,
            flush=True,
        )
    return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fl_app.flower.worker", description=__doc__)
    parser.add_argument(
        "--runtime-api", required=True, metavar="HOST:PORT", help="of the SuperNode"
    )
    parser.add_argument(
        "--task-file", required=True, type=Path, help="where the task in hand is noted"
    )
    add_cluster_arguments(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
