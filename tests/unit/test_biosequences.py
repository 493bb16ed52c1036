"""Sequences of DNA."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.data import Dataset
from shared.data.readers.biosequences import Record, one_hot, read_sequences, write_fasta
from shared.data.readers.promoters import (
    MINUS_10,
    MINUS_35,
    SPACINGS,
    _place_box,
    simulate_promoters,
)
from shared.data.sources import load_examples, save_examples
from shared.experiment import DataSection


def read(path: Path, content: str | bytes) -> list[Record]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_sequences(path))


def test_what_is_written_is_read_back(tmp_path: Path):
    records = [
        Record("a", "ACGT" * 40, "label=x kind=y"),
        Record("b", "N"),
        Record("c", "ACGU" * 15, "label=z"),
    ]
    write_fasta(tmp_path / "s.fasta", records)
    assert list(read_sequences(tmp_path / "s.fasta")) == records
    (tmp_path / "s.fa.gz").write_bytes(gzip.compress((tmp_path / "s.fasta").read_bytes()))
    assert list(read_sequences(tmp_path / "s.fa.gz")) == records
    assert records[0].fields == {"label": "x", "kind": "y"}


def test_files_of_many_makers_are_read(tmp_path: Path):
    assert read(tmp_path / "s.fa", ">a one\r\nac\r\ngt\r\n\r\n>b\nTT") == [
        Record("a", "ACGT", "one"),
        Record("b", "TT"),
    ]
    found = read(tmp_path / "s.fastq", "@r1 x=1\nACG\n+\nI!5\n@r2\nT\n+r2\n~\n\n")
    assert found == [Record("r1", "ACG", "x=1", (40, 0, 20)), Record("r2", "T", "", (93,))]


BAD = {
    "no header": ("s.fa", "ACGT\n", "line 1: Expected '>' .* but got 'ACGT'"),
    "no name": ("s.fa", ">\nACGT\n", "record 1 has no name"),
    "no letters": ("s.fa", ">a\n>b\nA\n", r"record 1 \(a\) has no letters"),
    "a foreign letter": ("s.fa", ">a\nAC\nG-T\n", r"record 1 \(a\) holds '-'"),
    "a name twice": ("s.fa", ">a\nA\n>a\nC\n", "record 2 has the name 'a', which came before"),
    "other bytes": ("s.fa", b">a\n\xff\xfe\n", "cannot be read as a file of sequences"),
    "no gzip": ("s.fa.gz", b"\x1f\x8b>a\nACGT\n", "cannot be read as a file of sequences"),
    "a cut off record": ("s.fq", "@a\nACG\n+\n", "line 4: Premature end of file"),
    "no plus": ("s.fq", "@a\nACG\nIII\nIII\n", r"line 3: Line expected to start with '\+'"),
    "too few scores": ("s.fq", "@a\nACG\n+\nII\n", "line 4: Length of sequence and qual"),
    "other names": ("s.fq", "@a\nA\n+b\nI\n", r"line 3: .* don't match \('a' != 'b'\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_file_is_told_with_its_line(tmp_path: Path, case: str):
    name, content, words = BAD[case]
    with pytest.raises(ValueError, match=rf"{name}.*{words}"):
        read(tmp_path / name, content)


@pytest.mark.parametrize("name", ["s.FASTA", "s.fna", "s.fa.gz", "s.Fa.GZ"])
def test_capitals_other_endings_and_a_gz_that_is_none_are_read(tmp_path: Path, name: str):
    (tmp_path / name).write_text(">a label=x\nAC\n>b label=y\nGT\n")
    examples = load_examples(DataSection(name=str(tmp_path / name)))
    assert isinstance(examples, Dataset)
    assert examples.classes == ("x", "y")


def test_a_truncated_gzip_file_is_told(tmp_path: Path):
    whole = gzip.compress(b">a\n" + b"ACGT" * 5000)
    with pytest.raises(ValueError, match="Is it whole"):
        read(tmp_path / "s.fa.gz", whole[: len(whole) // 2])


def test_one_hot_is_what_its_letters_stand_for():
    x = one_hot(["ACGTU", "RN", "SW"], 4)
    assert x.dtype == np.float32
    assert x.argmax(axis=2)[0].tolist() == [0, 1, 2, 3]
    assert x[1].tolist() == [[0.5, 0, 0.5, 0], [0.25] * 4, [0] * 4, [0] * 4]
    assert x[2, :2].tolist() == [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5]]


def test_simulated_promoters_hold_both_boxes_at_a_stated_distance():
    records = simulate_promoters(200, 60, seed=0, mutation_rate=0.0)
    for record in records:
        distances = [
            j - i - len(MINUS_35)
            for i in range(60)
            for j in range(60)
            if record.sequence.startswith(MINUS_35, i) and record.sequence.startswith(MINUS_10, j)
        ]
        is_promoter = bool(set(distances) & set(SPACINGS))
        assert record.fields["label"] == ("promoter" if is_promoter else "background")
    alone = [
        r
        for r in records
        if "background" in r.description and (MINUS_35 in r.sequence or MINUS_10 in r.sequence)
    ]
    assert len(alone) >= 50
    assert simulate_promoters(20, 60, seed=0) == simulate_promoters(20, 60, seed=0)
    assert simulate_promoters(20, 60, seed=0) != simulate_promoters(20, 60, seed=1)


def test_letters_of_the_background_are_alike_and_boxes_mutate_at_the_stated_rate():
    records = simulate_promoters(2000, 60, seed=1, mutation_rate=0.0)
    plain = "".join(r.sequence for i, r in enumerate(records) if i % 4 == 3)
    share = plain.count("G") / len(plain)
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(plain))
    rng, letters = np.random.default_rng(0), np.full(6 * 3000, "N")
    for start in range(0, len(letters), 6):
        _place_box(letters, start, MINUS_10, rng, mutation_rate=0.2)
    mutated = np.mean(letters != np.tile(list(MINUS_10), 3000))
    assert abs(mutated - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(letters))
    assert set(letters) == set("ACGT")


def test_a_file_of_sequences_is_a_data_set(tmp_path: Path):
    write_fasta(tmp_path / "s.fasta", simulate_promoters(40, 50, seed=0))
    dataset = load_examples(DataSection(name=str(tmp_path / "s.fasta")))
    assert isinstance(dataset, Dataset)
    assert dataset.x.shape == (40, 50, 4)
    assert dataset.classes == dataset.schema.classes == ("background", "promoter")
    assert dataset.y.tolist() == [1, 0] * 20
    with pytest.raises(
        ValueError, match=r"as kind=\.\.\. \(data\.label\); received none in 'seq0' \(40 such\)"
    ):
        load_examples(DataSection(name=str(tmp_path / "s.fasta"), label="kind"))


def test_the_task_is_heeded_for_sequences_too(tmp_path: Path):
    path = tmp_path / "s.fasta"
    write_fasta(path, simulate_promoters(8, 50, seed=0))
    dataset = load_examples(DataSection(name=str(path), task="reconstruction"))
    assert isinstance(dataset, Dataset)
    assert dataset.schema.target_shape == dataset.schema.input_shape == (50, 4)
    with pytest.raises(ValueError, match=r"data\.task = 'regression' does not fit .*s\.fasta"):
        load_examples(DataSection(name=str(path), task="regression"))


def test_the_built_in_promoters_are_two_even_classes():
    dataset = load_examples(DataSection(name="promoters"))
    assert isinstance(dataset, Dataset)
    assert (dataset.x.shape, dataset.num_classes) == ((2000, 60, 4), 2)
    assert np.bincount(dataset.y).tolist() == [1000, 1000]


def test_named_classes_and_groups_survive_a_file_of_arrays(tmp_path: Path):
    """What a silo's part of a built-in set is written to: the silos and the server must mean the
    same classes.
    """
    dataset = replace(load_examples(DataSection(name="promoters")), groups=np.arange(2000) // 2)
    read = load_examples(DataSection(name=str(save_examples(tmp_path / "part", dataset))))
    assert read.schema == dataset.schema
    assert read.classes == ("background", "promoter")
    np.testing.assert_array_equal(read.groups, dataset.groups)
    np.savez(tmp_path / "wrong.npz", x=read.x, y=read.y, classes=np.array(["one"]))
    with pytest.raises(
        ValueError,
        match=r"wrong\.npz: classes must be the different names of the 2 classes; received",
    ):
        load_examples(DataSection(name=str(tmp_path / "wrong.npz")))
