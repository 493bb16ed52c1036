"""Folders of images and of texts: what is read, and what is refused with the file's name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_train.collectives import LocalCommunicator
from dist_train.trainer import train
from fl_app.silo.workbench import _stamp
from shared.data import load_dataset, load_examples
from shared.data.readers.texts import PAD
from shared.data.sources import save_examples
from shared.experiment import DataSection, experiment_from_flat


def write_images(
    folder: Path, mode: str = "L", num_each: int = 3, size: tuple[int, int] = (6, 4)
) -> Path:
    """Dark and bright images, (width, height) pixels."""
    rng = np.random.default_rng(0)
    for name, low in (("bright", 150), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for i in range(num_each):
            shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
            pixels = rng.integers(low, low + 100, shape, dtype=np.uint8)
            Image.fromarray(pixels, mode=mode).save(folder / name / f"{i}.png")
    return folder


def write_texts(folder: Path) -> Path:
    for name, text in (("cats", "The cat sat."), ("dogs", "A dög ran.")):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.txt").write_text(text, encoding="utf-8")
        (folder / name / "b.txt").write_text(text.upper(), encoding="utf-8")
    return folder


def load(folder: Path, **keys: object):
    return load_dataset(DataSection(name=str(folder), **keys))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3)])
def test_images_are_read_with_their_pixels_and_the_names_of_their_folders(
    tmp_path: Path, mode: str, channels: int
):
    folder = write_images(tmp_path / "images", mode)
    (folder / ".DS_Store").write_bytes(b"not ours")
    examples = load(folder)
    assert examples.x.shape == (6, 4, 6, channels)
    assert examples.classes == ("bright", "dark")
    assert examples.y.tolist() == [0, 0, 0, 1, 1, 1]
    first = np.asarray(
        Image.open(folder / "bright" / "0.png").convert("L" if channels == 1 else "RGB")
    )
    np.testing.assert_array_equal(np.rint(examples.x[0].reshape(first.shape) * 255), first)
    assert examples.x.dtype == np.float32


def test_photos_are_read_as_they_were_held(tmp_path: Path):
    folder = write_images(tmp_path / "images", num_each=1)
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    orientation = 0x0112
    turned_back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: 4}
    for value, transpose in turned_back.items():
        exif = Image.Exif()
        exif[orientation] = value
        upright.transpose(transpose).save(folder / "dark" / f"1-{value}.png", exif=exif)
    stored = np.asarray(upright, np.float32) / np.float32(255)
    for image in load(folder).x[2:]:
        np.testing.assert_allclose(image[..., 0], stored, atol=1e-6)


def test_grey_images_among_coloured_ones_become_coloured(tmp_path: Path):
    folder = write_images(tmp_path / "images", "RGB")
    Image.new("L", (6, 4), 51).save(folder / "dark" / "grey.png")
    assert load(folder).x[-1].tolist() == np.full((4, 6, 3), np.float32(0.2)).tolist()


def test_images_of_several_sizes_are_refused_or_resized(tmp_path: Path):
    folder = write_images(tmp_path / "images")
    Image.new("L", (12, 8), 255).save(folder / "dark" / "large.png")
    with pytest.raises(
        ValueError,
        match=r"one size; received .*large.png of 8x12 and .*0.png of 4x6. Set data.image_",
    ):
        load(folder)
    examples = load(folder, image_size="2x3")
    assert examples.x.shape == (7, 2, 3, 1)
    assert (examples.x[-1] == 1).all()
    with pytest.raises(
        ValueError, match=r"data.image_size is HEIGHTxWIDTH, such as '32x32'; received '0x3'"
    ):
        load(folder, image_size="0x3")


def test_texts_are_read_as_bytes_by_class(tmp_path: Path):
    examples = load(write_texts(tmp_path / "texts"), sequence_length=12)
    assert examples.classes == ("cats", "dogs")
    assert bytes(examples.x[0].tolist()) == b"The cat sat."
    assert examples.x[2].tolist() == [*"A dög ran.".encode(), PAD]
    assert examples.vocabulary_size == 257


def test_texts_without_classes_are_for_a_language_model(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abcdef")
    (tmp_path / "b.md").write_text("ghi")
    examples = load(tmp_path, sequence_length=5)
    assert bytes(examples.x.ravel().tolist()) == b"abcdef\n\ngh"
    assert bytes(examples.y.ravel().tolist()) == b"bcdef\n\nghi"


def test_a_folder_trains_and_a_silo_can_have_a_part_of_it(tmp_path: Path):
    folder = write_images(tmp_path / "images", num_each=30)
    keys = {
        "data.name": str(folder),
        "model.name": "cnn",
        "optimizer.learning_rate": 0.05,
        "training.epochs": 5,
    }
    keys |= {"data.augmentation": "flip, shift", "run.directory": str(tmp_path / "run")}
    result = train(experiment_from_flat(keys), LocalCommunicator())
    assert result["metrics"]["test"]["accuracy"] == 1.0
    assert result["confusion"]["classes"] == ["bright", "dark"]
    examples = load_examples(DataSection(name=str(folder)))
    part = load_dataset(
        DataSection(name=str(save_examples(tmp_path / "part", examples.take(np.arange(31)))))
    )
    assert part.classes == ("bright", "dark")
    assert part.x.shape == (31, 4, 6, 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "dark" / "0.png").write_text("no"),
            r"0\.png cannot be read as an image: ",
        ),
        (
            lambda folder: cut(folder / "dark" / "0.png"),
            r"0\.png cannot be read as an image: .* Is it whole\?",
        ),
        (
            lambda folder: (folder / "dark" / "x.csv").write_text("a,b"),
            r"received .*images with \.csv, \.png\. Take",
        ),
        (
            lambda folder: (folder / "none").mkdir(),
            r"the class 'none' has no examples\. Add some, or remove",
        ),
        (
            lambda folder: (folder / "dark" / "0.png").rename(folder / "0.png"),
            r"received .*images/0\.png\. Move it",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, spoil, message: str):
    folder = write_images(tmp_path / "images")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:45])


def test_an_empty_folder_and_texts_in_another_encoding_are_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"received .*empty with nothing"):
        load(tmp_path / "empty")
    folder = write_texts(tmp_path / "texts")
    (folder / "dogs" / "a.txt").write_bytes("A dög.".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"a\.txt is not in the encoding 'utf-8': .* Set data\.encoding"
    ):
        load(folder)
    assert (
        load(folder, encoding="latin-1", sequence_length=8).x[2, 3] == 0xC3
    )  # ö, read and written as UTF-8


def test_a_silo_notices_new_files_without_looking_at_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_images(tmp_path / "images", num_each=200)
    num_looks = 0
    stat = Path.stat

    def counted(path: Path, **options: bool):
        nonlocal num_looks
        num_looks += 1
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", counted)
    before = _stamp(str(folder))
    assert num_looks <= 10
    assert _stamp(str(folder)) == before
    Image.new("L", (6, 4), 51).save(folder / "dark" / "new.png")
    after = _stamp(str(folder))
    assert after != before
    (folder / "bright" / "0.png").unlink()
    assert _stamp(str(folder)) not in (before, after)
