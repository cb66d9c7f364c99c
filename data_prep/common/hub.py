"""Repositories on the Hub: what is uploaded to them, and data folders that are used from there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from data_prep.common.command_line import UserError, first_line
from data_prep.common.retries import Retries, status_of

T = TypeVar("T")
PREFIX = "hf://datasets/"
_DELAYS = (1, 4, 16)  # seconds before another attempt; the Hub's client itself repeats most requests before
_TIMEOUT = 60.0  # seconds without a sign of life
_NEW_TOKEN = "make one that may write at https://huggingface.co/settings/tokens, then: hf auth login, or HF_TOKEN"
_REFUSALS = {
    401: f"the Hub does not know the token; {_NEW_TOKEN}",
    403: f"the token may not write there; {_NEW_TOKEN}",
}


def repository_problem(option: str, repository: str) -> str | None:
    """What keeps a repository from being written to, as far as can be known without the Hub; None for nothing."""
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
    """Whether a data folder's name is that of one on the Hub, as in `hf://datasets/USER/NAME`."""
    return name.startswith(PREFIX)


def local_folder(name: str, download: bool = True) -> Path:
    """A data folder: the one of this name, or where the one of `hf://datasets/USER/NAME[@REVISION]` is kept.

    Args:
        download: what of it is not kept yet.

    Raises:
        UserError: for a name that is none, and for one that cannot be downloaded, or is not kept.
    """
    if not is_on_hub(name):
        return Path(name)
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1:
        raise UserError(f"{name!r} is not of the form {PREFIX}USER/NAME or {PREFIX}USER/NAME@REVISION")
    hub = Hub(repository, "dataset")
    return Path(hub.snapshot(revision or None, download))


class Hub:
    """A repository on the Hub; what fails for the moment is tried again.

    Args:
        repository: `USER/NAME`.
        kind: `model` or `dataset`.
    """

    def __init__(self, repository: str, kind: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self.api, self.where = HfApi(), {"repo_id": repository, "repo_type": kind}
        self.repository = repository

    def create(self, private: bool) -> None:
        """Make the repository, if it is not there yet."""
        self._try(lambda: self.api.create_repo(**self.where, private=private or None, exist_ok=True))

    def upload(self, files: dict[str, Path | bytes], message: str, tag: str | None = None) -> str:
        """Upload files, by their names there, as one commit of what is not there yet: its address."""
        from huggingface_hub import CommitOperationAdd

        def commit() -> Any:
            additions = [CommitOperationAdd(name, content) for name, content in files.items()]  # good for one attempt
            return self.api.create_commit(**self.where, operations=additions, commit_message=message)

        done = self._try(commit)
        if tag is not None:
            self._try(lambda: self._tag(tag, done.oid))
        return done.commit_url

    def snapshot(self, revision: str | None, download: bool) -> str:
        """Where all files of a revision are kept, the missing ones downloaded."""
        return self._try(
            lambda: self.api.snapshot_download(**self.where, revision=revision, local_files_only=not download)
        )

    def check_access(self) -> None:
        """See that the repository, or if it is not there its owner's account, may be written to.

        Raises:
            UserError: if not.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            self._try(lambda: self.api.auth_check(**self.where, write=True))
            return
        except UserError as error:
            if not isinstance(error.__cause__, RepositoryNotFoundError):
                raise
        about = self._try(self.api.whoami)
        owner, names = self.repository.partition("/")[0], [about["name"], *(org["name"] for org in about["orgs"])]
        if owner not in names:
            raise UserError(f"{self.repository}: the token is that of {names[0]}, who may write to {', '.join(names)}")
        if about["auth"]["accessToken"]["role"] == "read":
            raise UserError(f"{self.repository}: the token may only read; {_NEW_TOKEN}")

    def _tag(self, name: str, commit: str) -> None:
        tags = {tag.name: tag.target_commit for tag in self.api.list_repo_refs(**self.where).tags}
        if name in tags and tags[name] != commit:  # of what the run was before it went back
            self.api.delete_tag(**self.where, tag=name)
            del tags[name]
        if name not in tags:
            self.api.create_tag(**self.where, tag=name, revision=commit)

    def _try(self, request: Callable[[], T]) -> T:
        from huggingface_hub import get_session
        from huggingface_hub.errors import RepositoryNotFoundError

        retries = Retries(_DELAYS, "nothing is lost")
        while True:
            # It would wait for ever by itself.
            get_session().timeout = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", _TIMEOUT))
            try:
                return request()
            except (LookupError, TypeError, AttributeError):  # mistakes, not failures
                raise
            except RepositoryNotFoundError as error:  # for which the Hub answers 401 as well as 404
                kind = self.where["repo_type"]
                raise UserError(f"{self.repository}: no such {kind} on the Hub, or one that is not for you") from error
            except Exception as error:  # of several libraries
                if refusal := _REFUSALS.get(status_of(error)):
                    raise UserError(f"{self.repository}: {refusal}") from error
                retries.wait(self.repository, error)
