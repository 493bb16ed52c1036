"""archipelago COMMAND ...: trains, federates, inspects, reports; one name for all that can be done.

Nothing but Python's own library is imported before the choice, so that help comes at once and
`doctor` works where nothing else does.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command: the module whose `main` it is, what it does, and how it is called."""

    module: str
    summary: str
    example: str
    arguments: tuple[str, ...] = ()  # that come before the user's


COMMANDS = {
    "train": Command(
        "archipelago.train",
        "train an experiment in one process, or on Horovod ranks",
        "train experiments/digits_cnn.toml --ranks 2",
    ),
    "federate": Command(
        "fl_app.launch.__main__",
        "run a whole federation on this machine",
        "federate experiments/digits_cnn.toml --silos 3",
    ),
    "silo": Command(
        "fl_app.silo.__main__",
        "take part in a federation with one silo's data",
        "silo --superlink coordinator:8000 --root-certificates ca.crt --silo a --data a.csv",
    ),
    "inspect": Command(
        "shared.data.__main__",
        "show the columns of a file, and the experiment that suits",
        "inspect patients.csv --label outcome -o mine.toml",
        ("inspect",),
    ),
    "report": Command(
        "shared.report.__main__",
        "set runs side by side on one page",
        "report runs/a runs/b -o page.html",
    ),
    "export": Command(
        "shared.export.__main__",
        "write a trained model as a file for other programs",
        "export runs/a --format onnx",
    ),
    "keys": Command(
        "archipelago.keys",
        "list the keys of an experiment file with defaults and meaning",
        "keys federation",
    ),
    "status": Command(
        "archipelago.status", "say how far a run is, from what it has written", "status runs/a"
    ),
    "doctor": Command(
        "archipelago.doctor", "say what this machine has, what it lacks and the remedy", "doctor"
    ),
}
ALONE = ("archipelago.doctor",)  # needs no packages


def main(arguments: Sequence[str] | None = None) -> int:
    """Does the command; returns its exit status, 2 for a mistake of the user."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if given[0] == "--version":
        print(version())
        return 0
    if given[0] not in COMMANDS:
        return _mistake(
            f"there is no command {given[0]!r}; there are {', '.join(COMMANDS)}. See: archipelago"
            " --help"
        )

    command = COMMANDS[given[0]]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        return _mistake(
            f"this Python ({sys.executable}) has no package {error.name!r}. Run make setup in the"
            " checkout and use .venv/bin/archipelago; archipelago doctor says what else is missing."
        )
    status: int = module.main([*command.arguments, *given[1:]])
    return status


def overview() -> str:
    """The commands, each with what it does and an example."""
    lines = [
        "usage: archipelago COMMAND ...",
        "",
        "One Keras 3 model zoo, trained on a cluster with Horovod or across organisations with",
        "Flower, from one experiment file. archipelago COMMAND --help tells the options.",
        "",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<10}{command.summary}")
        lines.append(f"  {'':<10}  archipelago {command.example}")
    lines += ["", "  --version   print the version, and the hash of the app that silos compare"]
    return "\n".join(lines)


def version() -> str:
    """The project's version and the hash of the installed app, as far as they can be told."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        number = installed("archipelago")
    except PackageNotFoundError:
        number = "not installed"
    try:
        digest = importlib.import_module("fl_app.flower.fab").installed_digest()[:16]
    except ModuleNotFoundError as error:
        digest = f"unknown without {error.name}"
    return f"archipelago {number}, app {digest}"


def _mistake(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
