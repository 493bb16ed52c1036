"""Virtual environments beside .venv, for contenders whose packages do not go together with ours."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from benchmarks.contest import ContenderError
from tools import bootstrap

ROOT = Path(__file__).resolve().parents[1]


def pinned_python(environment: str, requirement_file: str) -> Path:
    """The interpreter of an environment with the pinned packages, which is made if it is not there.

    Raises ContenderError if that fails.
    """
    setup = bootstrap.Setup(ROOT, ROOT / environment, mpi=False, gpu=False)
    requirements = setup.requirements(requirement_file)
    pins = read_pins(requirements.read_text(encoding="utf-8"))
    if not has_packages(setup.python, pins):
        try:
            bootstrap.make_venv(setup)
            remedy = (
                f"pip could not install what {requirement_file} names: check network and disk space"
            )
            bootstrap.run_pip(setup, remedy, "install", "--no-compile", "-r", requirements)
        except (bootstrap.SetupError, OSError) as error:
            raise ContenderError(str(error)) from error
    return setup.python


def read_pins(requirements: str) -> dict[str, str]:
    """The versions by package in the text of a requirement file.

    >>> read_pins("torch==2.0.1  # why")
    {'torch': '2.0.1'}
    """
    return dict(re.findall(r"(?m)^([\w.-]+)==([^\s;#]+)", requirements))


def has_packages(python: Path, pins: Mapping[str, str]) -> bool:
    """Returns True if the interpreter runs and has those versions.

    A local part, as in 2.0.1+cpu, does not count.
    """
    program = (
        "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    )
    command: list[str | Path] = [python, "-I", "-c", program, *pins]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    installed = [version.partition("+")[0] for version in done.stdout.split()]
    return installed == list(pins.values())
