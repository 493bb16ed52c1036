"""Child processes: none outlives us, however we end."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shared import processes
from shared.processes import (
    ProcessGroup,
    child_environment,
    free_ports,
    is_listening,
    wait_until_listening,
)

GRACE_S = 0.4  # here, instead of the 5 s that real programs get
START_S = 20.0  # a shell or a Python is up long before
POLITE = "sleep 60"
STUBBORN = "trap '' TERM; while :; do sleep 0.1; done"


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", GRACE_S)


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """A file into which the processes of a test write their ids.

    Those that still live afterwards are ended.
    """
    path = tmp_path / "pids"
    path.touch()
    yield path
    for pid in map(int, path.read_text().split()):
        if is_alive(pid):
            psutil.Process(pid).kill()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + START_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def family(group: ProcessGroup, child: str, grandchild: str, pids: Path) -> list[int]:
    """Starts a shell that runs `child`, with another that runs `grandchild` below it.

    Returns both ids.
    """
    scripts = {
        "CHILD": f"echo $$ >> {pids}; {child}",
        "GRANDCHILD": f"echo $$ >> {pids}; {grandchild}",
    }
    command = ["sh", "-c", 'sh -c "$GRANDCHILD" & eval "$CHILD"']
    started = group.start(
        "family", command, child_environment(**scripts), log=pids.with_name("log")
    )
    assert wait_for(lambda: len(pids.read_text().split()) == 2)
    ids = sorted(map(int, pids.read_text().split()), key=lambda pid: pid != started.pid)
    assert ids[0] == started.pid
    assert psutil.Process(ids[1]).ppid() == started.pid
    return ids


@pytest.mark.parametrize("child", [POLITE, STUBBORN])
@pytest.mark.parametrize("grandchild", [POLITE, STUBBORN])
def test_leaving_ends_children_and_grandchildren_also_those_that_ignore_being_asked(
    pids: Path, child: str, grandchild: str
):
    with ProcessGroup() as group:
        started = family(group, child, grandchild, pids)
        assert all(map(is_alive, started))
        left = time.monotonic()
    # asking and killing have one grace period each, and this machine may be busy
    assert time.monotonic() - left < 2 * GRACE_S + 2.0
    assert not any(map(is_alive, started))
    assert group.dead() == ["family"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_ends_them_too_and_goes_on_its_way(pids: Path, error: type[BaseException]):
    started: list[int] = []

    def start_and_fail() -> None:
        with ProcessGroup() as group:
            started.extend(family(group, POLITE, POLITE, pids))
            raise error

    with pytest.raises(error):
        start_and_fail()
    assert len(started) == 2
    assert not any(map(is_alive, started))


def test_sigterm_leaves_the_group_as_an_exit(pids: Path):
    started: list[int] = []

    def start_and_be_asked_to_end() -> None:
        with ProcessGroup() as group:
            started.extend(family(group, POLITE, POLITE, pids))
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        start_and_be_asked_to_end()
    assert caught.value.code == 128 + signal.SIGTERM
    assert len(started) == 2
    assert not any(map(is_alive, started))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_leaving_puts_the_signal_handlers_back(number: signal.Signals):
    def ours(number: int, frame: object) -> None: ...

    before = signal.signal(number, ours)
    try:
        with ProcessGroup():
            pass
        assert signal.getsignal(number) is ours
    finally:
        signal.signal(number, before)


def test_a_name_that_has_ended_may_be_used_again():
    with ProcessGroup() as group:
        first = group.start(
            "worker", ["sh", "-c", "exit 3"], child_environment(), inherits_output=True
        )
        assert first.wait(START_S) == 3
        assert group.dead() == ["worker"]
        second = group.start("worker", ["sleep", "60"], child_environment(), inherits_output=True)
        assert group.dead() == []
        assert is_alive(second.pid)
    assert not is_alive(second.pid)


def test_a_child_that_inherits_the_output_tells_where_we_tell(capfd: pytest.CaptureFixture[str]):
    with ProcessGroup() as group:
        command = ["sh", "-c", "echo to you; echo to you too >&2"]
        child = group.start("talks", command, child_environment(), inherits_output=True)
        assert child.wait(START_S) == 0
        assert (child.stdout, child.stderr) == (None, None)
    assert capfd.readouterr() == ("to you\n", "to you too\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_child_can_be_asked_to_end_and_so_can_we_after_starting_it(number: signal.Signals):
    """Both signals wait while a child is being made; neither we nor the child must be left deaf."""
    with ProcessGroup() as group:
        child = group.start("waits", ["sleep", "60"], child_environment())
        assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        child.send_signal(number)
        assert child.wait(START_S) == -number


def test_starting_a_child_leaves_the_signal_mask_as_it_was():
    """A caller may block SIGTERM around something that must not be interrupted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with ProcessGroup() as group:
            child = group.start(
                "child", ["grep", "SigBlk", "/proc/self/status"], child_environment()
            )
            output, _ = child.communicate(timeout=START_S)
            assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | {signal.SIGTERM}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    blocked = int(output.split()[1], 16)
    assert blocked == sum(1 << (number - 1) for number in before | {signal.SIGTERM})


