"""The note of the task that a worker has in hand, for whoever answers in its place if it dies."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TaskFile:
    """A file with the token and the message of a task, never there in part, for its owner's eyes.

    The token is the right to answer the task.
    """

    path: Path

    def write(self, token: str, message: bytes = b"") -> None:
        """Notes the task: its token first, and again with its message as soon as it has come."""
        temporary = self.path.with_suffix(".partial")
        temporary.touch(mode=0o600)
        note = json.dumps({"token": token, "message": message.hex()})
        temporary.write_text(note, encoding="utf-8")
        temporary.replace(self.path)

    def read(self) -> tuple[str, bytes] | None:
        """The token and the message (empty if it had not come); None if there is no task."""
        if not self.path.exists():
            return None
        note = json.loads(self.path.read_text(encoding="utf-8"))
        return note["token"], bytes.fromhex(note["message"])

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
