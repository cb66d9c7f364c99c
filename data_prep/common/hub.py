"""Hugging Face Hub: uploads, data folders used from there, and retries of network requests."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_prep.common.command_line import UserError, cache_problem, first_line, redact

T = TypeVar("T")
PREFIX = "hf://datasets/"
_DELAYS = (1, 4, 16)  # seconds before another attempt
_TIMEOUT = 60.0  # seconds without an answer
_PROXIES = ("all_proxy", "http_proxy", "https_proxy", "no_proxy")
_NEW_TOKEN = "make one that may write at https://huggingface.co/settings/tokens, then: hf auth login, or HF_TOKEN"
_REFUSALS = {
    401: f"the Hub does not know the token; {_NEW_TOKEN}",
    403: f"the token may not write there; {_NEW_TOKEN}",
}


def repository_problem(option: str, repository: str) -> str | None:
    """Returns why a repository cannot be written to, as far as that is known without asking the Hub, or None."""
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        return f"{option}={repository!r}: {first_line(error)}"
    if "/" not in repository:
        return f"{option}={repository!r} is not of the form USER/NAME"
    if is_offline_mode():
        return f"{option}={repository!r} cannot work with HF_HUB_OFFLINE=1; unset it"
    if get_token() is None:
        return f"{option}={repository!r} needs a token that may write; hf auth login, or HF_TOKEN"
    return None


def is_on_hub(name: str) -> bool:
    """Whether a data folder is on the Hub, as in `hf://datasets/USER/NAME`."""
    return name.startswith(PREFIX)


def local_folder(name: str, download: bool = True) -> Path:
    """Returns a local data folder, or the local copy of `hf://datasets/USER/NAME[@REVISION]`.

    Args:
        download: download missing files.

    Raises:
        UserError: for an invalid name, a failed download, or a missing copy.
    """
    if not is_on_hub(name):
        return Path(name)
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1:
        raise UserError(f"{name!r} is not of the form {PREFIX}USER/NAME or {PREFIX}USER/NAME@REVISION")
    return Path(Hub(repository, "dataset").snapshot(revision or None, download))


def limit_waiting() -> None:
    """Sets a timeout for requests to the Hub; by default they wait forever.

    Raises:
        UserError: for values of the environment with which no request can be made.
    """
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return
    if not constants.ENDPOINT.startswith(("http://", "https://")):
        raise UserError(f"HF_ENDPOINT={constants.ENDPOINT!r} does not begin with https://; correct or unset it")
    try:
        get_session().timeout = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", _TIMEOUT))
    except Exception as error:  # of several types
        read = ("ssl_cert_file", "ssl_cert_dir") if isinstance(error, OSError) else _PROXIES
        given = ", ".join(f"{name}={value!r}" for name, value in os.environ.items() if name.lower() in read)
        text = f"no request to the Hub can be made with {given}: {first_line(error)}; correct or unset it"
        raise UserError(redact(text)) from error


class Retries:
    """Waits before another attempt, or raises a one-line error.

    tenacity repeats one call; here a stream continues from its last block, and each block that arrives resets the
    count. huggingface_hub repeats some of its requests, but not those that create repositories and tags; fsspec none.

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
    """HTTP status of an error or its causes; None if there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later. Types are compared by name, since fsspec uses many network
    libraries."""
    if (status := status_of(error)) is not None:
        return status >= 500 or status in (408, 429)
    names = {cls.__name__ for cls in type(error).__mro__}
    if "OfflineModeIsEnabled" in names:
        return False
    if names & {"ConnectionError", "TimeoutError", "TransportError", "ClientError"}:
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)


class Hub:
    """A repository on the Hub. Transient failures are retried.

    Args:
        repository: `USER/NAME`.
        kind: `model` or `dataset`.
    """

    def __init__(self, repository: str, kind: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self.api, self.repository, self.kind = HfApi(), repository, kind
        self._address: dict[str, Any] = {"repo_id": repository, "repo_type": kind}

    def create(self, private: bool) -> None:
        """Creates the repository if it does not exist."""
        self._try(lambda: self.api.create_repo(**self._address, private=private or None, exist_ok=True))

    def upload(self, files: dict[str, Path | bytes], message: str, tag: str | None = None) -> str:
        """Uploads files, keyed by their names in the repository, as one commit; returns its URL."""
        from huggingface_hub import CommitOperationAdd

        def commit() -> Any:
            additions = [CommitOperationAdd(name, content) for name, content in files.items()]  # usable only once
            return self.api.create_commit(**self._address, operations=additions, commit_message=message)

        done = self._try(commit)
        if tag is not None:
            self._try(lambda: self._tag(tag, done.oid))
        return done.commit_url

    def snapshot(self, revision: str | None, download: bool) -> str:
        """Returns the local folder with all files of a revision; downloads missing ones."""
        options = self._address | {"revision": revision, "local_files_only": not download}
        return self._try(lambda: self.api.snapshot_download(**options))

    def check_access(self) -> None:
        """Checks write access to the repository, or to its owner's account if it does not exist yet (`UserError`)."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            self._try(lambda: self.api.auth_check(**self._address, write=True))
            return
        except UserError as error:
            if not isinstance(error.__cause__, RepositoryNotFoundError):
                raise
        about = self._try(self.api.whoami)
        owner = self.repository.partition("/")[0]
        names = [about["name"], *(org["name"] for org in about.get("orgs", ()))]
        if owner not in names:
            raise UserError(f"{self.repository}: the token is that of {names[0]}, who may write to {', '.join(names)}")
        if about.get("auth", {}).get("accessToken", {}).get("role") == "read":  # others than access tokens have none
            raise UserError(f"{self.repository}: the token may only read; {_NEW_TOKEN}")

    def _tag(self, name: str, commit: str) -> None:
        tags = {tag.name: tag.target_commit for tag in self.api.list_repo_refs(**self._address).tags}
        if name in tags and tags[name] != commit:  # from before the run was rolled back
            self.api.delete_tag(**self._address, tag=name)
            del tags[name]
        if name not in tags:
            self.api.create_tag(**self._address, tag=name, revision=commit)

    def _try(self, request: Callable[[], T]) -> T:
        from huggingface_hub.errors import RepositoryNotFoundError

        retries = Retries(_DELAYS, "the same command tries again")
        while True:
            limit_waiting()
            try:
                return request()
            except (LookupError, TypeError, AttributeError):  # programming errors
                raise
            except RepositoryNotFoundError as error:  # status 401 as well as 404
                text = f"{self.repository}: not found on the Hub, or you lack access"
                raise UserError(text) from error
            except Exception as error:  # of several libraries
                if refusal := _REFUSALS.get(status_of(error) or 0):
                    raise UserError(f"{self.repository}: {refusal}") from error
                retries.wait(self.repository, error)
