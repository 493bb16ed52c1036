"""[data]: the examples, the roles of their columns, and what is held out of training."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from shared.experiment.sections import MAX_INTEGER, Fraction, Rule, Section


class DataSection(Section):
    """The examples. `name`: built-in, a path, `keras:NAME` or `hf:NAME`.

    Columns are listed as in CSV: "age, sex".
    """

    name: str = "digits"
    """A built-in set, the path of a file or a folder, keras:NAME or hf:OWNER/NAME."""
    label: str = "label"
    """The column that holds the target: of numbers, or of names of classes."""
    task: Literal["auto", "classification", "regression", "reconstruction"] = "auto"
    """auto: whole-number and text targets are classes; reconstruction: the targets are the inputs.
    """

    features: str = ""
    """Columns to learn from; empty: all that have no other role."""
    categorical: str = ""
    """Those of them that hold categories, each of which becomes an input of 0 or 1."""
    weight: str = ""
    """The column of sample weights."""
    ignore: str = ""
    """Columns that are no features where data.features is empty: row numbers, notes. A file may
    lack them."""
    id: str = ""
    """The column that identifies an example: never learnt from, and without duplicates."""
    group: str = ""
    """The column of groups (a patient, a document): no group is in two splits, or at two silos."""

    classes: str = ""
    """All classes by name, in the order of the model's outputs; empty: those that occur."""
    scaling: Literal["auto", "none", "standard"] = "auto"
    """auto: numbers of tables as standard deviations."""
    missing: Literal["refuse", "fill"] = "refuse"
    """fill: numbers with the mean of the training examples, categories with none."""
    missing_codes: str = ""
    """Further codes of a gap, beside the usual ones: "999, unknown"."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: all classes have the same weight in training."""

    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """Of CSV files."""
    decimal: Literal[".", ","] = "."
    """The decimal sign of numbers in text."""
    thousands: Literal["", ",", ".", " ", "'"] = ""
    """The sign between their thousands; empty: none."""
    encoding: str = "utf-8"
    """Of text files."""
    sequence_length: Annotated[int, Field(ge=2, le=MAX_INTEGER)] = 128
    """Ids of an example of text."""
    image_size: str = ""
    """HEIGHTxWIDTH to which images of a folder are resized; empty: all have one size."""
    augmentation: str = ""
    """Of training images: "flip", "shift" or "flip, shift"."""

    stream: bool = False
    """Parquet and TFRecord: the features stay on disk, encoded, and are read by batches."""
    cache: str = ""
    """The directory where they are kept; empty: .encoded beside the file."""

    test_fraction: Fraction = 0.2
    """Of all examples, kept for the test: by the server, in a federation."""
    validation_fraction: Fraction = 0.1
    """Of what is left, held out of training: at each silo of its own examples."""

    @property
    def has_validation_examples(self) -> bool:
        return self.validation_fraction > 0

    def rules(self) -> Iterable[Rule]:
        held_out = self.test_fraction + self.validation_fraction
        yield Rule(
            is_broken=held_out >= 1.0,
            keys=("data.test_fraction", "data.validation_fraction"),
            message=(
                "data.test_fraction + data.validation_fraction must be below 1; received"
                f" {held_out:g}. Lower one of them."
            ),
        )
        yield Rule(
            is_broken=self.decimal == self.thousands,
            keys=("data.decimal", "data.thousands"),
            message=(
                "data.decimal and data.thousands must be different signs; received"
                f" {self.decimal!r} for both. Change one of them."
            ),
        )
        yield Rule(
            is_broken=bool(self.classes) and self.task in ("regression", "reconstruction"),
            keys=("data.classes", "data.task"),
            message=(
                f"data.classes is for a classification; received data.task = {self.task!r}. Leave"
                " one of them out."
            ),
        )
