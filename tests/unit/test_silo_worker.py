"""A silo's worker: what it notes of its task, whose code it runs, one task after the other."""

import io
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.task_identity import TaskIdentity

from fl_app import flower_internals
from fl_app.flower_internals import TaskWithdrawn, installed_bundle
from fl_app.local_training import Workbench
from fl_app.messages import unpack_refusal, unpack_silo
from fl_app.silo import worker
from fl_app.silo.task_file import TaskFile
from fl_app.silo.worker import PACKAGES, bundle_digest, checked_app, work

# --- the note of the task in hand


def test_the_task_in_hand_is_noted_first_by_its_token_then_with_its_message(tmp_path: Path):
    file = TaskFile(tmp_path / "task.json")
    assert file.read() is None
    file.write("token")
    assert file.read() == ("token", b"")
    file.write("token", bytes(range(256)))
    assert file.read() == ("token", bytes(range(256)))
    file.write("another")
    assert file.read() == ("another", b"")
    file.clear()
    file.clear()
    assert file.read() is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes | None, int]]:
    """Of each file that took another's place: its content, that of the other, and who may read it."""
    seen, replace = [], Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append((self.read_bytes(), target.read_bytes() if target.exists() else None, self.stat().st_mode))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    return seen


def test_the_note_is_never_there_in_part(tmp_path: Path, replaced: list[tuple[bytes, bytes | None, int]]):
    file, notes = TaskFile(tmp_path / "task.json"), []
    for token in ("token", "another"):
        file.write(token, b"message")
        notes.append(file.path.read_bytes())
    assert [(new, old) for new, old, _ in replaced] == [(notes[0], None), (notes[1], notes[0])]


def test_nobody_else_may_read_the_token_which_is_the_right_to_answer(
    tmp_path: Path, replaced: list[tuple[bytes, bytes | None, int]]
):
    before, file, modes = os.umask(0), TaskFile(tmp_path / "task.json"), []
    try:
        for token in ("token", "another"):
            file.write(token, b"message")
            modes.append(file.path.stat().st_mode)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(mode) for mode in (*modes, *(mode for _, _, mode in replaced))] == [0o600] * 4


# --- whose code it runs


FILES = {"pyproject.toml": b"[project]\n", "shared/a.py": b"A = 1\n", "fl_app/b.py": b"B = 2\n" * 100}


def bundle(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED, year: int = 1980) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0)), content, compression)
    return target.getvalue()


def test_a_bundle_is_the_same_however_it_was_packed():
    others = [
        bundle(FILES, zipfile.ZIP_DEFLATED),
        bundle(FILES, zipfile.ZIP_LZMA),
        bundle(dict(reversed(FILES.items()))),
        bundle(FILES, year=2026),
        bundle(FILES | {".info/checksums": b"of Flower's"}),
    ]
    assert len({bundle(FILES), *others}) == 6
    assert {bundle_digest(other) for other in others} == {bundle_digest(bundle(FILES))}


@pytest.mark.parametrize(
    "files",
    [
        FILES | {"shared/a.py": b"A = 2\n"},
        FILES | {"shared/a.py": b""},
        FILES | {"shared/c.py": b""},
        {name: content for name, content in FILES.items() if name != "fl_app/b.py"},
        {name.replace("a.py", "c.py"): content for name, content in FILES.items()},
        FILES | {"shared/a.py": FILES["fl_app/b.py"], "fl_app/b.py": FILES["shared/a.py"]},
    ],
    ids=["content", "emptied", "one more", "one less", "name", "exchanged"],
)
def test_a_bundle_with_another_name_or_content_is_another_one(files: dict[str, bytes]):
    assert bundle_digest(bundle(files)) != bundle_digest(bundle(FILES))


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # which Flower builds with
def test_the_installed_code_is_the_bundle_that_flwr_run_makes_of_it(project: Path, tmp_path: Path):
    """Of a copy, with what else lies about in a checkout."""
    for package in (*PACKAGES, "experiments"):
        shutil.copytree(project / package, tmp_path / package)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "Makefile"):
        shutil.copy(project / name, tmp_path)
    installed = installed_bundle(tmp_path, PACKAGES)
    with zipfile.ZipFile(io.BytesIO(installed)) as archive:
        names = set(archive.namelist())
    assert {"pyproject.toml", "fl_app/client_app.py", "fl_app/silo/worker.py", "shared/zoo/mlp.py"} <= names
    assert bundle_digest(build_fab_from_disk(tmp_path)) == bundle_digest(installed)
    with (tmp_path / "shared" / "weights.py").open("a") as file:
        file.write("# changed\n")
    assert bundle_digest(installed_bundle(tmp_path, PACKAGES)) != bundle_digest(installed)


def test_the_folder_whose_code_is_compared_is_the_one_that_is_run(project: Path):
    assert project == worker.PROJECT


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Message, Context]]:
    """Makes the question of a roll call, and what the silo that gets it knows."""
    for name in ("_run_id", "_node_id", "_task_id"):  # private, and Flower's messages ask for them
        monkeypatch.setattr(TaskIdentity, name, 1)

    def make() -> tuple[Message, Context]:
        message = Message(RecordDict(), dst_node_id=5, message_type="query")
        message.metadata.__dict__["_message_id"] = "the id"
        return message, Context(1, 5, {"silo": "hospital-a", "data": "wine"}, RecordDict(), {})

    return make


