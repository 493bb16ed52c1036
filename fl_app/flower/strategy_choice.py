"""The Flower strategy that an experiment names; its needs are checked before anything waits."""

import importlib
from collections.abc import Iterator

from flwr.serverapp.strategy import Bulyan, Strategy

from shared.experiment import Experiment, FederationSection
from shared.zoo import parse_options

NODE_COUNTS = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")  # of Flower's own


def make_strategy(experiment: Experiment) -> Strategy:
    """The strategy that the experiment names, with its options.

    Raises ValueError if there is none such, or it is not a Flower strategy.
    """
    name = experiment.federation.strategy
    text = experiment.federation.strategy_options
    options = parse_options(text, "federation.strategy_options", "beta = 0.2")
    module_name, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
        strategy = make(**options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"federation.strategy = {name!r} with strategy_options = {text!r} cannot be made:"
            f" {error}. Name a class of flwr.serverapp.strategy or your own,"
            " 'package.module:Class', and arguments that it takes."
        ) from None
    if not isinstance(strategy, Strategy):
        raise ValueError(
            f"federation.strategy must be a Flower Strategy; {name!r} makes a"
            f" {type(strategy).__name__}."
        )
    return strategy


def check_needs(strategy: Strategy, settings: FederationSection) -> None:
    """Raises ValueError if the strategy needs more silos than those with which the run begins.

    Flower's strategies would wait for the others, for ever, or skip each round.
    """
    needs = dict(_needs(strategy))
    too_many = {name: count for name, count in needs.items() if count > settings.min_silos}
    if too_many:
        counts = ", ".join(f"{name} = {count}" for name, count in too_many.items())
        raise ValueError(
            f"A run must begin with the silos that its strategy needs; {settings.strategy!r} has"
            f" {counts}, received federation.min_silos = {settings.min_silos}. Take part with"
            f" {max(too_many.values())} silos and raise federation.min_silos, or lower these in"
            " federation.strategy_options."
        )


def _needs(strategy: Strategy) -> Iterator[tuple[str, int]]:
    """The numbers of silos that the strategy, and one that it wraps, asks for, by their names."""
    for name in NODE_COUNTS:
        count = getattr(strategy, name, None)
        if isinstance(count, int):
            yield name, count
    if isinstance(strategy, Bulyan):
        yield "4 * num_malicious_nodes + 3", 4 * strategy.num_malicious_nodes + 3

    wrapped = getattr(strategy, "strategy", None)
    if isinstance(wrapped, Strategy):
        yield from _needs(wrapped)
