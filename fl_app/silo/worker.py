"""python -m fl_app.silo.worker: does the tasks of a SuperNode one after the other, in one living process.

It runs the code that is installed here: a bundle with other code is refused. Started by `python -m fl_app.silo`.
"""

import argparse
import hashlib
import io
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import Context, Message

from fl_app.client_app import make_app
from fl_app.flower_internals import (
    AdaptiveWait,
    Task,
    TaskSource,
    TaskWithdrawn,
    installed_bundle,
    join_arrays_at_once,
    message_to_bytes,
)
from fl_app.local_training import Bench, SiloFailure, Workbench
from fl_app.messages import FORMAT, pack_refusal
from fl_app.silo.settings import add_cluster_arguments, cluster_of
from fl_app.silo.task_file import TaskFile

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("shared", "dist_train", "fl_app")


def bundle_digest(bundle: bytes) -> str:
    """SHA-256 over the names and contents of an app bundle's files, whatever made and compressed it."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        files = sorted(name for name in archive.namelist() if not name.startswith(".info/"))
        lines = [f"{name} {hashlib.sha256(archive.read(name)).hexdigest()}\n" for name in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def installed_digest() -> str:
    """That of the bundle which `flwr run` would make of the code that is installed here."""
    return bundle_digest(installed_bundle(PROJECT, PACKAGES))


def work(
    source: TaskSource,
    file: TaskFile,
    answer: Callable[[Message, Context, bytes], Message],
    when_idle: Callable[[], None] = lambda: None,
) -> None:
    """Takes tasks and answers them, for ever."""
    wait = AdaptiveWait()
    while True:
        task = source.next_task()
        if task is None:
            when_idle()
            wait.wait()
            continue
        try:
            _do(task, file, answer)
        except TaskWithdrawn as error:
            print(f"the task in hand was withdrawn: {error}", flush=True)
        file.clear()
        wait.happened()


def _do(task: Task, file: TaskFile, answer: Callable[[Message, Context, bytes], Message]) -> None:
    file.write(task.token)
    try:
        with task.heartbeat():
            message, context, bundle = task.pull()
            file.write(task.token, message_to_bytes(message))
            task.answer(answer(message, context, bundle), context)
    finally:
        task.close()


def checked_app(installed: str, workbench: Bench) -> Callable[[Message, Context, bytes], Message]:
    """The ClientApp of the installed code, on this workbench. It refuses to stand in for other code."""
    app = make_app(workbench)
    digests: dict[bytes, str] = {}  # of the last bundle

    def answer(message: Message, context: Context, bundle: bytes) -> Message:
        if bundle not in digests:
            digests.clear()
            digests[bundle] = bundle_digest(bundle)
        if (received := digests[bundle]) != installed:
            reason = (
                f"it runs the app that is installed here, {installed[:16]}; received the bundle {received[:16]}. "
                "Install the same version of Archipelago on both sides."
            )
            print(f"error: {reason}", file=sys.stderr, flush=True)
            return Message(
                pack_refusal(str(context.node_config.get("silo", "without a name")), reason), reply_to=message
            )
        return app(message=message, context=context)

    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fl_app.silo.worker", description=__doc__)
    parser.add_argument("--runtime-api", required=True, metavar="HOST:PORT", help="of the SuperNode")
    parser.add_argument("--task-file", required=True, type=Path, help="where the task in hand is noted")
    add_cluster_arguments(parser)
    options = parser.parse_args(arguments)
    file = TaskFile(options.task_file)
    file.clear()
    join_arrays_at_once(FORMAT)
    source, installed = TaskSource(options.runtime_api), installed_digest()
    if options.num_workers == 1:
        print("the worker is ready", flush=True)
        work(source, file, checked_app(installed, Workbench()))
        return 0
    from fl_app.silo.cluster import ClusterWorkbench, JobLost

    try:
        with ClusterWorkbench(cluster_of(options)) as workbench:
            workbench.start()
            print("the worker is ready", flush=True)
            work(source, file, checked_app(installed, workbench), workbench.mend)
    except (JobLost, SiloFailure) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except (ImportError, FileNotFoundError) as error:
        print(f"error: several workers need Horovod, which make setup builds; {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
