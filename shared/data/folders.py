"""Folders: of images or of texts, a subfolder for each class; or of texts alone, for a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.data.dataset import Dataset
from shared.data.texts import VOCABULARY_SIZE, as_ids, language_model_dataset
from shared.experiment import DataSection

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
TEXTS = (".txt", ".md")


def read_folder(folder: Path, config: DataSection) -> Dataset:
    """The examples in a folder; classes are the names of its subfolders, hidden files are left out.

    Images: float32 in [0, 1], shape (n, height, width, channels), one channel if all are grey. Texts: their bytes as
    ids, cut or padded to data.sequence_length; without subfolders the examples of a language model. Raises ValueError,
    naming the file, for one that cannot be read.
    """
    files = sorted(_files(folder))
    kinds = {file.suffix.lower() for file in files}
    if not files or not (kinds <= {*IMAGES} or kinds <= {*TEXTS}):
        found = ", ".join(sorted(kind or "files without one" for kind in kinds)) or "nothing"
        raise ValueError(
            f"A folder of examples holds images ({', '.join(IMAGES)}) or texts ({', '.join(TEXTS)}), a subfolder for "
            f"each class; received {folder} with {found}. Take out what does not belong there."
        )
    if kinds <= {*TEXTS} and all(file.parent == folder for file in files):
        documents = [_read_text(file, config.encoding) for file in files]
        return language_model_dataset(documents, config.sequence_length)
    classes, y = _classes(folder, files)
    if kinds <= {*TEXTS}:
        texts = [_read_text(file, config.encoding) for file in files]
        x = as_ids(texts, config.sequence_length)
        return Dataset(x, y, len(classes), vocabulary_size=VOCABULARY_SIZE, classes=classes)
    return Dataset(_read_images(files, config.image_size), y, len(classes), classes=classes)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _classes(folder: Path, files: list[Path]) -> tuple[tuple[str, ...], np.ndarray]:
    names = []
    for file in files:
        *parents, _ = file.relative_to(folder).parts
        if len(parents) != 1:
            raise ValueError(
                f"{folder} must have a subfolder for each class, with its files; received {file}. Move it there."
            )
        names.append(parents[0])
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."))
    if empty := sorted(set(classes) - set(names)):
        raise ValueError(f"{folder}: the class {empty[0]!r} has no examples. Add some, or remove that subfolder.")
    return classes, np.array([classes.index(name) for name in names], np.int32)


def _read_text(file: Path, encoding: str) -> str:
    try:
        return file.read_text(encoding=encoding)
    except (UnicodeError, LookupError) as error:
        raise ValueError(f"{file} is not in the encoding {encoding!r}: {error}. Set data.encoding.") from None


def _read_images(files: list[Path], image_size: str) -> np.ndarray:
    from PIL import Image as pillow

    images = []
    for file in files:
        try:
            with pillow.open(file) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise ValueError(
                f"{file} cannot be read as an image: {str(error).splitlines()[0]} Is it whole? Replace it."
            ) from None
        images.append((str(file), image))
    return stack_images(images, image_size)


def stack_images(images: Sequence[tuple[str, Image]], image_size: str) -> np.ndarray:
    """Named images as float32 in [0, 1], shape (n, height, width, channels); one channel if all are grey.

    `image_size` is HEIGHTxWIDTH to resize to, or empty. Raises ValueError if it is and sizes differ.
    """
    from PIL.Image import Resampling

    size = parse_image_size(image_size)
    first_name, first = images[0]
    for name, image in images:
        if not size and image.size != first.size:
            (width, height), (first_width, first_height) = image.size, first.size
            raise ValueError(
                f"Images must have one size; received {name} of {height}x{width} and {first_name} of "
                f"{first_height}x{first_width}. Set data.image_size, for example '{first_height}x{first_width}'."
            )
    mode = "L" if all(image.mode in ("1", "L", "LA") for _, image in images) else "RGB"
    alike = (image.resize(size[::-1], Resampling.BILINEAR) if size else image for _, image in images)
    pixels = np.stack([np.asarray(image.convert(mode), np.float32) for image in alike]) / np.float32(255)
    return pixels[..., None] if mode == "L" else pixels


def parse_image_size(text: str) -> tuple[int, int] | None:
    """(height, width) of '32x48'; None of an empty text.

    >>> parse_image_size("32x48")
    (32, 48)
    """
    if not text:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"data.image_size is HEIGHTxWIDTH, such as '32x32'; received {text!r}.")
    return int(height), int(width)
