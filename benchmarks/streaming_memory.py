"""python -m benchmarks.streaming_memory [--rows N]: a Parquet table on disk and in memory.

Both load and split it and pass once through its training batches, each in a process of its own. The
figure is the peak of anonymous memory (RssAnon) beyond the imports: pages of files, which the
system can drop, do not count.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

NUM_COLUMNS = 40


def anonymous_mib() -> float:
    """The memory of this process beyond pages of files, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"RssAnon:\s+(\d+)", status)
    assert match
    return int(match[1]) / 1024


def measure(path: str, stream: bool) -> dict[str, float]:
    """The peak and the seconds in this process, which should be a fresh one."""
    import filelock  # noqa: F401 (what the loading imports is no part of its cost)
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import tensorflow as tf

    from shared.data import load_examples, split
    from shared.experiment import DataSection
    from shared.training import EpochBatches

    tf.range(3).numpy()  # TensorFlow takes its own memory at the first operation
    before = anonymous_mib()
    peak = before
    started = time.monotonic()
    is_over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.002):
            peak = max(peak, anonymous_mib())

    # Load, split and pass once through the batches while the other thread watches.
    watcher = threading.Thread(target=watch)
    watcher.start()
    config = DataSection(name=path, stream=stream)
    train = split(load_examples(config), config, 0).train  # the rest is freed, as in a run
    for _ in EpochBatches(train, 256, 0).as_tf_dataset():
        pass
    is_over.set()
    watcher.join()
    seconds = time.monotonic() - started
    return {"peak_mib": round(peak - before, 1), "seconds": round(seconds, 1)}


def compare(num_rows: int) -> dict[str, dict[str, float]]:
    """Both ways on the same file of random numbers, 50,000 rows to a row group."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(0)
    columns = {f"c{i}": rng.normal(size=num_rows) for i in range(NUM_COLUMNS)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.parquet"
        frame = pd.DataFrame({**columns, "label": rng.integers(0, 2, num_rows)})
        frame.to_parquet(path, index=False, row_group_size=50_000)
        figures = {"file": {"mb": round(path.stat().st_size / 1e6, 1)}}
        for name in ("streamed", "in_memory"):
            command = [sys.executable, "-m", "benchmarks.streaming_memory"]
            command += ["--measure", str(path), name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures[name] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming_memory")
    parser.add_argument(
        "--rows", type=int, default=1_600_000, help="of the table (default: %(default)s)"
    )
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "HOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    result = (
        measure(options.measure[0], options.measure[1] == "streamed")
        if options.measure
        else compare(options.rows)
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
