"""A note of the task that a worker has in hand, for whoever must answer in its place if it dies."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TaskFile:
    path: Path

    def write(self, token: str, message: bytes = b"") -> None:
        """The task's token, which is the right to answer, and its message as soon as it is known."""
        temporary = self.path.with_suffix(".partial")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps({"token": token, "message": message.hex()}), encoding="utf-8")
        temporary.replace(self.path)

    def read(self) -> tuple[str, bytes] | None:
        """The token and the message in hand, which is empty if it had not come yet; None if there is no task."""
        if not self.path.exists():
            return None
        noted = json.loads(self.path.read_text(encoding="utf-8"))
        return noted["token"], bytes.fromhex(noted["message"])

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
