"""Upload a packed checkpoint: what can fail is tried before the work, and the upload is one commit or nothing."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, validate_repo_id

from optimum_sab.errors import ConfigError, OutputError
from optimum_sab.hf.hub.authorship import CARD, keeps
from optimum_sab.hf.hub.card import named
from optimum_sab.hf.output.members import is_weights
from optimum_sab.hf.output.place import content_of

_REMEDY = "log in with `hf auth login`, or give a token that may write (HF_TOKEN, --token)"


@dataclass(frozen=True)
class PushTarget:
    """A repository that may be written to.

    Attributes:
        repo_id: with its namespace.
        token: as it was given; None for the one of this machine.
    """

    repo_id: str
    token: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Where a person finds it."""
        return f"{constants.ENDPOINT}/{self.repo_id}"


def check_push(
    repo_id: str, private: bool = False, token: str | None = None, sources: Iterable[str] = ()
) -> PushTarget:
    """Find out whether a repository can be written to, now instead of after the work.

    A repository that does not exist is made, which is the one way to know that it can be; it stays empty until the
    upload. One that exists is asked whether a file may be uploaded, which changes nothing.

    Args:
        repo_id: as ``NAMESPACE/NAME``; ``NAME`` alone is in the namespace of the token's user.
        private: make it private; one that exists has to be.
        token: of the Hub; None takes the one of this machine.
        sources: what is read for the checkpoint, none of which may be this repository.

    Raises:
        ConfigError: the name is none, the Hub cannot be reached, the token is missing or invalid, it may not
            write there, or the repository is public and ``private`` was asked for.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ConfigError(f"{repo_id!r} is no name of a repository; give NAMESPACE/NAME ({error}).") from error
    api = HfApi(token=token)
    user = _user(api)
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    if repo_id in sources:
        raise ConfigError(f"{repo_id!r} is the repository that is read from; name another one to push to.")
    try:
        found = api.model_info(repo_id)
    except RepositoryNotFoundError:
        _create(api, repo_id, private)
    except Exception as error:
        raise _refusal(error, f"{repo_id!r} cannot be looked up") from error
    else:
        if private and not found.private:
            raise ConfigError(
                f"{repo_id!r} exists and is public, so --private would not hold; make it private in its settings, or "
                "name another one."
            )
    target = PushTarget(repo_id, token)
    try:
        api.preupload_lfs_files(repo_id, [CommitOperationAdd(CARD, b"-")])  # asks how, and needs the right to
    except Exception as error:
        raise _refusal(error, f"{repo_id!r} cannot be written to") from error
    return target


def push_folder(folder: Path, target: PushTarget, message: str = "Upload packed model") -> str:
    """Upload a folder in one commit: a reader finds all of it or what was there before.

    Weights of another model in the repository's top folder go with the same commit, and a card that somebody has
    written there stays.

    Args:
        folder: of the finished checkpoint; it stays as it is.
        target: from `check_push`.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        OutputError: the upload failed; says where the checkpoint is, and how to upload it.
        KeyboardInterrupt: it was interrupted; says the same.
    """
    api = HfApi(token=target.token)
    try:
        files = _files_of(folder)
        there = api.list_repo_files(target.repo_id)
        if CARD in there and _is_kept(api, target):
            files.pop(CARD, None)
        if CARD in files:
            files[CARD] = _card_of(folder, target)
        stale = [name for name in there if is_weights(name) and name not in files]
        operations = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, path) for name, path in files.items()]
        # not `upload_folder`, which with hf_xet makes several commits of a long upload
        return str(api.create_commit(target.repo_id, operations, commit_message=message).commit_url)
    except Exception as error:
        raise OutputError(
            f"the upload to {target.repo_id!r} failed ({_reason(error)}). The {_left(folder, target)}"
        ) from error
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(
            f"the upload to {target.repo_id!r} did not come to its end. The {_left(folder, target)}"
        ) from stopped


def _left(folder: Path, target: PushTarget) -> str:
    """Where everything is when it was not uploaded, and how it still can be."""
    command = shlex.join(["hf", "upload", target.repo_id, str(folder)])
    return f"checkpoint is finished and lies in {str(folder)!r}; upload it with: {command}"


def _card_of(folder: Path, target: PushTarget) -> bytes:
    """The folder's card; one of ours says where it lies."""
    content = (folder / CARD).read_bytes()
    if keeps(folder / CARD):
        return content
    return str(named(ModelCard(content.decode()), target.repo_id)).encode()


def _files_of(folder: Path) -> dict[str, str | bytes]:
    """What lies in a folder and below, by its name in the repository; nothing hidden."""
    found: dict[str, str | bytes] = {}
    for top in content_of(folder):
        for path in [top] if top.is_file() else top.rglob("*"):
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                found[name.as_posix()] = os.fspath(path)
    return dict(sorted(found.items()))


def _is_kept(api: HfApi, target: PushTarget) -> bool:
    """Whether somebody has written the repository's card."""
    try:
        path = api.hf_hub_download(target.repo_id, CARD)
    except EntryNotFoundError:
        return False
    return keeps(Path(path))


def _user(api: HfApi) -> str:
    try:
        found = api.whoami()
    except Exception as error:
        if isinstance(error, LocalTokenNotFoundError):
            what = "there is no token for the Hub"
        elif _status(error) in (401, 403):
            what = "the token for the Hub is refused"
        else:
            what = "the Hub cannot be asked whose the token is"
        raise _refusal(error, what) from error
    role = found.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConfigError(f"the token of {found['name']!r} may only read; {_REMEDY}.")
    return str(found["name"])


def _create(api: HfApi, repo_id: str, private: bool) -> None:
    try:
        api.create_repo(repo_id, private=private or None)
    except Exception as error:
        raise _refusal(error, f"{repo_id!r} does not exist and cannot be made") from error


def _refusal(error: Exception, what: str) -> ConfigError:
    status = _status(error)
    reachable = isinstance(error, (HfHubHTTPError, LocalTokenNotFoundError))
    remedy = _REMEDY if reachable and status in (None, 401, 403, 404) else "see whether the Hub is reached from here"
    return ConfigError(f"{what} ({_reason(error)}); {remedy}.")


def _reason(error: Exception) -> str:
    """The first line, where the Hub's errors have their point, and that of what caused it; without the full stop."""
    if isinstance(error.__cause__, Exception):
        return f"{_said(error)}: {_said(error.__cause__)}"
    return _said(error)


def _status(error: Exception) -> int | None:
    """Of the Hub's answer; None where there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _said(error: Exception) -> str:
    status = _status(error)
    said = getattr(error, "server_message", None) or next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"{status}: {said}".rstrip(".") if status is not None and str(status) not in said else said.rstrip(".")
