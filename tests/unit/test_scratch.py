"""Temporary folders: one's own, those of other programs that live, and those of killed ones."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shared.scratch import PREFIX, scratch_folder

HOLDER = """
import time
from shared.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "data").touch()
    print(folder, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_is_there_for_the_block_and_gone_after_it(parent: Path):
    with scratch_folder() as folder:
        (folder / "data").touch()
        assert [*parent.iterdir()] == [folder]
    assert [*parent.iterdir()] == []


def test_the_folder_of_a_living_program_stays_and_that_of_a_killed_one_goes(parent: Path):
    """Whatever the process ids: those of other containers mean nothing here."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    theirs = Path(holder.stdout.readline().strip())
    with scratch_folder() as ours:
        assert {*parent.iterdir()} == {theirs, ours}
        assert (theirs / "data").is_file()

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (theirs / "data").is_file()
    with scratch_folder() as ours:
        assert [*parent.iterdir()] == [ours]


def test_other_programs_folders_are_left_alone(parent: Path):
    others = {
        parent / name for name in ("archipelago-999999-abc", "archipelago-x", f".{PREFIX}new")
    }
    for other in others:
        other.mkdir()
    with scratch_folder():
        pass
    assert {*parent.iterdir()} == others
