"""The turns of a benchmark's contenders: one runs at a time, while the others are stopped.

A turn takes a few seconds, so a machine whose speed drifts meets all alike. A contender reports
that it is ready for its next slice, as a line of the file NEWS, and waits for a byte from the pipe
GO. Its `Contestant` stops all its processes until their turn has come. Standard library only:
PyTorch's environment reads this file too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NEWS, GO = "news.jsonl", "go"


@dataclass(frozen=True)
class Turns:
    """The contender's side, on each of its ranks; the root reports for them.

    mean: the mean over ranks of a number from each, which therefore also waits for all.
    """

    folder: Path
    num_slices: int  # of each model
    is_root: bool
    mean: Callable[[float], float]

    def begin(self) -> None:
        """Returns, on all ranks, when it is this contender's turn."""
        if self.is_root:
            self._write({"ready": True})
            with (self.folder / GO).open("rb", buffering=0) as pipe:
                pipe.read(1)
        self.mean(0.0)

    def report(self, model: str, samples_per_s: float) -> None:
        """Reports the figure of a slice."""
        if self.is_root:
            self._write({"model": model, "samples_per_s": samples_per_s})

    def _write(self, news: dict[str, object]) -> None:
        with (self.folder / NEWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(news) + "\n")
