"""The three ways Afterclick fails, and who must act.

    AfterclickError
    ├── ConfigError        an operator must act: wrong address, setting, topic, device
    ├── ContractError      bytes broke a promise: a click, an item, a record, a release
    └── UnavailableError   Kafka, Redis or a disk is away: retry within bounds, then degrade

A message reads `where: what was expected, what came, what to do`. It quotes values and never holds
user data beyond an id, nor a secret.
"""

import msgspec

BAD_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises on bytes that are not JSON of the type asked for."""


class AfterclickError(Exception):
    """Root of every error raised on purpose by this project."""

    exit_code = 1
    """What a command exits with when this error ends it."""


class ConfigError(AfterclickError):
    """An operator must change something before this can run."""

    exit_code = 2


class ContractError(AfterclickError):
    """Bytes from outside broke a written contract.

    Args:
        message: where, expectation, value, remedy.
        reason: a short, stable label for counters and dead-letter headers.
    """

    exit_code = 1

    def __init__(self, message: str, *, reason: str = "contract") -> None:
        super().__init__(message)
        self.reason = reason


class UnavailableError(AfterclickError):
    """Something outside did not answer in time; trying again later may succeed."""

    exit_code = 3
