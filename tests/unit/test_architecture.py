"""The import law, and that importing does nothing."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = {
    "shared": {"shared"},
    "dist_train": {"shared", "dist_train"},
    "fl_app": {"shared", "fl_app"},
    "archipelago": {"shared", "dist_train", "fl_app", "archipelago"},  # after the choice
}
# By framework: the files and the folders whose code may import it.
CONFINED = {
    "horovod": ("dist_train/collectives.py",),
    "flwr": ("fl_app/flower/",),
    "flwr_datasets": ("shared/data/partition.py", "shared/data/readers/hubs.py"),
}
# A silo that is a cluster: the one meeting of both engines.
BRIDGE = ("fl_app/silo/cluster.py", "dist_train.job")
# The only file that knows of ranks and of what a launcher sets.
LAUNCHERS_DOOR = "dist_train/collectives.py"
LAUNCHERS_VARIABLE = re.compile(r"(HOROVOD|OMPI|PMI|PMIX|SLURM)_[A-Z_]+")

# Imported before ours, for what they do to the process is theirs: TensorFlow sets variables, NumPy
# starts threads.
OTHERS = (
    "tensorflow",
    "keras",
    "pandas",
    "psutil",
    "pydantic",
    "sklearn.datasets",
    "rich.table",
    "flwr_datasets",
)
IMPORT_ALL = """
import importlib, json, logging, os, pkgutil, signal, sys, threading
import psutil

