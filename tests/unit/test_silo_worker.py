"""A silo's worker: its note of the task in hand, whose code it runs, one task after the other."""

import io
import os
import shutil
import stat
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.task_identity import TaskIdentity

from fl_app.failures import Failure
from fl_app.flower import fab
from fl_app.flower.client_app import make_app
from fl_app.flower.fab import PACKAGES, fab_digest, installed_fab
from fl_app.flower.node_tasks import TaskWithdrawn, message_from_bytes
from fl_app.flower.wire import pack_tasks, unpack_reply
from fl_app.flower.worker import checked_app, work
from fl_app.messages import DESCRIBE, Answer, SiloEntry, Task
from fl_app.silo.task_file import TaskFile
from fl_app.silo.workbench import Workbench
from shared import polling

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


@dataclass(frozen=True)
class Replacement:
    """A file that took another's place: its content, that of the other, and its mode."""

    new: bytes
    old: bytes | None
    mode: int


@pytest.fixture
def replacements(monkeypatch: pytest.MonkeyPatch) -> list[Replacement]:
    """The replacements of files by Path.replace."""
    replacements: list[Replacement] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        old = target.read_bytes() if target.exists() else None
        replacements.append(Replacement(self.read_bytes(), old, self.stat().st_mode))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    return replacements


def test_the_note_is_never_there_in_part(tmp_path: Path, replacements: list[Replacement]):
    file = TaskFile(tmp_path / "task.json")
    notes = []
    for token in ("token", "another"):
        file.write(token, b"message")
        notes.append(file.path.read_bytes())
    first, second = replacements
    assert (first.new, first.old) == (notes[0], None)
    assert (second.new, second.old) == (notes[1], notes[0])


def test_nobody_else_may_read_the_token_which_is_the_right_to_answer(
    tmp_path: Path, replacements: list[Replacement]
):
    file = TaskFile(tmp_path / "task.json")
    modes = []
    before = os.umask(0)
    try:
        for token in ("token", "another"):
            file.write(token, b"message")
            modes.append(file.path.stat().st_mode)
    finally:
        os.umask(before)
    modes += [replacement.mode for replacement in replacements]
    assert [stat.S_IMODE(mode) for mode in modes] == [0o600] * 4


# --- whose code it runs


FILES = {
    "pyproject.toml": b"[project]\n",
    "shared/a.py": b"A = 1\n",
    "fl_app/b.py": b"B = 2\n" * 100,
}


def make_fab(
    files: dict[str, bytes], compression: int = zipfile.ZIP_STORED, year: int = 1980
) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0)), content, compression)
    return target.getvalue()


def test_a_fab_is_the_same_however_it_was_packed():
    plain = make_fab(FILES)
    packings = [
        make_fab(FILES, zipfile.ZIP_DEFLATED),
        make_fab(FILES, zipfile.ZIP_LZMA),
        make_fab(dict(reversed(FILES.items()))),
        make_fab(FILES, year=2026),
        make_fab(FILES | {".info/checksums": b"of Flower's"}),
    ]
    assert len({plain, *packings}) == 6
    assert {fab_digest(packing) for packing in packings} == {fab_digest(plain)}


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
def test_a_fab_with_another_name_or_content_is_another_one(files: dict[str, bytes]):
    assert fab_digest(make_fab(files)) != fab_digest(make_fab(FILES))


@pytest.mark.filterwarnings(
    "ignore:GitWildMatchPattern:DeprecationWarning"
)  # which Flower builds with
def test_the_installed_code_is_the_fab_that_flwr_run_makes_of_it(project: Path, tmp_path: Path):
    """Of a copy, with what else lies about in a checkout."""
    for package in (*PACKAGES, "experiments"):
        shutil.copytree(project / package, tmp_path / package)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "Makefile"):
        shutil.copy(project / name, tmp_path)

    installed = installed_fab(tmp_path, PACKAGES)
    with zipfile.ZipFile(io.BytesIO(installed)) as archive:
        names = set(archive.namelist())
    expected = ("fl_app/flower/client_app.py", "fl_app/flower/worker.py", "shared/zoo/mlp.py")
    assert {"pyproject.toml", *expected} <= names
    assert fab_digest(build_fab_from_disk(tmp_path)) == fab_digest(installed)

    with (tmp_path / "shared" / "weights.py").open("a") as file:
        file.write("# changed\n")
    assert fab_digest(installed_fab(tmp_path, PACKAGES)) != fab_digest(installed)


