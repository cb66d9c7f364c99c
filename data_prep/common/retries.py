"""Retries of network requests.

tenacity repeats one call; here a stream continues from its last block, and each block that arrives resets the count.
huggingface_hub repeats some of its requests, but not those that create repositories and tags; fsspec's HTTP none.
"""

import sys
import time
from collections.abc import Sequence

from data_prep.common.command_line import UserError, cache_problem, redact


class Retries:
    """Waits before another attempt, or raises a one-line error.

    Attributes:
        delays: seconds before each new attempt.
        remedy: advice for the user after the last attempt.
        failures: number of failures in a row; callers set it to 0 after a success.
    """

    def __init__(self, delays: Sequence[float], remedy: str) -> None:
        self.delays, self.remedy, self.failures = delays, remedy, 0

    def wait(self, where: str, error: BaseException) -> None:
        """Waits until the next attempt (`UserError` for an error that is permanent, or if no delays are left)."""
        text = cache_problem(error) or " ".join(str(error).split()) or type(error).__name__
        where, reason = redact(where), redact(text)
        if not is_transient(error):
            raise UserError(f"{where}: {reason}") from error
        self.failures += 1
        if self.failures > len(self.delays):
            text = f"{where}: the network fails ({reason}), {self.failures} times in a row; {self.remedy}"
            raise UserError(text) from error
        delay = self.delays[self.failures - 1]
        print(f"{where}: {reason}; attempt {self.failures + 1} in {delay} s", file=sys.stderr, flush=True)
        time.sleep(delay)


def status_of(error: BaseException | None) -> int | None:
    """HTTP status of an error or of one of its causes; None without one."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later. Types are compared by name: fsspec uses many network libraries."""
    if (status := status_of(error)) is not None:
        return status >= 500 or status in (408, 429)
    names = {cls.__name__ for cls in type(error).__mro__}
    if "OfflineModeIsEnabled" in names:
        return False
    if names & {"ConnectionError", "TimeoutError", "TransportError", "ClientError"}:
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)
