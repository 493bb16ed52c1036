"""The commands of docs/how-to-cluster-silo.md as printed there, in one federation on the loopback
interface.

Replaced are only names: the coordinator's and the hosts' by localhost, the certificate's option by
--insecure, and the path of the data.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from shared.experiment import experiment_from_flat
from tests.federation.consortium import a_consortium
from tests.federation.processes import finished, rows, wait_for
from tests.parallel.launching import ROOT

pytestmark = [pytest.mark.federation, pytest.mark.slow]
PAGE = (ROOT / "docs" / "how-to-cluster-silo.md").read_text(encoding="utf-8")
SILOS = ("hospital-a", "hospital-b", "hospital-c")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_page_make_a_federation_of_three_clusters(tmp_path: Path) -> None:
    patients = tmp_path / "patients.csv"
    rng = np.random.default_rng(0)
    lines = [f"{a:.3f},{b:.3f},{int(a > b)}" for a, b in rng.normal(size=(60, 2))]
    patients.write_text("\n".join(["a,b,label", *lines]))
    with a_consortium(tmp_path) as ours:
        replaced = {
            "coordinator.example.org:8000": f"127.0.0.1:{ours.port}",
            "--root-certificates ca.crt": "--insecure",
            'root-certificates = "ca.crt"': "insecure = true",
            "node1:1,node2:1": "localhost:2",
            "/data/patients.csv": str(patients),
            "silo.toml": str(tmp_path / "silo.toml"),
        }

        def here(text: str) -> str:
            for name, other in replaced.items():
                text = text.replace(name, other)
            return text

        (settings,) = blocks("toml")
        (tmp_path / "silo.toml").write_text(here(settings))
        commands = [shlex.split(here(block).replace("\\\n", " ")) for block in blocks("sh")]
        assert len(commands) == len(SILOS)
        logs = [tmp_path / f"{name}.log" for name in SILOS]
        for name, command, log in zip(SILOS, commands, logs, strict=True):
            ours.group.start(name, command, ours.environment(), log)
        for log in logs:
            assert wait_for(lambda log=log: "the worker is ready" in log.read_text(), 200), (
                log.read_text()
            )
            assert "the cluster is ready: 2 ranks on " in log.read_text()
        changes = {
            "federation.num_rounds": 1,
            "federation.min_silos": 3,
            "federation.evaluate_on_server": False,
        }
        e = experiment_from_flat(
            {"name": "page", **changes, "run.directory": str(tmp_path / "page" / "run")}
        )
        (tmp_path / "page").mkdir()
        output = finished(ours.start_run(e))
    assert "round 1/1" in output, output
    (row,) = (row for row in rows(e.run_directory) if "cohort" in row)
    assert row["cohort"] == list(SILOS)
