"""python -m benchmarks.inspection: what `inspect` costs on large tables.

A long table (1,000,000 x 20) by the CPU seconds of pandas, which only reads it; wide ones, as of
gene expressions, by CPU seconds and memory. Each in a process of its own, by turns.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks.results import Goal, goals_table, medians

TABLES = {"long": (1_000_000, 20), "genes": (200, 20_000), "wide": (40, 150_000)}
WIDE = ("genes", "wide")
MAX_RATIO = 4.0  # CPU of inspect over that of pandas.read_csv
MAX_WIDE_S = 60.0
MAX_WIDE_MB = 2000.0


def write_table(path: Path, num_rows: int, num_columns: int) -> None:
    """Writes random numbers and a label of two classes."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(0)
    values = rng.normal(size=(num_rows, num_columns - 1)).round(6)
    frame = pd.DataFrame(values, columns=[f"x{i}" for i in range(num_columns - 1)])
    frame["label"] = np.where(rng.random(num_rows) < 0.5, "ill", "well")
    frame.to_csv(path, index=False)


def measure(contender: str, path: str) -> dict[str, float]:
    """CPU seconds and the peak of memory in this process, which should be a fresh one."""
    import pandas as pd
    import pyarrow.compute
    import pyarrow.csv  # noqa: F401

    from shared.data.inspection import inspect_file

    started = time.process_time()
    if contender == "pandas":
        pd.read_csv(path)
    else:
        inspect_file(Path(path))
    seconds = time.process_time() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"cpu_s": round(seconds, 2), "peak_mb": round(peak_mb)}


def run(contender: str, path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.inspection", "--measure", contender, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(repetitions: int) -> list[Goal]:
    """Measures all tables; medians against the bounds."""
    seconds: dict[str, dict[str, list[float]]] = {"inspect": {}, "pandas": {}}
    peak_mb = dict.fromkeys(TABLES, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for name, (num_rows, num_columns) in TABLES.items():
            path = Path(folder) / f"{name}.csv"
            write_table(path, num_rows, num_columns)
            for _ in range(repetitions):
                for contender in ("pandas", "inspect") if name == "long" else ("inspect",):
                    figures = run(contender, path)
                    print(f"{name:6} {contender:8} {figures}", flush=True)
                    seconds[contender].setdefault(name, []).append(figures["cpu_s"])
                    if contender == "inspect":
                        peak_mb[name] = max(peak_mb[name], figures["peak_mb"])

    found = medians(seconds)
    ratio = found["inspect"]["long"] / found["pandas"]["long"]
    return [
        Goal("long_cpu_vs_pandas", ratio, MAX_RATIO, "<="),
        *(Goal(f"{name}_cpu_s", found["inspect"][name], MAX_WIDE_S, "<=") for name in WIDE),
        *(Goal(f"{name}_peak_mb", peak_mb[name], MAX_WIDE_MB, "<=") for name in WIDE),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspection", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--measure", nargs=2, metavar=("HOW", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0
    goals = compare(options.repetitions)
    Console(highlight=False).print(goals_table(goals))
    return 0 if all(goal.met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
