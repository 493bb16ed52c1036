"""What the tests of federations share: one SuperLink for all of them, and a way to start a program
whose processes are gone after the test.
"""

import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.federation.consortium import Consortium, a_consortium
from tests.federation.processes import cleaned_up, start


@pytest.fixture(scope="session")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """Serves the whole test run; each test gathers the silos that it needs."""
    with a_consortium(tmp_path_factory.mktemp("consortium")) as consortium:
        yield consortium


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `python -m MODULE ...`; whatever it leaves behind is ended after the test."""
    with cleaned_up(str(tmp_path)):
        yield functools.partial(start, str(tmp_path))