def test_a_worker_answers_for_the_code_that_is_installed_and_refuses_to_stand_in_for_other_code(
    ask: Callable[[], tuple[Message, Context]], capsys: pytest.CaptureFixture[str]
):
    mine, other = bundle(FILES), bundle(FILES | {"shared/a.py": b"A = 2\n"})
    answer = checked_app(bundle_digest(mine), Workbench())
    for _ in range(2):  # the bundle changes from one message to the next, and back
        assert unpack_silo(answer(*ask(), bundle(FILES, zipfile.ZIP_DEFLATED)).content).name == "hospital-a"
        refusal = unpack_refusal(answer(*ask(), other).content)
        assert refusal is not None
        assert refusal.startswith("silo 'hospital-a' refuses: it runs the app that is installed here")
        for digest in (bundle_digest(mine), bundle_digest(other)):
            assert digest[:16] in refusal
        assert "Install the same version of Archipelago on both sides." in refusal
        assert refusal.partition(": ")[2] in capsys.readouterr().err


# --- one task after the other


class NoMoreTasks(Exception):
    pass


class TaskHere:
    """Stands for `flower_internals.Task`; keeps what became of it."""

    def __init__(
        self, question: tuple[Message, Context], token: str, withdrawn_at: str = "", file: TaskFile | None = None
    ) -> None:
        self.question, self.token, self.withdrawn_at, self.file = question, token, withdrawn_at, file
        self.noted_when_pulled: tuple[str, bytes] | None = None
        self.answers: list[Message] = []
        self.was_closed = False

    def heartbeat(self) -> AbstractContextManager:
        return nullcontext()

    def pull(self) -> tuple[Message, Context, bytes]:
        self.check("pulled")
        self.noted_when_pulled = self.file.read() if self.file else None
        return *self.question, b"bundle"

    def answer(self, reply: Message, context: Context) -> None:
        self.check("answered")
        self.answers.append(reply)

    def check(self, event: str) -> None:
        if event == self.withdrawn_at:
            raise TaskWithdrawn("its time is over")

    def close(self) -> None:
        self.was_closed = True


class Tasks:
    """Stands for `flower_internals.TaskSource`: these one after the other, None for none at the moment."""

    def __init__(self, *tasks: TaskHere | None) -> None:
        self.tasks = list(tasks)

    def next_task(self) -> TaskHere | None:
        if not self.tasks:
            raise NoMoreTasks
        return self.tasks.pop(0)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each wait was, on a clock that stands still otherwise."""
    waited: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 10.0 * sum(waited), sleep=waited.append)
    monkeypatch.setattr(flower_internals, "time", clock)
    return waited


def test_a_worker_notes_each_task_while_it_does_it_and_waits_only_without_one(
    tmp_path: Path, ask: Callable[[], tuple[Message, Context]], sleeps: list[float]
):
    file, noted = TaskFile(tmp_path / "task.json"), []
    tasks = [TaskHere(ask(), token, file=file) for token in "abc"]

    def answer(message: Message, context: Context, data: bytes) -> Message:
        assert data == b"bundle"
        noted.append(file.read())
        return Message(RecordDict(), reply_to=message)

    with pytest.raises(NoMoreTasks):
        work(Tasks(None, None, None, tasks[0], tasks[1], None, tasks[2]), file, answer)
    assert [len(task.answers) for task in tasks] == [1, 1, 1]
    assert all(task.was_closed for task in tasks)
    assert [task.noted_when_pulled for task in tasks] == [("a", b""), ("b", b""), ("c", b"")]
    for token, note in zip("abc", noted, strict=True):
        assert note is not None
        assert note[0] == token
        assert flower_internals.message_from_bytes(note[1]).metadata.message_id == "the id"
    assert file.read() is None
    assert len(sleeps) == 4
    assert sleeps[-1] == sleeps[0]  # short again after a task


@pytest.mark.parametrize("withdrawn_at", ["pulled", "answered"])
def test_a_task_that_is_withdrawn_does_not_end_the_worker(
    tmp_path: Path,
    ask: Callable[[], tuple[Message, Context]],
    sleeps: list[float],
    capsys: pytest.CaptureFixture[str],
    withdrawn_at: str,
):
    file, tasks = TaskFile(tmp_path / "task.json"), [TaskHere(ask(), "a", withdrawn_at), TaskHere(ask(), "b")]
    with pytest.raises(NoMoreTasks):
        work(Tasks(*tasks), file, lambda message, context, data: Message(RecordDict(), reply_to=message))
    assert [len(task.answers) for task in tasks] == [0, 1]
    assert all(task.was_closed for task in tasks)
    assert file.read() is None
    assert capsys.readouterr().out == "the task in hand was withdrawn: its time is over\n"


def test_the_note_of_a_task_that_a_worker_died_on_stays_for_whoever_answers_in_its_place(
    tmp_path: Path, ask: Callable[[], tuple[Message, Context]], sleeps: list[float]
):
    def answer(message: Message, context: Context, data: bytes) -> Message:
        raise MemoryError

    file, task = TaskFile(tmp_path / "task.json"), TaskHere(ask(), "a")
    with pytest.raises(MemoryError):
        work(Tasks(task), file, answer)
    left = file.read()
    assert left is not None
    assert left[0] == "a"
    assert flower_internals.message_from_bytes(left[1]).metadata.message_id == "the id"
    assert task.was_closed
