"""The silo's program: its refusals, and the settings that it hands on to the SuperNode."""

import signal
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_app.silo.__main__ import main
from fl_app.silo.supervisor import SiloError, Supervisor

# --- the command line


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with files that the options may name; scratch folders go to its folder
    "scratch".
    """
    for name in ("own.csv", "ca.crt", "silo.key"):
        (tmp_path / name).touch()
    for name in ("scratch", "empty"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)

    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def arguments(**changes: str | None) -> list[str]:
    """Good options, but for the changes; None leaves one out, "" gives a flag."""
    options: dict[str, str | None] = {
        "superlink": "127.0.0.1:1",
        "silo": "hospital-a",
        "data": "wine",
        "insecure": "",
    }
    options |= {key.replace("_", "-"): value for key, value in changes.items()}
    arguments = []
    for key, value in options.items():
        if value is None:
            continue
        is_flag = key in ("insecure", "stock-waits")
        arguments.append(f"--{key}" if is_flag else f"--{key}={value}")
    return arguments


SECURE: dict[str, str | None] = {"insecure": None, "root_certificates": "ca.crt"}
REFUSED = {
    "a name with a blank": (
        {"silo": "hospital a"},
        "letters, digits, '.', '_' and '-'; received 'hospital a'",
    ),
    "no name": ({"silo": ""}, "received ''"),
    "a path for a name": ({"silo": "../a"}, "received '../a'"),
    "an option for a name": ({"silo": "-a"}, "received '-a'"),
    "a name of two lines": ({"silo": "a\n"}, r"received 'a\n'"),
    "data that is not there": (
        {"data": "none.csv"},
        "received 'none.csv', which is none of these. Check the path.",
    ),
    "no data": ({"data": ""}, "received '', which is none of these"),
    "an empty folder": ({"data": "empty"}, "received 'empty', which is none of these"),
    "a data set's name misspelt": (
        {"data": "wime"},
        "a built-in set (digits, breast_cancer, wine, diabetes,",
    ),
    "statistics of nobody": (
        {"min_examples": "0"},
        "the least number of examples that a statistic may rest on; received 0",
    ),
    "no certificate": ({"insecure": None}, "needs TLS: --root-certificates ca.crt"),
    "a certificate that is not there": (
        {"insecure": None, "root_certificates": "gone.crt"},
        "There is no file gone.crt. Check the path.",
    ),
    "a folder for a certificate": (
        {"insecure": None, "root_certificates": "scratch"},
        "There is no file scratch",
    ),
    "a key that is not there": (
        {**SECURE, "auth_supernode_private_key": "gone.key"},
        "There is no file gone.key",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_in_one_line_before_anything_is_started(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
):
    changes, message = REFUSED[case]
    monkeypatch.setattr(Supervisor, "run", lambda self: pytest.fail("it was started"))
    assert main(arguments(**changes)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert list((files / "scratch").iterdir()) == []


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Supervisor, dict[str, Any]]]:
    """The supervisors that were run, each with its node config."""
    started = []

    def run(self: Supervisor) -> None:
        config = Path(self.supernode[self.supernode.index("--node-config") + 1])
        started.append((self, tomllib.loads(config.read_text())))
        raise SiloError("the SuperNode of silo hospital-a ended with status 1.")

    monkeypatch.setattr(Supervisor, "run", run)
    return started


def test_the_supernode_gets_the_coordinators_address_and_the_settings_of_the_silos_app(
    files: Path, started: list, capsys: pytest.CaptureFixture[str]
):
    quoted = files / """it's "mine".csv"""
    quoted.touch()
    allowed = ["--allow", "mine.models:build", "--allow", "other.module:make"]
    shared = ["--share-values", 'sex, "a, b"', "--share-values", "stage", "--cache", "scratch"]
    assert main([*arguments(data=quoted.name), *allowed, *shared]) == 2
    error = capsys.readouterr().err
    assert error == "error: the SuperNode of silo hospital-a ended with status 1.\n"

    ((supervisor, config),) = started
    assert config == {
        "silo": "hospital-a",
        "data": str(quoted),
        "allow": "mine.models:build other.module:make",
        "state": str(supervisor.scratch / "state"),
        "columns": "",
        "share-values": 'sex, "a, b", stage',
        "min-examples": 5,
        "cache": str(files / "scratch"),
    }
    assert supervisor.supernode[:3] == ["--superlink", "127.0.0.1:1", "--insecure"]
    assert (supervisor.silo, supervisor.stock_waits) == ("hospital-a", False)
    assert not supervisor.scratch.exists()


def test_a_silo_allows_nothing_unless_asked_to_and_a_built_in_set_keeps_its_name(
    files: Path, started: list
):
    main(arguments(stock_waits=""))
    ((supervisor, config),) = started
    assert (config["silo"], config["data"], config["allow"]) == ("hospital-a", "wine", "")
    assert supervisor.stock_waits


def test_certificates_and_keys_are_handed_on(files: Path, started: list):
    main(arguments(**SECURE, auth_supernode_private_key="silo.key"))
    ((supervisor, _),) = started
    assert "--insecure" not in supervisor.supernode
    command = " ".join(supervisor.supernode)
    assert "--root-certificates ca.crt --auth-supernode-private-key silo.key" in command


def test_a_silo_that_is_interrupted_says_that_it_has_left(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(self: Supervisor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Supervisor, "run", interrupted)
    assert main(arguments()) == 130
    assert capsys.readouterr().err == "silo hospital-a has left the federation\n"
    assert list((files / "scratch").iterdir()) == []
