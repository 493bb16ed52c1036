"""Exports: the model of a finished run as a file for other programs, checked against the run.

An exported model takes the data as it is and answers in its units: a table's columns in, unscaled,
with gaps (NaN); probabilities of classes, or numbers in the label's unit, out.
`PATH.inputs.json` says what goes where.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from shared.data import Schema
from shared.data.schema import schema_from_json
from shared.experiment import load_experiment
from shared.export.check import largest_difference
from shared.export.formats import FORMATS
from shared.export.serving import describe, serving_model
from shared.run_record import SCHEMA

if TYPE_CHECKING:
    import keras

__all__ = ["FORMATS", "export"]


def export(run: Path, format_name: str, output: Path | None = None) -> Path:
    """Writes the model of a finished run in a format of `FORMATS`; returns its path.

    Guarantee: read back by the format's own runtime, the file predicts what the run's model
    predicts, within the format's tolerance, on drawn examples with gaps and unknown categories;
    otherwise nothing is left behind. Beside it lies `PATH.inputs.json`, how to feed it.

    Raises ValueError for a run that has no model, a path that exists, or a model that the format
    cannot hold.
    """
    form = FORMATS[format_name]
    schema, model = _read_run(run)
    path = output or run / f"export{form.suffix}"
    _check_free(path)

    # Write, read back and compare. Whatever stops this, Ctrl-C too, no file stays.
    served = serving_model(model, schema, form)
    is_good = False
    try:
        form.save(served, path)
        difference = largest_difference(form, path, model, schema)
        is_good = difference <= form.tolerance
    except Exception as error:  # converters raise errors of any type
        raise ValueError(
            f"The model of {run} cannot be exported as {format_name}: {type(error).__name__}:"
            f" {error}. Try another --format: {', '.join(FORMATS)}."
        ) from error
    finally:
        if not is_good:
            _remove(path)
    if not is_good:
        raise ValueError(
            f"An export must predict what the model predicts, to {form.tolerance:g}; received"
            f" {path} whose predictions differ by {difference:g}. It was removed; choose another"
            f" --format: {', '.join(FORMATS)}."
        )

    notes = json.dumps(describe(schema, form), indent=2) + "\n"
    Path(f"{path}.inputs.json").write_text(notes, encoding="utf-8")
    return path


def _check_free(path: Path) -> None:
    if path.exists():
        raise ValueError(
            f"The export {path} exists already. Delete it, or choose another path with -o."
        )
    if not path.parent.is_dir():
        raise ValueError(
            f"The export must lie in a directory that exists; received {path}. Choose another"
            " with -o."
        )


def _read_run(run: Path) -> tuple[Schema, keras.Model]:
    """The schema and the model of a finished run, in float32."""
    import keras

    from shared.zoo import build_model

    for name in ("experiment.toml", SCHEMA, "model.keras"):
        if not (run / name).is_file():
            raise ValueError(
                "An export takes the directory of a finished run, with experiment.toml,"
                f" schema.json and model.keras; received {run}, which lacks {name}. Name one, for"
                " example runs/NAME."
            )
    try:
        schema = schema_from_json(json.loads((run / SCHEMA).read_text(encoding="utf-8")))
        model = keras.models.load_model(run / "model.keras", compile=False)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"The record in {run} cannot be read: {str(error).splitlines()[0]}"
        ) from None

    # Other engines round bfloat16 in other places.
    config = load_experiment(run / "experiment.toml").model
    if config.precision == "float32":
        return schema, model
    plain = config.model_copy(update={"precision": "float32", "adapter": "none", "initial": ""})
    exact = build_model(plain, schema, seed=0)
    exact.set_weights(model.get_weights())
    return schema, exact


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