def test_the_folder_whose_code_is_compared_is_the_one_that_is_run(project: Path):
    assert project == fab.PROJECT


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Message, Context]]:
    """Makes the question of a roll call, and what the silo that gets it knows."""
    for name in ("_run_id", "_node_id", "_task_id"):  # private, and Flower's messages ask for them
        monkeypatch.setattr(TaskIdentity, name, 1)

    def make() -> tuple[Message, Context]:
        content = pack_tasks({"": Task(DESCRIBE)})[""]
        message = Message(content, dst_node_id=5, message_type="query")
        message.metadata.__dict__["_message_id"] = "the id"
        return message, Context(1, 5, {"silo": "hospital-a", "data": "wine"}, RecordDict(), {})

    return make


def test_a_worker_answers_for_the_code_that_is_installed_and_refuses_to_stand_in_for_other_code(
    ask: Callable[[], tuple[Message, Context]], capsys: pytest.CaptureFixture[str]
):
    mine = make_fab(FILES)
    repacked = make_fab(FILES, zipfile.ZIP_DEFLATED)
    other = make_fab(FILES | {"shared/a.py": b"A = 2\n"})
    app = checked_app(fab_digest(mine), Workbench())

    for _ in range(2):  # the FAB changes from one message to the next, and back
        introduction = unpack_reply(app(*ask(), repacked).content)
        assert isinstance(introduction, Answer)
        assert SiloEntry.from_answer(introduction).name == "hospital-a"

        refused = unpack_reply(app(*ask(), other).content)
        assert isinstance(refused, Failure)
        refusal = refused.reason
        assert refusal.startswith(
            "silo 'hospital-a' refuses: it runs the app that is installed here"
        )
        for digest in (fab_digest(mine), fab_digest(other)):
            assert digest[:16] in refusal
        assert "Install the same version of Archipelago on both sides." in refusal
        assert refusal.partition(": ")[2] in capsys.readouterr().err


def zip_bomb() -> bytes:
    """A bundle of a few kilobytes that says that it holds 200 MB, and would."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("shared/a.py", bytes(200 << 20))
    return buffer.getvalue()


def of_many_files() -> bytes:
    return make_fab({f"shared/{i}.py": b"" for i in range(6000)})


def with_a_lie() -> bytes:
    """A bundle whose directory says that a file is shorter than it is."""
    return make_fab(FILES).replace(b"A = 1", b"A = 7")


@pytest.mark.parametrize(
    "bundle", [zip_bomb, of_many_files, with_a_lie, lambda: b"", lambda: b"PK" + bytes(50)]
)
def test_a_bundle_that_cannot_be_read_or_would_fill_the_memory_is_refused_in_a_sentence(
    ask: Callable[[], tuple[Message, Context]], bundle: Callable[[], bytes]
):
    app = checked_app(fab_digest(make_fab(FILES)), Workbench())
    fab = bundle()
    tracemalloc.start()
    refused = unpack_reply(app(*ask(), fab).content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(refused, Failure)
    assert "received no app bundle: " in refused.reason
    assert peak < 32 << 20


@pytest.mark.parametrize(
    ("run_config", "reason"),
    [
        ({"federation.num_rounds": -1}, "it received an experiment that cannot be read: "),
        ({"data.nane": "wine"}, "it received an experiment that cannot be read: "),
        ({"data.validation_fraction": 0.79}, "a silo holds out at most half of its examples"),
    ],
)
def test_whose_fault_it_is_is_said_where_the_reason_may_leave(
    ask: Callable[[], tuple[Message, Context]], run_config: dict[str, Any], reason: str
):
    message, context = ask()
    context.run_config.update(run_config)
    reply = unpack_reply(make_app(Workbench())(message, context).content)
    assert isinstance(reply, Failure)
    assert reason in reply.reason


# --- one task after the other


class NoMoreTasks(Exception):
    pass


@dataclass
class TaskHere:
    """Stands for a `NodeTask`; keeps what became of it."""

    question: tuple[Message, Context]
    token: str
    withdrawn_at: str = ""  # "pulled" or "answered"
    run: int = 0  # 0: one of its own
    file: TaskFile | None = None
    noted_when_pulled: tuple[str, bytes] | None = None
    answers: list[Message] = field(default_factory=list)
    was_closed: bool = False
    num_hearts: int = 0  # heartbeats that go on

    @property
    def run_id(self) -> int:
        return self.run or id(self)

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        self.num_hearts += 1
        yield
        self.num_hearts -= 1

    def pull(self) -> tuple[Message, Context, bytes]:
        self.check("pulled")
        self.noted_when_pulled = self.file.read() if self.file else None
        message, context = self.question
        return message, context, b"FAB"

    def answer(self, reply: Message, context: Context) -> None:
        self.check("answered")
        self.answers.append(reply)

    def check(self, event: str) -> None:
        if event == self.withdrawn_at:
            raise TaskWithdrawn("its time is over")

    def close(self) -> None:
        self.was_closed = True


class Tasks:
    """Stands for a `TaskSource`: these tasks one by one, None for none at the moment.

    After the last there are none so often that a worker has done all that it holds.
    """

    def __init__(self, *tasks: TaskHere | None) -> None:
        self.tasks = [*tasks, *[None] * sum(task is not None for task in tasks)]

    def next_task(self) -> TaskHere | None:
        if not self.tasks:
            raise NoMoreTasks
        return self.tasks.pop(0)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The lengths of the waits, on a clock that stands still otherwise."""
    waited: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 10.0 * sum(waited), sleep=waited.append)
    monkeypatch.setattr(polling, "time", clock)
    return waited


