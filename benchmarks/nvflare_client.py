"""The training script of the NVFlare contender, in the form that its Client API recommends.

Runs in .venv-nvflare. Every site runs it, in its own process, for the whole job: data, model and
compiled step stay.
"""

import argparse
from pathlib import Path

import nvflare.client as flare

from benchmarks.federation_workload import (
    BATCH_SIZE,
    compiled_model,
    read_silo,
    silo_path,
    write_mark,
)

FIRST_SITE = "site-1"  # the first one marks the rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the silos' files")
    parser.add_argument("--marks", type=Path, required=True)
    options = parser.parse_args()
    flare.init()
    site = flare.get_site_name()
    number = int(site.removeprefix("site-")) - 1
    (x, y), (x_evaluated, y_evaluated) = read_silo(silo_path(options.data, number))
    model = compiled_model(options.size)
    while flare.is_running():
        received = flare.receive()
        if site == FIRST_SITE:
            write_mark(options.marks)
        for layer, weights in received.params.items():
            model.get_layer(layer).set_weights(weights)
        _, accuracy = model.evaluate(x_evaluated, y_evaluated, verbose=0)
        model.fit(x, y, epochs=1, batch_size=BATCH_SIZE, verbose=0)
        params = {layer.name: layer.get_weights() for layer in model.layers}
        flare.send(flare.FLModel(params=params, params_type="FULL", metrics={"accuracy": accuracy}))


if __name__ == "__main__":
    main()
