"""The commands of docs/how-to-federation.md as printed there: three parties on the loopback
interface, over TLS.

Replaced are only names: the coordinator's by localhost, ports by free ones, 0.0.0.0 by 127.0.0.1,
RUN_ID by a run's number, NODE_ID by a node's, and at hospital-b its name. Each party has a home and
a checkout of its own.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
import pytest

from shared.processes import ProcessGroup, free_ports, wait_until_listening
from tests.federation.processes import MARK, cleaned_up, result, rows, wait_for
from tests.parallel.launching import ROOT, environment

pytestmark = [pytest.mark.federation, pytest.mark.slow]
PAGE = ROOT / "docs" / "how-to-federation.md"
CHECKOUT = ("shared", "dist_train", "fl_app", "experiments", "pyproject.toml", ".gitignore")
PROGRAMS = ("openssl", "ssh-keygen", "bash")
CONNECTED = ("SuperNode ID", "the worker is ready")  # what a silo tells


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(text: str) -> list[str]:
    """The page's blocks of shell commands that contain this text, from top to bottom."""
    return [block for block in blocks("sh") if text in block]


@dataclass
class Party:
    """A machine of the page: a home, a checkout in it, and what was run there."""

    name: str
    home: Path
    group: ProcessGroup
    ports: dict[str, int]  # on the page: here
    ran: set[str] = field(default_factory=set)
    num_started: int = 0

    def __post_init__(self) -> None:
        self.checkout.mkdir(parents=True)
        for name in CHECKOUT:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.checkout / name)  # with its bytecode
            else:
                shutil.copy2(ROOT / name, self.checkout / name)
        (self.checkout / ".venv").symlink_to(sys.prefix)

    @property
    def checkout(self) -> Path:
        return self.home / "archipelago"

    def start(self, block: str, number: str = "") -> "Started":
        """Starts a block of the page in a shell that was prepared as the page says; returns it and
        its log.

        `number`: of the run or node that the block is about.
        """
        (prepare,) = commands("source .venv/bin/activate")
        script = block.replace("coordinator.example.org", "localhost").replace(
            "0.0.0.0", "127.0.0.1"
        )
        script = re.sub("(RUN|NODE)_ID", number, script)
        if self.name == "hospital-b":
            script = script.replace("hospital-a", "hospital-b")
        for printed, port in self.ports.items():
            script = re.sub(rf"\b{printed}\b", str(port), script)
        variables = environment(
            HOME=str(self.home), PATH=os.environ["PATH"], NO_PROXY="localhost,127.0.0.1"
        )
        variables[MARK] = str(self.home.parent)
        for unset in (
            "PYTHONPATH",
            "FLWR_HOME",
            "FLWR_TELEMETRY_ENABLED",
            "FLWR_DISABLE_UPDATE_CHECK",
        ):
            variables.pop(unset, None)
        self.ran |= {prepare, block}
        self.num_started += 1
        log = self.home / f"{self.num_started}.log"
        shell = ["bash", "-e", "-o", "pipefail", "-c", f"cd {self.checkout}\n{prepare}\n{script}"]
        return self.group.start(f"{self.name}: {block}", shell, variables, log), log

    def run(self, block: str, number: str = "") -> tuple[int, str]:
        """Exit status and output of a block that ends by itself."""
        return wait_for_end(self.start(block, number))

    def succeed(self, block: str, number: str = "") -> str:
        status, output = self.run(block, number)
        assert status == 0, f"{block}ended with status {status}:\n{output}"
        return output

    def start_superlink(self, block: str) -> None:
        process, log = self.start(block)
        assert wait_until_listening(self.ports["8000"], process, 60), log.read_text()


Started = tuple["subprocess.Popen[bytes]", Path]  # a process and its log


def wait_for_end(started: Started, timeout_s: float = 200) -> tuple[int, str]:
    """Exit status and output of a process that ends by itself."""
    process, log = started
    try:
        return process.wait(timeout_s), log.read_text(errors="replace")
    except subprocess.TimeoutExpired:
        raise AssertionError(
            f"not done after {timeout_s:g} s: {log.read_text(errors='replace')}"
        ) from None


def wait_until_told(started: Started, *texts: str) -> None:
    """Waits until the log of a process that goes on holds these texts."""
    process, log = started
    wait_for(
        lambda: process.poll() is not None or all(text in log.read_text() for text in texts), 120
    )
    assert process.poll() is None, log.read_text()
    assert all(text in log.read_text() for text in texts), log.read_text()


