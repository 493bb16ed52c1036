"""The state that a silo keeps from round to round, safe against lost, late and repeated answers.

A silo cannot know whether the server used its answer. So what training leaves is a proposal, and
the next task, which says the last round that the server acknowledged, commits it or drops it:

| the next task acknowledges | training goes on from |
|---|---|
| the round that was proposed last | its state, committed thereby |
| an earlier round: the answer was lost or late, or the task is repeated | the committed state |
| round 0: the server used no answer yet | no state |
| a round whose state is not here, while others are | none: ValueError |
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from shared.state import NO_STATE, State, load_state, save_state

MAX_RUNS = 8  # whose states are kept


@dataclass(frozen=True)
class StateStore:
    """The states of a silo's runs: a folder for each, with a file `round-N.npz` for the committed
    round and one for the proposed.

    Methods without state leave no file. Whenever the process dies, the next one goes on as if it
    had not: files are replaced whole, a commit is the removal of all others, and both can be
    repeated.
    """

    folder: Path | None  # None: nowhere

    def load(self, run: str, acknowledged_round: int) -> State:
        """Returns the state after the acknowledged round and drops all others (table above)."""
        if self.folder is None:
            return NO_STATE
        kept = self._file(run, acknowledged_round)
        dropped = [path for path in self._files(run) if path != kept]
        if dropped and acknowledged_round > 0 and not kept.exists():
            rounds = sorted(_round_of(path) for path in dropped)
            raise ValueError(
                "A silo goes on from its state after the round that the server acknowledged,"
                f" {acknowledged_round}; it keeps those of {rounds}. Resume the run from its newest"
                " checkpoint, or begin another."
            )
        for path in dropped:
            path.unlink()
        return load_state(kept) if kept.exists() else NO_STATE

    def propose(self, run: str, round_number: int, state: State) -> None:
        """Writes the state after a round, to be committed when the server acknowledges it.

        A method proposes a state in every round or in none.
        """
        if not state:
            return
        if self.folder is None:
            raise ValueError(
                "This experiment's method keeps state at the silo; received a silo without a place"
                " for it. Start the silo with python -m fl_app.silo, or add state = a folder to its"
                " node config."
            )
        file = self._file(run, round_number)
        if not file.parent.exists():
            file.parent.mkdir(parents=True)
            self._forget_old_runs()
        save_state(file, state)

    def _files(self, run: str) -> list[Path]:
        return sorted(self._run_folder(run).glob("round-*.npz"))

    def _file(self, run: str, round_number: int) -> Path:
        return self._run_folder(run) / f"round-{round_number}.npz"

    def _run_folder(self, run: str) -> Path:
        """The folder of a run, whose name comes from the server: no path of its choice."""
        assert self.folder is not None
        return self.folder / hashlib.sha256(run.encode()).hexdigest()[:32]

    def _forget_old_runs(self) -> None:
        assert self.folder is not None
        by_age = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in by_age[:-MAX_RUNS]:
            shutil.rmtree(path, ignore_errors=True)


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
