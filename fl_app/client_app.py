"""The ClientApp: Flower's side of a silo. Unpack, do what `local_training` does, pack."""

import sys
import traceback
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_app.local_training import Bench, LocalResult, Silo, SiloFailure, Workbench
from fl_app.messages import (
    is_of_strategy,
    pack_refusal,
    pack_result,
    pack_silo,
    pack_strategy_result,
    unpack_strategy_task,
    unpack_task,
)
from shared.experiment import Experiment, experiment_from_flat
from shared.metrics import describe


def make_app(workbench: Bench) -> ClientApp:
    """A ClientApp that works on this workbench, which keeps data and model warm between messages."""
    app = ClientApp()

    def answer(message: Message, context: Context, work: Callable[[Silo, Experiment], RecordDict]) -> Message:
        """The work's result, or a refusal. What is wrong may quote the silo's data: told here, not to the server."""
        try:
            experiment = experiment_from_flat(context.run_config)
            content = work(workbench.silo(context.node_config, experiment), experiment)
        except SiloFailure as error:
            print(f"error: silo {context.node_config['silo']}: {error}", file=sys.stderr, flush=True)
            content = pack_refusal(str(context.node_config["silo"]), f"{error}.")
        except Exception as error:  # Flower would send any exception's text to the server
            if not isinstance(error, ValueError):
                traceback.print_exc()
            name = str(context.node_config.get("silo", "without a name"))
            print(f"error: silo {name}: {error}", file=sys.stderr, flush=True)
            content = pack_refusal(name, "its data or settings cannot be used; its own log says why.")
        return Message(content, reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return answer(message, context, lambda silo, experiment: pack_silo(silo))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def work(silo: Silo, experiment: Experiment) -> RecordDict:
            if is_of_strategy(message.content):
                schema, weights, number = unpack_strategy_task(message.content)
                result = workbench.train(silo, schema, experiment, weights, number, evaluate=False)
                _tell(silo, f"round {number}", result)
                return pack_strategy_result(weights, result)
            schema, weights, round_number, evaluate = unpack_task(message.content)
            result = workbench.train(silo, schema, experiment, weights, round_number, evaluate)
            _tell(silo, f"round {round_number}", result)
            return pack_result(result)

        return answer(message, context, work)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def work(silo: Silo, experiment: Experiment) -> RecordDict:
            if is_of_strategy(message.content):
                schema, weights, _ = unpack_strategy_task(message.content)
                return pack_strategy_result(weights, workbench.evaluate(silo, schema, experiment, weights))
            schema, weights, _, _ = unpack_task(message.content)
            return pack_result(workbench.evaluate(silo, schema, experiment, weights))

        return answer(message, context, work)

    return app


def _tell(silo: Silo, what: str, result: LocalResult) -> None:
    metrics = describe({"train": result.train, "validation": result.validation})
    print(f"silo {silo.name}: {what}: {metrics}, {result.num_examples} examples in {result.seconds:.2f} s", flush=True)


app = make_app(Workbench())
