"""[federation]: the rounds of a federation: the silos drawn, quorum, evaluation, time limits."""

from collections.abc import Iterable
from typing import ClassVar

from shared.experiment.sections import Count, CountOrZero, Positive, Rule, Section


class FederationSection(Section):
    """The rounds of a federation, by our own round loop or by a Flower strategy."""

    own_rounds_only: ClassVar = (
        "cohort_size",
        "over_selection",
        "min_replies",
        "early_stopping_patience",
        "restore_best",
        "cross_site_evaluation",
    )

    num_rounds: Count = 10
    """Rounds: the cohort trains, the server applies the mean of its updates."""
    min_silos: Count = 1
    """A run begins when so many silos are registered."""

    cohort_size: CountOrZero = 0
    """Silos drawn for each round; 0: all."""
    over_selection: CountOrZero = 0
    """Silos drawn beyond that; the round ends with the first cohort_size results."""
    min_replies: CountOrZero = 0
    """Results that a round needs; 0: of the whole cohort."""
    round_timeout_s: Positive = 600.0
    """Then the round goes on with the silos that have answered."""

    local_epochs: Count = 1
    """Passes of each silo over its own training examples in a round."""
    local_batch_size: CountOrZero = 32
    """0: the silo's whole training data as one batch."""

    evaluate_on_server: bool = True
    """Evaluate the test split of [data] after each round."""
    evaluate_on_silos: bool = True
    """Evaluate each silo's own validation examples."""
    evaluate_every: Count = 1
    """Rounds between evaluations; the last round's weights are always evaluated."""

    early_stopping_patience: CountOrZero = 0
    """Evaluations without a better validation loss; 0: never stop early."""
    restore_best: bool = False
    """End with the weights of the best round instead of the last."""
    cross_site_evaluation: bool = False
    """At the end: each silo's model on each silo's validation examples."""

    strategy: str = ""
    """A Flower Strategy in place of our rounds, 'package.module:Class'."""
    strategy_options: str = ""
    """Its arguments as TOML text: 'beta = 0.2'."""

    silo_timeout_s: Positive = 600.0
    """For silos to connect, and to answer outside of rounds."""

    @property
    def has_own_rounds(self) -> bool:
        """True if our round loop runs, with its checkpoints; else a Flower strategy does."""
        return not self.strategy

    @property
    def selects_by_validation(self) -> bool:
        """True if the silos' validation loss decides when to stop or which weights to keep."""
        return self.early_stopping_patience > 0 or self.restore_best

    def num_drawn(self, num_silos: int) -> int:
        """The silos drawn for a round, of so many that take part.

        >>> FederationSection(min_silos=5, cohort_size=3, over_selection=1).num_drawn(num_silos=5)
        4
        """
        if self.cohort_size == 0:
            return num_silos
        return min(self.cohort_size + self.over_selection, num_silos)

    def num_wanted(self, num_drawn: int) -> int:
        """The results that end a round early, of so many silos drawn."""
        if self.cohort_size == 0:
            return num_drawn
        return min(self.cohort_size, num_drawn)

    def quorum(self, num_drawn: int) -> int:
        """The results that a round needs, of so many silos drawn: never more than are wanted."""
        wanted = self.num_wanted(num_drawn)
        return wanted if self.min_replies == 0 else min(self.min_replies, wanted)

    def is_evaluated(self, round_number: int) -> bool:
        """True if the weights after this round are evaluated; round 0 is the initial weights."""
        return round_number % self.evaluate_every == 0 or round_number == self.num_rounds

    def stops_early(self, evaluations_since_best: int) -> bool:
        """True if the run ends after so many evaluations without a better validation loss."""
        return 0 < self.early_stopping_patience <= evaluations_since_best

    def rules(self) -> Iterable[Rule]:
        yield Rule(
            is_broken=self.min_silos < self.cohort_size,
            keys=("federation.min_silos", "federation.cohort_size"),
            message=(
                "federation.min_silos must reach federation.cohort_size; received"
                f" {self.min_silos} and {self.cohort_size}. Raise min_silos or lower cohort_size."
            ),
        )

        yield Rule(
            is_broken=self.over_selection > 0 and self.cohort_size == 0,
            keys=("federation.over_selection", "federation.cohort_size"),
            message=(
                "federation.over_selection draws silos beyond cohort_size; received"
                f" {self.over_selection} with cohort_size = 0, all silos. Set"
                " federation.cohort_size or over_selection = 0."
            ),
        )

        yield Rule(
            is_broken=0 < self.cohort_size < self.min_replies,
            keys=("federation.min_replies", "federation.cohort_size"),
            message=(
                "federation.min_replies cannot exceed federation.cohort_size; received"
                f" {self.min_replies} and {self.cohort_size}. Lower min_replies or raise"
                " cohort_size."
            ),
        )
