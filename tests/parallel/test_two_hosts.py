"""A job on two hosts, started by the commands that docs/how-to-many-hosts.md prints: horovodrun,
ssh, Gloo.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import keras
import pytest

from shared.weights import max_difference
from tests.parallel.launching import ROOT, environment, run_ranks
from tests.parallel.two_hosts import ADDRESSES, SYSTEM_PATH, NoHosts, TwoHosts

pytestmark = [pytest.mark.parallel, pytest.mark.slow]
PAGE = ROOT / "docs" / "how-to-many-hosts.md"
RUN_DIR = "runs/two_hosts"  # in the page's command


@dataclass(frozen=True)
class Job:
    """What the page's commands left behind."""

    folder: Path
    checks: str
    status: int
    log: str
    bytes_to_h1: int
    bytes_from_h1: int
    files_on_h1: list[str]

    @property
    def result(self) -> dict:
        assert self.status == 0, self.log[-3000:]
        return json.loads((self.folder / RUN_DIR / "result.json").read_text())


def page_block(text: str) -> str:
    """The one fenced block of shell commands on the page that contains this text."""
    [block] = [
        b
        for b in re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
        if text in b
    ]
    return block


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Runs the page's commands on h0 in a folder that stands for the checkout, at the same path on
    both hosts.
    """
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "runs").mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "experiments").symlink_to(ROOT / "experiments")
    variables = environment(
        HOME=str(folder), PATH=SYSTEM_PATH
    )  # ~/.horovod remembers hosts for an hour
    try:
        with TwoHosts(tmp_path_factory.mktemp("logs"), own_folder=folder / "runs") as hosts:
            _, checks = hosts.run_on_h0(page_block("getent"), folder, variables, timeout_s=30)
            before = hosts.bytes_through_the_cable()
            status, log = hosts.run_on_h0(
                page_block("-H h0:1,h1:1"), folder, variables, timeout_s=240
            )
            to_h1, from_h1 = (
                b - a for a, b in zip(before, hosts.bytes_through_the_cable(), strict=True)
            )
            return Job(folder, checks, status, log, to_h1, from_h1, hosts.files_on_h1())
    except NoHosts as reason:
        pytest.skip(str(reason))


def test_the_checks_show_what_they_should(job: Job) -> None:
    for address in ADDRESSES.values():
        assert address in job.checks
    assert "127." not in job.checks


def test_the_job_trains_on_both_hosts(job: Job) -> None:
    assert job.result["runtime"] == "horovod"
    assert job.result["world_size"] == 2
    assert job.result["metrics"]["test"]["accuracy"] > 0.5  # chance: 0.1
    gradients_per_rank = job.result["bytes_sent"] / 2
    assert (
        min(job.bytes_to_h1, job.bytes_from_h1) > gradients_per_rank
    )  # they went through the cable


def test_the_record_lies_on_the_first_host_only(job: Job) -> None:
    assert (job.folder / RUN_DIR / "model.keras").is_file()
    assert job.result["world_size"] == 2
    assert job.files_on_h1 == []


def test_two_hosts_end_with_the_weights_of_one_process(job: Job, tmp_path: Path) -> None:
    assert job.result["world_size"] == 2
    as_it_ran = job.folder / RUN_DIR / "experiment.toml"
    done = run_ranks(1, "-m", "dist_train", as_it_ran, "--run-dir", tmp_path / "one")
    assert done.returncode == 0, done.stderr[-2000:]
    two, one = (
        keras.models.load_model(run / "model.keras").get_weights()
        for run in (job.folder / RUN_DIR, tmp_path / "one")
    )
    assert max_difference(two, one) < 1e-5  # float32 sums in another order
