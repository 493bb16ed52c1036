"""The best evaluation of a run so far: which weights to keep, and how long ago that was."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Best:
    """The lowest validation loss so far.

    step: the epoch or round whose weights have it; a value of the caller's before the first.
    evaluations_since: those after it, none of which was lower.

    >>> Best().after(1, 0.5).after(2, 0.7).after(3, 0.5)
    Best(step=1, loss=0.5, evaluations_since=2)
    """

    step: int = 0
    loss: float = math.inf
    evaluations_since: int = 0

    def after(self, step: int, loss: float) -> Best:
        """Returns the best after one more evaluation. An equal loss is no better, nor is NaN."""
        if loss < self.loss:
            return Best(step, loss)
        return replace(self, evaluations_since=self.evaluations_since + 1)
