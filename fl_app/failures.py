"""What can go wrong in a federation, side by side.

| name | where | meaning | ends |
|---|---|---|---|
| refusal | a silo's message | it does not do this task, for a reason | the task |
| `SiloFailure` | raised at a silo | such a reason; becomes a refusal | the task |
| `MessageError` | raised on either side | the other's message is garbled, or absurd | the task |
| `Failure` | value at the server | no answer: refused, lost, late, garbled | the silo's part |
| `QuorumError` | raised at the server | a round has too few results | the round, or its attempt |
| `FederationError` | raised at the server | the federation cannot go on | the run; resume it |

Any other exception at a silo becomes a refusal with a fixed sentence: its text may quote data.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """The reason why a silo gave no answer; `is_disconnected` if it may answer once it is back."""

    reason: str
    is_disconnected: bool = False


class SiloFailure(Exception):
    """A silo could not do its work. The text may leave it: it holds nothing of its data."""


class MessageError(ValueError):
    """Another party's message cannot be used. The text quotes that message and nothing else."""


class FederationError(Exception):
    """The federation cannot go on; the checkpoint of the last round stays, to resume from."""


class QuorumError(FederationError):
    """A round has too few results. `failures` holds the silos that gave none."""

    def __init__(self, message: str, failures: Mapping[str, Failure]) -> None:
        super().__init__(message)
        self.failures = failures
