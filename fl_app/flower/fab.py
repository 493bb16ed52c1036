"""The FAB, Flower's app bundle: a zip file of the project's code, which `flwr run` sends to all.

A silo compares the FAB that it gets with the code that is installed there, and runs only the
latter.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from fl_app.border import UNREADABLE, printable_line
from fl_app.failures import MessageError

PROJECT = Path(__file__).resolve().parents[2]
MAX_FILES = 5000  # of a bundle: far more than the project has
MAX_BYTES = 64 << 20
UNREADABLE_ZIP = (  # what zipfile raises
    *UNREADABLE,
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    NotImplementedError,
    EOFError,
    OSError,
)
PACKAGES = ("shared", "dist_train", "fl_app")


def installed_digest() -> str:
    """The digest of the FAB that `flwr run` would make of the code that is installed here."""
    return fab_digest(installed_fab(PROJECT, PACKAGES))


def installed_fab(project: Path, packages: Sequence[str]) -> bytes:
    """The FAB that `flwr run` makes of the project in this folder, whose code is in `packages`."""
    from flwr.cli.build import build_fab_from_files

    paths = [project / "pyproject.toml"]
    for package in packages:
        paths += (project / package).rglob("*.py")
    files = {path.relative_to(project).as_posix(): path for path in paths}
    fab, _ = build_fab_from_files(files)
    return fab


def fab_digest(fab: bytes) -> str:
    """SHA-256 over the names and contents of a FAB's files, whatever built and compressed it.

    Raises MessageError for what is no FAB, or would be too large once unpacked.
    """
    lines = []
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as archive:
            _check_size(archive)
            for name in sorted(archive.namelist()):
                if not name.startswith(".info/"):
                    content = hashlib.sha256(archive.read(name)).hexdigest()
                    lines.append(f"{name} {content}\n")
    except UNREADABLE_ZIP as error:
        raise MessageError(f"no app bundle: {printable_line(error)}") from None
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_size(archive: zipfile.ZipFile) -> None:
    """Raises ValueError for a bundle that would fill the memory.

    Its directory may be believed: `read` refuses a file that holds more than it says.
    """
    files = archive.infolist()
    num_bytes = sum(file.file_size for file in files)
    if len(files) > MAX_FILES or num_bytes > MAX_BYTES:
        raise ValueError(
            f"a bundle of at most {MAX_FILES} files and {MAX_BYTES} bytes; received {len(files)}"
            f" and {num_bytes}"
        )
