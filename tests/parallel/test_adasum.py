"""Adasum against its closed form for two ranks, where Horovod has MPI; refused with the remedy over
Gloo.
"""

from pathlib import Path

import horovod.tensorflow as hvd
import numpy as np
import pytest

from tests.parallel.launching import run_ranks

pytestmark = pytest.mark.parallel
JOB = Path(__file__).with_name("adasum_job.py")


def test_adasum_is_refused_over_gloo(tmp_path: Path) -> None:
    done = run_ranks(2, JOB, tmp_path)
    assert done.returncode != 0
    assert "refused: Adasum needs ranks that talk over MPI" in done.stdout
    assert "make setup MPI=1" in done.stdout


@pytest.mark.skipif(
    not hvd.mpi_built(), reason="Horovod was built without MPI (make setup MPI=1 builds it)"
)
def test_adasum_of_two_ranks_is_its_closed_form(tmp_path: Path) -> None:
    """(1 - ab / 2aa) a + (1 - ab / 2bb) b, Maleki et al. 2020 (arXiv:2006.02924), equation 4."""
    done = run_ranks(2, JOB, tmp_path, launcher="--mpi")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with np.load(tmp_path / "0.npz") as one, np.load(tmp_path / "1.npz") as other:
        a, b = one["grad"].astype(np.float64), other["grad"].astype(np.float64)
        ab, aa, bb = np.sum(a * b), np.sum(a * a), np.sum(b * b)
        expected = (1 - ab / (2 * aa)) * a + (1 - ab / (2 * bb)) * b
        np.testing.assert_allclose(one["step"], expected, rtol=1e-4, atol=1e-6)
        assert one["step"].tobytes() == other["step"].tobytes()
        assert not np.allclose(
            expected, (a + b) / 2, rtol=1e-2
        )  # the test can tell it from the mean
