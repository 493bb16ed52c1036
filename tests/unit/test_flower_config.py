"""Flower's copy of the defaults in pyproject.toml: written and checked by a command."""

import tomllib
from pathlib import Path

import pytest

from shared.experiment import Experiment, flatten
from tools import flower_config

BEFORE = '[project]\nname = "mine"   # as it is\n\n# Of the defaults.\n'
BLOCK = "[tool.flwr.app.config]\nseed = 7\n\n[tool.flwr.app.config.data]\nold_key = 1\n"
AFTER = '\n\n# Of another table: x = 1\n[tool.other]\nconfig = "[tool.flwr.app.config]"\n\n\n'


def test_the_copy_in_pyproject_is_the_defaults_key_by_key_and_type_by_type(project: Path):
    tables = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    declared = flatten(tables["tool"]["flwr"]["app"]["config"])
    defaults = Experiment().to_flat()
    assert declared == defaults
    assert [type(declared[key]) for key in defaults] == [type(value) for value in defaults.values()]
    assert flower_config.main(["--check"]) == 0


@pytest.mark.parametrize("after", ["", "\n", AFTER, AFTER.lstrip(), "[tool.flwr.app.configs]\n"])
@pytest.mark.parametrize("block", [BLOCK, "[tool.flwr.app.config]\n"])
def test_writing_replaces_the_block_and_leaves_the_rest_byte_for_byte(
    tmp_path: Path, block: str, after: str
):
    path = tmp_path / "pyproject.toml"
    path.write_bytes((BEFORE + block + after).encode())
    assert flower_config.main(["--write"], path) == 0
    written = path.read_bytes().decode()
    assert written.startswith(BEFORE + "[tool.flwr.app.config]\n")
    assert written.endswith('mlflow = ""\n' + after)
    config = tomllib.loads(written)["tool"]["flwr"]["app"]["config"]
    assert config == Experiment().model_dump()


def test_a_copy_that_is_not_the_defaults_is_refused_with_the_remedy_which_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "pyproject.toml"
    path.write_text(BEFORE + BLOCK + AFTER)
    assert flower_config.main(["--check"], path) == 1
    assert "Run make format." in capsys.readouterr().err
    assert path.read_text() == BEFORE + BLOCK + AFTER
    assert flower_config.main(["--write"], path) == 0
    assert flower_config.main(["--check"], path) == 0


def test_a_file_without_the_block_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "pyproject.toml"
    path.write_text(BEFORE)
    assert flower_config.main(["--write"], path) == 2
    assert "There must be a line [tool.flwr.app.config]" in capsys.readouterr().err
    assert path.read_text() == BEFORE