@dataclass(frozen=True)
class Story:
    """What the page's commands left behind."""

    home: Path  # of the coordinator
    hashes: list[str]
    checked: str
    checked_with_another_ca: tuple[int, str]
    nodes: str
    stream: str
    listed: str
    shown: str
    stopped: tuple[int, str]
    first_result: dict
    resumed: str
    without_key: tuple[int, str]
    nodes_with_keys: str
    ran: set[str]

    @property
    def run_directory(self) -> Path:
        return self.home / "archipelago" / "runs" / "consortium"


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"no {', '.join(missing)} here")
    folder = tmp_path_factory.mktemp("three_machines")
    port, port_with_keys, port_of_node = free_ports(3)
    with cleaned_up(str(folder)), ProcessGroup() as group:

        def party(name: str, home: str, superlink: int) -> Party:
            return Party(name, folder / home, group, {"8000": superlink, "9094": port_of_node})

        coordinator = party("coordinator", "coordinator", port)
        hospitals = [party(f"hospital-{x}", f"hospital-{x}", port) for x in "ab"]
        coordinator_with_keys = party(
            "coordinator with keys", "coordinator-with-keys", port_with_keys
        )
        hospital_with_key = party("hospital-a with a key", "hospital-with-key", port_with_keys)
        yield tell(coordinator, hospitals, coordinator_with_keys, hospital_with_key)


def tell(
    coordinator: Party, hospitals: list[Party], keys: Party, hospital_with_key: Party
) -> Story:
    """Goes through the page: once without keys, with a run, and beside it with keys, up to the
    connection.
    """
    superlink, superlink_with_keys = commands("flower-superlink --host")
    silo, silo_with_key = commands("python -m fl_app.silo --superlink")
    (certificates,), (connection,), (check,) = map(
        commands, ("openssl req", "[superlink.consortium]", "s_client")
    )
    (version,), (nodes,), (run,) = map(
        commands, ("fl_app.silo --version", "flwr supernode list", "flwr run")
    )
    (report,), (listing,), (log_and_stop,) = map(commands, ("shared.report", "flwr ls", "flwr log"))
    (make_key,), (register,), (unregister,) = map(
        commands, ("ssh-keygen", "supernode register", "unregister")
    )
    (stock_node,) = commands("flower-supernode --superlink")
    experiment, resume = blocks("toml")

    for each, superlink_block in ((coordinator, superlink), (keys, superlink_with_keys)):
        each.succeed(certificates)
        each.succeed(connection)
        each.start_superlink(superlink_block)
    (coordinator.home / "consortium" / "experiment.toml").write_text(experiment)
    for seed, hospital in enumerate([*hospitals, hospital_with_key]):
        authority = keys if hospital is hospital_with_key else coordinator
        (hospital.home / "consortium").mkdir()
        shutil.copy(authority.home / "consortium" / "ca.crt", hospital.home / "consortium")
        write_patients(
            hospital.home / "consortium" / "data.csv", num_patients=(120, 160, 80)[seed], seed=seed
        )
    starting = [hospital.start(silo) for hospital in hospitals]
    hashes = [party.succeed(version) for party in (coordinator, *hospitals)]
    checked = hospitals[0].succeed(check)
    shutil.copy(
        keys.home / "consortium" / "ca.crt", hospitals[1].home / "consortium" / "another.crt"
    )
    checked_with_another_ca = hospitals[1].run(check.replace("ca.crt", "another.crt"))
    for each in starting:
        wait_until_told(each, *CONNECTED)
    nodes_online = coordinator.succeed(nodes)

    running = coordinator.start(run)
    without_key = hospital_with_key.run(silo)
    hospital_with_key.succeed(make_key)
    shutil.copy(hospital_with_key.home / "consortium" / "hospital-a.pub", keys.home / "consortium")
    (node,) = re.findall(r"SuperNode (\d+) registered", keys.succeed(register))
    wait_until_told(hospital_with_key.start(silo_with_key), *CONNECTED)
    nodes_with_keys = keys.succeed(nodes)
    keys.succeed(unregister, node)
    status, first = wait_for_end(running)
    assert (status, "run record:" in first) == (0, True), first
    first_result = result(coordinator.checkout / "runs" / "consortium")

    run_id = re.findall(r"started run (\d+)", first)[0]
    coordinator.succeed(report)
    listed = coordinator.succeed(listing)
    show, stop = log_and_stop.splitlines(keepends=True)
    shown, stopped = coordinator.succeed(show, run_id), coordinator.run(stop, run_id)
    longer = experiment.replace("num_rounds = 2", "num_rounds = 3") + resume
    (coordinator.home / "consortium" / "experiment.toml").write_text(longer)
    resumed = coordinator.succeed(run)
    wait_until_told(hospitals[0].start(stock_node), CONNECTED[0])
    ran = set().union(
        *(each.ran for each in (coordinator, *hospitals, keys, hospital_with_key))
    ) | {log_and_stop}
    return Story(
        home=coordinator.home,
        hashes=hashes,
        checked=checked,
        checked_with_another_ca=checked_with_another_ca,
        nodes=nodes_online,
        stream=first,
        listed=listed,
        shown=shown,
        stopped=stopped,
        first_result=first_result,
        resumed=resumed,
        without_key=without_key,
        nodes_with_keys=nodes_with_keys,
        ran=ran,
    )


