"""[training]: central training, in one process or on the ranks of a cluster."""

from collections.abc import Iterable
from typing import Literal

from shared.experiment.sections import Count, CountOrZero, Rule, Section


class TrainingSection(Section):
    """Central training: one process or the ranks of a cluster."""

    epochs: Count = 10
    """Passes over the training examples."""
    global_batch_size: Count = 32
    """Examples per step over all ranks."""
    per_rank_batch_size: CountOrZero = 0
    """If set, the global batch is this times world_size."""

    scale_learning_rate: bool = False
    """Linear scaling: learning_rate times world_size."""
    warmup_epochs: CountOrZero = 0
    """Epochs in which the rate climbs from learning_rate to the scaled rate."""

    early_stopping_patience: CountOrZero = 0
    """Epochs without a better validation loss; 0: never stop early."""
    restore_best: bool = False
    """End with the weights of the best epoch instead of the last."""

    loss: str = "auto"
    """auto: cross-entropy for classes, mean squared error for numbers."""
    aggregation: Literal["average", "adasum"] = "average"
    """The reduction of the ranks' gradients to one."""
    sync_batch_norm: bool = False
    """Batch normalisation with the statistics of the global batch."""

    @property
    def selects_by_validation(self) -> bool:
        """True if the validation loss decides when to stop or which weights to keep."""
        return self.early_stopping_patience > 0 or self.restore_best

    @property
    def averages_gradients(self) -> bool:
        return self.aggregation == "average"

    @property
    def batch_grows_with_ranks(self) -> bool:
        return self.per_rank_batch_size > 0

    def batch_size(self, world_size: int) -> int:
        """The examples per step over so many ranks.

        >>> TrainingSection(per_rank_batch_size=8).batch_size(world_size=3)
        24
        """
        if self.batch_grows_with_ranks:
            return self.per_rank_batch_size * world_size
        return self.global_batch_size

    def stops_early(self, epochs_since_best: int) -> bool:
        """True if the run ends after so many epochs without a better validation loss."""
        return 0 < self.early_stopping_patience <= epochs_since_best

    def rules(self) -> Iterable[Rule]:
        scales_rate = self.scale_learning_rate or self.warmup_epochs > 0
        yield Rule(
            is_broken=scales_rate and not self.batch_grows_with_ranks,
            keys=(
                "training.scale_learning_rate",
                "training.warmup_epochs",
                "training.per_rank_batch_size",
            ),
            message=(
                "training.scale_learning_rate and training.warmup_epochs follow a global batch that"
                " grows with the number of ranks; received per_rank_batch_size = 0. Set"
                " training.per_rank_batch_size."
            ),
        )

        yield Rule(
            is_broken=self.warmup_epochs > 0 and not self.scale_learning_rate,
            keys=("training.warmup_epochs", "training.scale_learning_rate"),
            message=(
                "training.warmup_epochs climbs to the scaled rate; received warmup_epochs ="
                f" {self.warmup_epochs} with scale_learning_rate = false. Set"
                " training.scale_learning_rate = true."
            ),
        )
