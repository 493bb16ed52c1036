"""Set-up: a virtual environment with the pinned packages, Horovod from source, and this project.

    python3 tools/bootstrap.py [--mpi] [--gpu] [--venv .venv]

Guarantees: with nothing changed it does nothing and prints nothing; the next call continues an
interrupted one; an error ends with one sentence and exit status 1. An option that is not given
stays as the environment has it. Standard library only, in the syntax of Python 3.6, so that an old
Python gets its sentence too.
"""

# ruff: noqa: UP006, UP035, UP045 (their newer forms fail in Python 3.6)

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Optional, Sequence

VERSION = 1  # a higher one remakes every environment
STARTED_S = time.monotonic()
STAMP_NAME = "archipelago-setup.json"
STAGES = ("packages", "horovod", "project")
MAX_BUILD_JOBS = 16  # Horovod has about 100 sources, and compiling one can take 1 GB
# Variables that would reach into the new environment, or into Horovod's build.
UNWANTED = (
    "PYTHON(DONTWRITEBYTECODE|PATH|HOME)|PIP_(USER|TARGET|PREFIX)|(GNU)?M(AKE)?FLAGS|MAKELEVEL|"
    "HOROVOD_(WITH|GPU_|CPU_).*"
)


class SetupError(Exception):
    """An error with its remedy, in one sentence for the user."""


class Mend(NamedTuple):
    """A fix of Horovod's source.

    In the file at `path`, `old`, which must occur exactly once, becomes `new`.
    """

    path: str
    old: str
    new: str


MENDS = (
    # Needs XLA headers, which TensorFlow no longer ships; its ops are off by default.
    Mend(
        "horovod/tensorflow/CMakeLists.txt",
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        "",
    ),
    # While another thread holds the lock, Gloo's thread polls for it; on one core, until its time
    # slice (4 ms) is over.
    Mend(
        "third_party/gloo/gloo/transport/tcp/pair.cc",
        "  if (!lock) {\n    return;\n",
        "  if (!lock) {\n    std::this_thread::yield();\n    return;\n",
    ),
)


class Setup(NamedTuple):
    """The environment that is wanted: for which project, where, and the two options."""

    root: Path
    venv: Path
    mpi: bool
    gpu: bool

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.venv / "bin" / "python"

    def requirements(self, name: str = "") -> Path:
        """The requirement file of that name.

        Without a name, the file for pip, which includes common.txt.
        """
        if not name:
            name = "gpu.txt" if self.gpu else "cpu.txt"
        return self.root / "requirements" / name

    def pins(self) -> str:
        """The text of all requirement files that decide the environment's packages."""
        paths = (
            self.requirements(),
            self.requirements("common.txt"),
            self.requirements("horovod.txt"),
        )
        return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def check_python(version: Sequence[int], executable: str) -> None:
    """Raises SetupError unless this Python is supported and can make virtual environments.

    `version` is (major, minor, micro).
    """
    if tuple(version[:2]) not in ((3, 11), (3, 12)):
        received = ".".join(map(str, version[:3]))
        raise SetupError(
            f"Archipelago needs Python 3.11 or 3.12; received {received} ({executable}): run"
            " `apt-get install python3.11 python3.11-venv` and then `make setup"
            " PYTHON=python3.11`."
        )
    try:
        import ensurepip  # noqa: F401 (Debian packs these two separately)
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(
            f"Making an environment needs Python's module {error.name}, which is missing: run"
            f" `apt-get install python3-venv` (or python{version[0]}.{version[1]}-venv, for a"
            " Python beside the system's own)."
        ) from None


