"""What a rank takes of its host."""

import os

import pytest

from dist_train.rendezvous import place_on_host
from dist_train.resources import own_cores, own_gpu, prepare_process

THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """A host of eight cores; the affinities that are set."""
    affinities: list[set[int]] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("os.sched_setaffinity", lambda _, cores: affinities.append(set(cores)))
    for variable in THREADS:
        monkeypatch.setenv(variable, "")  # so that it is put back as it was after the test
        monkeypatch.delenv(variable)
    return affinities


@pytest.mark.parametrize(
    ("wanted", "local_size", "threads"),
    [(0, 1, "8"), (0, 3, "2"), (0, 4, "2"), (0, 16, "1"), (3, 4, "3")],
)
def test_ranks_share_the_cores_of_their_host(
    affinity: list, wanted: int, local_size: int, threads: str
) -> None:
    prepare_process(0, local_size, wanted)
    assert os.environ["TF_NUM_INTRAOP_THREADS"] == threads
    assert os.environ["TF_NUM_INTEROP_THREADS"] == str(max(2, int(threads)))


def test_what_the_user_has_set_stays(affinity: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "5")
    prepare_process(0, 2, 3, pin=False)
    assert os.environ["TF_NUM_INTRAOP_THREADS"] == "5"
    assert affinity == [set(range(8))]


@pytest.mark.parametrize("local_size", [1, 2, 3, 8])
def test_every_rank_gets_as_many_cores_and_none_is_given_twice(
    affinity: list, local_size: int
) -> None:
    for rank in range(local_size):
        prepare_process(rank, local_size)
    assert len({len(cores) for cores in affinity}) == 1
    assert sum(map(len, affinity)) == len(set().union(*affinity)) == 8 // local_size * local_size


def test_more_ranks_than_cores_share_all_of_them() -> None:
    assert own_cores([4, 5], local_rank=2, local_size=3) == [4, 5]


def test_each_rank_gets_a_gpu_of_its_own() -> None:
    assert [own_gpu(4, rank, 3) for rank in range(3)] == [0, 1, 2]
    assert own_gpu(0, 1, 2) is None


def test_fewer_gpus_than_ranks_are_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"received 4 ranks on a host with 2\. Start 2 ranks per host"
    ):
        own_gpu(2, 0, 4)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1)),
        (
            {
                "HOROVOD_LOCAL_RANK": "3",
                "HOROVOD_LOCAL_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            },
            (3, 4),
        ),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2)),
        ({"MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}, (0, 2)),
    ],
)
def test_the_launcher_reports_the_place_on_the_host(
    environment: dict[str, str], place: tuple[int, int]
) -> None:
    assert place_on_host(environment) == place
