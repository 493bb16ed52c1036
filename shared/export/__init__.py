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

from shared.export.formats import FORMATS, Format, FormatError

if TYPE_CHECKING:
    import keras

    from shared.data import Schema

__all__ = ["FORMATS", "export"]

NEEDED = ("experiment.toml", "schema.json", "model.keras")  # of a run's record


def export(run: Path, format_name: str, output: Path | None = None) -> Path:
    """Writes the model of a finished run in a format of `FORMATS`; returns its path.

    Guarantee: read back by the format's own runtime, the file predicts what the run's model
    predicts, within the format's tolerance, on drawn examples with gaps and unknown categories;
    otherwise nothing is left behind. Beside it lies `PATH.inputs.json`, how to feed it.

    Raises ValueError for a run that has no model, a path that exists, or a model that the format
    cannot hold.
    """
    form = FORMATS[format_name]
    path = output or run / f"export{form.suffix}"
    _check_run(run)
    _check_free(path)

    from shared.export.serving import describe  # with what is slow to import: after mistakes

    schema, model = _read_run(run)
    _write(form, model, schema, path, f"The model of {run} cannot be exported as {format_name}")
    notes = json.dumps(describe(schema, form), indent=2) + "\n"
    Path(f"{path}.inputs.json").write_text(notes, encoding="utf-8")
    return path


def _check_run(run: Path) -> None:
    """Raises ValueError unless the directory is that of a finished run."""
    missing = [name for name in NEEDED if not (run / name).is_file()]
    if missing:
        lack = f"lacks {missing[0]}" if run.exists() else "does not exist"
        raise ValueError(
            "An export takes the directory of a finished run, with experiment.toml, schema.json and"
            f" model.keras; received {run}, which {lack}. Name one, for example runs/NAME."
        )


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
    from shared.data.schema import schema_from_json
    from shared.experiment import load_experiment
    from shared.zoo import saved_model

    try:
        schema = schema_from_json(json.loads((run / "schema.json").read_text(encoding="utf-8")))
        config = load_experiment(run / "experiment.toml").model
        return schema, saved_model(config, schema, run / "model.keras")
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise ValueError(
            f"The record in {run} cannot be read: {str(error).splitlines()[0]}"
        ) from None


def _write(form: Format, model: keras.Model, schema: Schema, path: Path, refusal: str) -> None:
    """Writes the file, reads it back and compares. Whatever stops this, Ctrl-C too, no file stays.

    Raises ValueError, which begins with `refusal`.
    """
    from shared.export.check import largest_difference
    from shared.export.serving import serving_model
    from shared.zoo.own import describe_error

    remedy = f"Choose another --format: {', '.join(FORMATS)}."
    is_good = False
    try:
        form.save(serving_model(model, schema, form), path)
        difference = largest_difference(form, path, model, schema)
        is_good = difference <= form.tolerance
    except FormatError as error:
        raise ValueError(f"{refusal}: {error}. {remedy}") from error
    except Exception as error:  # converters raise errors of any type, some of hundreds of lines
        raise ValueError(f"{refusal}: {describe_error(error)}. {remedy}") from error
    finally:
        if not is_good:
            _remove(path)

    if not is_good:
        raise ValueError(
            f"An export must predict what the model predicts, to {form.tolerance:g}; received"
            f" {path} whose predictions differ by {difference:g}. It was removed."
            f" {remedy}"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
