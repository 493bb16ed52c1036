"""Virtual environments beside .venv, for contenders whose packages would not go together with ours."""

from pathlib import Path

from benchmarks.contest import ContenderError
from benchmarks.distributed import has_packages, read_pins
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
            remedy = f"pip could not install what {requirement_file} names: check network and disk space"
            bootstrap.run_pip(setup, remedy, "install", "--no-compile", "-r", requirements)
        except (bootstrap.SetupError, OSError) as error:
            raise ContenderError(str(error)) from error
    return setup.python
