"""archipelago doctor: what this machine has, what it lacks, and the remedy.

Takes Python's own library alone, as it must work where nothing is installed.
"""

import argparse
import importlib.util
import os
import shutil
import socket
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SUPPORTED = ((3, 11), (3, 12))
SUPERLINK_PORT = 8000


@dataclass(frozen=True)
class Finding:
    """What was found: whether it will do, and if not, what for it is needed and the remedy."""

    what: str
    is_fine: bool
    detail: str
    is_needed: bool = True  # by the commands of the README; else by some options only

    def __str__(self) -> str:
        mark = "ok      " if self.is_fine else "MISSING " if self.is_needed else "optional"
        return f"{mark}  {self.what}: {self.detail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the findings; returns 1 if something is missing that the README's commands need."""
    parser = argparse.ArgumentParser(
        prog="archipelago doctor",
        description="Say what this machine has, what it lacks, and the remedy.",
        epilog="Example: archipelago doctor",
    )
    parser.parse_args(arguments)
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        print(finding)

    missing = [finding.what for finding in findings if finding.is_needed and not finding.is_fine]
    print()
    print(f"missing: {', '.join(missing)}" if missing else "nothing is missing")
    return 1 if missing else 0


# --- what make setup needs, and makes


def check_python() -> Iterator[Finding]:
    number = sys.version_info[:2]
    detail = f"{sys.version.split()[0]} at {sys.executable}"
    if number not in SUPPORTED:
        detail += "; 3.11 or 3.12 is needed: apt-get install python3.11 python3.11-venv"
    yield Finding("Python", number in SUPPORTED, detail)


def check_tools() -> Iterator[Finding]:
    for program, package in (("g++", "g++"), ("make", "make"), ("git", "git")):
        yield _program(program, f"make setup needs it: apt-get install {package}")
    yield _program("chromium", "tests of the report: apt-get install chromium", is_needed=False)
    yield _program("mpirun", "ranks over MPI: make setup MPI=1 says how", is_needed=False)
    yield _program("nvidia-smi", "no GPU: ranks compute on the CPU", is_needed=False)


def _program(name: str, remedy: str, is_needed: bool = True) -> Finding:
    path = shutil.which(name)
    return Finding(name, path is not None, path or remedy, is_needed)


def check_packages() -> Iterator[Finding]:
    """The packages that the project's own file pins, as they are installed for this Python."""
    lines = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [*lines["dependencies"], *lines["optional-dependencies"]["cluster"]]:
        name, equals, wanted = line.partition("==")
        name = name.partition(">=")[0]
        found = _installed(name)
        if found and equals and found != wanted:
            yield Finding(name, False, f"{found}, where {wanted} is needed: run make setup")
        elif not found:
            yield Finding(name, False, "not installed for this Python: run make setup")
        elif name in ("flwr", "keras", "tensorflow", "horovod"):
            yield Finding(name, True, found)


def _installed(name: str) -> str:
    for candidate in (name, f"{name}-cpu"):  # TensorFlow's wheel without CUDA
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return ""


def check_horovod() -> Iterator[Finding]:
    """How Horovod was built, from the files that its build leaves."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or not spec.submodule_search_locations:
        return
    folder = Path(next(iter(spec.submodule_search_locations)))
    libraries = [*folder.glob("tensorflow/mpi_lib*.so")]
    detail = "built for TensorFlow" if libraries else "not built for TensorFlow: run make setup"
    yield Finding("Horovod's library", bool(libraries), detail)


# --- what runs need


def check_processors() -> Iterator[Finding]:
    count = len(os.sched_getaffinity(0))
    detail = f"{count} for this process"
    if count < 2:
        detail += "; two ranks or silos will share it and be slow"
    yield Finding("processors", True, detail)


def check_ports() -> Iterator[Finding]:
    with socket.socket() as probe:
        is_free = probe.connect_ex(("127.0.0.1", SUPERLINK_PORT)) != 0
    detail = "free" if is_free else "in use: a SuperLink here, or choose another with --port"
    yield Finding(f"port {SUPERLINK_PORT}", is_free, detail, is_needed=False)


def check_flower_home() -> Iterator[Finding]:
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
    config = home / "config.toml"
    if not config.is_file():
        detail = f"{config} is not there: flwr run needs it (docs/how-to-federation.md, section 2)"
        yield Finding("Flower's config", False, detail, is_needed=False)
        return
    try:
        links = tomllib.loads(config.read_text(encoding="utf-8")).get("superlink", {})
        names = [name for name, value in links.items() if isinstance(value, dict)]
        yield Finding(
            "Flower's config", True, f"{config}, SuperLinks: {', '.join(names) or 'none'}"
        )
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        yield Finding("Flower's config", False, f"{config} is no TOML: {error}", is_needed=False)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_tools,
    check_packages,
    check_horovod,
    check_processors,
    check_ports,
    check_flower_home,
)


if __name__ == "__main__":
    sys.exit(main())
