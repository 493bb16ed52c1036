"""What the server carries from round to round, one step of it, and its checkpoint."""

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from fl_app.server.optimizer import (
    ServerOptimizer,
    ServerOptimizerState,
    apply_update,
    initial_state,
)
from shared.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.early_stopping import Best
from shared.experiment import Experiment
from shared.metrics import merge_means
from shared.run_record import CHECKPOINT, Record
from shared.weights import Weights

NO_ROUND = -1  # round 0 is that of the initial weights
Loss: TypeAlias = tuple[float, int]  # a silo's validation loss, and the examples it is a mean over
MOMENTS = ("first_moment", "second_moment")


@dataclass(frozen=True)
class ServerState:
    """The state of a run after a number of rounds: all that a checkpoint holds."""

    weights: Weights
    run_id: str = ""  # stays when the run is resumed: the silos keep their own state under it
    round: int = 0  # rounds done
    bytes_sent: int = 0  # in training, over all links, in both directions
    silos: tuple[str, ...] = ()  # that take part, from the first round to the last
    # By silo: the last round in which its answer was used.
    acknowledged_rounds: Mapping[str, int] = field(default_factory=dict)
    optimizer: ServerOptimizerState = field(default_factory=ServerOptimizerState)
    best: Best = field(default_factory=lambda: Best(step=NO_ROUND))
    best_weights: Weights = field(default_factory=list)
    best_losses: Mapping[str, Loss] = field(default_factory=dict)  # by silo, of the best weights


def begin_state(
    optimizer: ServerOptimizer,
    weights: Weights,
    trainable: Sequence[bool],
    silos: Iterable[str],
) -> ServerState:
    """The state before the first round of a new run."""
    return ServerState(
        weights,
        run_id=uuid.uuid4().hex,
        silos=tuple(sorted(silos)),
        optimizer=initial_state(optimizer, weights, trainable),
    )


def step(
    state: ServerState,
    optimizer: ServerOptimizer,
    update: Iterable[np.ndarray],
    trainable: Sequence[bool],
    results: Iterable[str],
) -> ServerState:
    """The state after one more round: the aggregated update applied, the silos' answers noted."""
    weights, optimizer_state = apply_update(
        optimizer, state.optimizer, state.weights, update, trainable
    )
    number = state.round + 1
    return replace(
        state,
        weights=weights,
        optimizer=optimizer_state,
        round=number,
        acknowledged_rounds={**state.acknowledged_rounds, **dict.fromkeys(results, number)},
    )


def with_validation(state: ServerState, losses: Mapping[str, Loss]) -> ServerState:
    """The state once its weights' validation losses are known, by silo: it keeps the best weights.

    Weights are compared by their mean loss over the silos that have evaluated both, so that
    neither a silo's absence nor its return looks like progress. Without such silos nothing changes;
    a loss that is not finite at any silo counts as no better.
    """
    finite = {silo: loss for silo, loss in losses.items() if math.isfinite(loss[0])}
    if losses and not finite:
        return replace(state, best=state.best.after(state.round, math.nan))
    is_first = not state.best_losses
    common = sorted(finite if is_first else finite.keys() & state.best_losses.keys())
    if not common:
        return state

    best = state.best
    if not is_first:
        best = replace(best, loss=_mean_loss(state.best_losses, common))
    best = best.after(state.round, _mean_loss(finite, common))
    if best.step == state.round:
        return replace(state, best=best, best_weights=state.weights, best_losses=finite)
    return replace(state, best=replace(best, loss=state.best.loss))


def _mean_loss(losses: Mapping[str, Loss], silos: Iterable[str]) -> float:
    parts = [({"loss": losses[silo][0]}, losses[silo][1]) for silo in sorted(silos)]
    return merge_means(parts)["loss"]


def save_state(experiment: Experiment, record: Record, state: ServerState) -> None:
    """Writes the checkpoint of a state into the run's record."""
    moments = {name: getattr(state.optimizer, name) for name in MOMENTS}
    arrays = {"weights": state.weights, **moments, "best": state.best_weights}
    best = state.best
    meta = {
        "run_id": state.run_id,
        "round": state.round,
        "bytes_sent": state.bytes_sent,
        "silos": state.silos,
        "acknowledged_rounds": dict(state.acknowledged_rounds),
        "best": {
            "round": best.step,
            "loss": best.loss,
            "evaluations_since": best.evaluations_since,
            "losses": dict(state.best_losses),
        },
        "server_optimizer_step": state.optimizer.step,
    }
    save_checkpoint(record.directory / CHECKPOINT, experiment, Checkpoint(arrays, meta))


def restore_state(experiment: Experiment, record: Record) -> ServerState:
    """The state in the run's checkpoint. Raises ValueError if there is none of this experiment."""
    checkpoint = load_checkpoint(record.directory / CHECKPOINT, experiment, "weights")
    meta = checkpoint.meta
    arrays = {
        name: [np.asarray(array) for array in group] for name, group in checkpoint.arrays.items()
    }
    moments = {name: arrays.get(name, []) for name in MOMENTS}
    best = meta["best"]
    return ServerState(
        weights=arrays["weights"],
        run_id=meta.get("run_id", ""),  # not in checkpoints of version 0.1
        round=meta["round"],
        bytes_sent=meta["bytes_sent"],
        silos=tuple(meta["silos"]),
        acknowledged_rounds=meta.get("acknowledged_rounds", {}),
        optimizer=ServerOptimizerState(meta["server_optimizer_step"], **moments),
        best=Best(best["round"], best["loss"], best["evaluations_since"]),
        best_weights=arrays.get("best", []),
        best_losses={silo: (loss, n) for silo, (loss, n) in best.get("losses", {}).items()},
    )
