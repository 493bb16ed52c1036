"""Our server optimizers as strategies of Flower, for a ServerApp of one's own that calls Flower's
`strategy.start`.

    trainable = [variable.trainable for variable in model.weights]
    strategy = FedAdam(learning_rate=0.01, trainable=trainable)
    result = strategy.start(grid, ArrayRecord(model.get_weights()), num_rounds=10)

Replies are those of Flower's own strategies: an ArrayRecord of local weights and a MetricRecord
with "num-examples". The formulas are in `fl_app.server.optimizer`.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, strategy

from fl_app.aggregation.aggregator import Contribution
from fl_app.aggregation.mean import RunningMean
from fl_app.server.optimizer import (
    ServerOptimizer,
    ServerOptimizerState,
    apply_update,
    initial_state,
)

LOGGER = logging.getLogger("flwr")  # Flower's own


class FedOpt(strategy.FedAvg):
    """FedOpt of Reddi et al. 2021, arXiv:2003.00295, Algorithm 1: the mean update, then a step of
    a server optimizer.

        w <- apply_update(w, sum_k n_k (w_k - w) / sum_k n_k)

    `trainable` says which arrays are (none given: all, as in Flower); the others follow plain
    FedAvg. `sampling` is what Flower's FedAvg takes. Set `state` before `start` to go on where
    another left off.

    Guarantees: the weights do not depend on the order of the replies and keep their dtypes (those
    of Flower's FedAdam become float64). Replies with errors are left out, as in Flower, and so are
    those that cannot be averaged: not finite, or without examples. A round without any other reply
    leaves the weights as they are. Raises ValueError if a reply's arrays are not those that were
    sent.
    """

    def __init__(
        self, optimizer: ServerOptimizer, trainable: Sequence[bool] | None = None, **sampling: Any
    ) -> None:
        super().__init__(**sampling)
        self.optimizer = optimizer
        self.trainable = trainable
        self.state: ServerOptimizerState | None = None
        self.sent = ArrayRecord()

    def summary(self) -> None:
        LOGGER.info("\t├──> %s", self.optimizer)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The weights after the step and the mean of the metrics; (None, None) if no reply can be
        averaged.
        """
        valid, _ = self._check_and_log_replies(replies, is_train=True)  # Flower's, private
        weights = self.sent.to_numpy_ndarrays()
        trainable = [True] * len(weights) if self.trainable is None else self.trainable
        state = self.state or initial_state(self.optimizer, weights, trainable)

        # Average the updates that can be; without any, the weights stay.
        mean, averaged = self._average([(reply, self._contribution(reply)) for reply in valid])
        if not averaged:
            self.state = replace(state, step=state.step + 1)  # Flower's FedAdam counts rounds
            return None, None

        # One step of the optimizer.
        weights, self.state = apply_update(self.optimizer, state, weights, mean, trainable)
        arrays = ArrayRecord(
            {key: Array(np.asarray(array)) for key, array in zip(self.sent, weights, strict=True)}
        )
        return arrays, self.train_metrics_aggr_fn(averaged, self.weighted_by_key)

    def _average(
        self, received: list[tuple[Message, Contribution]]
    ) -> tuple[Iterable[np.ndarray], list[RecordDict]]:
        """The mean update, and the contents of the replies in it: those that can be averaged."""
        num_examples = sum(contribution.num_examples for _, contribution in received)
        mean = RunningMean(self.sent.to_numpy_ndarrays(), max(num_examples, 1))
        averaged = []
        for reply, contribution in received:
            try:
                mean.add(str(reply.metadata.src_node_id), contribution)
                averaged.append(reply.content)
            except ValueError as error:
                LOGGER.warning(
                    "The reply of node %d is left out: %s.", reply.metadata.src_node_id, error
                )
        return mean.result() if averaged else [], averaged

    def _contribution(self, reply: Message) -> Contribution:
        """The reply's update, local weights - sent weights; 0 examples if their number is none."""
        (local,) = reply.content.array_records.values()
        (metrics,) = reply.content.metric_records.values()
        received = {key: array.shape for key, array in local.items()}
        expected = {key: array.shape for key, array in self.sent.items()}
        if received != expected:
            raise ValueError(
                f"A reply must hold the arrays that were sent, by key and shape: {expected};"
                f" received {received} from node {reply.metadata.src_node_id}. Let its ClientApp"
                " return all weights of the same model."
            )

        update = []
        for key, array in self.sent.items():
            w = array.numpy()
            update.append(np.asarray(local[key].numpy() - w, dtype=w.dtype))

        # One number: Flower has checked that.
        num_examples = cast(float, metrics[self.weighted_by_key])
        if not 0 <= num_examples < math.inf:
            num_examples = 0
        return Contribution(update, cast(int, num_examples))


# --- by the names of Flower's strategies, with Flower's defaults; `options` are those of FedOpt


def FedAvg(learning_rate: float = 1.0, **options: Any) -> FedOpt:
    return FedOpt(ServerOptimizer("fedavg", learning_rate), **options)


def FedAvgM(learning_rate: float = 1.0, momentum: float = 0.0, **options: Any) -> FedOpt:
    return FedOpt(ServerOptimizer("fedavgm", learning_rate, momentum), **options)


def FedAdam(
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    beta_2: float = 0.99,
    tau: float = 1e-3,
    **options: Any,
) -> FedOpt:
    return FedOpt(ServerOptimizer("fedadam", learning_rate, momentum, beta_2, tau), **options)


def FedYogi(
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    beta_2: float = 0.99,
    tau: float = 1e-3,
    **options: Any,
) -> FedOpt:
    return FedOpt(ServerOptimizer("fedyogi", learning_rate, momentum, beta_2, tau), **options)


def FedAdagrad(
    learning_rate: float = 0.1, momentum: float = 0.0, tau: float = 1e-3, **options: Any
) -> FedOpt:
    return FedOpt(ServerOptimizer("fedadagrad", learning_rate, momentum, tau=tau), **options)
