"""The living job of ranks: what it answers, and that it is lost in good time and can be started
anew.
"""

import socket
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from dist_train import job as launch
from dist_train.job import JobLost, RankJob

pytestmark = pytest.mark.parallel
MODULE = "tests.parallel.launch_job"


@pytest.fixture(scope="module")
def any_job() -> Iterator[RankJob]:
    """One for all tests, which may have been lost in the one before."""
    with RankJob(MODULE, 2) as ranks:
        yield ranks


@pytest.fixture
def job(any_job: RankJob) -> RankJob:
    """The job, running."""
    try:
        any_job.check()
    except JobLost:
        any_job.start()
    return any_job


def pids() -> set[int]:
    return {
        p.pid
        for p in psutil.Process().children(recursive=True)
        if p.cmdline()[1:] == ["-m", MODULE]
    }


def test_calls_reach_all_ranks_and_what_is_for_the_root_only_that(job: RankJob):
    before = pids()
    assert len(before) == 2
    for factor in (1.0, 2.0, 3.0):
        found = job.call("sum", factor * np.ones(3))
        assert found == [(0, 3 * factor), (1, 3 * factor)]
    assert pids() == before  # the same ranks


def test_a_refusal_that_the_ranks_agree_on_is_a_value_error_and_costs_nothing(job: RankJob):
    before = pids()
    with pytest.raises(ValueError, match="rank 1 does not like it"):
        job.call("refuse")
    assert job.call("sum", np.ones(3)) == [(0, 3.0), (1, 3.0)]
    assert pids() == before


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_ends_amid_a_call_ends_the_job_at_once(job: RankJob, rank: int):
    started = time.monotonic()
    with pytest.raises(JobLost, match=r"rank [01] has ended|horovodrun ended"):
        job.call(f"end {rank}")
    assert time.monotonic() - started < 20
    assert pids() == set()
    with pytest.raises(JobLost, match="not running"):
        job.call("sum", np.ones(3))
    job.start()
    assert job.call("sum", np.ones(3)) == [(0, 3.0), (1, 3.0)]


@pytest.mark.parametrize(
    ("rank", "times"),
    [(0, 1), (1, 1), *(pytest.param(rank, 4, marks=pytest.mark.slow) for rank in (0, 1))],
)
def test_work_that_fails_on_a_rank_is_told_from_a_lost_rank(job: RankJob, rank: int, times: int):
    """Also where others wait for that rank in a collective, and fail for its sake."""
    for time_before in range(times):
        if time_before:
            job.start()
        with pytest.raises(ValueError, match=f"rank {rank} failed with InvalidArgumentError"):
            job.call(f"fail {rank}")
        assert pids() == set()


def test_ranks_with_other_arrays_are_refused_before_these_travel(job: RankJob):
    before = pids()
    with pytest.raises(
        ValueError, match=r"same model.*\(3,\), 'float64'.*on rank 1 in the place of.*\(2,\)"
    ):
        job.call("mismatch")
    assert pids() == before


@pytest.mark.slow
def test_four_ranks_find_each_other_again_and_again():
    with RankJob(MODULE, 4) as ranks:
        ranks.start()
        for factor in range(12):
            assert ranks.call("sum", factor * np.ones(3)) == [
                (rank, 3.0 * factor) for rank in range(4)
            ]


@pytest.mark.slow
def test_a_rank_that_hangs_is_told_from_one_that_computes(
    job: RankJob, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "SILENCE_TIMEOUT_S", 4.0)
    monkeypatch.setattr(launch, "PING_INTERVAL_S", 1.0)
    assert job.call("sleep") == "awake"  # for longer than a rank may be silent
    with pytest.raises(JobLost, match="rank 1 has said nothing for 4 s"):
        job.call("stop 1")
    assert pids() == set()


@pytest.mark.slow
def test_a_stranger_at_the_port_is_not_taken_for_a_rank(
    any_job: RankJob, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "HANDSHAKE_TIMEOUT_S", 1.0)
    create, ports = socket.create_server, []

    def create_and_intrude(address: tuple[str, int]) -> socket.socket:
        server = create(address)
        ports.append(socket.create_connection(server.getsockname()))  # keeps silent
        talker = socket.create_connection(server.getsockname())
        talker.sendall(b"GET / HTTP/1.1\r\n\r\n")
        ports.append(talker)
        return server

    monkeypatch.setattr(launch.socket, "create_server", create_and_intrude)
    any_job.start()
    assert any_job.call("sum", np.ones(3)) == [(0, 3.0), (1, 3.0)]
    for each in ports:
        each.close()