def acknowledge(message: Message, context: Context, fab: bytes) -> Message:
    """An app that answers anything with nothing."""
    return Message(RecordDict(), reply_to=message)


def test_a_worker_notes_each_task_while_it_does_it_and_waits_only_without_one(
    tmp_path: Path, ask: Callable[[], tuple[Message, Context]], sleeps: list[float]
):
    file = TaskFile(tmp_path / "task.json")
    tasks = [TaskHere(ask(), token, file=file) for token in "abc"]
    notes = []

    def app(message: Message, context: Context, fab: bytes) -> Message:
        assert fab == b"FAB"
        notes.append(file.read())
        return acknowledge(message, context, fab)

    with pytest.raises(NoMoreTasks):
        work(Tasks(None, None, None, tasks[0], tasks[1], None, tasks[2]), file, app)
    assert [len(task.answers) for task in tasks] == [1, 1, 1]
    assert all(task.was_closed for task in tasks)

    # The token is noted before the message is there, and both while the task is done.
    assert [task.noted_when_pulled for task in tasks] == [("a", b""), ("b", b""), ("c", b"")]
    for token, note in zip("abc", notes, strict=True):
        assert note is not None
        assert note[0] == token
        assert message_from_bytes(note[1]).metadata.message_id == "the id"
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
    file = TaskFile(tmp_path / "task.json")
    tasks = [TaskHere(ask(), "a", withdrawn_at), TaskHere(ask(), "b")]
    with pytest.raises(NoMoreTasks):
        work(Tasks(*tasks), file, acknowledge)
    assert [len(task.answers) for task in tasks] == [0, 1]
    assert all(task.was_closed for task in tasks)
    assert file.read() is None
    assert capsys.readouterr().out == "the task in hand was withdrawn: its time is over\n"


def test_of_the_tasks_of_a_run_that_wait_only_the_newest_is_done(
    tmp_path: Path,
    ask: Callable[[], tuple[Message, Context]],
    sleeps: list[float],
    capsys: pytest.CaptureFixture[str],
):
    file = TaskFile(tmp_path / "task.json")
    runs = {"a": 1, "b": 2, "c": 1, "d": 1, "e": 2}  # those of run 1 are of three rounds
    tasks = {token: TaskHere(ask(), token, run=run) for token, run in runs.items()}
    done: list[str] = []

    def app(message: Message, context: Context, fab: bytes) -> Message:
        note = file.read()
        assert note is not None
        done.append(note[0])
        assert all(task.num_hearts == 1 for task in tasks.values() if not task.answers)
        return acknowledge(message, context, fab)

    with pytest.raises(NoMoreTasks):
        work(Tasks(*(tasks[token] for token in "abcde")), file, app)
    assert done == ["d", "e"]
    assert all(task.was_closed and task.num_hearts == 0 for task in tasks.values())
    for token in "abc":
        (reply,) = tasks[token].answers
        refusal = unpack_reply(reply.content)
        assert refusal == Failure("silo 'hospital-a' refuses: a newer task has come meanwhile.")
    assert capsys.readouterr().out.count("a task is declined: a newer one of its run is there") == 3


def test_a_task_that_comes_while_another_of_its_run_is_done_is_done_after_it(
    tmp_path: Path, ask: Callable[[], tuple[Message, Context]], sleeps: list[float]
):
    tasks = [TaskHere(ask(), token, run=1) for token in "ab"]
    with pytest.raises(NoMoreTasks):
        work(Tasks(tasks[0], None, tasks[1]), TaskFile(tmp_path / "task.json"), acknowledge)
    assert [dict(task.answers[0].content) for task in tasks] == [{}, {}]


def test_the_note_of_a_task_that_a_worker_died_on_stays_for_whoever_answers_in_its_place(
    tmp_path: Path, ask: Callable[[], tuple[Message, Context]], sleeps: list[float]
):
    def dying(message: Message, context: Context, fab: bytes) -> Message:
        raise MemoryError

    file = TaskFile(tmp_path / "task.json")
    task = TaskHere(ask(), "a")
    with pytest.raises(MemoryError):
        work(Tasks(task), file, dying)
    left = file.read()
    assert left is not None
    assert left[0] == "a"
    assert message_from_bytes(left[1]).metadata.message_id == "the id"
    assert task.was_closed