def test_children_that_have_ended_by_themselves_are_no_trouble():
    with ProcessGroup() as group:
        ended = group.start("ended", ["sh", "-c", "exit 3"], child_environment())
        assert ended.wait(START_S) == 3
        group.start("running", ["sleep", "60"], child_environment())
        assert group.dead() == ["ended"]
    assert set(group.dead()) == {"ended", "running"}


def test_a_command_that_does_not_exist_is_an_error_and_leaves_nothing_behind():
    with ProcessGroup() as group:
        with pytest.raises(FileNotFoundError):
            group.start("none", ["/no/such/command"], child_environment())
        assert group.processes == {}


def test_output_goes_to_the_log_or_to_a_pipe(tmp_path: Path):
    with ProcessGroup() as group:
        command = ["sh", "-c", "echo out; echo err >&2"]
        group.start("logged", command, child_environment(), log=tmp_path / "log").wait(START_S)
        piped, _ = group.start("piped", command, child_environment()).communicate(timeout=START_S)
    assert (tmp_path / "log").read_text() == "out\nerr\n"
    assert piped == b"out\nerr\n"
    assert group.logs == {"logged": tmp_path / "log"}


def test_the_children_of_a_process_that_is_killed_outright_die(project: Path, pids: Path):
    script = f"""if True:
        import time
        from shared.processes import ProcessGroup, child_environment
        with ProcessGroup() as group:
            command = ["sh", "-c", "echo $$ >> {pids}; {STUBBORN}"]
            group.start("child", command, child_environment())
            time.sleep(60)"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=project, env=child_environment())
    assert wait_for(lambda: len(pids.read_text().split()) == 1)
    child = int(pids.read_text())
    assert is_alive(child)
    parent.kill()
    parent.wait(START_S)
    assert wait_for(lambda: not is_alive(child))


# --- ports


def test_free_ports_differ_and_nobody_listens_on_them():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert not any(map(is_listening, ports))


def test_waiting_ends_when_something_listens():
    (port,) = free_ports(1)
    script = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    with ProcessGroup() as group:
        server = group.start("server", [sys.executable, "-c", script], child_environment())
        assert wait_until_listening(port, server, timeout_s=START_S)
        assert is_listening(port)


def test_waiting_ends_when_the_process_dies():
    with ProcessGroup() as group:
        dying = group.start("dying", ["sh", "-c", "exit 1"], child_environment())
        began = time.monotonic()
        assert not wait_until_listening(free_ports(1)[0], dying, timeout_s=START_S)
        assert time.monotonic() - began < START_S / 2


def test_waiting_ends_when_the_time_is_up():
    with ProcessGroup() as group:
        silent = group.start("silent", ["sleep", "60"], child_environment())
        assert not wait_until_listening(free_ports(1)[0], silent, timeout_s=0.2)


def test_a_childs_environment_is_ours_with_changes_and_with_bytecode_on_disk(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("ARCHIPELAGO_A", "ours")
    monkeypatch.setenv("ARCHIPELAGO_B", "ours")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    environment = child_environment(ARCHIPELAGO_B="changed")
    assert (environment["ARCHIPELAGO_A"], environment["ARCHIPELAGO_B"]) == ("ours", "changed")
    assert "PYTHONDONTWRITEBYTECODE" not in environment