def state():
    signals = [number for number in signal.Signals if number in signal.valid_signals()]
    return {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "files": sorted(os.listdir()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "number of threads": psutil.Process().num_threads(),
        "children": [child.pid for child in psutil.Process().children(recursive=True)],
        "signal handlers": {number.name: str(signal.getsignal(number)) for number in signals},
        "log handlers": [str(handler) for handler in logging.getLogger().handlers],
        "log level": logging.getLogger().level,
        "hooks": str((sys.excepthook, sys.displayhook, threading.excepthook)),
    }

def effects_of_importing(packages):
    before = state()
    for package in packages:
        importlib.import_module(package)
        for module in pkgutil.walk_packages([os.path.join(PROJECT, package)], package + "."):
            importlib.import_module(module.name)
    return {key: [before[key], value] for key, value in state().items() if value != before[key]}

PROJECT = os.environ["PYTHONPATH"]
for other in OTHERS:
    importlib.import_module(other)
found = {"shared": effects_of_importing(["shared"])}
found["loaded by shared"] = sorted({"flwr", "horovod", "dist_train", "fl_app"} & set(sys.modules))
import flwr.app, flwr.clientapp, flwr.serverapp
found["runtimes"] = effects_of_importing(["dist_train", "fl_app", "archipelago"])
found["loaded by the runtimes"] = sorted({"horovod"} & set(sys.modules))
ours = ("shared", "dist_train", "fl_app", "archipelago")
found["number of modules"] = sum(name.split(".")[0] in ours for name in sys.modules)
os.write(int(os.environ["ANSWER"]), json.dumps(found).encode())
"""


def violations(root: Path) -> Iterator[str]:
    """One sentence for each place in the tree that breaks the law."""
    for package, allowed in LAYERS.items():
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for name in imported_names(tree, file):
                top = name.partition(".")[0]
                if (file, name) == BRIDGE:
                    continue
                if top in LAYERS and top not in allowed:
                    yield f"{file} imports {name}"
                if not file.startswith(CONFINED.get(top, file)):
                    yield f"{file} imports {name}"
            if file != LAUNCHERS_DOOR:
                yield from (f"{file} knows of {what}" for what in launchers_knowledge(tree))


def imported_names(tree: ast.AST, file: str) -> Iterator[str]:
    """The absolute names of all imports, also within functions, of relative ones, and of those by
    name.
    """
    parents = file.removesuffix("/__init__.py").removesuffix(".py").split("/")
    package = parents if file.endswith("__init__.py") else parents[:-1]
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(level=0):
                yield node.module or ""
            case ast.ImportFrom():
                yield ".".join([*package[: len(package) - node.level + 1], node.module or ""])
            case ast.Call(
                func=ast.Name("__import__") | ast.Attribute(attr="import_module"), args=[first, *_]
            ):
                if isinstance(first, ast.Constant):
                    yield str(first.value)


def launchers_knowledge(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if LAUNCHERS_VARIABLE.fullmatch(text):
                yield text
            case ast.Attribute(value=ast.Name("hvd"), attr=name):
                yield f"hvd.{name}"


# --- the law


def test_the_layers_import_only_what_lies_below_them_and_frameworks_stay_in_their_files(
    project: Path,
):
    assert list(violations(project)) == []


def test_the_places_that_frameworks_are_confined_to_exist(project: Path):
    for place in {LAUNCHERS_DOOR, *(place for places in CONFINED.values() for place in places)}:
        assert (project / place).exists(), place


@pytest.mark.parametrize(
    ("file", "line", "violation"),
    [
        (
            "shared/training.py",
            "import horovod.tensorflow as hvd",
            "shared/training.py imports horovod.tensorflow",
        ),
        ("shared/weights.py", "from flwr.app import Array", "shared/weights.py imports flwr.app"),
        (
            "shared/zoo/mlp.py",
            "from dist_train import trainer",
            "shared/zoo/mlp.py imports dist_train",
        ),
        ("shared/zoo/mlp.py", "from ...fl_app import rounds", "shared/zoo/mlp.py imports fl_app"),
        (
            "shared/a.py",
            "def f():\n    from fl_app.server.rounds import draw_cohort",
            "shared/a.py imports fl_app.server.rounds",
        ),
        ("shared/a.py", "m = importlib.import_module('flwr')", "shared/a.py imports flwr"),
        ("shared/a.py", "m = __import__('horovod')", "shared/a.py imports horovod"),
        (
            "dist_train/trainer.py",
            "import fl_app.server.rounds",
            "dist_train/trainer.py imports fl_app.server.rounds",
        ),
        ("dist_train/trainer.py", "import horovod", "dist_train/trainer.py imports horovod"),
        (
            "fl_app/server/rounds.py",
            "from dist_train.job import RankJob",
            "fl_app/server/rounds.py imports dist_train.job",
        ),
        (
            "fl_app/silo/cluster.py",
            "import dist_train.trainer",
            "fl_app/silo/cluster.py imports dist_train.trainer",
        ),
        (
            "fl_app/server/rounds.py",
            "import dist_train",
            "fl_app/server/rounds.py imports dist_train",
        ),
        (
            "fl_app/server/rounds.py",
            "from flwr.serverapp import Grid",
            "fl_app/server/rounds.py imports flwr.serverapp",
        ),
        (
            "fl_app/silo/supervisor.py",
            "import flwr.supernode",
            "fl_app/silo/supervisor.py imports flwr.supernode",
        ),
        (
            "fl_app/server/cohort.py",
            "m = importlib.import_module('flwr.app')",
            "fl_app/server/cohort.py imports flwr.app",
        ),
        (
            "fl_app/launch/silo_data.py",
            "import flwr_datasets",
            "fl_app/launch/silo_data.py imports flwr_datasets",
        ),
        (
            "dist_train/trainer.py",
            "x = os.environ['HOROVOD_RANK']",
            "dist_train/trainer.py knows of HOROVOD_RANK",
        ),
        (
            "shared/a.py",
            "x = os.getenv('OMPI_COMM_WORLD_RANK')",
            "shared/a.py knows of OMPI_COMM_WORLD_RANK",
        ),
        (
            "dist_train/trainer.py",
            "if hvd.rank() == 0: pass",
            "dist_train/trainer.py knows of hvd.rank",
        ),
    ],
)
def test_a_planted_violation_is_found_and_named(
    tmp_path: Path, file: str, line: str, violation: str
):
    allowed = {
        "dist_train/collectives.py": (
            "import horovod.tensorflow as hvd\nhvd.rank()\nNAME = 'HOROVOD_RANK'"
        ),
        "fl_app/flower/wire.py": "from flwr.app import Array\nfrom shared.weights import Weights",
        "shared/data/partition.py": "from flwr_datasets import partitioner",
        "shared/zoo/__init__.py": (
            "from . import mlp\nfrom ..data import Schema\nimport horovodlike, flwrlike"
        ),
        "dist_train/keras_horovod.py": (
            "'''Never reads HOROVOD_RANK.'''\nfrom dist_train.collectives import connect"
        ),
    }
    for name, text in (allowed | {file: line}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(violations(tmp_path)) == [violation]


# --- importing does nothing


def effects_of_importing_all(project: Path, folder: Path) -> tuple[dict, str]:
    """Imports everything in a fresh process whose working directory is `folder`: its effects, and
    what it printed.
    """
    reading, writing = os.pipe()
    script = f"OTHERS = {OTHERS}\n{IMPORT_ALL}"
    # bytecode goes where no law is broken; the answer has a channel of its own, for nothing may be
    # printed
    environment = {**os.environ, "PYTHONPATH": str(project), "ANSWER": str(writing)}
    child = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        pass_fds=[writing],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    assert child.returncode == 0, child.stdout
    return json.loads(text), child.stdout


def without_native_notices(printed: str) -> list[str]:
    """The lines that are not TensorFlow's own about the CPU, which on some CPUs no setting
    silences.
    """
    return [
        line
        for line in printed.splitlines()
        if not re.match(r"[IW]\d{4} |WARNING: All log|To enable the", line)
    ]


def test_importing_any_of_our_modules_does_nothing_to_the_process(project: Path, tmp_path: Path):
    found, printed = effects_of_importing_all(project, tmp_path)
    assert without_native_notices(printed) == []
    assert found["shared"] == {}
    assert found["runtimes"] == {}
    assert found["loaded by shared"] == []  # its tests run without Horovod or Flower
    assert found["loaded by the runtimes"] == []  # Horovod waits until a launcher's rank connects
    num_files = sum(1 for package in LAYERS for _ in (project / package).rglob("*.py"))
    assert found["number of modules"] == num_files


@pytest.mark.parametrize("package", LAYERS)
def test_every_package_is_found_from_the_project_under_test(project: Path, package: str):
    """Not from an installed copy: else all of these tests would test something else."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin == str(project / package / "__init__.py")
