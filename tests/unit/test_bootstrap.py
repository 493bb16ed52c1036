"""The set-up program: its refusals, its second call, its fixes of Horovod. No network."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bootstrap

ROOT = Path(bootstrap.__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with this one's set-up program and requirement files, and a pyproject.toml."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "requirements", project / "requirements")
    (project / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "bootstrap.py", project / "tools")
    (project / "pyproject.toml").write_text('[project]\nname = "sample"\nversion = "1"\n')
    return project


def wanted(project: Path, *, mpi: bool = False, gpu: bool = False) -> bootstrap.Setup:
    return bootstrap.Setup(project, project / ".venv", mpi=mpi, gpu=gpu)


def make_environment(setup: bootstrap.Setup, num_done: int = len(bootstrap.STAGES)) -> None:
    """A real, empty environment that says it has the first stages behind it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", setup.venv], check=True)
    bootstrap.write_stamp(setup, num_done)


def run_program(
    project: Path, *arguments: str, programs: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the program with nothing on PATH, or only `programs`, and a cache of its own."""
    environment = {
        "PATH": str(programs or project / "nothing"),
        "XDG_CACHE_HOME": str(project / "cache"),
    }
    command = [sys.executable, "-B", str(project / "tools" / "bootstrap.py"), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def all_files(folder: Path) -> dict[str, float]:
    return {str(path): path.lstat().st_mtime for path in folder.rglob("*")}


def stages_done(setup: bootstrap.Setup) -> list[str]:
    return [stage for stage in bootstrap.STAGES if bootstrap.is_done(setup, stage)]


def test_importing_it_does_nothing(project: Path) -> None:
    before = all_files(project)
    command = [sys.executable, "-B", "-c", "import tools.bootstrap"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert all_files(project) == before


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 8, 18), (3, 10, 0), (3, 13, 1), (4, 0, 0)])
def test_another_python_is_refused_in_one_sentence(version: tuple[int, int, int]) -> None:
    with pytest.raises(bootstrap.SetupError) as refusal:
        bootstrap.check_python(version, "/some/python")
    sentence = str(refusal.value)
    assert sentence.startswith(
        "Archipelago needs Python 3.11 or 3.12; received {}.{}.{} ".format(*version)
    )
    assert "apt-get install python3.11" in sentence
    assert "make setup PYTHON=" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 9)])
def test_the_supported_pythons_are_taken(version: tuple[int, int, int]) -> None:
    bootstrap.check_python(version, "/some/python")


def test_an_old_python_can_read_the_program() -> None:
    ast.parse((ROOT / "tools" / "bootstrap.py").read_text(), feature_version=(3, 6))


def test_a_second_call_does_nothing(project: Path) -> None:
    make_environment(wanted(project))
    before = all_files(project)
    done = run_program(project)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert all_files(project) == before


@pytest.mark.parametrize("name", ["cpu.txt", "common.txt", "horovod.txt"])
def test_a_changed_pin_makes_all_stages_stale(project: Path, name: str) -> None:
    setup = wanted(project)
    make_environment(setup)
    with (project / "requirements" / name).open("a") as file:
        file.write("one-more==1.0\n")
    assert stages_done(setup) == []


def test_each_change_makes_only_what_depends_on_it_stale(project: Path) -> None:
    setup = wanted(project)
    make_environment(setup)
    assert stages_done(setup) == ["packages", "horovod", "project"]
    assert stages_done(wanted(project, mpi=True)) == ["packages"]
    assert stages_done(wanted(project, gpu=True)) == []
    (project / "requirements" / "gpu.txt").write_text("")  # not used by a CPU environment
    assert stages_done(setup) == ["packages", "horovod", "project"]
    (project / "pyproject.toml").write_text("")
    assert stages_done(setup) == ["packages", "horovod"]


@pytest.mark.parametrize("num_done", [0, 1, 2])
def test_an_interrupted_set_up_goes_on_from_the_last_stage_done(
    project: Path, num_done: int
) -> None:
    setup = wanted(project, mpi=True)
    make_environment(setup, num_done)
    assert stages_done(setup) == list(bootstrap.STAGES[:num_done])
    assert bootstrap.parse_options([], project) == setup  # and keeps what was asked for


def test_a_moved_or_broken_environment_is_stale(project: Path) -> None:
    make_environment(wanted(project))
    moved = project.rename(project.with_name("moved"))
    assert stages_done(wanted(moved)) == []
    moved.rename(project)
    wanted(project).python.unlink()
    assert stages_done(wanted(project)) == []


def test_options_stay_until_others_are_given(project: Path) -> None:
    assert bootstrap.parse_options([], project) == wanted(project)
    make_environment(wanted(project, mpi=True))
    assert bootstrap.parse_options([], project) == wanted(project, mpi=True)
    assert bootstrap.parse_options(["--no-mpi"], project) == wanted(project)
    assert bootstrap.parse_options(["--gpu"], project) == wanted(project, mpi=True, gpu=True)
    assert bootstrap.parse_options(["--venv", "other"], project).venv == project / "other"


def test_a_missing_compiler_is_found_before_anything_else(project: Path) -> None:
    make_environment(wanted(project), num_done=0)
    before = all_files(project)
    done = run_program(project)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: .* needs a C\+\+ compiler.*`apt-get install g\+\+`\.\n", done.stderr
    )
    assert done.stdout == ""
    assert all_files(project) == before


@pytest.mark.parametrize(
    ("present", "option", "packages"),
    [(["c++"], "--no-mpi", "make"), (["c++", "make"], "--mpi", "libopenmpi-dev openmpi-bin")],
)
def test_other_missing_build_tools(
    project: Path, present: list[str], option: str, packages: str
) -> None:
    programs = project / "programs"
    programs.mkdir()
    for name in present:
        (programs / name).symlink_to(sys.executable)
    done = run_program(project, option, programs=programs)
    assert done.returncode == 1
    assert re.fullmatch(f"error: .*`apt-get install {packages}`\\.\n", done.stderr)


def test_a_kept_wheel_needs_no_compiler_and_no_other_folder_is_removed(project: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(project / "cache"))
        folder = bootstrap.wheel_folder(wanted(project))
    folder.mkdir(parents=True)
    (folder / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl").touch()
    (project / "mine").mkdir()
    (project / "mine" / "thesis.txt").touch()
    done = run_program(project, "--venv", "mine")
    assert done.returncode == 1
    assert "no virtual environment" in done.stderr
    assert (project / "mine" / "thesis.txt").exists()


def test_wheels_are_kept_apart_by_all_that_changes_a_build(project: Path) -> None:
    options = [(False, False), (True, False), (False, True), (True, True)]
    folders = {bootstrap.wheel_folder(wanted(project, mpi=mpi, gpu=gpu)) for mpi, gpu in options}
    assert len(folders) == len(options)
    pins = project / "requirements" / "cpu.txt"
    pins.write_text(re.sub(r"tensorflow-cpu==\S+", "tensorflow-cpu==2.99.0", pins.read_text()))
    folder = bootstrap.wheel_folder(wanted(project))
    assert folder not in folders
    assert {"tensorflow-cpu-2.99.0", "horovod-0.28.1"} <= set(folder.name.split("_"))
    common = project / "requirements" / "common.txt"  # does not change the build
    common.write_text("keras==1.0\n")
    assert bootstrap.wheel_folder(wanted(project)) == folder


def test_a_mend_changes_the_one_place_and_nothing_else(tmp_path: Path) -> None:
    change = bootstrap.Mend("folder/file.cc", "  bad();\n", "  good();\n")
    (tmp_path / "folder").mkdir()
    file = tmp_path / change.path
    file.write_text("before();\n  bad();\nafter();\n")
    bootstrap.mend(tmp_path, [change])
    assert file.read_text() == "before();\n  good();\nafter();\n"
    for num_found, text in enumerate(["none\n", "  bad();\n", "  bad();\n  bad();\n"]):
        if num_found != 1:
            file.write_text(text)
            with pytest.raises(
                bootstrap.SetupError, match=f"exactly one 'bad\\(\\);'; received {num_found}: pin"
            ):
                bootstrap.mend(tmp_path, [change])
    file.unlink()
    with pytest.raises(bootstrap.SetupError, match="received 0"):
        bootstrap.mend(tmp_path, [change])


def test_another_mend_is_another_wheel_and_another_environment(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = wanted(project)
    folder, hashes = bootstrap.wheel_folder(setup), bootstrap.hashes(setup)
    monkeypatch.setattr(bootstrap, "MENDS", bootstrap.MENDS[:1])
    assert bootstrap.wheel_folder(setup) != folder
    assert [
        stage for stage in bootstrap.STAGES if bootstrap.hashes(setup)[stage] != hashes[stage]
    ] == [
        "horovod",
        "project",
    ]


def test_the_build_sees_only_its_own_options(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = (
        "HOROVOD_WITHOUT_GLOO",
        "HOROVOD_WITH_PYTORCH",
        "HOROVOD_GPU_OPERATIONS",
        "PYTHONDONTWRITEBYTECODE",
    )
    for name in (*outside, "MAKEFLAGS", "HOROVOD_NCCL_HOME"):
        monkeypatch.setenv(name, "from outside")
    environment = bootstrap.build_environment(wanted(project))
    assert not set(outside) & set(environment)
    assert re.fullmatch(r"-j\d+", environment["MAKEFLAGS"])
    assert environment["HOROVOD_NCCL_HOME"] == "from outside"  # where NCCL is, the user knows
    assert environment["PATH"].split(os.pathsep)[0] == str(project / ".venv" / "bin")
    assert environment["HOROVOD_WITHOUT_MPI"] == "1"
    assert "HOROVOD_WITHOUT_MPI" not in bootstrap.build_environment(wanted(project, mpi=True))


def test_a_failing_command_shows_why_and_its_last_lines_and_keeps_all(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = wanted(project)
    setup.venv.mkdir()
    command = [
        sys.executable,
        "-c",
        "print('Error: why'); [print('line', n) for n in range(99)]; raise SystemExit(3)",
    ]
    with pytest.raises(bootstrap.SetupError, match="the remedy"):
        bootstrap.run(setup, command, "the remedy")
    last_15 = [f"line {number}" for number in range(84, 99)]
    assert capsys.readouterr().err.splitlines() == ["Error: why", *last_15]
    assert (setup.venv / "setup.log").read_text().count("line") == 99
