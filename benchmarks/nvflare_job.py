"""The NVFlare contender of the federated benchmark: its FedAvg recipe, in its POC mode.

Runs in .venv-nvflare, in a network namespace with nothing but the loopback interface: the servers
that it starts listen on all interfaces.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare.app_opt.tf.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import PocEnv

from benchmarks.federation_workload import SIZES

POLL_S = 0.05  # of the tuned contender


class TunedRecipe(FedAvgRecipe):
    """The recipe with a controller that polls for results every POLL_S, instead of 0.5 s."""

    def _get_controller_kwargs(self) -> dict[str, Any]:
        return {**super()._get_controller_kwargs(), "task_check_period": POLL_S}


def make_recipe(options: argparse.Namespace) -> FedAvgRecipe:
    """The job.

    Tuned: server and clients poll every POLL_S, as far as NVFlare has options for that.
    """
    arguments = f"--size {options.size} --data {options.data} --marks {options.marks}"
    kind = TunedRecipe if options.tuned else FedAvgRecipe
    recipe = kind(
        name="benchmark",
        num_rounds=options.rounds,
        min_clients=options.silos,
        model={
            "class_path": "benchmarks.federation_workload.compiled_model",
            "args": {"size": options.size},
        },
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        train_args=arguments,
    )
    if options.tuned:
        recipe.add_server_config({"server": {"task_request_interval": POLL_S}})
        recipe.add_client_config({"default_task_fetch_interval": POLL_S})
    return recipe


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--silos", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the silos' files")
    parser.add_argument("--marks", type=Path, required=True)
    parser.add_argument("--tuned", action="store_true")
    options = parser.parse_args(arguments)
    run = make_recipe(options).execute(PocEnv(num_clients=options.silos))
    run.get_result(clean_up=False)
    return 0 if run.get_status() == "FINISHED:COMPLETED" else 1


if __name__ == "__main__":
    sys.exit(main())
