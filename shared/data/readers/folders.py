"""Folders of images or texts by class, or of texts alone for a language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.data.dataset import Dataset
from shared.data.readers.texts import VOCABULARY_SIZE, as_ids, language_model_dataset
from shared.experiment import DataSection

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
TEXTS = (".txt", ".md")
GREY_MODES = ("1", "L", "LA")  # Pillow's: black and white, grey, grey with transparency


def read_folder(folder: Path, config: DataSection) -> Dataset:
    """Returns the examples in a folder; classes are the names of its subfolders.

    | files | examples |
    |---|---|
    | images | float32 in [0, 1], shape (n, height, width, channels); one channel if all are grey |
    | texts by class | bytes as int32 ids, cut or padded to data.sequence_length |
    | texts without subfolders | those of a language model, data.sequence_length bytes each |

    Hidden files and folders are left out. Raises ValueError, naming the file, for one that cannot
    be read or does not belong there.
    """
    files = _visible_files(folder)
    kinds = {file.suffix.lower() for file in files}
    are_texts = kinds <= set(TEXTS)
    are_images = kinds <= set(IMAGES)
    if not files or not (are_texts or are_images):
        received = ", ".join(sorted(kind or "files without one" for kind in kinds)) or "nothing"
        raise ValueError(
            f"A folder of examples holds images ({', '.join(IMAGES)}) or texts"
            f" ({', '.join(TEXTS)}), a subfolder for each class; received {folder} with {received}."
            " Take out what does not belong there."
        )

    if are_texts and all(file.parent == folder for file in files):
        documents = [_read_text(file, config.encoding) for file in files]
        return language_model_dataset(documents, config.sequence_length)

    classes, y = _read_classes(folder, files)
    if are_texts:
        texts = [_read_text(file, config.encoding) for file in files]
        x = as_ids(texts, config.sequence_length)
        return Dataset(x, y, len(classes), vocabulary_size=VOCABULARY_SIZE, classes=classes)
    x = _read_images(files, config.image_size)
    return Dataset(x, y, len(classes), classes=classes)


def stack_images(images: Sequence[tuple[str, Image]], image_size: str) -> np.ndarray:
    """Returns images as float32 in [0, 1], shape (n, height, width, channels).

    One channel if all are grey, else three. `images`: each with the name for messages.
    `image_size`: HEIGHTxWIDTH to resize to; empty: all must have one size, else ValueError.
    """
    from PIL.Image import Resampling

    size = parse_image_size(image_size)
    if size is None:
        _check_one_size(images)

    is_grey = all(image.mode in GREY_MODES for _, image in images)
    pixels = []
    for _, image in images:
        if size is not None:
            height, width = size
            image = image.resize((width, height), Resampling.BILINEAR)
        pixels.append(np.asarray(image.convert("L" if is_grey else "RGB"), np.float32))

    stacked = np.stack(pixels) / np.float32(255)
    return stacked[..., None] if is_grey else stacked


def parse_image_size(text: str) -> tuple[int, int] | None:
    """Returns (height, width) of '32x48'; None of an empty text. Raises ValueError otherwise.

    >>> parse_image_size("32x48")
    (32, 48)
    """
    if not text:
        return None
    height, _, width = text.partition("x")
    are_numbers = height.isdecimal() and width.isdecimal()
    if not are_numbers or int(height) == 0 or int(width) == 0:
        raise ValueError(f"data.image_size is HEIGHTxWIDTH, such as '32x32'; received {text!r}.")
    return int(height), int(width)


def _check_one_size(images: Sequence[tuple[str, Image]]) -> None:
    first_name, first = images[0]
    for name, image in images:
        if image.size != first.size:
            width, height = image.size
            first_width, first_height = first.size
            raise ValueError(
                f"Images must have one size; received {name} of {height}x{width} and {first_name}"
                f" of {first_height}x{first_width}. Set data.image_size, for example"
                f" '{first_height}x{first_width}'."
            )


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without those whose path has a part that is hidden."""
    files = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not is_hidden:
            files.append(path)
    return sorted(files)


def _read_classes(folder: Path, files: list[Path]) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the subfolders, sorted, and each file's place among them."""
    names = []
    for file in files:
        *parents, _ = file.relative_to(folder).parts
        if len(parents) != 1:
            raise ValueError(
                f"{folder} must have a subfolder for each class, with its files; received {file}."
                " Move it there."
            )
        names.append(parents[0])

    subfolders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    classes = tuple(sorted(subfolder.name for subfolder in subfolders))
    empty = sorted(set(classes) - set(names))
    if empty:
        raise ValueError(
            f"{folder}: the class {empty[0]!r} has no examples. Add some, or remove that subfolder."
        )
    return classes, np.array([classes.index(name) for name in names], np.int32)


def _read_text(file: Path, encoding: str) -> str:
    try:
        return file.read_text(encoding=encoding)
    except (UnicodeError, LookupError) as error:
        raise ValueError(
            f"{file} is not in the encoding {encoding!r}: {error}. Set data.encoding."
        ) from None


def _read_images(files: list[Path], image_size: str) -> np.ndarray:
    from PIL import Image as pillow
    from PIL import ImageOps

    images = []
    for file in files:
        try:
            with pillow.open(file) as image:
                upright = ImageOps.exif_transpose(image)  # a camera may store how it was held
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{file} cannot be read as an image: {reason} Is it whole? Replace it."
            ) from None
        images.append((str(file), upright))
    return stack_images(images, image_size)
