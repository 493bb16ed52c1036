"""The data of the silos on this machine: the experiment's own, partitioned, or files named by the
user.
"""

from collections.abc import Sequence
from pathlib import Path

from fl_app.silo.settings import check_silo_name
from shared.data import load_examples, split_pool
from shared.data.sources import save_examples
from shared.experiment import Experiment


def partition_data(experiment: Experiment, num_silos: int, folder: Path) -> dict[str, str]:
    """Partitions the experiment's data, less the test split, into files of the folder.

    Returns the path of each silo's data by the silo's name, silo-0 and so on.
    """
    # Seconds to import: flwr-datasets brings pandas, pyarrow, seaborn.
    from shared.data.partition import partition

    examples = load_examples(experiment.data)
    pool, _ = split_pool(examples, experiment.seed, experiment.data.test_fraction)
    silos = {}
    for i, part in enumerate(partition(experiment.partition, pool, num_silos, experiment.seed)):
        silo = f"silo-{i}"
        silos[silo] = str(save_examples(folder / silo, part))
    return silos


def own_data(assignments: Sequence[str], experiment: Experiment) -> dict[str, str]:
    """The data by silo in assignments NAME=DATA, files by their absolute path.

    Raises ValueError for what is no assignment, for names that repeat, and if the server would test
    on the data of a silo.
    """
    silos: dict[str, str] = {}
    for assignment in assignments:
        name, equals, data = assignment.partition("=")
        if not (name and equals and data):
            raise ValueError(
                f"--silo takes NAME=DATA; received {assignment!r}. Example: --silo hospital-a=a.csv"
            )
        check_silo_name(name)
        if name in silos:
            raise ValueError(f"Every silo needs a name of its own; received {name!r} twice.")
        silos[name] = str(Path(data).resolve()) if Path(data).exists() else data

    tested_on = str(Path(experiment.data.name).resolve())
    if experiment.federation.evaluate_on_server and tested_on in silos.values():
        raise ValueError(
            "The server would test on examples that a silo trains on; received data.name ="
            f" {experiment.data.name!r}, a silo's own. Name other data to test on, or set"
            " federation.evaluate_on_server = false."
        )
    return silos
