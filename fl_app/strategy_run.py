"""Any Flower strategy at the server: federation.strategy = "flwr.serverapp.strategy:FedTrimmedAvg".

The strategy runs by its own `start`, over a grid without fixed waits. Its messages are Flower's own: a record of arrays
and one of settings there, and back the local weights and metrics with "num-examples".
"""

import importlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_app.flower_internals import AdaptiveWait
from fl_app.messages import strategy_arrays, strategy_config
from fl_app.rounds import Exchange, common_schema, server_test_split
from shared.data import encode
from shared.experiment import Experiment
from shared.metrics import describe
from shared.run_record import Record
from shared.training import compile_model, evaluate, evaluation_batches
from shared.zoo import build_model, parse_options


def run_strategy(experiment: Experiment, grid: Grid, exchange: Exchange, record: Record) -> dict[str, Any]:
    """Runs the experiment's rounds by its strategy; the result. Raises ValueError as `run_federation` does."""
    record.check()
    strategy = make_strategy(experiment)
    test = server_test_split(experiment)
    silos = exchange.roll_call(experiment.federation.min_silos)
    schema = common_schema([*silos.values()], test, experiment.data)
    model = compile_model(build_model(experiment.model, schema, experiment.seed), experiment, schema)
    batches, num_rounds = evaluation_batches(encode(test, schema)) if test else None, experiment.federation.num_rounds
    record.open()

    def test_metrics(arrays: ArrayRecord) -> dict[str, dict[str, float]]:
        model.set_weights(arrays.to_numpy_ndarrays())
        return {"test": evaluate(model, batches)} if batches else {}

    def after_round(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        metrics = test_metrics(arrays)
        record.append({"round": number, **metrics, "bytes_sent": counted.bytes_sent})
        print(f"round {number}/{num_rounds}: {describe(metrics)}", flush=True)
        return MetricRecord({**metrics["test"]}) if metrics else None

    counted, config = QuickGrid(grid), strategy_config(schema)
    start = strategy_arrays(model.get_weights())
    timeout_s = experiment.federation.round_timeout_s
    found = strategy.start(counted, start, num_rounds, timeout_s, config, config, after_round)
    if not found.train_metrics_clientapp:
        raise ValueError("The strategy aggregated nothing in any round. The silos' logs and the lines above say why.")
    metrics = test_metrics(found.arrays)
    for name, by_round in (("train", found.train_metrics_clientapp), ("validation", found.evaluate_metrics_clientapp)):
        for number, values in sorted(by_round.items()):
            record.append({"round": number, name: dict(values)})
            metrics[name] = {key: float(value) for key, value in values.items()}  # type: ignore[arg-type]
    metrics.pop("train", None)
    result = {"num_silos": len(silos), "silos": sorted(silos), "metrics": metrics, "rounds": num_rounds}
    result |= {"bytes_sent": counted.bytes_sent, "strategy": experiment.federation.strategy}
    record.finish(model, schema, result)
    return result


def make_strategy(experiment: Experiment) -> Strategy:
    """The strategy that the experiment names, with its options. Raises ValueError if there is none such."""
    name, text = experiment.federation.strategy, experiment.federation.strategy_options
    options = parse_options(text, "federation.strategy_options", "beta = 0.2")
    module_name, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
        strategy = make(**options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"federation.strategy = {name!r} with strategy_options = {text!r} cannot be made: {error}. "
            "Name a class of flwr.serverapp.strategy or your own, 'package.module:Class', and "
            "arguments that it takes."
        ) from None
    if not isinstance(strategy, Strategy):
        raise ValueError(f"federation.strategy must be a Flower Strategy; {name!r} makes a {type(strategy).__name__}.")
    return strategy


@dataclass
class QuickGrid(Grid):
    """A grid that looks for replies often, where Flower's own looks every 3 s; it counts the bytes of arrays."""

    grid: Grid
    bytes_sent: int = 0
    wait: AdaptiveWait = field(default_factory=AdaptiveWait)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        pending = set(self.push_messages(messages))
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies: list[Message] = []
        self.wait.happened()
        while pending and time.monotonic() < deadline:
            for reply in self.pull_messages(pending):
                pending.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
                self.wait.happened()
            if pending:
                self.wait.wait()
        return replies

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.bytes_sent += sum(map(_num_bytes, messages))
        return self.grid.push_messages(messages) if messages else []

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = list(self.grid.pull_messages(message_ids))
        self.bytes_sent += sum(map(_num_bytes, replies))
        return replies

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def get_nodes(self) -> Any:
        return self.grid.get_nodes()

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.grid.create_message(*args, **kwargs)

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run


def _num_bytes(message: Message) -> int:
    if not message.has_content():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
