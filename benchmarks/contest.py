"""Interleaves contenders (turns.py): starts all, lets one run at a time, collects their figures."""

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

# Until the first turn, and between two turns: a model is built, traced and warmed up.
START_TIMEOUT_S = 300.0
POLL_S = 0.02


@dataclass(frozen=True)
class Launch:
    """One process of a contender: its command, and its environment."""

    command: Sequence[str | Path]
    environment: Mapping[str, str]


class ContenderError(Exception):
    """The reason why a contender could not be measured, in a sentence."""


class Contestant:
    """A contender's processes, which run only within `start` and `turn`.

    Otherwise they are stopped (SIGSTOP). Those that would miss each other's heartbeats just wait:
    `is_stoppable` false.
    """

    def __init__(
        self, name: str, group: ProcessGroup, folder: Path, is_stoppable: bool = True
    ) -> None:
        self.name = name
        self.group = group
        self.folder = folder
        self.is_stoppable = is_stoppable
        self._names: list[str] = []  # of its processes in the group
        self._num_read = 0  # lines of its reports

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
        """Lets it run until it is ready for its next turn, or has ended with success.

        Returns (model, samples per second) of each slice. Raises ContenderError if one of its
        processes fails.
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
            raise ContenderError(
                f"was not ready for a turn within {START_TIMEOUT_S:.0f} s: see {self.folder}/*.log"
            )
        finally:
            self.stop()

    def _unread(self) -> list[dict[str, Any]]:
        path = self.folder / NEWS
        if not path.is_file():
            return []
        whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        unread = whole_lines[self._num_read :]
        self._num_read = len(whole_lines)
        return [json.loads(line) for line in unread]

    def _has_ended(self) -> bool:
        statuses = {name: self.group.processes[name].poll() for name in self._names}
        for name, status in statuses.items():
            if status:
                raise ContenderError(f"{name} ended with status {status}: see {self.folder}/*.log")
        return all(status == 0 for status in statuses.values())

    def _tree(self) -> list[psutil.Process]:
        processes: list[psutil.Process] = []
        for name in self._names:
            try:
                parent = psutil.Process(self.group.processes[name].pid)
                processes += [parent, *parent.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return processes


class Contest:
    """Interleaved contestants, and their figures so far.

    samples: by contender and model. failures: the reasons of those that failed, which have no
    further turns.
    """

    def __init__(self, contestants: Sequence[Contestant], log: Callable[[str], None]) -> None:
        self.contestants = list(contestants)
        self.log = log
        self.samples: dict[str, dict[str, list[float]]] = {c.name: {} for c in contestants}
        self.failures: dict[str, str] = {}

    def start(self, contestant: Contestant, launches: Callable[[Path], Sequence[Launch]]) -> None:
        started = time.monotonic()
        with self._noting_failure(contestant):
            contestant.start(launches(contestant.folder))
            self.log(f"{contestant.name} is ready after {time.monotonic() - started:.0f} s")

    def round(self, number: int) -> None:
        """Gives one turn to each, beginning with another one in each round."""
        first = number % len(self.contestants)
        for contestant in (*self.contestants[first:], *self.contestants[:first]):
            if contestant.name in self.failures:
                continue
            samples = self.samples[contestant.name]
            with self._noting_failure(contestant):
                for model, figure in contestant.turn():
                    samples.setdefault(model, []).append(figure)

    @contextmanager
    def _noting_failure(self, contestant: Contestant) -> Iterator[None]:
        try:
            yield
        except ContenderError as error:
            self.failures[contestant.name] = str(error)
            self.log(f"{contestant.name} FAILED: {error}")


def run_contest(
    launches: Mapping[str, Callable[[Path], Sequence[Launch]]],
    models: Sequence[str],
    num_slices: int,
    folder: Path,
    log: Callable[[str], None],
    unstoppable: Sequence[str] = (),
) -> Contest:
    """Interleaves all contenders until each has measured `num_slices` slices of each model.

    `launches` returns the processes of a contender, which report to the folder that it is given.
    """
    with ProcessGroup() as group:
        contestants = [
            Contestant(name, group, folder / name, is_stoppable=name not in unstoppable)
            for name in launches
        ]
        contest = Contest(contestants, log)
        try:
            for contestant in contest.contestants:
                contest.start(contestant, launches[contestant.name])
            for model in models:
                started = time.monotonic()
                for number in range(num_slices):
                    contest.round(number)
                seconds = time.monotonic() - started
                log(f"{model}: {num_slices} slices of each in {seconds:.0f} s")
        finally:
            for contestant in contest.contestants:
                contestant.resume()  # a stopped process would not get the signal to end
    return contest
