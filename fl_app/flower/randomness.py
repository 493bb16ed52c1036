"""Flower's random draws, kept apart from the generator that determines the initial weights.

A ServerApp has a thread that sends heartbeats and draws the time of the next one from the module
`random`. `build_model` seeds the generator of that module, and Keras's initialisers draw from it: a
heartbeat between the two would give a run other initial weights.
"""

import random
from importlib import import_module

from fl_app.flower.internals import Internals, missing_internals

INTERNALS: Internals = {
    ("flwr.supercore.heartbeat", "random"): (),
    ("flwr.supercore.retry.retry_invoker", "random"): (),
    ("flwr.supercore.inflatable.inflatable_utils", "random"): (),
}


def separate_random_draws() -> list[str]:
    """Gives those modules of Flower that draw in threads a generator of their own.

    Returns the missing internals; the others are changed all the same.
    """
    missing = missing_internals(INTERNALS)
    for module_name, name in INTERNALS:
        if f"{module_name}.{name}" not in missing:
            vars(import_module(module_name))[name] = random.Random()
    return missing
