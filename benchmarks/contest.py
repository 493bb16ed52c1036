"""Conducts contenders that take turns (turns.py): starts all, lets one run at a time, and collects what they say."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.turns import GO, NEWS
from shared.processes import ProcessGroup

START_TIMEOUT_S = 300.0  # until the first turn, and between two turns: a model is built, traced and warmed up
POLL_S = 0.02


@dataclass(frozen=True)
class Launch:
    """One process of a contender: its command, and its environment."""

    command: Sequence[str | Path]
    environment: Mapping[str, str]


class ContenderError(Exception):
    """Why a contender could not be measured, in a sentence."""


class Contestant:
    """A contender's processes. They run only within `start` and `turn`, and are stopped (SIGSTOP) otherwise.

    Those that do not bear it, because they miss each other's heartbeats, just wait: `is_stoppable` false.
    """

    def __init__(self, name: str, group: ProcessGroup, folder: Path, is_stoppable: bool = True) -> None:
        self.name, self.group, self.folder, self.is_stoppable = name, group, folder, is_stoppable
        self._names: list[str] = []  # of its processes in the group
        self._num_read = 0  # lines of its news

    def start(self, launches: Sequence[Launch]) -> None:
        """Starts the processes; returns when they are ready for their first turn."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (NEWS, GO):
            (self.folder / name).unlink(missing_ok=True)
        os.mkfifo(self.folder / GO)
        self._pipe = os.open(self.folder / GO, os.O_RDWR)
        for rank, launch in enumerate(launches):
            name = f"{self.name} rank {rank}"
            self.group.start(name, launch.command, launch.environment, self.folder / f"{rank}.log")
            self._names.append(name)
        list(self._news())

    def turn(self) -> list[tuple[str, float]]:
        """Lets it run until it is ready for its next turn, or has ended well; returns (model, samples per second).

        Raises ContenderError if one of its processes fails.
        """
        self.resume()
        os.write(self._pipe, b".")
        return list(self._news())

    def stop(self) -> None:
        """Stops its processes where they are."""
        if self.is_stoppable:
            for process in self._tree():
                process.suspend()

    def resume(self) -> None:
        for process in self._tree():
            process.resume()

    def _news(self) -> Iterator[tuple[str, float]]:
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            while time.monotonic() < deadline:
                ended = self._has_ended()
                for news in self._unread():
                    if "ready" in news:
                        return
                    yield news["model"], news["samples_per_s"]
                if ended:
                    return
                time.sleep(POLL_S)
            raise ContenderError(f"was not ready for a turn within {START_TIMEOUT_S:.0f} s: see {self.folder}/*.log")
        finally:
            self.stop()

    def _unread(self) -> list[dict[str, Any]]:
        path = self.folder / NEWS
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # whole ones
        unread, self._num_read = lines[self._num_read :], len(lines)
        return [json.loads(line) for line in unread]

    def _has_ended(self) -> bool:
        statuses = {name: self.group.processes[name].poll() for name in self._names}
        for name, status in statuses.items():
            if status:
                raise ContenderError(f"{name} ended with status {status}: see {self.folder}/*.log")
        return all(status == 0 for status in statuses.values())

    def _tree(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for name in self._names:
            try:
                parent = psutil.Process(self.group.processes[name].pid)
                found += [parent, *parent.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found


class Contest:
    """Contestants who take turns, and what they have come to."""

    def __init__(self, contestants: Sequence[Contestant], tell: Callable[[str], None]) -> None:
        self.contestants, self.tell = list(contestants), tell
        self.samples: dict[str, dict[str, list[float]]] = {c.name: {} for c in contestants}  # by model
        self.failures: dict[str, str] = {}  # why contenders failed; these have no further turns

    def start(self, contestant: Contestant, launches: Callable[[Path], Sequence[Launch]]) -> None:
        started = time.monotonic()
        with self._noting_failure(contestant):
            contestant.start(launches(contestant.folder))
            self.tell(f"{contestant.name} is ready after {time.monotonic() - started:.0f} s")

    def round(self, number: int) -> None:
        """One turn for each, beginning with another one in each round."""
        first = number % len(self.contestants)
        for contestant in (*self.contestants[first:], *self.contestants[:first]):
            if contestant.name not in self.failures:
                with self._noting_failure(contestant):
                    for model, figure in contestant.turn():
                        self.samples[contestant.name].setdefault(model, []).append(figure)

    @contextmanager
    def _noting_failure(self, contestant: Contestant) -> Iterator[None]:
        try:
            yield
        except ContenderError as error:
            self.failures[contestant.name] = str(error)
            self.tell(f"{contestant.name} FAILED: {error}")


def run_contest(
    launches: Mapping[str, Callable[[Path], Sequence[Launch]]],
    models: Sequence[str],
    num_slices: int,
    folder: Path,
    tell: Callable[[str], None],
    unstoppable: Sequence[str] = (),
) -> Contest:
    """Lets all contenders measure `num_slices` slices of each model, by turns.

    `launches` gives the processes of a contender, which report to the folder that they are told.
    """
    with ProcessGroup() as group:
        contest = Contest([Contestant(n, group, folder / n, n not in unstoppable) for n in launches], tell)
        try:
            for contestant in contest.contestants:
                contest.start(contestant, launches[contestant.name])
            for model in models:
                started = time.monotonic()
                for number in range(num_slices):
                    contest.round(number)
                tell(f"{model}: {num_slices} slices of each in {time.monotonic() - started:.0f} s")
        finally:
            for contestant in contest.contestants:
                contestant.resume()  # a stopped process would not hear that it is to end
    return contest
