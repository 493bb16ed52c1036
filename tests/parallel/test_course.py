"""What one rank alone decides during `fit` reaches all ranks. Real horovodrun on two ranks; make
test has some of the cases, within test_equality.py.
"""

from pathlib import Path

import pytest

from tests.parallel.course_expectations import EXPECTED, FAILURES, check_case
from tests.parallel.launching import run_ranks

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

JOB = Path(__file__).with_name("course_job.py")
TOGETHER = [name for name in EXPECTED if name not in FAILURES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job with all cases that do not end it."""
    folder = tmp_path_factory.mktemp("course")
    done = run_ranks(2, JOB, folder, *TOGETHER)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", TOGETHER)
def test_what_one_rank_decides_alone_reaches_all(folder: Path, name: str) -> None:
    check_case(folder, name)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_one_rank_reaches_all_with_its_reason(tmp_path: Path, name: str) -> None:
    done = run_ranks(2, JOB, tmp_path, name, timeout_s=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_case(tmp_path, name)
