"""The wheel: all of the project's packages are in it and can be imported from it alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("archipelago", "shared", "dist_train", "fl_app")
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")
IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""


def modules_in(root: Path) -> set[str]:
    """The paths of the project's Python files below a folder."""
    return {
        path.relative_to(root).as_posix()
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }


@pytest.fixture(scope="module")
def unpacked_wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the project, built offline from a copy of its sources, and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        without_bytecode = shutil.ignore_patterns("__pycache__")
        shutil.copytree(project / package, source / package, ignore=without_bytecode)
    for name in BUILD_FILES:
        shutil.copy(project / name, source / name)

    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "-w", folder, source]
    built = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr

    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_every_module_is_in_the_wheel(project: Path, unpacked_wheel: Path):
    assert modules_in(unpacked_wheel) == modules_in(project)


def test_every_package_is_imported_from_the_wheel(
    project: Path, unpacked_wheel: Path, tmp_path: Path
):
    """Runs in a fresh process, elsewhere: no working directory and no installed copy helps."""
    folders = sorted({str(Path(module).parent) for module in modules_in(project)})
    packages = [folder.replace("/", ".") for folder in folders]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *packages],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked_wheel)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = [str(unpacked_wheel / folder / "__init__.py") for folder in folders]
    assert done.stdout.splitlines() == expected