def write_patients(path: Path, num_patients: int, seed: int) -> None:
    """A table of made-up patients whose outcome can be learnt, with the label that the page's
    experiment names.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_patients, 4))
    outcome = x[:, 0] + 0.5 * x[:, 1] + 0.3 * rng.normal(size=num_patients) > 0
    table = np.column_stack([x, outcome])
    np.savetxt(
        path,
        table,
        ["%.4f"] * 4 + ["%d"],
        ",",
        header="age,pressure,marker,dose,outcome",
        comments="",
    )


def test_all_parties_print_the_same_version(story: Story) -> None:
    assert len(set(story.hashes)) == 1
    assert re.fullmatch(r"[0-9a-f]{16}\n", story.hashes[0])


def test_the_check_of_the_connection_tells_the_right_coordinator_from_another(story: Story) -> None:
    assert "Verification: OK" in story.checked
    status, output = story.checked_with_another_ca
    assert status == 1
    assert "unable to get local issuer certificate" in output


def test_two_silos_end_with_a_model_and_a_record(story: Story) -> None:
    assert story.nodes.count("online") == 2
    run = story.run_directory
    assert story.first_result["silos"] == ["hospital-a", "hospital-b"]
    assert story.first_result["rounds"] == 2
    assert keras.models.load_model(run / "model.keras", compile=False).input_shape == (None, 4)
    assert {row["silo"] for row in rows(run, "silos.jsonl")} == {"hospital-a", "hospital-b"}
    assert (run.parents[1] / "report.html").is_file()


def masked(line: str) -> str:
    return re.sub(r"/\S+", "PATH", re.sub(r"\d+(\.\d+)?(/\d+)?", "0", line))


def test_the_stream_reads_as_the_page_shows_it(story: Story) -> None:
    (printed,) = blocks("text")
    told = [
        masked(line)
        for line in story.stream.splitlines()
        if re.match("roll call|round|consortium:|run rec", line)
    ]
    assert told == [masked(line) for line in printed.splitlines()]
    assert f"run record: {story.run_directory}" in story.stream


def test_a_run_is_listed_shown_and_stopped_by_its_number(story: Story) -> None:
    assert "finished" in story.listed
    assert "run record:" in story.shown
    status, output = story.stopped
    assert (status, "already finished" in output) == (1, True), output


def test_a_run_is_resumed_by_the_key_that_the_page_names(story: Story) -> None:
    assert "round 2/3" not in story.resumed
    assert "round 3/3" in story.resumed
    assert result(story.run_directory)["rounds"] == 3


def test_with_keys_only_a_registered_silo_joins(story: Story) -> None:
    status, output = story.without_key
    assert status == 2
    assert "SuperNode authentication is enabled" in output
    assert story.nodes_with_keys.count("online") == 1


def test_every_command_of_the_page_was_run(story: Story) -> None:
    (rehearsal,) = commands("make federate")
    assert set(blocks("sh")) - story.ran == {rehearsal}
    done = subprocess.run(
        ["make", "-n", *rehearsal.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (launch,) = [line for line in done.stdout.splitlines() if "fl_app.launch" in line]
    assert launch.split()[-5:] == [
        "experiments/digits_cnn.toml",
        "--silos",
        "3",
        "--run-dir",
        "runs/rehearsal",
    ]
    assert (ROOT / "experiments" / "digits_cnn.toml").is_file()
