"""A network that fails now and then."""

import sys
import time
from collections.abc import Sequence

from data_prep.common.command_line import UserError, redact


class Retries:
    """What to do about an error: wait and try again, or give up in one line.

    Attributes:
        delays: seconds to wait before each new attempt.
        remedy: what the user can do once they are used up.
        failures: so many in a row; whoever gets through sets it to 0.
    """

    def __init__(self, delays: Sequence[float], remedy: str) -> None:
        self.delays, self.remedy = delays, remedy
        self.failures = 0

    def wait(self, where: str, error: BaseException) -> None:
        """Return when it is time for another attempt.

        Raises:
            UserError: for an error that another attempt cannot mend, and where all delays are used up.
        """
        reason = redact(" ".join(str(error).split()) or type(error).__name__)
        where = redact(where)
        if not is_transient(error):
            raise UserError(f"{where}: {reason}") from error
        if self.failures == len(self.delays):
            raise UserError(
                f"{where}: the network fails ({reason}), {self.failures + 1} times in a row; {self.remedy}"
            ) from error
        delay = self.delays[self.failures]
        self.failures += 1
        print(f"{where}: {reason}; attempt {self.failures + 1} in {delay} s", file=sys.stderr, flush=True)
        time.sleep(delay)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error; None where there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later. By name: the network libraries of fsspec's protocols are many."""
    if (status := status_of(error)) is not None:
        return status >= 500 or status in (408, 429)
    names = {cls.__name__ for cls in type(error).__mro__}
    if "OfflineModeIsEnabled" in names:
        return False
    if names & {"ConnectionError", "TimeoutError", "TransportError", "ClientError"}:
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)
