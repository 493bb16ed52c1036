"""The ClientApp: Flower's side of a silo. Unpack, do what `local_training` does, pack."""

import sys
import traceback
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_app.local_training import Silo, evaluate_at_silo, load_silo, train_at_silo, with_federation_schema
from fl_app.messages import pack_refusal, pack_result, pack_silo, unpack_task
from shared.experiment import Experiment, experiment_from_flat

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    return _answer(message, context, lambda silo, experiment: pack_silo(silo))


@app.train()
def train(message: Message, context: Context) -> Message:
    def work(silo: Silo, experiment: Experiment) -> RecordDict:
        schema, weights, round_number = unpack_task(message.content)
        return pack_result(train_at_silo(with_federation_schema(silo, schema), experiment, weights, round_number))

    return _answer(message, context, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    def work(silo: Silo, experiment: Experiment) -> RecordDict:
        schema, weights, _ = unpack_task(message.content)
        return pack_result(evaluate_at_silo(with_federation_schema(silo, schema), experiment, weights))

    return _answer(message, context, work)


def _answer(message: Message, context: Context, work: Callable[[Silo, Experiment], RecordDict]) -> Message:
    """The work's result, or a refusal. What is wrong may quote the silo's data: it is told here, not to the server."""
    try:
        experiment = experiment_from_flat(context.run_config)
        content = work(load_silo(context.node_config, experiment), experiment)
    except Exception as error:  # Flower would send any exception's text to the server
        if not isinstance(error, ValueError):
            traceback.print_exc()
        name = str(context.node_config.get("silo", "without a name"))
        print(f"error: silo {name}: {error}", file=sys.stderr, flush=True)
        content = pack_refusal(name, "its data or settings cannot be used; its own log says why.")
    return Message(content, reply_to=message)
