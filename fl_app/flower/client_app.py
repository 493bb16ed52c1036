"""The ClientApp: Flower's side of a silo. Unpacks a task, has it handled, packs the answer."""

import sys
import traceback
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_app.border import UNREADABLE, printable_line
from fl_app.failures import MessageError, SiloFailure
from fl_app.flower.wire import (
    is_of_strategy,
    pack_answer,
    pack_refusal,
    pack_strategy_result,
    unpack_strategy_task,
    unpack_task,
)
from fl_app.messages import EVALUATE, LocalResult
from fl_app.silo.handlers import Site, handle
from fl_app.silo.policy import SiloSettings
from fl_app.silo.workbench import Bench, Workbench
from shared.experiment import Experiment, experiment_from_run_config

UNUSABLE = "its data or settings cannot be used; its own log says why."


def make_app(bench: Bench) -> ClientApp:
    """A ClientApp that computes on this bench, which keeps data and model between messages."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        """Any message: a task of our own server, or one of Flower's strategies."""

        def work(site: Site) -> RecordDict:
            if not is_of_strategy(message.content):
                return pack_answer(handle(unpack_task(message.content), site))
            task = unpack_strategy_task(message.content, kind=message.metadata.message_type)
            result = LocalResult.from_answer(handle(task, site))
            if task.kind == EVALUATE and not result.validation:
                raise SiloFailure("it has no validation examples")
            return pack_strategy_result(task, result)

        return _answer(bench, message, context, work)

    for register in (app.query, app.train, app.evaluate):
        register()(answer)
    return app


def _answer(
    bench: Bench, message: Message, context: Context, work: Callable[[Site], RecordDict]
) -> Message:
    """The work's result, or a refusal.

    Flower would send the text of any exception to the server. It may quote the silo's data, so it
    is reported here, and the server gets a fixed sentence. What was wrong with its own message or
    experiment it may know, and the text of a SiloFailure too.
    """
    try:
        experiment = _experiment(context)
        settings = SiloSettings.from_node_config(context.node_config)
        content = work(Site(settings, experiment, bench))
    except MessageError as error:
        content = _refusal(context, error, f"it received {error}.")
    except SiloFailure as error:
        content = _refusal(context, error, f"{error}.")
    except Exception as error:
        if not isinstance(error, ValueError):
            traceback.print_exc()
        content = _refusal(context, error, UNUSABLE)
    return Message(content, reply_to=message)


def _experiment(context: Context) -> Experiment:
    try:
        return experiment_from_run_config(context.run_config)
    except (*UNREADABLE, MemoryError) as error:
        raise MessageError(f"an experiment that cannot be read: {error}") from None


def _refusal(context: Context, error: Exception, reason: str) -> RecordDict:
    """Reports the error here; returns the refusal for the server."""
    name = str(context.node_config.get("silo", "without a name"))
    print(f"error: silo {name}: {printable_line(error)}", file=sys.stderr, flush=True)
    return pack_refusal(name, reason)


app = make_app(Workbench())