def check_build_tools(setup: Setup) -> None:
    """Raises SetupError if Horovod cannot be built on this machine, with the package to install."""
    compilers = os.environ.get("CXX", "").split()[:1]
    compilers = compilers or ["c++", "g++", "clang++"]  # CMake's own order
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    cuda_home = os.environ.get("HOROVOD_CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(cuda_home + "/bin/nvcc")

    # Each tool: its name for the user, where it is, and the Debian packages that have it.
    needed = [("a C++ compiler", compiler, "g++"), ("make", shutil.which("make"), "make")]
    if setup.mpi:
        mpicxx = shutil.which("mpicxx")
        needed.append(("MPI's compiler mpicxx", mpicxx, "libopenmpi-dev openmpi-bin"))
    if setup.gpu:
        needed.append(("CUDA's nvcc", nvcc, "nvidia-cuda-toolkit libnccl-dev"))
    for name, program, packages in needed:
        if program is None:
            raise SetupError(
                f"Building Horovod needs {name}, and none was found: run `apt-get install"
                f" {packages}`."
            )


def hashes(setup: Setup) -> Dict[str, str]:
    """A hash for each stage of STAGES, over all that its result depends on."""
    packages = [
        str(VERSION),
        str(setup.venv),
        platform.python_version(),
        str(setup.gpu),
        setup.pins(),
    ]
    horovod = [*packages, str(setup.mpi), str(MENDS)]
    project = [*horovod, (setup.root / "pyproject.toml").read_text(encoding="utf-8")]
    digests = [
        hashlib.sha256("\0".join(pieces).encode()).hexdigest()
        for pieces in (packages, horovod, project)
    ]
    return dict(zip(STAGES, digests, strict=True))


def read_stamp(venv: Path) -> Dict[str, object]:
    """The options and hashes that an environment was made with; empty if they are not known."""
    try:
        return dict(json.loads((venv / STAMP_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_stamp(setup: Setup, num_done: int) -> None:
    """Records the options and the hashes of the first `num_done` stages.

    The next call does the others again.
    """
    stamp: Dict[str, object] = {"mpi": setup.mpi, "gpu": setup.gpu}
    stamp.update(list(hashes(setup).items())[:num_done])
    draft = setup.venv / (STAMP_NAME + ".new")
    draft.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    draft.replace(setup.venv / STAMP_NAME)


def is_done(setup: Setup, stage: str) -> bool:
    """Returns True if the stage is as it is wanted now, and the interpreter starts."""
    if read_stamp(setup.venv).get(stage) != hashes(setup)[stage]:
        return False
    nothing = [str(setup.python), "-I", "-S", "-c", ""]
    try:
        return subprocess.call(nothing, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def say(message: str) -> None:
    """Prints a progress line with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED_S:4.0f} s] {message}", flush=True)


def clean_environment() -> Dict[str, str]:
    """The variables of this process that are passed on to the programs it starts."""
    return {name: value for name, value in os.environ.items() if not re.fullmatch(UNWANTED, name)}


def run(
    setup: Setup,
    command: Sequence[object],
    remedy: str,
    environment: Optional[Dict[str, str]] = None,
) -> None:
    """Runs a command quietly.

    If it fails, prints the lines that show the cause, keeps all output in setup.log and raises
    SetupError(remedy).
    """
    environment = environment or clean_environment()
    with tempfile.TemporaryFile() as output:
        status = subprocess.call(
            list(map(str, command)),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        if status == 0:
            return
        output.seek(0)
        text = output.read().decode(errors="replace")

    # A build ends in a long traceback: its first errors come before that.
    lines = text.splitlines()
    causes = [line for line in lines[:-15] if re.search(r"(?i)\berror\b", line)]
    print(*causes[:5], *lines[-15:], sep="\n", file=sys.stderr)
    log = setup.venv / "setup.log"
    if setup.venv.is_dir():
        log.write_text(text, encoding="utf-8")
    raise SetupError(f"{remedy} (its end is above, all of it in {log}).")


def run_pip(
    setup: Setup, remedy: str, *arguments: object, environment: Optional[Dict[str, str]] = None
) -> None:
    """Runs the environment's pip, as `run` does."""
    command = [setup.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    run(setup, command, remedy, environment)


def make_venv(setup: Setup) -> None:
    """Makes an empty environment, in place of an earlier one."""
    if setup.venv.exists():
        if not (setup.venv / "pyvenv.cfg").exists() and any(setup.venv.iterdir()):
            raise SetupError(
                f"{setup.venv} is no virtual environment: remove it, or give another place with"
                " --venv."
            )
        say(f"removing the old {setup.venv.name}")
        shutil.rmtree(str(setup.venv))

    # The base interpreter, as this one may have been in the old environment.
    say(f"making {setup.venv.name} with Python {platform.python_version()}")
    base_python = getattr(sys, "_base_executable", sys.executable)
    command = [base_python, "-m", "venv", setup.venv]
    run(setup, command, "Python could not make a virtual environment")
    write_stamp(setup, 0)


def install_packages(setup: Setup) -> None:
    """Stage 1: the pinned packages, in a new environment, without those that are not pinned."""
    make_venv(setup)
    say("installing the pinned packages: 1 to 2 minutes, more with a slow network")
    remedy = (
        "pip could not install the packages: check network and disk space, then run `make setup`"
        " again"
    )
    run_pip(setup, remedy, "install", "--no-compile", "-r", setup.requirements())


def install_project(setup: Setup) -> None:
    """Stage 3: the project itself, editable; and all bytecode, which pip would make on one core."""
    say("installing the project and compiling bytecode: half a minute the first time")
    remedy = "pip could not install the project: see pyproject.toml"
    options = ("--no-deps", "--no-build-isolation", "--no-compile")
    run_pip(setup, remedy, "install", *options, "-e", setup.root)

    # The status does not count: some packages ship templates that are no valid Python.
    compile_all = [str(setup.python), "-m", "compileall", "-qq", "-j", "0", str(setup.venv / "lib")]
    quiet = subprocess.DEVNULL
    subprocess.call(compile_all, env=clean_environment(), stdout=quiet, stderr=quiet)


def wheel_folder(setup: Setup) -> Path:
    """The folder of Horovod's wheel: one for each combination that needs a build of its own."""
    pins = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", setup.pins()))
    tensorflow = "tensorflow" if setup.gpu else "tensorflow-cpu"
    key = [f"{name}-{pins.get(name)}" for name in ("horovod", tensorflow)]
    key += ["python-{}.{}".format(*sys.version_info), f"{sys.platform}-{platform.machine()}"]
    key.append("gloo" + "-mpi" * setup.mpi + "-nccl" * setup.gpu)
    key.append(hashlib.sha256(str(MENDS).encode()).hexdigest()[:8])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "archipelago" / "wheels" / "_".join(key)


def kept_wheel(setup: Setup) -> Optional[Path]:
    """The wheel of an earlier build, if there is one."""
    return next(wheel_folder(setup).glob("horovod-*.whl"), None)


def mend(source: Path, mends: Sequence[Mend] = MENDS) -> None:
    """Applies the fixes to the unpacked source; raises SetupError if one does not fit."""
    for path, old, new in mends:
        file = source / path
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if text.count(old) != 1:
            raise SetupError(
                f"Horovod's {path} must hold exactly one {old.strip()!r}; received"
                f" {text.count(old)}: pin the version in requirements/horovod.txt that"
                " tools/bootstrap.py was made for."
            )
        file.write_text(text.replace(old, new), encoding="utf-8")


def build_environment(setup: Setup) -> Dict[str, str]:
    """The variables for Horovod's build: TensorFlow and Gloo, with MPI and NCCL when wanted."""
    environment = clean_environment()
    programs = setup.venv / "bin"
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1

    environment.update(
        PATH=f"{programs}{os.pathsep}{environment.get('PATH', os.defpath)}",
        HOROVOD_CMAKE=str(programs / "cmake"),
        # Horovod's setup.py passes VERBOSE=1, which Ninja refuses
        CMAKE_GENERATOR="Unix Makefiles",
        # its copy of Gloo asks for CMake 2.8, which CMake 4 refuses
        CMAKE_POLICY_VERSION_MINIMUM="3.5",
        # without it, setup.py takes -j8 on every machine
        MAKEFLAGS=f"-j{min(num_cores, MAX_BUILD_JOBS)}",
        HOROVOD_WITH_TENSORFLOW="1",
        HOROVOD_WITHOUT_PYTORCH="1",
        HOROVOD_WITHOUT_MXNET="1",
        HOROVOD_WITH_GLOO="1",
    )
    environment["HOROVOD_WITH_MPI" if setup.mpi else "HOROVOD_WITHOUT_MPI"] = "1"
    if setup.gpu:
        environment["HOROVOD_GPU_OPERATIONS"] = "NCCL"
    return environment


def build_wheel(setup: Setup) -> Path:
    """Builds Horovod's wheel from its fixed source, and keeps it; returns its path."""
    check_build_tools(setup)
    say(
        "building Horovod from source: 3 to 5 minutes on two cores; its wheel is kept for the next"
        " time"
    )
    with tempfile.TemporaryDirectory(prefix="archipelago-") as name:
        folder = Path(name)
        source = download_source(setup, folder)
        mend(source)

        options = ("--no-deps", "--no-build-isolation", "--no-cache-dir")
        remedy = "Horovod could not be built: try another compiler, with CXX="
        arguments = ("wheel", *options, "-w", folder / "wheel", source)
        run_pip(setup, remedy, *arguments, environment=build_environment(setup))
        wheel = next((folder / "wheel").glob("*.whl"))

        # Renamed when it is whole: nobody ever sees half a wheel.
        draft = wheel_folder(setup) / f"{os.getpid()}.partial"
        draft.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(wheel), str(draft))
        draft.replace(draft.with_name(wheel.name))
        return draft.with_name(wheel.name)


def download_source(setup: Setup, folder: Path) -> Path:
    """Downloads Horovod's source, checked by its hash, and unpacks it; returns its folder."""
    remedy = (
        "pip could not download Horovod's source: check the network, then run `make setup` again"
    )
    options = ("--no-deps", "--no-build-isolation", "--no-binary", "horovod", "--require-hashes")
    pinned = ("-r", setup.requirements("horovod.txt"))
    run_pip(setup, remedy, "download", *options, *pinned, "-d", folder)
    archive = next(folder.glob("horovod-*.tar.gz"))
    shutil.unpack_archive(str(archive), str(folder))
    return folder / archive.name[: -len(".tar.gz")]


def install_wheel(setup: Setup, wheel: Path) -> None:
    """Installs a wheel of Horovod and checks that it can do what it was built for."""
    say("installing Horovod and trying it")
    remedy = f"pip could not install {wheel}: delete it and run `make setup` again"
    run_pip(setup, remedy, "install", "--no-deps", "--no-compile", "--force-reinstall", wheel)
    wanted = ["gloo_built"] + ["mpi_built"] * setup.mpi + ["nccl_built"] * setup.gpu
    check = "import horovod.tensorflow as hvd; " + "; ".join(
        f"assert hvd.{name}(), '{name}'" for name in wanted
    )
    run(setup, [setup.python, "-c", check], "Horovod was built but does not work here")


def install_horovod(setup: Setup) -> None:
    """Stage 2: Horovod, from a kept wheel if there is one.

    A kept wheel that does not work here (another MPI or C library, say) is built again.
    """
    wheel = kept_wheel(setup)
    try:
        install_wheel(setup, wheel or build_wheel(setup))
    except SetupError as error:
        if wheel is None:
            raise
        say(f"building again, for the kept wheel failed: {error}")
        install_wheel(setup, build_wheel(setup))


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Waits until no other set-up of this project runs.

    The lock is on the folder and ends with this process.
    """
    import fcntl

    handle = os.open(str(root), os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another set-up of this project")
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks
    yield
    os.close(handle)


def set_up(setup: Setup) -> None:
    """Does the stages that are not done yet, or not as wanted now."""
    if is_done(setup, STAGES[-1]):
        return
    if not is_done(setup, "horovod") and kept_wheel(setup) is None:
        check_build_tools(setup)  # before the minutes of downloading

    steps = (install_packages, install_horovod, install_project)
    with only_one(setup.root):
        for num_done, (stage, step) in enumerate(zip(STAGES, steps, strict=True)):
            if is_done(setup, stage):
                continue
            if num_done > 0:  # this stage and the later ones count as not done from here on
                write_stamp(setup, num_done)
            step(setup)
            write_stamp(setup, num_done + 1)
    say("set-up done")


def parse_options(arguments: Optional[Sequence[str]], root: Path) -> Setup:
    """Reads the command line.

    An option that is not given stays as the existing environment has it.
    """
    parser = argparse.ArgumentParser(
        description="Makes the project's virtual environment; safe to call again."
    )
    parser.add_argument(
        "--venv", default=".venv", help="where, seen from the project's folder (default: .venv)"
    )
    for name, meaning in (
        ("mpi", "Horovod with MPI besides Gloo"),
        ("gpu", "TensorFlow and Horovod for GPUs"),
    ):
        parser.add_argument("--" + name, action="store_true", default=None, help=meaning)
        parser.add_argument("--no-" + name, dest=name, action="store_false", help="without that")

    options = parser.parse_args(arguments)
    venv = root / Path(options.venv).expanduser()
    stamp = read_stamp(venv)
    mpi = stamp.get("mpi") is True if options.mpi is None else options.mpi
    gpu = stamp.get("gpu") is True if options.gpu is None else options.gpu
    return Setup(root, venv, mpi=mpi, gpu=gpu)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the program; returns its exit status."""
    try:
        check_python(sys.version_info[:3], sys.executable)
        set_up(parse_options(arguments, Path(__file__).resolve().parent.parent))
    except (SetupError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; `make setup` goes on from the last stage done", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
